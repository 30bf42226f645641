"""The noise audit through the coordinator: a sum that does not open costs the liar, not the round.

Client 1 lies, the others are honest; only opening the sum can tell.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest.mock import patch

import cohort
import numpy as np
import pytest
import structlog
from key_holders import LocalKeyHolder
from numpy.typing import NDArray
from servers import (
    DEADLINE_S,
    DOWN,
    START,
    Killed,
    Server,
    breathe,
    dies_at,
    exactly,
    running,
    scenario,
    task,
)
from serving import soon

from secagg import audit, ring
from secagg.context import RoundContext
from secagg.parameters import MODULUS, RING_DEGREE
from secagg.receipts import Receipt
from secagg.residues import widen
from secagg.sealing import seal, seal_info
from secagg.upload import Admission, Upload
from secagg_server.key_holder import KEY_HOLDER_ATTEMPTS
from secagg_server.schema import UploadRow
from secagg_server.states import RoundState, TaskState, UploadState
from secagg_server.store import RoundRow

HONEST = [0, 2, 3, 5]
Lie = Callable[[RoundContext, int], Upload]


def noise_under_an_honest_seal(context: RoundContext, index: int) -> Upload:
    """A seed sealed for, and a receipt over, bytes that this seed did not encrypt."""
    noise = cohort.noise_upload(context, index)
    key, name = cohort.identity(index), noise.admission.receipt.upload_digest
    seed = bytes([index]) * 32
    sealed = seal(seed, context.round_key, seal_info(context.id.digest, key.public, name))
    return Upload(Admission(Receipt.sign(key, context.id, name, sealed), sealed), noise.payload)


async def collect(
    server: Server,
    *,
    number: int = 1,
    attempt: int = 1,
    honest: Iterable[int] = HONEST,
    liars: Iterable[int] = (1,),
    lie: Lie = cohort.off_grid,
) -> RoundContext:
    """A round with these clients, closed."""
    context = (await server.collecting(number, attempt)).context
    for index in liars:
        server.send(context, lie(context, index))
    server.send_all(context, honest)
    server.clock.advance(DEADLINE_S)
    return context


def standing(server: Server, context: RoundContext) -> dict[bytes, tuple[UploadState, str]]:
    """State and reason of each upload, by signing key."""

    def rows(session) -> dict[bytes, tuple[UploadState, str]]:  # type: ignore[no-untyped-def]  # noqa: ANN001
        found = session.query(UploadRow).filter_by(
            task_id="task", round_number=context.id.round_number, attempt=context.id.attempt
        )
        return {row.client_key: (row.state, row.reason) for row in found}

    return server.store.database.read(rows)


def verify_named(
    server: Server, context: RoundContext, *liars: int, honest: Iterable[int] = HONEST
) -> None:
    """The liars are out with the reason, the others are the sum."""
    wanted = {cohort.identity(i).public: (UploadState.REJECTED, "OFF_GRID") for i in liars}
    wanted |= {cohort.identity(i).public: (UploadState.ACCEPTED, "") for i in honest}
    assert standing(server, context) == wanted
    row = server.row(context.id.round_number, context.id.attempt)
    assert (row.state, row.audited) == (RoundState.DONE, True)
    assert row.contributors == len(list(honest))
    exactly(server.sums(context.plan, context.id.round_number), cohort.clear_sums(context, honest))


# --- liars are named ------------------------------------------------------------------------------


@scenario
async def test_a_client_off_the_grid_is_named_in_every_round_and_costs_none(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task(rounds=4))
        for number in range(1, 5):
            context = await collect(server, number=number)
            await server.ended(number)
            verify_named(server, context, 1)
        assert await server.task_ended() == (TaskState.FINISHED, "")
        assert [row.attempt for row in server.store.rounds("task")] == [1] * 4
        assert server.store.task("task").model_version == 4
        # Two sums of one round would show the difference between them.
        assert server.key_holder.calls.count("check_sum") == 2 * 4
        assert server.key_holder.calls.count("release") == 4
        assert len(server.events("round-audited")) == 4
        audit.verify(server.store.audit())


@pytest.mark.parametrize("lie", [cohort.off_grid, noise_under_an_honest_seal])
@pytest.mark.parametrize("liars", [[1], [1, 4], [4, 0]])
def test_whoever_lies_and_however_many_the_sum_is_that_of_the_others(
    lie: Lie, liars: list[int], tmp_path: Path
) -> None:
    async def work() -> None:
        honest = [index for index in range(6) if index not in liars]
        async with running(tmp_path) as server:
            server.create(task(rounds=1))
            context = await collect(server, honest=honest, liars=liars, lie=lie)
            assert await server.task_ended() == (TaskState.FINISHED, "")
            verify_named(server, context, *liars, honest=honest)

    asyncio.run(work())


@scenario
async def test_the_audit_of_uploads_of_several_chunks(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task(cohort.long_plan(), rounds=1))
        context = await collect(server)
        assert await server.task_ended() == (TaskState.FINISHED, "")
        verify_named(server, context, 1)


@scenario
async def test_a_refused_seal_and_an_upload_off_the_grid_in_one_round(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task(rounds=1))
        context = (await server.collecting()).context
        server.send(context, cohort.broken_seal(context, 4))
        await collect(server)
        assert await server.task_ended() == (TaskState.FINISHED, "")
        rejected = standing(server, context)
        assert rejected[cohort.identity(4).public] == (UploadState.REJECTED, "INVALID_SEAL")
        assert rejected[cohort.identity(1).public] == (UploadState.REJECTED, "OFF_GRID")
        exactly(server.sums(context.plan, 1), cohort.clear_sums(context, HONEST))


@scenario
async def test_honest_rounds_are_not_audited(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task(rounds=1))
        await collect(server, liars=[])
        await server.task_ended()
        assert "audit" not in server.key_holder.calls
        assert not server.row(1, 1).audited


@scenario
async def test_of_each_upload_only_dithered_low_bits_leave_and_none_twice(folder: Path) -> None:
    """A second dither of the same upload would tell the key holder more of its values."""
    key_holder, seen = LocalKeyHolder(), []
    ask = key_holder.audit

    async def watched(context: RoundContext, name: bytes, low: NDArray[np.uint32]) -> str:
        seen.append((name, low))
        return await ask(context, name, low)

    key_holder.audit = watched  # type: ignore[method-assign]
    key_holder.fail("audit", DOWN, times=KEY_HOLDER_ATTEMPTS - 1)
    async with running(folder, key_holder) as server:
        server.create(task(rounds=1))
        context = (await server.collecting()).context
        uploads = {u.admission.receipt.upload_digest: u for u in _uploads(context)}
        for upload in uploads.values():
            server.send(context, upload)
        server.clock.advance(DEADLINE_S)
        assert await server.task_ended() == (TaskState.FINISHED, "")
    assert {name for name, _ in seen} == uploads.keys()
    assert len(seen) == len(uploads) + KEY_HOLDER_ATTEMPTS - 1
    for name, upload in uploads.items():
        coefficients = ring.from_ntt(widen(upload.payload, context.plan.blocks)) % MODULUS
        copies = [low for other, low in seen if other == name]
        for _, layout, part in context.plan.block_ranges():
            grid = 1 << layout.shift
            assert copies[0][part].max() < grid
            moved = (copies[0][part].astype(np.int64) - coefficients[part] + 3) % grid - 3
            # One less by the dither, and two either way by the cover.
            assert set(np.unique(moved)) == set(range(-3, 3))
        assert all(np.array_equal(copies[0], copy) for copy in copies)


def _uploads(context: RoundContext) -> list[Upload]:
    return [cohort.off_grid(context, 1), *(cohort.encrypted(context, i) for i in HONEST)]


@scenario
async def test_logs_of_an_audit_name_no_client(folder: Path) -> None:
    with structlog.testing.capture_logs() as log:
        async with running(folder) as server:
            server.create(task(rounds=1))
            await collect(server)
            await server.task_ended()
            entries = str(list(server.store.audit()))
    assert [(entry["event"], entry.get("named")) for entry in log] == [
        ("noise_audit", 1),
        ("round_done", None),
    ]
    for index in [1, *HONEST]:
        key = cohort.identity(index).public
        assert key.hex() not in str(log) + entries
        assert str(key) not in str(log)


# --- audits that cannot save the attempt ----------------------------------------------------------


async def voided(server: Server, reason: str) -> RoundRow:
    """The round's record: the key holder has had its sum, and is given no other one of it."""
    row = await server.ended(1, 1)
    assert (row.state, row.reason.partition(":")[0]) == (RoundState.ABORTED, reason)
    assert server.store.task("task").rounds_done == 1
    assert server.store.task("task").model_version == 0
    assert server.store.attempts("task", 1) == 1
    assert not (server.folder / "sums").exists()
    return row


async def aborted(server: Server, reason: str) -> RoundRow:
    """The first attempt's record; the next attempt is done by honest clients."""
    row = await server.ended(1, 1)
    assert (row.state, row.reason.partition(":")[0]) == (RoundState.ABORTED, reason)
    assert np.array_equal(server.model(0), START)
    assert server.store.task("task").model_version == 0
    assert not (server.folder / "models" / "task" / "1.f32").exists()
    assert not (server.folder / "sums").exists()
    context = await collect(server, attempt=2, liars=[])
    assert (await server.ended(1, 2)).state is RoundState.DONE
    exactly(server.sums(context.plan, 1), cohort.clear_sums(context, HONEST))
    return row


@scenario
async def test_with_too_few_left_after_the_audit_the_attempt_is_aborted(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task())
        context = await collect(server, honest=[0, 2], liars=[1, 4])
        row = await aborted(server, "QUORUM_NOT_REACHED")
        assert "got 2" in row.reason
        assert server.key_holder.calls.count("check_sum") == 1 + 1
        assert server.key_holder.calls.count("release") == 0 + 1
        assert server.key_holder.closed == [context]
        assert standing(server, context)[cohort.identity(4).public][1] == "OFF_GRID"


@scenario
async def test_an_upload_out_of_range_costs_the_round_and_starts_no_audit(folder: Path) -> None:
    """Its noise is honest: only the sum itself shows it, and no second one is sent after that."""
    async with running(folder) as server:
        server.create(task())
        context = await collect(server, lie=cohort.out_of_range)
        row = await voided(server, "RELEASE_REFUSED")
        assert not row.audited
        assert "audit" not in server.key_holder.calls
        assert server.key_holder.calls.count("release") == 1
        assert server.key_holder.closed == [context]
        assert {state for state, _ in standing(server, context).values()} == {UploadState.ACCEPTED}


def pushing(context: RoundContext, index: int) -> Upload:
    """Errors as large as an honest one can be, all the same way: five of them leave the guard."""
    with patch("secagg.encryptor.errors", lambda _, blocks: np.full((blocks, RING_DEGREE), 21)):
        return cohort.encrypted(context, index)


@scenario
async def test_clients_that_push_together_are_named_by_nobody_and_cost_the_attempt(
    folder: Path,
) -> None:
    async with running(folder) as server:
        server.create(task())
        context = await collect(server, honest=[], liars=range(5), lie=pushing)
        row = await aborted(server, "RELEASE_REFUSED")
        assert "names nobody" in row.reason
        assert row.audited
        assert server.key_holder.calls.count("release") == 0 + 1
        assert {state for state, _ in standing(server, context).values()} == {UploadState.ACCEPTED}


@scenario
async def test_a_second_refusal_after_the_audit_ends_the_round(folder: Path) -> None:
    """One off the grid hides one out of range: the audit finds the first, the sum is still shut."""
    async with running(folder) as server:
        server.create(task())
        context = (await server.collecting()).context
        server.send(context, cohort.out_of_range(context, 4))
        await collect(server)
        await voided(server, "RELEASE_REFUSED")
        rejected = standing(server, context)
        assert rejected[cohort.identity(1).public] == (UploadState.REJECTED, "OFF_GRID")
        assert rejected[cohort.identity(4).public] == (UploadState.ACCEPTED, "")
        calls = server.key_holder.calls[: server.key_holder.calls.index("close_round")]
        assert [calls.count(name) for name in ("check_sum", "audit", "release")] == [2, 6, 1]


@pytest.mark.parametrize("answered", [False, True], ids=["not done", "done, answer lost"])
def test_a_key_holder_that_is_back_in_time_goes_on_with_the_audit(
    answered: bool, tmp_path: Path
) -> None:
    async def work() -> None:
        key_holder = LocalKeyHolder()
        for _ in range(KEY_HOLDER_ATTEMPTS - 1):
            (key_holder.lose_answer if answered else key_holder.fail)("audit", DOWN)
        async with running(tmp_path, key_holder) as server:
            server.create(task(rounds=1))
            context = await collect(server)
            assert await server.task_ended() == (TaskState.FINISHED, "")
            verify_named(server, context, 1)

    asyncio.run(work())


@scenario
async def test_a_key_holder_that_stays_away_during_the_audit_costs_the_attempt(
    folder: Path,
) -> None:
    key_holder = LocalKeyHolder()
    key_holder.fail("audit", DOWN, times=KEY_HOLDER_ATTEMPTS)
    async with running(folder, key_holder) as server:
        server.create(task())
        context = await collect(server)
        row = await aborted(server, "UNAVAILABLE")
        assert not row.audited
        assert standing(server, context)[cohort.identity(1).public][0] is UploadState.ACCEPTED


# --- restarts during the audit --------------------------------------------------------------------


Arm = Callable[[Server], None]


def at_store(method: str, *, done: bool, call: int = 1) -> Arm:
    return lambda server: dies_at(server.store, method, done=done, call=call)


def _after_two_answers(server: Server) -> None:
    ask, answers = server.key_holder.audit, 0

    async def dying(*arguments: object) -> str:
        nonlocal answers
        answers += 1
        reason = await ask(*arguments)  # type: ignore[arg-type]
        if answers == 2:
            server.key_holder.audit = ask  # type: ignore[method-assign]
            raise Killed
        return reason

    server.key_holder.audit = dying  # type: ignore[method-assign]


# `advance` steps: checking, summing, releasing, auditing, summing, releasing.
POINTS: dict[str, tuple[Arm, RoundState]] = {
    "auditing": (at_store("advance", done=True, call=4), RoundState.AUDITING),
    "some audited": (_after_two_answers, RoundState.AUDITING),
    "all audited": (at_store("set_audited", done=False), RoundState.AUDITING),
    "audit recorded": (at_store("set_audited", done=True), RoundState.AUDITING),
    "one left out": (at_store("reject_upload", done=True), RoundState.AUDITING),
    "all left out": (at_store("reject_upload", done=True, call=2), RoundState.AUDITING),
    "manifest recorded": (at_store("record_manifest", done=True, call=2), RoundState.AUDITING),
    "manifest fixed": (at_store("advance", done=True, call=5), RoundState.SUMMING),
    "releasing again": (at_store("advance", done=True, call=6), RoundState.RELEASING),
    "model stored": (at_store("finish_round", done=False), RoundState.RELEASING),
}


async def killed(folder: Path, key_holder: LocalKeyHolder, arm: Arm) -> tuple[RoundContext, str]:
    """Two liars and a server that dies over them; the round, and the state it was left in."""
    server = Server(folder, key_holder)
    arm(server)
    server.create(task(rounds=1))
    work = server.coordinator._running["task"]
    context = await collect(server, liars=[1, 4])
    with pytest.raises(Killed):
        await work
    state = server.row(1, 1).state
    server.store.close()
    return context, state


@pytest.mark.parametrize("restarted", [False, True], ids=["the server", "both"])
@pytest.mark.parametrize("point", POINTS)
def test_an_audit_that_a_crash_interrupts_ends_as_if_none_had(
    point: str, restarted: bool, tmp_path: Path
) -> None:
    async def work() -> None:
        key_holder = LocalKeyHolder()
        arm, left = POINTS[point]
        context, state = await killed(tmp_path, key_holder, arm)
        assert state is left
        if restarted:
            key_holder.restart()
        async with running(tmp_path, key_holder) as server:
            server.coordinator.resume()
            assert await server.task_ended() == (TaskState.FINISHED, "")
            assert [row.attempt for row in server.store.rounds("task")] == [1]
            verify_named(server, context, 1, 4)
            assert server.events("round-audited") != []
            audit.verify(server.store.audit())

    asyncio.run(work())


@pytest.mark.parametrize("point", POINTS)
def test_an_audit_that_the_key_holder_has_forgotten_costs_the_attempt(
    point: str, tmp_path: Path
) -> None:
    async def work() -> None:
        key_holder = LocalKeyHolder()
        await killed(tmp_path, key_holder, POINTS[point][0])
        key_holder.lose()
        async with running(tmp_path, key_holder) as server:
            server.coordinator.resume()
            context = await collect(server, attempt=2, liars=[])
            assert await server.task_ended() == (TaskState.FINISHED, "")
            row = server.row(1, 1)
            assert (row.state, row.reason.partition(":")[0]) == (
                RoundState.ABORTED,
                "ROUND_CLOSED",
            )
            exactly(server.sums(context.plan, 1), cohort.clear_sums(context, HONEST))

    asyncio.run(work())


@pytest.mark.parametrize("point", ["audit recorded", "auditing"])
def test_an_audit_that_named_nobody_names_nobody_after_a_restart(
    point: str, tmp_path: Path
) -> None:
    async def work() -> None:
        key_holder = LocalKeyHolder()
        first = Server(tmp_path, key_holder)
        POINTS[point][0](first)
        first.create(task())
        work = first.coordinator._running["task"]
        await collect(first, honest=[], liars=range(5), lie=pushing)
        with pytest.raises(Killed):
            await work
        first.store.close()
        async with running(tmp_path, key_holder) as server:
            server.coordinator.resume()
            await aborted(server, "RELEASE_REFUSED")

    asyncio.run(work())


@scenario
async def test_a_key_holder_that_restarts_between_refusal_and_audit_still_audits(
    folder: Path,
) -> None:
    key_holder = LocalKeyHolder()
    async with running(folder, key_holder) as server:
        advance = server.store.advance

        def advanced(key: tuple[str, int, int], state: RoundState) -> None:
            advance(key, state)
            if state in (RoundState.AUDITING, RoundState.SUMMING):
                key_holder.restart()

        server.store.advance = advanced  # type: ignore[method-assign]
        server.create(task(rounds=1))
        context = await collect(server)
        assert await server.task_ended() == (TaskState.FINISHED, "")
        verify_named(server, context, 1)


def test_an_upload_that_is_audited_again_after_a_restart_has_the_same_dither(
    tmp_path: Path,
) -> None:
    """Low bits under two dithers would tell twice as much."""
    seen: list[tuple[bytes, bytes]] = []

    class Remembering(LocalKeyHolder):
        async def audit(
            self, context: RoundContext, upload_digest: bytes, low: NDArray[np.uint32]
        ) -> str:
            seen.append((upload_digest, low.tobytes()))
            return await super().audit(context, upload_digest, low)

    async def work() -> None:
        key_holder = Remembering()
        key_holder.lose_answer("audit", Killed())
        server = Server(tmp_path, key_holder)
        server.create(task())
        running_task = server.coordinator._running["task"]
        await collect(server)
        with pytest.raises(Killed):
            await running_task
        server.store.close()
        server = Server(tmp_path, key_holder)
        server.coordinator.resume()
        await server.ended()
        await server.coordinator.stop()
        server.store.close()

    asyncio.run(work())
    assert len(seen) == len({upload for upload, _ in seen}) + 1
    assert len(set(seen)) == len({upload for upload, _ in seen})


@pytest.mark.parametrize("dies", ["the server", "the answer"])
def test_a_refusal_that_was_never_heard_costs_nothing(dies: str, tmp_path: Path) -> None:
    """Asked again for the same sum, the key holder refuses it again and counts it once."""

    async def work() -> None:
        key_holder = LocalKeyHolder()
        error = Killed() if dies == "the server" else DOWN
        key_holder.lose_answer("release", error)
        server = Server(tmp_path, key_holder)
        server.create(task())
        running_task = server.coordinator._running["task"]
        context = await collect(server)
        if dies == "the server":
            with pytest.raises(Killed):
                await running_task
            server.store.close()
            server = Server(tmp_path, key_holder)
            server.coordinator.resume()
        await server.ended()
        verify_named(server, context, 1)
        await server.coordinator.stop()
        server.store.close()

    asyncio.run(work())


@scenario
async def test_the_operator_ends_a_task_during_its_audit(folder: Path) -> None:
    key_holder = LocalKeyHolder()
    asked, never = asyncio.Event(), asyncio.Event()

    async def hangs(*_: object) -> str:
        asked.set()
        await never.wait()
        return ""

    key_holder.audit = hangs  # type: ignore[method-assign]
    async with running(folder, key_holder) as server:
        server.create(task())
        context = await collect(server)
        await soon(asked.is_set)
        await server.coordinator.abort("task")
        assert server.row(1, 1).state is RoundState.ABORTED
        assert key_holder.closed == [context]
        await server.tidied()
        server.clock.advance(10 * DEADLINE_S)
        await breathe()
        assert len(server.store.rounds("task")) == 1
