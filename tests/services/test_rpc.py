"""Errors, retries and limits at the edge between processes, over real in-process servers."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import grpc.aio
import pytest
import structlog
from clocks import FakeTime
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status
from serving import LoopThread, loop_thread, serving

from secagg.errors import (
    ClosedError,
    ConfigurationError,
    MalformedError,
    NotReadyError,
    PlanError,
    SecaggError,
    UnavailableError,
    by_reason,
)
from secagg.rpc import channels
from secagg.rpc.retry import RetryPolicy
from secagg.rpc.status import DOMAIN, from_rpc_error, retry_delay_s, to_status, translated
from secagg.wire.codec import MAX_MESSAGE_BYTES
from secagg.wire.v1 import aggregation_service_pb2 as pb
from secagg.wire.v1 import aggregation_service_pb2_grpc as aggregation
from secagg.wire.v1 import operator_service_pb2, operator_service_pb2_grpc


def tree(root: type[SecaggError] = SecaggError) -> list[type[SecaggError]]:
    return [root, *(found for child in root.__subclasses__() for found in tree(child))]


class Raising(aggregation.AggregationServiceServicer):
    """Raises what the test put into ``error``; else answers with what it put into ``answer``."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.answer = pb.GetModelResponse()

    @translated
    async def GetModel(self, request: pb.GetModelRequest, context: object) -> pb.GetModelResponse:
        if self.error:
            raise self.error
        return self.answer

    @translated
    async def PutChunk(self, request: pb.PutChunkRequest, context: object) -> pb.PutChunkResponse:
        return pb.PutChunkResponse()


class RaisingStreams(operator_service_pb2_grpc.OperatorServiceServicer):
    """Streams one piece, then raises."""

    error: BaseException | None = None

    @translated
    async def GetSums(
        self, request: operator_service_pb2.GetSumsRequest, context: object
    ) -> AsyncIterator[operator_service_pb2.GetSumsResponse]:
        yield operator_service_pb2.GetSumsResponse(data=b"first")
        if self.error:
            raise self.error


@pytest.fixture(scope="module")
def thread() -> Iterator[LoopThread]:
    with loop_thread() as running:
        yield running


@pytest.fixture
def servicers() -> tuple[Raising, RaisingStreams]:
    return Raising(), RaisingStreams()


@pytest.fixture
def connection(
    thread: LoopThread, servicers: tuple[Raising, RaisingStreams]
) -> Iterator[grpc.Channel]:
    def add(server: grpc.aio.Server) -> None:
        aggregation.add_AggregationServiceServicer_to_server(servicers[0], server)
        operator_service_pb2_grpc.add_OperatorServiceServicer_to_server(servicers[1], server)

    with serving(thread, add) as address, channels.channel(address) as channel:
        yield channel


@pytest.fixture
def stub(connection: grpc.Channel) -> aggregation.AggregationServiceStub:
    return aggregation.AggregationServiceStub(connection)


@pytest.fixture
def raising(servicers: tuple[Raising, RaisingStreams]) -> Raising:
    return servicers[0]


@pytest.fixture
def log() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs(
        processors=[structlog.processors.format_exc_info]
    ) as captured:
        yield captured


def failure(call: Callable[..., Any], request: object) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=20)
    return caught.value


def ask(stub: aggregation.AggregationServiceStub) -> grpc.RpcError:
    return failure(stub.GetModel, pb.GetModelRequest())


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tree(), ids=lambda kind: kind.reason)
def test_an_error_comes_back_as_the_class_and_text_it_was(
    kind: type[SecaggError], raising: Raising, stub: aggregation.AggregationServiceStub
) -> None:
    raising.error = kind("expected this; got that; do the other — ×2")
    rpc_error = ask(stub)
    back = from_rpc_error(rpc_error)
    assert type(back) is kind
    assert back.reason == kind.reason
    assert str(back) == "expected this; got that; do the other — ×2"
    assert rpc_error.code().name == kind.status


def test_every_reason_names_one_class() -> None:
    reasons = [kind.reason for kind in tree()]
    assert len(reasons) == len(set(reasons))
    assert all(re.fullmatch(r"[A-Z][A-Z_]*[A-Z]", reason) for reason in reasons)
    assert [by_reason(kind.reason) for kind in tree()] == tree()
    assert by_reason("INVENTED_LATER") is SecaggError


@pytest.mark.parametrize("kind", tree(), ids=lambda kind: kind.reason)
def test_only_not_ready_says_when_to_try_again(
    kind: type[SecaggError], raising: Raising, stub: aggregation.AggregationServiceStub
) -> None:
    raising.error = kind("text")
    assert retry_delay_s(ask(stub)) == (0.2 if kind is NotReadyError else None)


def test_the_reason_travels_in_an_error_info_of_this_project(
    raising: Raising, stub: aggregation.AggregationServiceStub
) -> None:
    raising.error = PlanError("text")
    status = rpc_status.from_call(ask(stub))
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.domain, info.reason) == (DOMAIN, "IMPOSSIBLE_PLAN") == ("secagg", info.reason)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("token=hunter2"),
        KeyError("hunter2"),
        AssertionError("hunter2"),
        OSError(5, "hunter2"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_unexpected_error_crosses_without_its_text(
    error: Exception, raising: Raising, stub: aggregation.AggregationServiceStub, log: list[Any]
) -> None:
    raising.error = error
    rpc_error = ask(stub)
    assert rpc_error.code() is grpc.StatusCode.INTERNAL
    assert "hunter2" not in f"{rpc_error!r}{rpc_error.details()}{rpc_error.trailing_metadata()}"
    assert type(from_rpc_error(rpc_error)) is SecaggError


def test_an_unexpected_error_is_logged_by_its_kind_and_without_its_text(
    raising: Raising, stub: aggregation.AggregationServiceStub, log: list[Any]
) -> None:
    raising.error = RuntimeError("token=hunter2")
    ask(stub)
    assert [(entry["event"], entry["method"], entry["error"]) for entry in log] == [
        ("unexpected_error", "GetModel", "RuntimeError")
    ]
    assert "hunter2" not in str(log)


def test_an_expected_error_is_not_logged_as_an_unexpected_one(
    raising: Raising, stub: aggregation.AggregationServiceStub, log: list[Any]
) -> None:
    raising.error = MalformedError("text")
    ask(stub)
    assert log == []


@pytest.mark.parametrize("size", [1_000, 20_000])
def test_a_long_message_does_not_cost_the_reason(
    size: int, raising: Raising, stub: aggregation.AggregationServiceStub
) -> None:
    """Texts quote what came in (names of tensors, say), so that a peer decides on their length."""
    raising.error = PlanError("x" * size)
    assert type(from_rpc_error(ask(stub))) is PlanError


def test_errors_in_the_middle_of_a_stream_come_back_too(
    connection: grpc.Channel, servicers: tuple[Raising, RaisingStreams]
) -> None:
    servicers[1].error = ClosedError("text")
    answers = operator_service_pb2_grpc.OperatorServiceStub(connection).GetSums(
        operator_service_pb2.GetSumsRequest(), timeout=20
    )
    assert next(answers).data == b"first"
    with pytest.raises(grpc.RpcError) as caught:
        next(answers)
    assert type(from_rpc_error(caught.value)) is ClosedError


def test_errors_reach_asyncio_clients_as_well(thread: LoopThread, raising: Raising) -> None:
    def add(server: grpc.aio.Server) -> None:
        aggregation.add_AggregationServiceServicer_to_server(raising, server)

    async def call(address: str) -> SecaggError:
        async with channels.aio_channel(address) as channel:
            stub = aggregation.AggregationServiceStub(channel)
            try:
                await stub.GetModel(pb.GetModelRequest(), timeout=20)
            except grpc.RpcError as error:
                return from_rpc_error(error)
        raise AssertionError

    raising.error = NotReadyError("soon")
    with serving(thread, add) as address:
        back = thread.run(call(address))
    assert (type(back), str(back)) == (NotReadyError, "soon")


class AnyError(grpc.RpcError):
    """A failed call as gRPC reports it."""

    def __init__(self, code: grpc.StatusCode, status: status_pb2.Status | None = None) -> None:
        self._code = code
        self._metadata = (
            (("grpc-status-details-bin", status.SerializeToString()),) if status else ()
        )
        self._details = status.message if status else "details"

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return self._metadata


def test_an_error_info_of_another_domain_is_not_taken_for_ours() -> None:
    status = status_pb2.Status(code=code_pb2.FAILED_PRECONDITION, message="text")
    status.details.add().Pack(
        error_details_pb2.ErrorInfo(reason="NOT_READY", domain="googleapis.com")
    )
    back = from_rpc_error(AnyError(grpc.StatusCode.FAILED_PRECONDITION, status))
    assert type(back) is SecaggError


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, UnavailableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, UnavailableError),
        (grpc.StatusCode.UNIMPLEMENTED, SecaggError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, SecaggError),
        (grpc.StatusCode.INTERNAL, SecaggError),
    ],
)
def test_a_failed_connection_is_unavailable_and_the_rest_is_not(
    code: grpc.StatusCode, kind: type[SecaggError]
) -> None:
    assert type(from_rpc_error(AnyError(code))) is kind


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff", b"\x08\x03\x12\x05other"])
def test_garbage_for_a_status_is_an_error_of_ours(garbage: bytes) -> None:
    """The trailer comes from the peer: bytes that are no status, or one that contradicts itself."""
    error = AnyError(grpc.StatusCode.FAILED_PRECONDITION)
    error._metadata = (("grpc-status-details-bin", garbage),)
    assert type(from_rpc_error(error)) is SecaggError
    assert retry_delay_s(error) is None


def test_nobody_listening_is_unavailable(free_address: str) -> None:
    with channels.channel(free_address) as channel:
        rpc_error = ask(aggregation.AggregationServiceStub(channel))
    assert type(from_rpc_error(rpc_error)) is UnavailableError


@pytest.fixture
def free_address(thread: LoopThread) -> str:
    """An address where a server was, and is no longer."""
    with serving(thread, lambda _server: None) as address:
        return address


# --- retries ----------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "kind", [kind for kind in tree() if kind.status != "UNAVAILABLE"], ids=lambda kind: kind.reason
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


# --- addresses --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:7400", "127.9.9.9:1", "localhost:0", "[::1]:7400", "::1:7400", "127.0.0.1:65535"],
)
def test_loopback_addresses_are_allowed(address: str) -> None:
    assert channels.check_loopback(address) == address
    assert channels.is_loopback(address)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0:7400",
        "[::]:7400",
        "::7400",
        "8.8.8.8:443",
        "192.168.1.2:80",
        "10.0.0.1:80",
        "169.254.0.1:80",
        "[2001:db8::1]:80",
        "[fe80::1]:80",
        "[::ffff:8.8.8.8]:80",
        "example.com:7400",
        "localhost.example.com:7400",
        "127.0.0.1.example.com:80",
        "127.1:80",
        "2130706433:80",
        "0:80",
        "dns:///127.0.0.1:80",
        "ipv4:127.0.0.1:80",
        "127.0.0.1,8.8.8.8:80",
        " 127.0.0.1:80",
        "LOCALHOST%2f:80",
    ],
)
def test_any_other_address_is_refused_before_a_socket_is_opened(address: str) -> None:
    assert not channels.is_loopback(address)
    with pytest.raises(ConfigurationError):
        channels.check_loopback(address)
    with pytest.raises(ConfigurationError):
        channels.channel(address)


@pytest.mark.parametrize(
    "address",
    [
        "",
        ":",
        "127.0.0.1",
        "127.0.0.1:",
        ":7400",
        "127.0.0.1:70000",
        "127.0.0.1:65536",
        "127.0.0.1:-1",
        "127.0.0.1:http",
        "127.0.0.1:80/path",
        "127.0.0.1:²",
        "127.0.0.1:٣",
        "127.0.0.1: 80",
        "unix:/tmp/socket",
        "7400",
    ],
)
def test_an_address_without_a_usable_port_is_refused_with_the_form(address: str) -> None:
    with pytest.raises(ConfigurationError, match="host:port"):
        channels.check_loopback(address)


def test_the_refusal_says_why_and_what_works() -> None:
    with pytest.raises(ConfigurationError) as caught:
        channels.check_loopback("192.168.1.2:7400")
    text = str(caught.value)
    assert "plaintext" in text
    assert "127.0.0.1:7400" in text
    assert "'192.168.1.2:7400'" in text


def test_listeners_and_asyncio_connections_obey_the_same_rule() -> None:
    async def attempt() -> None:
        server = channels.server()
        with pytest.raises(ConfigurationError, match="plaintext"):
            channels.add_listener(server, "0.0.0.0:0")
        with pytest.raises(ConfigurationError, match="plaintext"):
            channels.aio_channel("192.168.1.2:80")
        await server.stop(None)

    asyncio.run(attempt())


def test_a_port_that_is_taken_is_refused_by_its_name(thread: LoopThread) -> None:
    async def attempt(address: str) -> None:
        server = channels.server()
        try:
            with pytest.raises(ConfigurationError, match=f"free port; '{address}'"):
                channels.add_listener(server, address)
        finally:
            await server.stop(None)

    with serving(thread, lambda _server: None) as address:
        thread.run(attempt(address))


# --- sizes ------------------------------------------------------------------------------------


def sized_chunk(size: int) -> pb.PutChunkRequest:
    request = pb.PutChunkRequest(data=bytes(size - 8))
    request.data = bytes(size - 8 + size - request.ByteSize())
    assert request.ByteSize() == size
    return request


def sized_piece(size: int) -> pb.GetModelResponse:
    answer = pb.GetModelResponse(data=bytes(size - 8))
    answer.data = bytes(size - 8 + size - answer.ByteSize())
    assert answer.ByteSize() == size
    return answer


def wide_open(address: str) -> grpc.Channel:
    """A client that does not keep the limit."""
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    return grpc.insecure_channel(address, options=options)


def test_a_request_of_exactly_the_limit_passes(stub: aggregation.AggregationServiceStub) -> None:
    stub.PutChunk(sized_chunk(MAX_MESSAGE_BYTES), timeout=20)


def test_a_client_does_not_send_a_request_over_the_limit(
    stub: aggregation.AggregationServiceStub,
) -> None:
    error = failure(stub.PutChunk, sized_chunk(MAX_MESSAGE_BYTES + 1))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_server_refuses_a_request_over_the_limit(thread: LoopThread, raising: Raising) -> None:
    def add(server: grpc.aio.Server) -> None:
        aggregation.add_AggregationServiceServicer_to_server(raising, server)

    with serving(thread, add) as address, wide_open(address) as channel:
        stub = aggregation.AggregationServiceStub(channel)
        error = failure(stub.PutChunk, sized_chunk(MAX_MESSAGE_BYTES + 1))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_an_answer_over_the_limit_reaches_neither_kind_of_client(
    thread: LoopThread, raising: Raising
) -> None:
    def add(server: grpc.aio.Server) -> None:
        aggregation.add_AggregationServiceServicer_to_server(raising, server)

    raising.answer = sized_piece(MAX_MESSAGE_BYTES + 1)
    with serving(thread, add) as address:
        for connect in (channels.channel, wide_open):
            with connect(address) as channel:
                error = ask(aggregation.AggregationServiceStub(channel))
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_client_refuses_an_answer_over_the_limit(thread: LoopThread, raising: Raising) -> None:
    async def start() -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server(options=[("grpc.max_send_message_length", -1)])
        aggregation.add_AggregationServiceServicer_to_server(raising, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    raising.answer = sized_piece(MAX_MESSAGE_BYTES + 1)
    server, port = thread.run(start())
    try:
        with channels.channel(f"127.0.0.1:{port}") as channel:
            error = ask(aggregation.AggregationServiceStub(channel))
    finally:
        thread.run(server.stop(None))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_an_answer_of_exactly_the_limit_passes(
    raising: Raising, stub: aggregation.AggregationServiceStub
) -> None:
    raising.answer = sized_piece(MAX_MESSAGE_BYTES)
    assert stub.GetModel(pb.GetModelRequest(), timeout=20) == raising.answer
