"""The key holder's promises, as far as they live on the disk: what was acknowledged stays true."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import chain
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from secagg import audit
from secagg.context import NO_MODEL, ContextId, RoundContext
from secagg.errors import (
    ClosedError,
    ConfigurationError,
    ContextError,
    DuplicateError,
    MalformedError,
    SealError,
    SecaggError,
    StorageError,
)
from secagg.keyholder import Finding
from secagg.parameters import IntegerSegment
from secagg.planner import make_plan
from secagg.sealing import ROUND_KEY_BYTES
from secagg_keyholder import database
from secagg_keyholder.backup import restore_ledger
from secagg_keyholder.database import Database
from secagg_keyholder.ledger import Ledger, OpenedRound, RoundState, Verdict
from secagg_keyholder.schema import ROUNDS

AUDIT_KEY = bytes(range(32))
PLAN = make_plan([IntegerSegment("counts", 8, 100)], min_clients=3, max_clients=6)
PLAN_BYTES = b"the plan's wire bytes"
MODEL = b"m" * 32
SUMS = b"the exact sums, which are public to the server alone"
SEAL = b"an admission's wire bytes, with a seal inside"
MANIFEST = b"n" * 32
LIMIT = 10


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ledger.sqlite3"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with closing(Ledger(path, AUDIT_KEY)) as opened:
        yield opened


def context(
    number: int = 1, attempt: int = 1, *, task_id: str = "task", model: bytes = MODEL
) -> RoundContext:
    return RoundContext.create(
        PLAN,
        os.urandom(ROUND_KEY_BYTES),
        task_id=task_id,
        round_number=number,
        attempt=attempt,
        model_digest=model,
    )


def opened(
    ledger: Ledger,
    number: int = 1,
    attempt: int = 1,
    *,
    task_id: str = "task",
    model: bytes = MODEL,
    limit: int = LIMIT,
) -> ContextId:
    fresh = context(number, attempt, task_id=task_id, model=model)
    ledger.open_round(fresh, PLAN_BYTES, attempts_limit=limit)
    return fresh.id


def upload(index: int) -> bytes:
    return index.to_bytes(32, "big")


def verdict(index: int, client: str, reason: str = "", seal: bytes = SEAL) -> Verdict:
    return Verdict(upload(index), client, reason, None if reason else seal)


def judged(ledger: Ledger, name: ContextId, *given: object) -> str:
    """Records one verdict; the reason that stands."""
    one = verdict(*given)  # type: ignore[arg-type]
    return ledger.record_verdicts(name, [one])[one.upload_digest]


def admitted(ledger: Ledger, name: ContextId, *indices: int) -> None:
    ledger.record_verdicts(name, [verdict(index, f"client-{index}") for index in indices or (1,)])


def finding(index: int, *, passed: bool = True) -> Finding:
    """By the sketch of this number."""
    return Finding(b"sketch".ljust(31) + bytes([index]), passed)


def current(ledger: Ledger, task_id: str = "task") -> OpenedRound:
    found = ledger.current(task_id)
    assert found is not None
    return found


def rows(ledger: Ledger, statement: str, *values: object) -> list[tuple[Any, ...]]:
    return ledger._database.rows(statement, *values)


def entries(ledger: Ledger) -> list[audit.Entry]:
    found = rows(ledger, "SELECT * FROM audit ORDER BY sequence")
    return [audit.Entry(*row) for row in found]


def events(ledger: Ledger) -> list[str]:
    return [entry.event for entry in entries(ledger)]


def details(ledger: Ledger) -> dict[str, Any]:
    found = json.loads(entries(ledger)[-1].details)
    assert isinstance(found, dict)
    return found


def reopened(path: Path) -> Ledger:
    return Ledger(path, AUDIT_KEY)


def dump(ledger: Ledger) -> list[str]:
    """Everything in the file."""
    return list(ledger._database._connection.iterdump())


def refuses(
    kind: type[SecaggError], ledger: Ledger, call: Callable[..., object], *args: object
) -> str:
    """The message; and nothing changed, not even the audit log."""
    before = dump(ledger)
    with pytest.raises(kind) as error:
        call(*args)
    assert dump(ledger) == before
    return str(error.value)


# --- opening rounds ---------------------------------------------------------------------------


def test_an_opened_round_is_there_after_a_restart(path: Path, ledger: Ledger) -> None:
    fresh = context(3, 2)
    assert ledger.open_round(fresh, PLAN_BYTES, attempts_limit=LIMIT) == []
    with closing(reopened(path)) as again:
        row = current(again)
        assert [row] == again.open_rounds() == ledger.open_rounds()
    assert (row.id, row.plan, row.public_key) == (fresh.id, PLAN_BYTES, fresh.round_key)
    assert (row.state, row.refusals, row.judged) == (RoundState.OPEN, 0, False)
    assert events(ledger) == ["ledger-migrated", "round-opened"]
    assert details(ledger)["round_key_id"] == fresh.id.round_key_id.hex()


def test_a_task_that_was_never_seen_has_no_round(ledger: Ledger) -> None:
    opened(ledger)
    assert ledger.current("other") is None


@pytest.mark.parametrize("later", [(1, 2), (2, 1), (7, 3)])
def test_a_later_attempt_closes_the_one_that_is_open(
    ledger: Ledger, later: tuple[int, int]
) -> None:
    first = opened(ledger)
    admitted(ledger, first)
    other = opened(ledger, task_id="other")
    fresh = context(*later)
    assert ledger.open_round(fresh, PLAN_BYTES, attempts_limit=LIMIT) == [first.round_key_id]
    assert current(ledger).id == fresh.id
    assert {row.id for row in ledger.open_rounds()} == {fresh.id, other}
    assert ledger.admissions(first) == []
    assert events(ledger)[-2:] == ["round-closed", "round-opened"]
    # What was closed before is not reported again.
    assert ledger.open_round(context(9), PLAN_BYTES, attempts_limit=LIMIT) == [
        fresh.id.round_key_id
    ]


@pytest.mark.parametrize("earlier", [(2, 2), (2, 1), (1, 9)])
@pytest.mark.parametrize("state", ["OPEN", "CLOSED"])
def test_an_earlier_attempt_is_refused(
    ledger: Ledger, earlier: tuple[int, int], state: str
) -> None:
    name = opened(ledger, 2, 3)
    if state == "CLOSED":
        ledger.close_round(name, "ABANDONED")
    refuses(ClosedError, ledger, opened, ledger, *earlier)


def test_the_same_attempt_is_recorded_once(ledger: Ledger) -> None:
    fresh = context()
    ledger.open_round(fresh, PLAN_BYTES, attempts_limit=LIMIT)
    for again in (fresh, context()):
        refuses(
            DuplicateError,
            ledger,
            lambda again=again: ledger.open_round(again, PLAN_BYTES, attempts_limit=LIMIT),
        )


@pytest.mark.parametrize("wanted", [(2, 2), (2, 1), (1, 5), (1, 1)])
def test_a_released_round_is_never_opened_again(ledger: Ledger, wanted: tuple[int, int]) -> None:
    ledger.record_release(opened(ledger, 2), MANIFEST, 3, SUMS)
    with pytest.raises((ClosedError, DuplicateError)):
        opened(ledger, *wanted)
    assert current(ledger).state is RoundState.RELEASED
    opened(ledger, 3)


def test_attempts_on_one_model_are_limited(ledger: Ledger) -> None:
    # Whatever becomes of them, and in whichever rounds.
    ledger.close_round(opened(ledger, 1, 1, limit=3), "ABANDONED")
    ledger.record_release(opened(ledger, 1, 2, limit=3), MANIFEST, 3, SUMS)
    opened(ledger, 2, 1, limit=3)
    message = refuses(ClosedError, ledger, lambda: opened(ledger, 3, 1, limit=3))
    assert "at most 3" in message
    assert current(ledger).state is RoundState.OPEN  # the refused one has closed nothing
    opened(ledger, 3, 1, model=b"o" * 32, limit=3)
    opened(ledger, 1, 1, task_id="other", limit=3)


def test_attempts_without_a_model_are_limited_by_round(ledger: Ledger) -> None:
    for attempt in (1, 2):
        opened(ledger, 1, attempt, model=NO_MODEL, limit=2)
    refuses(ClosedError, ledger, lambda: opened(ledger, 1, 3, model=NO_MODEL, limit=2))
    opened(ledger, 2, 1, model=NO_MODEL, limit=2)


def test_another_rounds_names_are_refused(ledger: Ledger) -> None:
    opened(ledger)
    other = context().id  # the same numbers, another key
    calls: list[Callable[[ContextId], object]] = [
        ledger.verdicts,
        ledger.admissions,
        ledger.audited,
        ledger.findings,
        ledger.release,
        ledger.count_refusal,
        lambda name: ledger.close_round(name, "ABANDONED"),
        lambda name: ledger.record_verdicts(name, []),
        lambda name: judged(ledger, name, 1, "client"),
        lambda name: ledger.record_release(name, MANIFEST, 3, SUMS),
        lambda name: ledger.record_audited(name, upload(1), ""),
        lambda name: ledger.record_finding(name, upload(1), finding(1)),
        lambda name: ledger.record_given(name, []),
    ]
    for call in calls:
        assert "round_key_id" in refuses(ContextError, ledger, call, other)
    unknown = context(5).id
    for call in calls[:6] + calls[7:]:
        refuses(ClosedError, ledger, call, unknown)


# --- uploads ----------------------------------------------------------------------------------


def test_admissions_are_there_after_a_restart(path: Path, ledger: Ledger) -> None:
    name = opened(ledger)
    verdicts = [
        verdict(2, "bob", seal=b"two"),
        verdict(3, "eve", "INVALID_SEAL"),
        verdict(1, "al", seal=b"one"),
    ]
    wanted = {upload(2): "", upload(3): "INVALID_SEAL", upload(1): ""}
    assert ledger.record_verdicts(name, verdicts) == wanted
    with closing(reopened(path)) as again:
        assert again.admissions(name) == [(upload(2), "bob", b"two"), (upload(1), "al", b"one")]
        assert again.verdicts(name) == wanted


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(("first", "second"), [("", "MALFORMED"), ("MALFORMED", ""), ("A", "B")])
def test_the_first_verdict_stands(ledger: Ledger, first: str, second: str, together: bool) -> None:
    name = opened(ledger)
    one, other = verdict(1, "client", first), verdict(1, "client", second, b"other")
    calls = [[one, other]] if together else [[one], [one], [other]]
    for call in calls:
        assert ledger.record_verdicts(name, call) == {upload(1): first}
    assert ledger.verdicts(name) == {upload(1): first}
    assert ledger.admissions(name) == ([] if first else [(upload(1), "client", SEAL)])
    assert len(events(ledger)) == 3


def test_a_client_is_accepted_once(ledger: Ledger) -> None:
    name = opened(ledger)
    judged(ledger, name, 9, "client-1", "MALFORMED")
    admitted(ledger, name, 1)
    refuses(DuplicateError, ledger, judged, ledger, name, 2, "client-1")
    # To refuse more of them is no contradiction.
    judged(ledger, name, 2, "client-1", "DUPLICATE_UPLOAD")
    assert [row[0] for row in ledger.admissions(name)] == [upload(1)]


def test_an_upload_is_accepted_from_one_client(ledger: Ledger) -> None:
    name = opened(ledger)
    admitted(ledger, name, 1, 2)
    for client in ("client-2", "client-3"):
        refuses(DuplicateError, ledger, judged, ledger, name, 1, client)
    assert judged(ledger, name, 1, "client-3", "DUPLICATE_UPLOAD") == ""


@pytest.mark.parametrize("last", [verdict(3, "client-1"), verdict(1, "client-3")])
def test_verdicts_are_recorded_all_or_none(ledger: Ledger, last: Verdict) -> None:
    name = opened(ledger)
    verdicts = [verdict(1, "client-1"), verdict(2, "client-2", "MALFORMED"), last]
    refuses(DuplicateError, ledger, ledger.record_verdicts, name, verdicts)
    assert len(ledger.record_verdicts(name, verdicts[:2])) == 2


def test_verdicts_cost_one_commit(ledger: Ledger) -> None:
    name = opened(ledger)
    said: list[str] = []
    ledger._database._connection.set_trace_callback(said.append)
    admitted(ledger, name, *range(50))
    assert [line for line in said if line in ("BEGIN IMMEDIATE", "COMMIT")] == [
        "BEGIN IMMEDIATE",
        "COMMIT",
    ]
    assert len(ledger.verdicts(name)) == 50


def test_uploads_of_other_rounds_count_for_nothing(ledger: Ledger) -> None:
    first = opened(ledger)
    admitted(ledger, first)
    second = opened(ledger, 2)
    assert ledger.verdicts(second) == {}
    admitted(ledger, second)
    assert len(ledger.admissions(second)) == 1


def test_an_ended_round_takes_no_uploads(ledger: Ledger) -> None:
    closed = opened(ledger)
    admitted(ledger, closed)
    ledger.close_round(closed, "ABANDONED")
    released = opened(ledger, 2)
    ledger.record_release(released, MANIFEST, 3, SUMS)
    for name in (closed, released):
        for reason in ("", "MALFORMED"):
            refuses(ClosedError, ledger, judged, ledger, name, 8, "late", reason)
    # What was answered before is answered again.
    assert judged(ledger, closed, 1, "client-1") == ""


@pytest.mark.parametrize("digest", [b"", bytes(31), bytes(33)])
def test_an_upload_digest_has_its_size(digest: bytes) -> None:
    with pytest.raises(MalformedError, match="upload_digest"):
        Verdict(digest, "client", "", SEAL)


@pytest.mark.parametrize(("reason", "seal"), [("", None), ("INVALID_RECEIPT", SEAL)])
def test_accepted_uploads_and_no_others_come_with_their_seal(
    reason: str, seal: bytes | None
) -> None:
    with pytest.raises(ValueError, match="admission"):
        Verdict(upload(1), "client", reason, seal)


def test_a_verdict_does_not_show_whose_it_is() -> None:
    assert "client-1" not in repr(verdict(1, "client-1"))
    assert repr(SEAL) not in repr(verdict(1, "client-1"))


# --- releases ---------------------------------------------------------------------------------


def test_a_release_reads_the_same_ever_after(path: Path, ledger: Ledger) -> None:
    name = opened(ledger)
    assert ledger.release(name) is None
    ledger.record_release(name, MANIFEST, 3, SUMS)
    ledger.record_release(name, MANIFEST, 3, SUMS)
    with closing(reopened(path)) as again:
        assert again.release(name) == ledger.release(name) == (MANIFEST, 3, SUMS)
        row = current(again)
    assert row.state is RoundState.RELEASED
    assert rows(ledger, "SELECT ended_at >= opened_at FROM rounds") == [(1,)]
    assert ledger.open_rounds() == []
    assert events(ledger).count("round-released") == 1


@pytest.mark.parametrize(
    "other", [(b"o" * 32, 3, SUMS), (MANIFEST, 4, SUMS), (MANIFEST, 3, SUMS + b"!")]
)
def test_a_second_different_release_is_refused(
    ledger: Ledger, other: tuple[bytes, int, bytes]
) -> None:
    name = opened(ledger)
    ledger.record_release(name, MANIFEST, 3, SUMS)
    refuses(ClosedError, ledger, ledger.record_release, name, *other)
    assert ledger.release(name) == (MANIFEST, 3, SUMS)


def test_a_closed_round_is_never_released(ledger: Ledger) -> None:
    name = opened(ledger)
    ledger.close_round(name, "ABANDONED")
    refuses(ClosedError, ledger, ledger.record_release, name, MANIFEST, 3, SUMS)
    assert ledger.release(name) is None


def test_a_manifest_has_its_size(ledger: Ledger) -> None:
    name = opened(ledger)
    refuses(MalformedError, ledger, ledger.record_release, name, MANIFEST[:-1], 3, SUMS)


def test_a_release_drops_the_seals(path: Path, ledger: Ledger) -> None:
    name = opened(ledger)
    admitted(ledger, name)
    ledger.record_release(name, MANIFEST, 3, SUMS)
    assert ledger.admissions(name) == []
    assert ledger.verdicts(name) == {upload(1): ""}
    ledger.close()
    assert SEAL not in path.read_bytes()


def test_sums_are_dropped_but_not_that_they_were_released(ledger: Ledger) -> None:
    names = []
    for number in (1, 2, 3):
        names.append(opened(ledger, number))
        ledger.record_release(names[-1], MANIFEST, 3, SUMS)
    other = opened(ledger, task_id="other")
    ledger.record_release(other, MANIFEST, 3, SUMS)
    ledger.drop_sums("task", 3)
    assert [ledger.release(name) for name in names] == [
        (MANIFEST, 3, None),
        (MANIFEST, 3, None),
        (MANIFEST, 3, SUMS),
    ]
    assert ledger.release(other) == (MANIFEST, 3, SUMS)
    assert details(ledger)["rounds"] == 2
    count = len(events(ledger))
    ledger.drop_sums("task", 3)
    ledger.record_release(names[0], MANIFEST, 3, SUMS)
    assert len(events(ledger)) == count
    refuses(ClosedError, ledger, ledger.record_release, names[0], b"o" * 32, 3, SUMS)


def test_refusals_are_counted_across_restarts(path: Path, ledger: Ledger) -> None:
    name = opened(ledger)
    assert ledger.count_refusal(name) == 1
    with closing(reopened(path)) as again:
        assert again.count_refusal(name) == 2
    assert current(ledger).refusals == 2
    ledger.close_round(name, "REFUSED_TWICE")
    refuses(ClosedError, ledger, ledger.count_refusal, name)


def test_a_round_is_closed_once(ledger: Ledger) -> None:
    name = opened(ledger)
    admitted(ledger, name)
    ledger.close_round(name, "ABANDONED")
    ended = current(ledger)
    assert ended.state is RoundState.CLOSED
    assert details(ledger)["reason"] == "ABANDONED"
    ledger.close_round(name, "AGAIN")
    assert current(ledger) == ended
    assert events(ledger).count("round-closed") == 1
    assert ledger.admissions(name) == []


def test_closing_leaves_a_release_alone(ledger: Ledger) -> None:
    name = opened(ledger)
    ledger.record_release(name, MANIFEST, 3, SUMS)
    ledger.close_round(name, "ABANDONED")
    assert ledger.release(name) == (MANIFEST, 3, SUMS)
    ledger.close_round(context(7).id, "ABANDONED")  # never opened


def test_all_open_rounds_are_closed_at_once(ledger: Ledger) -> None:
    released = opened(ledger, task_id="a")
    ledger.record_release(released, MANIFEST, 3, SUMS)
    names = [opened(ledger, task_id=task_id) for task_id in ("b", "c")]
    assert ledger.close_all_open("RESTORED") == [name.round_key_id for name in names]
    assert ledger.open_rounds() == []
    assert ledger.close_all_open("RESTORED") == []
    assert ledger.release(released) is not None


# --- noise audits -----------------------------------------------------------------------------


def test_findings_are_there_after_a_restart(path: Path, ledger: Ledger) -> None:
    name = opened(ledger)
    admitted(ledger, name, 1, 2, 3)
    assert ledger.record_audited(name, upload(1), "") == ""
    assert ledger.record_audited(name, upload(2), "OFF_GRID") == "OFF_GRID"
    with closing(reopened(path)) as again:
        assert again.audited(name) == {upload(1): "", upload(2): "OFF_GRID"}
    assert len(ledger.admissions(name)) == 3


def test_the_first_finding_stands(ledger: Ledger) -> None:
    name = opened(ledger)
    admitted(ledger, name)
    assert ledger.record_audited(name, upload(1), "OFF_GRID") == "OFF_GRID"
    count = len(events(ledger))
    assert ledger.record_audited(name, upload(1), "") == "OFF_GRID"
    assert ledger.audited(name) == {upload(1): "OFF_GRID"}
    assert len(events(ledger)) == count
    assert details(ledger)["reason"] == "OFF_GRID"


def test_only_accepted_uploads_are_audited(ledger: Ledger) -> None:
    name = opened(ledger)
    judged(ledger, name, 1, "client", "MALFORMED")
    for index in (1, 2):
        refuses(SealError, ledger, ledger.record_audited, name, upload(index), "")


def test_an_ended_round_is_not_audited(ledger: Ledger) -> None:
    name = opened(ledger)
    admitted(ledger, name, 1, 2)
    ledger.record_audited(name, upload(1), "OFF_GRID")
    ledger.close_round(name, "ABANDONED")
    refuses(ClosedError, ledger, ledger.record_audited, name, upload(2), "")
    # What was found before stays found.
    assert ledger.record_audited(name, upload(1), "") == "OFF_GRID"


# --- norm checks ------------------------------------------------------------------------------


def checked(ledger: Ledger, *refused: int) -> ContextId:
    """An open round of uploads 1 to 3, whose sketches are judged and whose verdicts are not."""
    name = opened(ledger)
    admitted(ledger, name, 1, 2, 3)
    for index in (1, 2, 3):
        ledger.record_finding(name, upload(index), finding(index, passed=index not in refused))
    return name


@pytest.mark.parametrize("given", [False, True])
def test_what_the_norm_check_found_is_there_after_a_restart(
    path: Path, ledger: Ledger, given: bool
) -> None:
    name = checked(ledger, 2)
    wanted = {upload(index): finding(index, passed=index != 2) for index in (1, 2, 3)}
    if given:
        ledger.record_given(name, wanted)
    with closing(reopened(path)) as again:
        assert again.findings(name) == wanted
        assert current(again).judged is given
        assert again.open_rounds() == [current(again)]
    assert len(ledger.admissions(name)) == 3
    assert ledger.audited(name) == {}


def test_an_upload_is_judged_by_one_sketch(ledger: Ledger) -> None:
    name = checked(ledger, 1)
    before = dump(ledger)
    ledger.record_finding(name, upload(1), finding(1, passed=False))
    assert dump(ledger) == before
    refuses(DuplicateError, ledger, ledger.record_finding, name, upload(1), finding(2))
    # The same sketch cannot be found to be something else.
    ledger.record_finding(name, upload(1), finding(1))
    assert dump(ledger) == before


def test_nothing_is_found_of_uploads_that_were_not_accepted(ledger: Ledger) -> None:
    name = opened(ledger)
    judged(ledger, name, 1, "client", "MALFORMED")
    for index in (1, 2):
        refuses(SealError, ledger, ledger.record_finding, name, upload(index), finding(index))


def test_nothing_new_is_found_once_a_round_has_ended(ledger: Ledger) -> None:
    name = opened(ledger)
    admitted(ledger, name, 1, 2)
    ledger.record_finding(name, upload(1), finding(1))
    ledger.close_round(name, "ABANDONED")
    refuses(ClosedError, ledger, ledger.record_finding, name, upload(2), finding(2))
    refuses(ClosedError, ledger, ledger.record_given, name, [upload(1)])
    assert ledger.findings(name) == {upload(1): finding(1)}


def test_verdicts_are_given_only_on_what_was_found_and_then_all_at_once(ledger: Ledger) -> None:
    name = opened(ledger)
    admitted(ledger, name, 1, 2)
    ledger.record_finding(name, upload(1), finding(1))
    for names in ([upload(1), upload(2)], [upload(1), upload(9)]):
        refuses(SealError, ledger, ledger.record_given, name, names)
    assert not current(ledger).judged


def test_verdicts_leave_one_entry_an_upload_and_no_number(ledger: Ledger) -> None:
    name = checked(ledger, 2)
    ledger.record_given(name, [upload(1), upload(2)])
    found = [entry for entry in entries(ledger) if entry.event == "norm-judged"]
    said = [json.loads(entry.details) for entry in found]
    assert [(each["upload_digest"], each["reason"]) for each in said] == [
        (upload(1).hex(), ""),
        (upload(2).hex(), "NORM_REFUSED"),
    ]
    keys = {"task_id", "round_number", "attempt", "upload_digest", "client", "reason"}
    assert [set(each) for each in said] == [keys] * 2
    assert said[0]["client"] == audit.client_hash(AUDIT_KEY, "client-1")
    before = dump(ledger)
    ledger.record_given(name, [upload(1), upload(2), upload(3)])  # once an attempt
    assert dump(ledger) == before


def test_what_was_found_is_not_logged_before_the_verdicts_are_given(ledger: Ledger) -> None:
    checked(ledger, 2)
    found = [entry for entry in entries(ledger) if entry.event == "sketch-judged"]
    said = [json.loads(entry.details) for entry in found]
    keys = {"task_id", "round_number", "attempt", "upload_digest", "client", "sketch_digest"}
    assert [set(each) for each in said] == [keys] * 3
    assert said[1]["sketch_digest"] == finding(2).sketch_digest.hex()


# --- the audit log ----------------------------------------------------------------------------


def busy(ledger: Ledger) -> None:
    """One of everything that leaves an entry."""
    first = opened(ledger)
    admitted(ledger, first)
    judged(ledger, first, 2, "", "INVALID_RECEIPT")
    ledger.count_refusal(first)
    ledger.record_audited(first, upload(1), "")
    ledger.record_finding(first, upload(1), finding(1))
    ledger.record_given(first, [upload(1)])
    second = opened(ledger, 2)
    ledger.record_release(second, MANIFEST, 3, SUMS)
    ledger.drop_sums("task", 9)
    opened(ledger, 3)
    ledger.close_all_open("RESTORED")


def test_every_change_is_in_the_chain_and_names_nobody(path: Path, ledger: Ledger) -> None:
    busy(ledger)
    found = list(audit.read_entries(path))
    assert found == entries(ledger)
    assert audit.verify(found) == found[-1]
    assert [entry.event for entry in found] == [
        "ledger-migrated",
        "round-opened",
        "upload-admitted",
        "upload-refused",
        "release-refused",
        "upload-audited",
        "sketch-judged",
        "norm-judged",
        "round-closed",
        "round-opened",
        "round-released",
        "sums-dropped",
        "round-opened",
        "round-closed",
    ]
    text = "".join(entry.details for entry in found)
    assert "client-1" not in text
    assert text.count(audit.client_hash(AUDIT_KEY, "client-1")) == 4
    assert audit.client_hash(AUDIT_KEY, "") not in text


def test_a_change_of_the_log_is_seen(ledger: Ledger) -> None:
    busy(ledger)
    rows(ledger, "UPDATE audit SET details = replace(details, '3', '4') WHERE sequence = 11")
    with pytest.raises(SecaggError, match="entry 11"):
        audit.verify(entries(ledger))


CHANGES: dict[str, Callable[[Ledger, ContextId], object]] = {
    "open": lambda ledger, _: opened(ledger, 2),
    "verdict": lambda ledger, name: admitted(ledger, name, 5),
    "refusal": lambda ledger, name: ledger.count_refusal(name),
    "release": lambda ledger, name: ledger.record_release(name, MANIFEST, 3, SUMS),
    "close": lambda ledger, name: ledger.close_round(name, "ABANDONED"),
    "close all": lambda ledger, _: ledger.close_all_open("RESTORED"),
    "audited": lambda ledger, name: ledger.record_audited(name, upload(1), ""),
    "found": lambda ledger, name: ledger.record_finding(name, upload(1), finding(1)),
    "given": lambda ledger, name: ledger.record_given(name, [upload(7)]),
}


def ready(ledger: Ledger) -> ContextId:
    """An open round to which any of these changes can happen."""
    name = opened(ledger)
    admitted(ledger, name, 1, 7)
    ledger.record_finding(name, upload(7), finding(7))
    return name


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_without_its_entry_is_none(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    name = ready(ledger)

    def fails(*_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error near INSERT INTO audit")

    with monkeypatch.context() as patched:
        patched.setattr(database, "next_entry", fails)
        message = refuses(StorageError, ledger, CHANGES[change], ledger, name)
    assert "INSERT" not in message
    CHANGES[change](ledger, name)


# --- failures ---------------------------------------------------------------------------------


def test_the_file_is_for_its_owner_alone(path: Path) -> None:
    previous = os.umask(0)
    try:
        with closing(reopened(path)) as ledger:
            opened(ledger)
            modes = {each.name: each.stat().st_mode & 0o777 for each in path.parent.iterdir()}
    finally:
        os.umask(previous)
    assert set(modes.values()) == {0o600}
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert len(modes) == 3


def test_commits_are_on_the_disk_when_they_return(ledger: Ledger) -> None:
    wanted = {"synchronous": 2, "journal_mode": "wal", "foreign_keys": 1, "secure_delete": 1}
    for name, value in wanted.items():
        assert rows(ledger, f"PRAGMA {name}") == [(value,)]


def test_ping_really_writes(ledger: Ledger) -> None:
    before = ledger._database._connection.total_changes
    ledger.ping()
    ledger.ping()
    assert ledger._database._connection.total_changes == before + 2
    assert events(ledger) == ["ledger-migrated"]


@pytest.mark.parametrize("limit", ["query_only = ON", "max_page_count = 1"], ids=["locked", "full"])
def test_a_ledger_that_cannot_be_written_says_so(ledger: Ledger, limit: str) -> None:
    name = ready(ledger)
    rows(ledger, f"PRAGMA {limit}")
    if "max" in limit:  # full: room for small changes is left in the pages there are
        big = b"x" * 10**6
        message = refuses(StorageError, ledger, ledger.record_release, name, MANIFEST, 3, big)
        assert "SQLITE_FULL" in message
    else:
        message = refuses(StorageError, ledger, ledger.ping)
        assert "SQLITE_READONLY" in message
        for change in CHANGES.values():
            refuses(StorageError, ledger, change, ledger, name)
    assert not {"INSERT", "UPDATE", "SELECT"} & set(message.split())
    assert current(ledger).state is RoundState.OPEN


def test_a_ledger_that_another_process_holds_says_so(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_BUSY_SECONDS", 0.0)
    with closing(reopened(path)) as ledger, closing(sqlite3.connect(path)) as other:
        name = opened(ledger)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match="SQLITE_BUSY"):
            ledger.ping()
        assert ledger.verdicts(name) == {}  # reading goes on
        with pytest.raises(StorageError):
            ledger.count_refusal(name)
        other.execute("ROLLBACK")
        assert ledger.count_refusal(name) == 1


def test_a_closed_ledger_is_unavailable(path: Path) -> None:
    ledger = reopened(path)
    ledger.close()
    ledger.close()
    for call in (ledger.ping, ledger.open_rounds, ledger.restored):
        with pytest.raises(StorageError):
            call()


@pytest.mark.parametrize("data", [b"x" * 5000, b"SQLite format 3\0" + b"\xff" * 5000])
def test_what_is_no_database_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "ledger.sqlite3"
    path.write_bytes(data)
    with pytest.raises(ConfigurationError, match=str(path)):
        reopened(path)
    assert path.read_bytes() == data


def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite3"
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE tasks (task_id TEXT)")
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match="another database"):
        reopened(path)
    assert path.read_bytes() == before


def test_a_place_that_holds_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path, tmp_path / "file" / "ledger.sqlite3"):
        with pytest.raises(ConfigurationError, match=str(path)):
            reopened(path)


# --- versions ---------------------------------------------------------------------------------

NOW = len(database.MIGRATIONS)
ADDED = ("ALTER TABLE rounds ADD COLUMN note TEXT NOT NULL DEFAULT 'old'", "CREATE TABLE more (a)")


def version(path: Path) -> int:
    with closing(sqlite3.connect(path)) as db:
        return int(db.execute("PRAGMA user_version").fetchone()[0])


def test_an_older_ledger_is_brought_forward(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(reopened(path)) as ledger:
        name = opened(ledger)
        admitted(ledger, name)
        before = entries(ledger)
    monkeypatch.setattr(database, "MIGRATIONS", (*database.MIGRATIONS, ADDED))
    with closing(reopened(path)) as ledger:
        assert ledger.admissions(name) == [(upload(1), "client-1", SEAL)]
        assert entries(ledger)[: len(before)] == before
        assert events(ledger)[-1] == "ledger-migrated"
        assert details(ledger) == {"before": NOW, "version": NOW + 1}
        assert rows(ledger, "SELECT note FROM rounds") == [("old",)]
        audit.verify(entries(ledger))
    assert version(path) == NOW + 1
    with closing(reopened(path)) as ledger:  # once
        assert events(ledger).count("ledger-migrated") == 2


@pytest.mark.parametrize("backup", [False, True])
def test_a_ledger_from_before_the_norm_check_keeps_what_it_knew(
    path: Path, monkeypatch: pytest.MonkeyPatch, backup: bool
) -> None:
    released, begun = context(1), context(2)
    with monkeypatch.context() as patched:
        patched.setattr(database, "MIGRATIONS", database.MIGRATIONS[:1])
        with closing(Database(path)) as older, older.transaction():
            for each, state in ((released, "RELEASED"), (begun, "OPEN")):
                number = each.id.round_number
                older.change(
                    "INSERT INTO rounds VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    *("task", number, 1, PLAN.digest, MODEL, each.id.round_key_id),
                    *(PLAN_BYTES, each.round_key, state, number, MANIFEST, 3, SUMS, "then", None),
                )
                older.change(
                    "INSERT INTO admissions VALUES ('task', ?, 1, ?, 'client-1', ?, '', ?)",
                    *(number, upload(number), SEAL, "OFF_GRID"),
                )
            if backup:
                older.change("INSERT INTO facts VALUES ('backup', 'then')")
    assert version(path) == 1
    if backup:
        (path.parent / "new").mkdir()
        restore_ledger(path, path.parent / "new")
        path = path.parent / "new" / path.name
    with closing(reopened(path)) as ledger:
        row = current(ledger)
        assert (row.id, row.refusals, row.judged) == (begun.id, 2, False)
        assert ledger.release(released.id) == (MANIFEST, 3, SUMS)
        assert ledger.admissions(begun.id) == [(upload(2), "client-1", SEAL)]
        assert ledger.audited(begun.id) == {upload(2): "OFF_GRID"}
        assert ledger.findings(begun.id) == {}
        assert ledger.restored() is backup
        ledger.record_finding(begun.id, upload(2), finding(2, passed=False))
        ledger.record_given(begun.id, [upload(2)])
        assert ledger.findings(begun.id) == {upload(2): finding(2, passed=False)}
        assert current(ledger).judged
        audit.verify(entries(ledger))
    assert version(path) == NOW


def test_a_migration_that_fails_leaves_the_older_version(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(reopened(path)) as ledger:
        before = dump(ledger)
    with monkeypatch.context() as patched:
        patched.setattr(database, "MIGRATIONS", (*database.MIGRATIONS, (*ADDED, "CREATE nothing")))
        with pytest.raises(ConfigurationError) as error:
            reopened(path)
        assert "CREATE" not in str(error.value)
    assert version(path) == NOW
    with closing(reopened(path)) as ledger:
        assert dump(ledger) == before


def test_a_newer_ledger_is_refused_and_left_alone(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(database, "MIGRATIONS", (*database.MIGRATIONS, ADDED))
        reopened(path).close()
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match=rf"version {NOW + 1}; run the newer"):
        reopened(path)
    assert path.read_bytes() == before


# --- backups ----------------------------------------------------------------------------------


def test_a_backup_knows_everything_but_opens_nothing(tmp_path: Path, ledger: Ledger) -> None:
    released = opened(ledger)
    # Long enough to fill pages of their own, which nothing would overwrite.
    sums, seal = SUMS * 1000, SEAL * 1000
    ledger.record_release(released, MANIFEST, 3, sums)
    name = opened(ledger, 2)
    judged(ledger, name, 1, "client-1", "", seal)
    ledger.record_finding(name, upload(1), finding(1, passed=False))
    ledger.record_given(name, [upload(1)])
    target = tmp_path / "backup.sqlite3"
    ledger.backup(target)
    assert [each.name for each in tmp_path.iterdir() if each.is_file()] == [target.name]
    assert target.stat().st_mode & 0o777 == 0o600
    data = target.read_bytes()
    assert b"client-1" in data  # it is no secret from those who may read the ledger
    for secret in (SEAL, SUMS):
        assert secret not in data
    # The ledger itself lacks nothing.
    assert ledger.admissions(name) == [(upload(1), "client-1", seal)]
    assert ledger.release(released) == (MANIFEST, 3, sums)
    assert not ledger.restored()
    with closing(reopened(target)) as copy:
        assert copy.restored()
        assert copy.release(released) == (MANIFEST, 3, None)
        assert copy.admissions(name) == []
        assert copy.verdicts(name) == {upload(1): ""}
        assert copy.findings(name) == {upload(1): finding(1, passed=False)}
        assert copy.open_rounds() == ledger.open_rounds()
        assert current(copy).judged
        assert entries(copy) == entries(ledger)
        # Where SQLite does not overwrite what it removes, an unused page would still hold it.
        assert rows(copy, "PRAGMA freelist_count") == [(0,)]
        with pytest.raises((ClosedError, DuplicateError)):
            opened(copy, 1, 2)


def test_a_restored_ledger_goes_on_once_it_was_cleared(tmp_path: Path, ledger: Ledger) -> None:
    name = opened(ledger)
    ledger.backup(tmp_path / "backup")
    with closing(reopened(tmp_path / "backup")) as copy:
        assert copy.close_all_open("RESTORED") == [name.round_key_id]
        copy.clear_restored()
        copy.clear_restored()
        assert events(copy)[-2:] == ["round-closed", "restore-cleared"]
    with closing(reopened(tmp_path / "backup")) as copy:
        assert not copy.restored()
        audit.verify(entries(copy))
        copy.backup(tmp_path / "second")
    with closing(reopened(tmp_path / "second")) as copy:
        assert copy.restored()


def test_a_backup_replaces_nothing(tmp_path: Path, ledger: Ledger) -> None:
    (tmp_path / "there").write_bytes(b"older")
    for target in (tmp_path / "there", tmp_path, tmp_path / "missing" / "backup"):
        refuses(ConfigurationError, ledger, ledger.backup, target)
    assert (tmp_path / "there").read_bytes() == b"older"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_backup_that_fails_leaves_nothing(
    tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = set(tmp_path.iterdir())
    with monkeypatch.context() as patched:
        patched.setattr(os, step, fails)
        with pytest.raises(StorageError, match="No space"):
            ledger.backup(tmp_path / "backup")
    assert set(tmp_path.iterdir()) == before
    ledger.backup(tmp_path / "backup")


# --- crashes ----------------------------------------------------------------------------------

WRITER = """
import os, sys
from pathlib import Path
from secagg.context import RoundContext
from secagg.keyholder import Finding
from secagg.parameters import IntegerSegment
from secagg.planner import make_plan
from secagg_keyholder.ledger import Ledger, Verdict

plan = make_plan([IntegerSegment("counts", 8, 100)], min_clients=3, max_clients=6)
ledger = Ledger(Path(sys.argv[1]), bytes(range(32)))

def said(*words):
    print(*words, flush=True)

number = 0
while True:
    number += 1
    context = RoundContext.create(
        plan, os.urandom(1216), task_id="task", round_number=number, attempt=1,
        model_digest=os.urandom(32),
    )
    ledger.open_round(context, b"plan", attempts_limit=1)
    said("opened", number, context.id.round_key_id.hex())
    names = [os.urandom(32) for _ in range(3)]
    for index, name in enumerate(names):
        ledger.record_verdicts(context.id, [Verdict(name, f"client-{index}", "", bytes(1500))])
        said("admitted", number, name.hex())
    for name in names:
        ledger.record_finding(context.id, name, Finding(name[::-1], name[0] < 128))
        said("found", number, name.hex())
    ledger.record_given(context.id, names)
    said("given", number, "-")
    if number % 3:
        sums = os.urandom(20000)
        ledger.record_release(context.id, sums[:32], 3, sums)
        said("released", number, sums.hex())
    elif number % 2:
        ledger.close_round(context.id, "ABANDONED")
        said("closed", number, "-")
"""


def written(path: Path, lines: int, failpoint: str = "") -> list[tuple[str, int, str]]:
    """What a process acknowledged before it was killed: after so many lines, or at a point."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        stdout=subprocess.PIPE,
        env=os.environ | {"SECAGG_FAILPOINT": failpoint},
        text=True,
    ) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(lines)]
        if not failpoint:
            process.kill()
        said += process.stdout.readlines()
    assert process.returncode == -signal.SIGKILL
    parts = (line.split() for line in said if line.endswith("\n"))
    return [(what, int(number), value) for what, number, value in parts]


def name_of(ledger: Ledger, number: int) -> ContextId:
    (row,) = rows(ledger, ROUNDS + "WHERE round_number = ?", number)
    return OpenedRound.from_row(row).id


@pytest.mark.parametrize("lines", [1, 7, 40, 150])
def test_what_was_acknowledged_survives_a_kill(path: Path, lines: int) -> None:
    said = written(path, lines)
    assert len(said) >= lines
    with closing(reopened(path)) as ledger:
        for what, number, value in said:
            name = name_of(ledger, number)
            if what == "opened":
                assert name.round_key_id.hex() == value
            elif what == "admitted":
                assert ledger.verdicts(name)[bytes.fromhex(value)] == ""
            elif what == "found":
                digest = bytes.fromhex(value)
                assert ledger.findings(name)[digest] == Finding(digest[::-1], digest[0] < 128)
            elif what == "given":
                given = rows(ledger, "SELECT judged FROM rounds WHERE round_number = ?", number)
                assert given == [(1,)]
            elif what == "released":
                sums = bytes.fromhex(value)
                assert ledger.release(name) == (sums[:32], 3, sums)
            else:
                state = rows(ledger, "SELECT state FROM rounds WHERE round_number = ?", number)
                assert state == [("CLOSED",)]
        found = entries(ledger)
        assert audit.verify(found) is not None
        assert rows(ledger, "PRAGMA integrity_check") == [("ok",)]
        assert rows(ledger, "PRAGMA foreign_key_check") == []
        # Whatever was acknowledged has its entry, and whatever has one was done.
        done = (
            len(rows(ledger, "SELECT 1 FROM rounds")),
            len(rows(ledger, "SELECT 1 FROM admissions")),
            len(rows(ledger, "SELECT 1 FROM admissions WHERE sketch_digest IS NOT NULL")),
            3 * len(rows(ledger, "SELECT 1 FROM rounds WHERE judged")),
        )
        logged = [entry.event for entry in found]
        of_each = ("round-opened", "upload-admitted", "sketch-judged", "norm-judged")
        assert tuple(logged.count(event) for event in of_each) == done
        assert len(ledger.open_rounds()) <= 1


@pytest.mark.parametrize(
    ("point", "acknowledged", "state", "uploads", "found"),
    [
        ("round-recorded", 0, "OPEN", 0, 0),
        ("upload-admitted", 1, "OPEN", 1, 0),
        ("sketch-judged", 4, "OPEN", 3, 1),
        ("verdicts-given", 7, "OPEN", 3, 3),
        ("release-recorded", 8, "RELEASED", 3, 3),
        ("round-closed", 26, "CLOSED", 3, 3),
    ],
)
def test_a_kill_at_a_point_leaves_what_was_done_there(
    path: Path, point: str, acknowledged: int, state: str, uploads: int, found: int
) -> None:
    assert len(written(path, 0, point)) == acknowledged
    with closing(reopened(path)) as ledger:
        row = current(ledger)
        assert row.state == state
        assert len(ledger.verdicts(row.id)) == uploads
        assert len(ledger.findings(row.id)) == found
        assert row.judged == (acknowledged >= 7)
        assert (ledger.release(row.id) is not None) == (state == "RELEASED")
        audit.verify(entries(ledger))


KILLED_WITHIN = """
import os, signal, sys
from pathlib import Path
from secagg_keyholder import database
from secagg_keyholder.ledger import Ledger

ledger = Ledger(Path(sys.argv[1]), bytes(range(32)))
row = ledger.current("task")
# The row is written, its audit entry is not.
database.next_entry = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
ledger.record_release(row.id, bytes(32), 3, bytes(10**7))
"""


def test_a_kill_within_a_transaction_leaves_nothing_of_it(path: Path) -> None:
    with closing(reopened(path)) as ledger:
        name = opened(ledger)
        admitted(ledger, name)
        before = dump(ledger)
    ended = subprocess.run([sys.executable, "-c", KILLED_WITHIN, str(path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    with closing(reopened(path)) as ledger:
        assert dump(ledger) == before


# --- threads ----------------------------------------------------------------------------------


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Results, or the error instead; all calls start together."""
    barrier = Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:  # noqa: ANN401
        barrier.wait(timeout=30)
        try:
            return call()
        except SecaggError as error:
            return type(error)

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


@pytest.mark.parametrize("shared", [True, False], ids=["one ledger", "two on one file"])
def test_two_threads_open_an_attempt_once(path: Path, ledger: Ledger, shared: bool) -> None:
    with closing(reopened(path)) as second:
        other = ledger if shared else second
        for number in range(1, 11):
            found = at_once(lambda: opened(ledger, number), lambda: opened(other, number))  # noqa: B023
            assert sum(isinstance(each, ContextId) for each in found) == 1
            assert DuplicateError in found
    audit.verify(entries(ledger))


def test_two_threads_release_a_round_once(ledger: Ledger) -> None:
    for number in range(1, 11):
        name = opened(ledger, number)
        found = at_once(
            lambda: ledger.record_release(name, b"a" * 32, 3, b"a"),  # noqa: B023
            lambda: ledger.record_release(name, b"b" * 32, 3, b"b"),  # noqa: B023
        )
        assert sorted(map(str, found)) == sorted(map(str, [None, ClosedError]))
        release = ledger.release(name)
        assert release is not None
        assert release.sums == release.manifest[:1] == (b"a" if found[0] is None else b"b")


def test_many_threads_lose_no_count_and_break_no_chain(ledger: Ledger) -> None:
    name = opened(ledger)

    def work(thread: int) -> list[int]:
        counts = []
        for index in range(10):
            admitted(ledger, name, 100 * thread + index)
            counts.append(ledger.count_refusal(name))
            ledger.admissions(name)
        return counts

    counts = at_once(*(lambda thread=thread: work(thread) for thread in range(4)))
    assert sorted(chain.from_iterable(counts)) == list(range(1, 41))
    assert len(ledger.verdicts(name)) == 40
    audit.verify(entries(ledger))


def test_a_backup_of_a_busy_ledger_is_consistent(tmp_path: Path, ledger: Ledger) -> None:
    name = opened(ledger)

    def write() -> None:
        for index in range(50):
            admitted(ledger, name, index)

    at_once(write, lambda: ledger.backup(tmp_path / "backup"))
    with closing(reopened(tmp_path / "backup")) as copy:
        logged = events(copy).count("upload-admitted")
        assert logged == len(copy.verdicts(name))
        audit.verify(entries(copy))


# --- any sequence of calls --------------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """One task of a ledger beside a plain model of it; the process restarts at any time."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self._path = Path(self._folder.name, "ledger.sqlite3")
        self._ledger = reopened(self._path)
        self._rounds: dict[tuple[int, int], str] = {}
        self._names: dict[tuple[int, int], ContextId] = {}
        self._verdicts: dict[tuple[int, int], dict[bytes, tuple[str, str]]] = {}

    def teardown(self) -> None:
        self._ledger.close()
        self._folder.cleanup()

    @rule(number=st.integers(1, 4), attempt=st.integers(1, 3))
    def open(self, number: int, attempt: int) -> None:
        wanted, fresh = (number, attempt), context(number, attempt)
        released = any(n >= number and s == "RELEASED" for (n, _), s in self._rounds.items())
        late = bool(self._rounds) and wanted < max(self._rounds)
        if wanted in self._rounds and wanted == max(self._rounds):
            with pytest.raises(DuplicateError):
                self._ledger.open_round(fresh, PLAN_BYTES, attempts_limit=6)
        elif late or released or len(self._rounds) >= 6:
            with pytest.raises(ClosedError):
                self._ledger.open_round(fresh, PLAN_BYTES, attempts_limit=6)
        else:
            still_open = [key for key, state in self._rounds.items() if state == "OPEN"]
            closed = self._ledger.open_round(fresh, PLAN_BYTES, attempts_limit=6)
            assert closed == [self._names[key].round_key_id for key in still_open]
            self._rounds |= dict.fromkeys(still_open, "CLOSED") | {wanted: "OPEN"}
            self._names[wanted], self._verdicts[wanted] = fresh.id, {}

    @precondition(lambda self: self._rounds)
    @rule(
        data=st.data(),
        index=st.integers(1, 4),
        client=st.sampled_from(["al", "bo", "cy"]),
        reason=st.sampled_from(["", "", "MALFORMED"]),
    )
    def judge(self, data: st.DataObject, index: int, client: str, reason: str) -> None:
        key = data.draw(st.sampled_from(sorted(self._rounds)))
        known = self._verdicts[key]
        arguments = (self._ledger, self._names[key], index, client, reason, client.encode())
        accepted = [d for d, (owner, said) in known.items() if (owner, said) == (client, "")]
        if upload(index) in known and (not reason and known[upload(index)][0] != client):
            with pytest.raises(DuplicateError):
                judged(*arguments)
        elif upload(index) in known:
            assert judged(*arguments) == known[upload(index)][1]
        elif not reason and accepted:
            with pytest.raises(DuplicateError):
                judged(*arguments)
        elif self._rounds[key] != "OPEN":
            with pytest.raises(ClosedError):
                judged(*arguments)
        else:
            assert judged(*arguments) == reason
            known[upload(index)] = (client, reason)

    @precondition(lambda self: self._rounds)
    @rule(data=st.data(), content=st.sampled_from([b"a", b"b"]))
    def release(self, data: st.DataObject, content: bytes) -> None:
        key = data.draw(st.sampled_from(sorted(self._rounds)))
        before = self._ledger.release(self._names[key])
        arguments = (self._names[key], content * 32, 3, content)
        if self._rounds[key] == "CLOSED" or (before is not None and before.sums != content):
            with pytest.raises(ClosedError):
                self._ledger.record_release(*arguments)
            assert self._ledger.release(self._names[key]) == before
        else:
            self._ledger.record_release(*arguments)
            assert self._ledger.release(self._names[key]) == arguments[1:]
            self._rounds[key] = "RELEASED"

    @precondition(lambda self: self._rounds)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self._rounds)))
        self._ledger.close_round(self._names[key], "ABANDONED")
        if self._rounds[key] == "OPEN":
            self._rounds[key] = "CLOSED"

    @rule()
    def restart(self) -> None:
        self._ledger.close()
        self._ledger = reopened(self._path)

    @invariant()
    def agrees(self) -> None:
        newest = self._ledger.current("task")
        assert (newest and newest.key[1:]) == (max(self._rounds) if self._rounds else None)
        for key, state in self._rounds.items():
            name, known = self._names[key], self._verdicts[key]
            assert (self._ledger.release(name) is not None) == (state == "RELEASED")
            assert self._ledger.verdicts(name) == {d: said for d, (_, said) in known.items()}
            seals = [(d, who, who.encode()) for d, (who, said) in known.items() if not said]
            assert self._ledger.admissions(name) == (seals if state == "OPEN" else [])
        still_open = [key for key, state in self._rounds.items() if state == "OPEN"]
        assert [row.key[1:] for row in self._ledger.open_rounds()] == still_open
        audit.verify(entries(self._ledger))


Machine.TestCase.settings = settings(deadline=None, max_examples=40, stateful_step_count=25)
TestAnySequence = Machine.TestCase


def test_a_file_that_makes_sqlite_ask_for_all_memory_is_an_error_about_the_file(
    tmp_path: Path,
) -> None:
    file = tmp_path / "ledger.sqlite3"
    with (
        pytest.raises(ConfigurationError, match=r"ledger\.sqlite3: MemoryError"),
        database.as_error(ConfigurationError, file),
    ):
        raise MemoryError


def test_a_ledger_of_a_version_below_zero_is_damaged(tmp_path: Path) -> None:
    file = tmp_path / "ledger.sqlite3"
    Database(file).close()
    with closing(sqlite3.connect(file)) as opened:
        opened.execute("PRAGMA user_version = -1")
    with pytest.raises(ConfigurationError, match="it is damaged"):
        Database(file)
