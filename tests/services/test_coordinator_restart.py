"""A server that dies at any point, and a key holder that restarts or loses all it had."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
from collections.abc import Callable, Iterator
from pathlib import Path

import cohort
import numpy as np
import pytest
from clocks import EPOCH, ManualClock
from key_holders import LocalKeyHolder
from servers import (
    DEADLINE_S,
    DOWN,
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

from secagg import audit
from secagg.context import RoundContext
from secagg.errors import ClosedError, DuplicateError
from secagg_server import retention
from secagg_server.coordinator import RESTART_GRACE_S
from secagg_server.key_holder import KEY_HOLDER_ATTEMPTS
from secagg_server.states import RoundState, TaskState, UploadState
from secagg_server.tasks import TaskSpec

HONEST = [0, 2, 3, 5]


def later(seconds: float) -> ManualClock:
    """The clock of a process that starts so long after the first one."""
    return ManualClock(EPOCH + datetime.timedelta(seconds=seconds))


def send_cohort(server: Server, context: RoundContext) -> None:
    """Four clients whose sum is known, and one that the key holder refuses."""
    server.send_all(context, HONEST)
    server.send(context, cohort.broken_seal(context, 1))


async def killed(folder: Path, key_holder: LocalKeyHolder, arm: Arm, spec: TaskSpec) -> RoundState:
    """Let a server run a round until it dies where it was told to; the state it leaves behind."""
    server = Server(folder, key_holder)
    arm(server)
    server.create(spec)
    work = server.coordinator._running["task"]
    await soon(lambda: server.newest() is not None or work.done())
    if not work.done():
        send_cohort(server, (await server.collecting()).context)
        server.clock.advance(DEADLINE_S)
    with pytest.raises(Killed):
        await work
    state = server.row(1, 1).state
    server.store.close()
    return state


async def to_the_end(server: Server) -> RoundContext:
    """Take part in whatever collects until the task has ended; the last round's context."""
    while True:
        await soon(
            lambda: (
                server.newest() is not None
                or server.store.task("task").state is not TaskState.RUNNING
            )
        )
        if (current := server.rounds._open.get("task")) is None:
            assert await server.task_ended() == (TaskState.FINISHED, "")
            return server.key_holder.contexts[-1]
        await server.clock.watched()
        if not server.store.accepted(current.context):
            send_cohort(server, current.context)
        server.clock.advance(DEADLINE_S)
        await soon(lambda seen=current: server.rounds._open.get("task") is not seen)  # type: ignore[misc]


def verify_result(server: Server, context: RoundContext) -> None:
    exactly(server.sums(context.plan, 1), cohort.clear_sums(context, HONEST))
    row = server.row(1, context.id.attempt)
    assert (row.state, row.contributors) == (RoundState.DONE, len(HONEST))
    assert server.store.task("task").model_version == 1
    assert len(server.events("round-finished")) == 1
    audit.verify(server.store.audit())


# --- the server dies ----------------------------------------------------------------------------

Arm = Callable[[Server], None]


def at_store(method: str, *, done: bool, call: int = 1) -> Arm:
    return lambda server: dies_at(server.store, method, done=done, call=call)


def at_answer(call: str) -> Arm:
    return lambda server: server.key_holder.lose_answer(call, Killed())


# Where it dies, and the state that the next process finds.
POINTS: dict[str, tuple[Arm, RoundState]] = {
    "attempt recorded": (at_store("create_round", done=True), RoundState.CREATED),
    "key opened": (at_answer("open_round"), RoundState.CREATED),
    "collecting": (at_store("open_round", done=True), RoundState.COLLECTING),
    "uploads accepted": (at_store("advance", done=False), RoundState.COLLECTING),
    "closed": (at_store("advance", done=True), RoundState.CHECKING),
    "judged": (at_answer("judge"), RoundState.CHECKING),
    "refusal recorded": (at_store("reject_upload", done=True), RoundState.CHECKING),
    "manifest recorded": (at_store("record_manifest", done=True), RoundState.CHECKING),
    "manifest fixed": (at_store("advance", done=True, call=2), RoundState.SUMMING),
    "summed": (at_store("advance", done=False, call=3), RoundState.SUMMING),
    "releasing": (at_store("advance", done=True, call=3), RoundState.RELEASING),
    "released": (at_answer("release"), RoundState.RELEASING),
    "model stored": (at_store("finish_round", done=False), RoundState.RELEASING),
    "finished": (at_store("finish_round", done=True), RoundState.DONE),
}
# Whose key the key holder needs, but no longer has when it lost everything.
NEEDS_ITS_KEY = POINTS.keys() - {"attempt recorded", "key opened", "finished"}


def test_every_state_that_a_restart_can_find_is_among_the_points() -> None:
    audited = {RoundState.AUDITING}  # see the tests of the audit
    assert {state for _, state in POINTS.values()} == set(RoundState) - audited - {
        RoundState.ABORTED
    }


@pytest.mark.parametrize("restarted", [False, True], ids=["the server", "both"])
@pytest.mark.parametrize("point", POINTS)
def test_the_next_process_finishes_the_round_with_the_very_sum(
    point: str, restarted: bool, tmp_path: Path
) -> None:
    async def work() -> None:
        key_holder = LocalKeyHolder()
        arm, left = POINTS[point]
        assert await killed(tmp_path, key_holder, arm, task(rounds=1)) is left
        if restarted:
            key_holder.restart()
        async with running(tmp_path, key_holder) as server:
            server.coordinator.resume()
            context = await to_the_end(server)
            assert [row.attempt for row in server.store.rounds("task")] == [1]
            assert len({found.round_key for found in key_holder.contexts}) == 1
            verify_result(server, context)
            # Those of a task that ended in this very moment are left to the next sweep.
            assert bool(server.upload_files()) is (point == "finished")
            retention.sweep(server.store, server.blobs, EPOCH)
            await server.tidied()

    asyncio.run(work())


@pytest.mark.parametrize("point", POINTS)
def test_after_the_key_holder_lost_all_the_attempt_is_given_up_and_the_next_one_done(
    point: str, tmp_path: Path
) -> None:
    async def work() -> None:
        key_holder = LocalKeyHolder()
        await killed(tmp_path, key_holder, POINTS[point][0], task(rounds=1))
        key_holder.lose()
        async with running(tmp_path, key_holder) as server:
            server.coordinator.resume()
            context = await to_the_end(server)
            first = server.row(1, 1)
            if point in NEEDS_ITS_KEY:
                assert first.state is RoundState.ABORTED
                assert first.reason.startswith("ROUND_CLOSED: ")
            assert context.id.attempt == 1 + (point in NEEDS_ITS_KEY)
            verify_result(server, context)

    asyncio.run(work())


@scenario
async def test_a_server_that_dies_at_every_point_in_turn_still_gets_the_sum(folder: Path) -> None:
    """One death an attempt is not all there may be; the clients upload once."""
    key_holder = LocalKeyHolder()
    spec = task(rounds=1)
    await killed(folder, key_holder, POINTS["uploads accepted"][0], spec)
    for arm in (
        at_store("advance", done=True),
        at_answer("judge"),
        at_store("record_manifest", done=True),
        at_store("advance", done=True),
        at_store("advance", done=True),
        at_answer("release"),
        at_store("finish_round", done=False),
    ):
        server = Server(folder, key_holder, clock=later(10 * DEADLINE_S))
        arm(server)
        key_holder.restart()
        server.coordinator.resume()
        work = server.coordinator._running["task"]
        await soon(lambda: server.newest() is not None or work.done())  # noqa: B023
        server.clock.advance(DEADLINE_S)
        with pytest.raises(Killed):
            await work
        server.store.close()
    async with running(folder, key_holder) as again:
        again.coordinator.resume()
        context = await to_the_end(again)
        assert context.id.attempt == 1
        verify_result(again, context)


@scenario
async def test_the_rounds_after_the_interrupted_one_follow(folder: Path) -> None:
    key_holder = LocalKeyHolder()
    await killed(folder, key_holder, POINTS["released"][0], task(rounds=2))
    async with running(folder, key_holder) as server:
        server.coordinator.resume()
        second = await server.collecting(2)
        assert second.model_version == 1
        exactly(
            server.sums(second.context.plan, 1), cohort.clear_sums(key_holder.contexts[0], HONEST)
        )
        server.send_all(second.context, range(3))
        server.clock.advance(DEADLINE_S)
        assert await server.task_ended() == (TaskState.FINISHED, "")
        exactly(server.sums(second.context.plan, 2), cohort.clear_sums(second.context, range(3)))


@scenario
async def test_a_model_that_was_stored_before_the_crash_is_not_moved_twice(folder: Path) -> None:
    key_holder = LocalKeyHolder()
    await killed(folder, key_holder, POINTS["model stored"][0], task(rounds=1))
    async with running(folder, key_holder) as server:
        before = server.model(1)
        server.coordinator.resume()
        await to_the_end(server)
        np.testing.assert_array_equal(server.model(1), before)
        assert not (server.folder / "models" / "task" / "2.f32").exists()


@scenario
async def test_an_interrupted_attempt_whose_uploads_are_too_few_is_aborted(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task(rounds=1))
        server.send_all((await server.collecting()).context, range(2))
        key_holder = server.key_holder
    async with running(folder, key_holder) as server:
        server.coordinator.resume()
        await server.collecting(1, 1)
        server.clock.advance(DEADLINE_S)
        assert (await server.ended(1, 1)).reason.startswith("QUORUM_NOT_REACHED: ")
        await server.collecting(1, 2)
        await server.tidied()
        assert key_holder.closed == [key_holder.contexts[0]]


# --- the deadline goes on -----------------------------------------------------------------------


@contextlib.asynccontextmanager
async def resumed(folder: Path, clock: ManualClock, spec: TaskSpec | None = None):  # type: ignore[no-untyped-def]  # noqa: ANN201
    """A server that resumes a round which another one opened at the epoch and left collecting."""
    async with running(folder) as server:
        server.create(spec or task())
        server.send_all((await server.collecting()).context, HONEST)
        key_holder = server.key_holder
    async with running(folder, key_holder, clock=clock) as server:
        server.coordinator.resume()
        yield server, await server.collecting()


async def closes_after(server: Server, seconds: float) -> None:
    """The round collects that long, and not a millisecond more or less."""
    server.clock.advance(seconds - 0.001)
    await breathe()
    assert server.row(1, 1).state is RoundState.COLLECTING
    server.clock.advance(0.001)
    assert (await server.ended()).state is RoundState.DONE


@pytest.mark.parametrize(
    ("away_s", "left_s"),
    [
        (0.0, 30.0),
        (0.25, 29.75),
        (12.5, 17.5),
        (20.0, 10.0),
        (20.001, RESTART_GRACE_S),
        (29.9, RESTART_GRACE_S),
        (30.0, RESTART_GRACE_S),
        (1e9, RESTART_GRACE_S),  # or a clock that was wrong before
        (-0.001, DEADLINE_S),
        (-20.0, DEADLINE_S),  # a clock that was set back
        (-1e9, DEADLINE_S),
    ],
)
def test_a_resumed_round_keeps_its_deadline_but_gives_clients_time_to_come_back(
    away_s: float, left_s: float, tmp_path: Path
) -> None:
    async def work() -> None:
        async with resumed(tmp_path, later(away_s)) as (server, current):
            assert server.rounds.remaining_ms(current) == round(left_s * 1000)
            await closes_after(server, left_s)

    asyncio.run(work())


@pytest.mark.parametrize("away_s", [-100.0, 0.0, 3.0, 100.0])
def test_the_grace_is_never_longer_than_a_round(away_s: float, tmp_path: Path) -> None:
    async def work() -> None:
        spec = task(round_deadline_ms=4000)
        async with resumed(tmp_path, later(away_s), spec) as (server, current):
            assert server.rounds.remaining_ms(current) == 4000
            await closes_after(server, 4.0)

    asyncio.run(work())


@scenario
async def test_a_round_that_was_full_when_the_server_died_closes_at_once(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task(rounds=1, target_clients=4))
        current = await server.collecting()
        # The last commit was stored; the process died before it woke the coordinator.
        server.rounds.note_upload = lambda *_: None  # type: ignore[method-assign]
        server.send_all(current.context, HONEST)
        key_holder = server.key_holder
    async with running(folder, key_holder) as server:
        server.coordinator.resume()
        assert await server.task_ended() == (TaskState.FINISHED, "")
        assert server.clock.now() == 0.0
        exactly(server.sums(current.context.plan, 1), cohort.clear_sums(current.context, HONEST))


@scenario
async def test_clients_go_on_where_they_were_when_the_server_died(folder: Path) -> None:
    """Accepted, half sent, announced, and not yet there: each continues its one upload."""
    plan = cohort.long_plan()
    async with running(folder) as server:
        server.create(task(plan, rounds=1))
        current = await server.collecting()
        uploads = [cohort.encrypted(current.context, index) for index in range(4)]
        server.send(current.context, uploads[0])
        for upload in uploads[1:3]:
            server.intake.open(upload.admission)
        receipt = uploads[1].admission.receipt
        named = (current.context.id, receipt.client_key, receipt.upload_digest)
        server.intake.put_chunk(*named, 1, cohort.chunk(uploads[1], 1))
        key_holder = server.key_holder
    async with running(folder, key_holder) as server:
        server.coordinator.resume()
        context = (await server.collecting()).context
        assert context == current.context
        states = [server.intake.open(upload.admission) for upload in uploads]
        receiving = UploadState.RECEIVING
        assert states == [
            (UploadState.ACCEPTED, []),
            (receiving, [0, 2]),
            (receiving, [0, 1, 2]),
            (receiving, [0, 1, 2]),
        ]
        with pytest.raises(DuplicateError):
            server.send(context, cohort.encrypted(context, 0))
        for upload in uploads:
            server.send(context, upload)
        server.clock.advance(DEADLINE_S)
        assert (await server.ended()).contributors == 4
        exactly(server.sums(plan, 1), cohort.clear_sums(context, range(4)))


# --- what a restart must not bring back -----------------------------------------------------------


@scenario
async def test_a_restart_does_not_bring_a_failed_or_finished_task_back(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task())
        await server.collecting()
        await server.coordinator.abort("task")
    async with running(folder) as server:
        server.coordinator.resume()
        await breathe()
        assert len(server.store.rounds("task")) == 1
        assert server.key_holder.calls == []


@scenario
async def test_a_task_whose_rounds_were_all_done_finishes_after_a_restart(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task(rounds=1))
        server.send_all((await server.collecting()).context, range(3))
        server.store.end_task = lambda *_: None  # type: ignore[method-assign]
        server.clock.advance(DEADLINE_S)
        await server.ended()
        await breathe()
    async with running(folder) as server:
        server.coordinator.resume()
        assert await server.task_ended() == (TaskState.FINISHED, "")
        assert len(server.store.rounds("task")) == 1
        assert server.key_holder.calls == []


@scenario
async def test_restarts_cost_no_attempt_but_those_before_a_restart_count(folder: Path) -> None:
    """Otherwise a server that crashes and restarts tries for ever."""
    key_holder = LocalKeyHolder()
    async with running(folder, key_holder) as server:
        server.create(task(max_attempts=2))
        await server.collecting(1, 1)
        server.clock.advance(DEADLINE_S)
        await server.collecting(1, 2)
    for _ in range(3):
        async with running(folder, key_holder) as server:
            server.coordinator.resume()
            await server.collecting(1, 2)
    async with running(folder, key_holder) as server:
        server.coordinator.resume()
        await server.collecting(1, 2)
        server.clock.advance(DEADLINE_S)
        state, reason = await server.task_ended()
        # The reason is that of the last attempt, as without a restart.
        assert (state, reason.partition(":")[0]) == (TaskState.FAILED, "QUORUM_NOT_REACHED")
        assert [row.key[1:] for row in server.store.rounds("task")] == [(1, 1), (1, 2)]


@scenario
async def test_an_attempt_given_up_right_before_the_crash_is_not_tried_again(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task(max_attempts=1))
        dies_at(server.store, "end_task", done=False)
        await server.collecting()
        work = server.coordinator._running["task"]
        server.clock.advance(DEADLINE_S)
        with pytest.raises(Killed):
            await work
    async with running(folder) as server:
        server.coordinator.resume()
        assert (await server.task_ended())[0] is TaskState.FAILED
        assert len(server.store.rounds("task")) == 1


# --- the key holder restarts ----------------------------------------------------------------------


class Faltering(LocalKeyHolder):
    """Restarts, or loses everything, right before or after one of its calls has its effect."""

    def __init__(self, call: str, moment: str, loses: bool) -> None:
        super().__init__()
        self._at, self._loses = (call, moment), loses

    def _falter(self, call: str, moment: str) -> None:
        if self._at == (call, moment):
            self._at = ("", "")
            (self.lose if self._loses else self.restart)()

    @contextlib.contextmanager
    def _call(self, name: str) -> Iterator[None]:
        self._falter(name, "before")
        with super()._call(name):
            yield
        self._falter(name, "after")


MOMENTS = [
    (call, when) for call in ("open_round", "judge", "release") for when in ("before", "after")
]


@pytest.mark.parametrize(("call", "moment"), MOMENTS)
def test_a_key_holder_that_restarts_costs_nothing(call: str, moment: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path, Faltering(call, moment, loses=False)) as server:
            server.create(task(rounds=1))
            context = await to_the_end(server)
            assert context.id.attempt == 1
            verify_result(server, context)

    asyncio.run(work())


@pytest.mark.parametrize(
    ("call", "moment"), [moment for moment in MOMENTS if moment != ("release", "before")]
)
def test_a_key_holder_that_loses_its_state_costs_the_attempt_it_had_a_key_for(
    call: str, moment: str, tmp_path: Path
) -> None:
    async def work() -> None:
        async with running(tmp_path, Faltering(call, moment, loses=True)) as server:
            server.create(task(rounds=1))
            context = await to_the_end(server)
            had_key = (call, moment) not in {("open_round", "before"), ("release", "after")}
            assert context.id.attempt == 1 + had_key
            if had_key:
                assert server.row(1, 1).reason.startswith("ROUND_CLOSED: ")
            verify_result(server, context)

    asyncio.run(work())


@scenario
async def test_a_key_holder_that_loses_its_state_with_the_sum_in_hand_costs_the_round(
    folder: Path,
) -> None:
    """It has had a sum of this round; another one over another cohort could tell them apart."""
    async with running(folder, Faltering("release", "before", loses=True)) as server:
        server.create(task(rounds=1))
        await to_the_end(server)
        row = await server.ended(1, 1)
        assert row.reason.startswith("ROUND_CLOSED: ")
        assert await server.task_ended() == (TaskState.FINISHED, "")
        assert server.store.attempts("task", 1) == 1
        assert server.store.task("task").model_version == 0


@scenario
async def test_a_release_is_had_again_from_a_key_holder_that_restarted_before_it_was_heard(
    folder: Path,
) -> None:
    key_holder = Faltering("release", "after", loses=False)
    async with running(folder, key_holder) as server:
        server.create(task(rounds=1))
        key_holder.lose_answer("release", DOWN)
        context = await to_the_end(server)
        assert key_holder.calls.count("release") == 2 <= KEY_HOLDER_ATTEMPTS
        verify_result(server, context)


@scenario
async def test_uploads_for_the_attempt_before_are_refused_after_a_restart(folder: Path) -> None:
    key_holder = LocalKeyHolder()
    async with running(folder, key_holder) as server:
        server.create(task(rounds=1))
        first = await server.collecting(1, 1)
        stale = cohort.encrypted(first.context, 0)
        server.clock.advance(DEADLINE_S)
        await server.collecting(1, 2)
    async with running(folder, key_holder) as server:
        server.coordinator.resume()
        second = await server.collecting(1, 2)
        with pytest.raises(ClosedError):
            server.send(first.context, stale)
        server.send(second.context, cohort.encrypted(second.context, 0))
        assert server.store.counts(("task", 1, 2)).accepted == 1
