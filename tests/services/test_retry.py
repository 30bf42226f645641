"""The retry policy: when to try again, how long to wait, and when to give up."""

from __future__ import annotations

import random

import grpc
import pytest
from clocks import FakeTime
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2
from rpc_errors import AnyError, tree

from secagg.errors import (
    ExpiredCertificateError,
    IdentityError,
    NotReadyError,
    OverloadedError,
    SecaggError,
    StorageError,
    UnavailableError,
)
from secagg.rpc.retry import RetryPolicy
from secagg.rpc.status import DOMAIN, to_status


def failed(kind: type[SecaggError]) -> AnyError:
    status = to_status(kind("text"))
    return AnyError(grpc.StatusCode[kind.status], status)


def not_ready(delay: Duration) -> AnyError:
    status = status_pb2.Status(code=code_pb2.UNAVAILABLE, message="text")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="NOT_READY", domain=DOMAIN))
    status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return AnyError(grpc.StatusCode.UNAVAILABLE, status)


class Script:
    """Fails as told, then answers; every call takes some fake time."""

    def __init__(self, time: FakeTime, *errors: grpc.RpcError, seconds: float = 0.0) -> None:
        self.calls = 0
        self._time, self._errors, self._seconds = time, list(errors), seconds

    def __call__(self) -> str:
        self.calls += 1
        self._time.now += self._seconds
        if self._errors:
            raise self._errors.pop(0)
        return "answer"


def policy(time: FakeTime, **changes: float) -> RetryPolicy:
    return RetryPolicy(sleep=time.sleep, clock=time.clock, **changes)


def steady(monkeypatch: pytest.MonkeyPatch, at: float = 0.5) -> None:
    """Jitter at one place of its range."""
    monkeypatch.setattr(random, "uniform", lambda low, high: low + at * (high - low))


def test_a_call_that_succeeds_is_made_once_and_does_not_wait() -> None:
    time = FakeTime()
    script = Script(time)
    assert policy(time).call(script) == "answer"
    assert (script.calls, time.sleeps) == (1, [])


def test_waits_double_up_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    steady(monkeypatch)
    time = FakeTime()
    script = Script(time, *[failed(UnavailableError)] * 7)
    policy(time, initial_s=0.1, longest_s=1.0, total_s=60).call(script)
    assert time.sleeps == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0])


@pytest.mark.parametrize(("place", "factor"), [(0.0, 0.75), (1.0, 1.25)])
def test_jitter_is_at_most_a_quarter(
    place: float, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    steady(monkeypatch, place)
    time = FakeTime()
    policy(time, initial_s=1.0).call(Script(time, failed(UnavailableError)))
    assert time.sleeps == pytest.approx([factor])


def test_jitter_spreads_the_waits() -> None:
    time = FakeTime()
    for _ in range(50):
        policy(time, initial_s=1.0).call(Script(time, failed(UnavailableError)))
    assert all(0.75 <= wait <= 1.25 for wait in time.sleeps)
    assert len(set(time.sleeps)) > 40


def test_an_unreachable_server_is_given_up_after_the_total() -> None:
    time = FakeTime()
    script = Script(time, *[failed(UnavailableError)] * 1000)
    with pytest.raises(UnavailableError):
        policy(time, initial_s=0.1, longest_s=5.0, total_s=60).call(script)
    assert 60 <= time.now <= 60 + 5 * 1.25
    assert script.calls >= 60 / (5 * 1.25)


def test_calls_that_hang_count_towards_the_total() -> None:
    time = FakeTime()
    script = Script(time, *[AnyError(grpc.StatusCode.DEADLINE_EXCEEDED)] * 1000, seconds=30)
    with pytest.raises(UnavailableError):
        policy(time, total_s=60).call(script)
    assert time.now <= 60 + 30 + 5 * 1.25


PASSING = (NotReadyError, OverloadedError, UnavailableError, StorageError)


@pytest.mark.parametrize(
    "kind", [kind for kind in tree() if kind not in PASSING], ids=lambda kind: kind.reason
)
def test_a_permanent_error_is_raised_at_once(kind: type[SecaggError]) -> None:
    time = FakeTime()
    script = Script(time, failed(kind))
    with pytest.raises(kind) as caught:
        policy(time).call(script)
    assert type(caught.value) is kind
    assert (script.calls, time.sleeps) == (1, [])


def test_not_ready_is_waited_for_beyond_the_total() -> None:
    time = FakeTime()
    script = Script(time, *[failed(NotReadyError)] * 2000)
    assert policy(time, total_s=5).call(script) == "answer"
    assert time.now > 100


def test_the_wait_that_the_server_asks_for_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    steady(monkeypatch)
    time = FakeTime()
    policy(time).call(Script(time, not_ready(Duration(seconds=2, nanos=500_000_000))))
    assert time.sleeps == [2.5]


@pytest.mark.parametrize("seconds", [-5, 0])
def test_a_wait_of_no_time_or_less_is_replaced_by_the_policys_own(
    seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    steady(monkeypatch)
    time = FakeTime()
    policy(time).call(Script(time, not_ready(Duration(seconds=seconds))))
    assert time.sleeps == [0.1]


def test_a_server_cannot_make_a_client_sleep_for_years() -> None:
    time = FakeTime()
    policy(time, longest_s=5.0).call(Script(time, not_ready(Duration(seconds=10**9))))
    assert time.now <= 3600


def test_being_unreachable_is_timed_from_the_last_answer() -> None:
    time = FakeTime()
    waiting, down = [failed(NotReadyError)] * 200, [failed(UnavailableError)] * 3
    assert policy(time, total_s=20).call(Script(time, *waiting, *down)) == "answer"
    assert time.now > 20


def test_errors_of_the_callers_own_are_not_tried_again() -> None:
    time, calls = FakeTime(), []

    def wrong() -> None:
        calls.append(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        policy(time).call(wrong)
    assert len(calls) == 1


# --- overload -----------------------------------------------------------------------------------


def test_an_overloaded_server_is_asked_again_after_the_wait_it_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steady(monkeypatch)
    time = FakeTime()
    assert policy(time, initial_s=1.0).call(Script(time, *[failed(OverloadedError)] * 3)) == (
        "answer"
    )
    assert time.sleeps == pytest.approx([0.2, 0.2, 0.2])


def test_a_server_that_stays_overloaded_is_given_up_after_the_total() -> None:
    time = FakeTime()
    with pytest.raises(OverloadedError):
        policy(time, total_s=60).call(Script(time, *[failed(OverloadedError)] * 1000))
    assert 60 <= time.now <= 60 + 5 * 1.25


def test_a_mixture_of_overload_and_silence_counts_as_one_failure() -> None:
    time = FakeTime()
    errors = [failed(OverloadedError), failed(UnavailableError)] * 500
    with pytest.raises((OverloadedError, UnavailableError)):
        policy(time, total_s=30).call(Script(time, *errors))
    assert 30 <= time.now <= 30 + 5 * 1.25


def test_a_limit_of_grpc_itself_is_not_tried_again() -> None:
    """RESOURCE_EXHAUSTED without our reason: a message that is too large stays too large."""
    time = FakeTime()
    script = Script(time, AnyError(grpc.StatusCode.RESOURCE_EXHAUSTED))
    with pytest.raises(SecaggError):
        policy(time).call(script)
    assert (script.calls, time.sleeps) == (1, [])


# --- connections that TLS refuses ---------------------------------------------------------------


class Diagnosis:
    """Says what it is told to, and counts how often it is asked."""

    def __init__(self, *found: SecaggError | None) -> None:
        self.calls = 0
        self._found = list(found)

    def __call__(self) -> SecaggError | None:
        self.calls += 1
        return self._found.pop(0) if self._found else None


@pytest.mark.parametrize("kind", tree(IdentityError), ids=lambda kind: kind.reason)
def test_a_connection_that_tls_refuses_is_not_tried_again(kind: type[SecaggError]) -> None:
    time, diagnosis = FakeTime(), Diagnosis(kind("text"))
    script = Script(time, *[AnyError(grpc.StatusCode.UNAVAILABLE)] * 10)
    with pytest.raises(kind) as caught:
        RetryPolicy(sleep=time.sleep, clock=time.clock, diagnose=diagnosis).call(script)
    assert type(caught.value) is kind
    assert (script.calls, diagnosis.calls, time.sleeps) == (1, 1, [])


def test_a_server_that_is_merely_away_is_diagnosed_once_and_waited_for() -> None:
    time, diagnosis = FakeTime(), Diagnosis()
    script = Script(time, *[AnyError(grpc.StatusCode.UNAVAILABLE)] * 5)
    policy_ = RetryPolicy(sleep=time.sleep, clock=time.clock, diagnose=diagnosis)
    assert policy_.call(script) == "answer"
    assert (script.calls, diagnosis.calls) == (6, 1)


@pytest.mark.parametrize("kind", [NotReadyError, OverloadedError], ids=lambda kind: kind.reason)
def test_a_server_that_answers_is_not_diagnosed(kind: type[SecaggError]) -> None:
    time, diagnosis = FakeTime(), Diagnosis(ExpiredCertificateError("text"))
    script = Script(time, *[failed(kind)] * 3)
    policy_ = RetryPolicy(sleep=time.sleep, clock=time.clock, diagnose=diagnosis)
    assert policy_.call(script) == "answer"
    assert diagnosis.calls == 0
