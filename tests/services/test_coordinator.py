"""The coordinator, with a clock that the test moves and a key holder that fails when told to."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import cohort
import numpy as np
import pytest
import structlog
from clocks import ManualClock
from key_holders import LocalKeyHolder
from numpy.typing import NDArray
from serving import soon

from secagg.context import NO_MODEL, RoundContext
from secagg.encryptor import encrypt_quantized
from secagg.errors import (
    ClosedError,
    MalformedError,
    NotReadyError,
    ReleaseError,
    SecaggError,
    UnavailableError,
)
from secagg.parameters import CHUNK_BLOCKS, IntegerSegment, Plan
from secagg.planner import make_plan
from secagg.quantize import Quantized
from secagg.release import Release, sums_sha256
from secagg.upload import Upload
from secagg.wire.codec import model_digest, model_to_bytes, sums_from_bytes
from secagg_server.blobs import BlobStore
from secagg_server.coordinator import RELEASE_ATTEMPTS, Coordinator
from secagg_server.intake import Intake
from secagg_server.rounds import OpenRound, OpenRounds
from secagg_server.states import RoundState, TaskState
from secagg_server.store import RoundRow, Store, round_key
from secagg_server.tasks import TaskSpec

DEADLINE_S = 30.0
START = np.linspace(-1, 1, 11, dtype=np.float32)


class Server:
    """Everything of a server but the network."""

    def __init__(self, folder: Path, key_holder: LocalKeyHolder) -> None:
        self.store = Store(f"sqlite:///{folder}/store.sqlite3")
        self.folder = folder / "blobs"
        self.blobs = BlobStore(self.folder)
        self.clock = ManualClock()
        self.rounds = OpenRounds(self.clock)
        self.key_holder = key_holder
        self.intake = Intake(self.store, self.blobs, self.rounds)
        self.coordinator = Coordinator(self.store, self.blobs, self.rounds, key_holder, self.clock)

    def create(self, spec: TaskSpec) -> None:
        """Create and start a task, as the operator's service does."""
        model = model_to_bytes(START) if spec.model else b""
        if spec.model:
            self.blobs.put_model(spec.task_id, 0, model)
        self.store.create_task(spec, model_digest(model))
        self.coordinator.start(spec)

    async def collecting(self, number: int = 1, attempt: int = 1) -> OpenRound:
        """The round, once it collects."""
        await soon(lambda: self._newest() == (number, attempt))
        await self.clock.watched()
        return self.rounds.newest("task", (0, 0))

    def _newest(self) -> tuple[int, int] | None:
        try:
            found = self.rounds.newest("task", (0, 0)).context.id
        except NotReadyError:
            return None
        return found.round_number, found.attempt

    def send(self, context: RoundContext, upload: Upload) -> None:
        """What the service does for a client that uploads."""
        _, missing = self.intake.open(upload.admission)
        receipt = upload.admission.receipt
        for index in missing:
            self.intake.put_chunk(
                context.id,
                receipt.client_key,
                receipt.upload_digest,
                index,
                cohort.chunk(upload, index),
            )
        self.intake.commit(context.id, receipt.client_key, receipt.upload_digest)
        accepted = self.store.counts(round_key(context)).accepted
        self.rounds.note_upload(context.id, accepted)

    def send_all(self, context: RoundContext, indexes: Iterable[int]) -> None:
        for index in indexes:
            self.send(context, cohort.encrypted(context, index))

    async def ended(self, number: int = 1, attempt: int = 1) -> RoundRow:
        """The attempt's record, once it has ended."""
        await soon(lambda: self.row(number, attempt).ended_at is not None)
        return self.row(number, attempt)

    def row(self, number: int, attempt: int) -> RoundRow:
        rows = [r for r in self.store.rounds("task") if r.key[1:] == (number, attempt)]
        return rows[0] if rows else RoundRow(ended_at=None)

    async def task_ended(self) -> tuple[TaskState, str]:
        await soon(lambda: self.store.task("task").state is not TaskState.RUNNING)
        row = self.store.task("task")
        return row.state, row.reason

    def sums(self, plan: Plan, number: int) -> tuple[NDArray[np.int64], ...]:
        return sums_from_bytes(self.blobs.sums("task", number), plan)

    def model(self, version: int) -> NDArray[np.float32]:
        return np.frombuffer(self.blobs.model("task", version), "<f4")

    def upload_files(self) -> list[Path]:
        return [path for path in (self.folder / "uploads").rglob("*") if path.is_file()]


@asynccontextmanager
async def running(folder: Path, key_holder: LocalKeyHolder | None = None) -> AsyncIterator[Server]:
    server = Server(folder, key_holder or LocalKeyHolder())
    try:
        yield server
    finally:
        await server.coordinator.stop()
        server.store.close()


def task(plan: Plan | None = None, **changes: int) -> TaskSpec:
    plan = plan or cohort.mixed_plan()
    spec = TaskSpec("task", plan, 2, round(DEADLINE_S * 1000), 3, plan.max_clients)
    return replace(spec, **changes)


def scenario(work: Callable[[Path], Coroutine[Any, Any, None]]) -> Callable[[Path], None]:
    """A test that is a coroutine."""

    def test(tmp_path: Path) -> None:
        asyncio.run(work(tmp_path))

    test.__name__, test.__doc__ = work.__name__, work.__doc__
    return test


def released(current: OpenRound, contributors: int, sums: tuple[NDArray[np.int64], ...]) -> Release:
    return Release(current.context.plan, current.context.rotation, contributors, sums)


def exactly(found: Iterable[NDArray[np.int64]], wanted: Iterable[NDArray[np.int64]]) -> None:
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


# --- rounds that succeed ------------------------------------------------------------------------


@scenario
async def test_a_round_closes_at_its_deadline_and_the_sum_is_exactly_that_in_the_clear(
    folder: Path,
) -> None:
    async with running(folder) as server:
        server.create(task())
        current = await server.collecting()
        server.send_all(current.context, range(4))
        server.clock.advance(DEADLINE_S - 0.001)
        for _ in range(50):
            await asyncio.sleep(0)
        assert server.row(1, 1).state is RoundState.COLLECTING
        server.clock.advance(0.001)
        row = await server.ended()
        assert (row.state, row.contributors) == (RoundState.DONE, 4)
        sums = server.sums(current.context.plan, 1)
        exactly(sums, cohort.clear_sums(current.context, range(4)))
        assert row.sums_sha256.hex() == sums_sha256(sums)


@scenario
async def test_the_model_moves_by_the_mean_of_the_updates_each_round(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task())
        for number in (1, 2):
            current = await server.collecting(number)
            assert current.model_version == number - 1
            name = current.context.id.model_digest
            assert name == hashlib.sha256(server.blobs.model("task", number - 1)).digest()
            server.send_all(current.context, range(3))
            server.clock.advance(DEADLINE_S)
            row = await server.ended(number)
            assert row.model_version == number
            sums = tuple(cohort.clear_sums(current.context, range(3)))
            mean = released(current, 3, sums).mean()
            flat = np.concatenate([mean[t.name].reshape(-1) for t in cohort.TENSORS])
            expected = server.model(number - 1) + flat.astype(np.float32)
            np.testing.assert_array_equal(server.model(number), expected)
        assert await server.task_ended() == (TaskState.FINISHED, "")
        assert np.array_equal(server.model(0), START)


@scenario
async def test_a_round_closes_early_once_enough_have_come(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task(target_clients=4))
        current = await server.collecting()
        server.send_all(current.context, range(3))
        for _ in range(50):
            await asyncio.sleep(0)
        assert server.row(1, 1).state is RoundState.COLLECTING
        server.send_all(current.context, [3])
        row = await server.ended()
        assert (row.state, row.contributors, server.clock.now()) == (RoundState.DONE, 4, 0.0)


@scenario
async def test_a_task_of_counts_alone_has_no_model(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task(cohort.counts_plan(), rounds=1))
        current = await server.collecting()
        assert current.context.id.model_digest == NO_MODEL
        server.send_all(current.context, range(3))
        server.clock.advance(DEADLINE_S)
        row = await server.ended()
        assert (row.state, row.model_version) == (RoundState.DONE, 0)
        release = released(current, 3, server.sums(current.context.plan, 1))
        wanted = sum(cohort.contribution(current.context.plan, i)["counts"] for i in range(3))
        np.testing.assert_array_equal(release.total(), wanted)


@scenario
async def test_a_sum_over_several_chunks_is_exact(folder: Path) -> None:
    async with running(folder) as server:
        plan = cohort.long_plan()
        assert plan.blocks > 2 * CHUNK_BLOCKS
        server.create(task(plan, rounds=1))
        current = await server.collecting()
        server.send_all(current.context, range(3))
        server.clock.advance(DEADLINE_S)
        assert (await server.ended()).state is RoundState.DONE
        exactly(server.sums(plan, 1), cohort.clear_sums(current.context, range(3)))


@scenario
async def test_the_chunks_of_finished_and_aborted_rounds_are_removed(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task(rounds=1))
        current = await server.collecting()
        server.send_all(current.context, range(2))
        assert len(server.upload_files()) == 2
        server.clock.advance(DEADLINE_S)
        await server.ended()
        current = await server.collecting(1, 2)
        assert server.upload_files() == []
        server.send_all(current.context, range(3))
        server.clock.advance(DEADLINE_S)
        await server.task_ended()
        assert server.upload_files() == []
        assert server.row(1, 2).state is RoundState.DONE


@scenario
async def test_the_key_holder_is_asked_once_for_each_step(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task(rounds=1))
        current = await server.collecting()
        server.send_all(current.context, range(3))
        server.clock.advance(DEADLINE_S)
        await server.task_ended()
        assert server.key_holder.calls == ["open_round", "judge", "release"]


@scenario
async def test_a_task_that_runs_is_not_started_twice(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task())
        server.coordinator.start(task())
        await server.collecting()
        server.coordinator.start(task())
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(server.store.rounds("task")) == 1


# --- clients that come late, leave, or lie ------------------------------------------------------


@scenario
async def test_too_few_uploads_abort_the_attempt_and_the_next_has_a_new_key(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task())
        first = await server.collecting(1, 1)
        server.send_all(first.context, range(2))
        server.clock.advance(DEADLINE_S)
        row = await server.ended(1, 1)
        assert row.state is RoundState.ABORTED
        assert row.reason.startswith("QUORUM_NOT_REACHED: ")
        assert "got 2" in row.reason
        second = await server.collecting(1, 2)
        assert second.context.id.round_key_id != first.context.id.round_key_id
        assert second.context.id.model_digest == first.context.id.model_digest
        assert server.key_holder.closed == [first.context]
        assert "release" not in server.key_holder.calls
        server.send_all(second.context, range(3))
        server.clock.advance(DEADLINE_S)
        assert (await server.ended(1, 2)).contributors == 3


@scenario
async def test_a_task_fails_with_the_reason_once_a_round_is_out_of_attempts(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task(max_attempts=2))
        for attempt in (1, 2):
            await server.collecting(1, attempt)
            server.clock.advance(DEADLINE_S)
        state, reason = await server.task_ended()
        assert state is TaskState.FAILED
        assert reason.startswith("QUORUM_NOT_REACHED: expected at least min_clients=3")
        assert [row.key[1:] for row in server.store.rounds("task")] == [(1, 1), (1, 2)]
        assert np.array_equal(server.model(0), START)
        assert server.store.task("task").model_version == 0


@scenario
async def test_a_late_upload_is_refused_and_the_client_joins_the_next_round(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task())
        current = await server.collecting()
        late = cohort.encrypted(current.context, 5)
        server.intake.open(late.admission)
        server.send_all(current.context, range(3))
        server.clock.advance(DEADLINE_S)
        await server.ended()
        with pytest.raises(ClosedError):
            server.send(current.context, late)
        following = await server.collecting(2)
        with pytest.raises(ClosedError):
            server.send(current.context, late)
        server.send_all(following.context, [5, 0, 1])
        server.clock.advance(DEADLINE_S)
        assert (await server.ended(2)).contributors == 3
        sums = server.sums(current.context.plan, 2)
        exactly(sums, cohort.clear_sums(following.context, [0, 1, 5]))


@scenario
async def test_a_client_that_drops_out_after_announcing_changes_nothing(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task())
        current = await server.collecting()
        announced, half = (cohort.encrypted(current.context, index) for index in (4, 5))
        for upload in (announced, half):
            server.intake.open(upload.admission)
        receipt = half.admission.receipt
        server.intake.put_chunk(
            current.context.id, receipt.client_key, receipt.upload_digest, 0, half.payload
        )
        server.send_all(current.context, range(3))
        server.clock.advance(DEADLINE_S)
        row = await server.ended()
        assert (row.state, row.contributors) == (RoundState.DONE, 3)
        sums = server.sums(current.context.plan, 1)
        exactly(sums, cohort.clear_sums(current.context, range(3)))
        assert server.upload_files() == []


@scenario
async def test_uploads_that_the_key_holder_refuses_are_left_out_of_an_exact_sum(
    folder: Path,
) -> None:
    async with running(folder) as server:
        server.create(task())
        current = await server.collecting()
        server.send_all(current.context, [0, 2, 5])
        for index in (1, 3):
            server.send(current.context, cohort.broken_seal(current.context, index))
        server.clock.advance(DEADLINE_S)
        row = await server.ended()
        assert (row.state, row.contributors) == (RoundState.DONE, 3)
        counts = server.store.counts(row.key)
        assert (counts.accepted, counts.rejected) == (3, 2)
        sums = server.sums(current.context.plan, 1)
        exactly(sums, cohort.clear_sums(current.context, [0, 2, 5]))


@scenario
async def test_too_few_are_left_when_the_key_holder_refuses_some(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task())
        current = await server.collecting()
        server.send_all(current.context, [0, 1])
        server.send(current.context, cohort.broken_seal(current.context, 2))
        server.clock.advance(DEADLINE_S)
        row = await server.ended()
        assert row.reason.startswith("QUORUM_NOT_REACHED")
        assert "release" not in server.key_holder.calls


@scenario
async def test_a_ciphertext_that_does_not_belong_to_its_seed_aborts_and_changes_no_model(
    folder: Path,
) -> None:
    """The header is honest, the bytes are noise: only opening the sum can tell."""
    async with running(folder) as server:
        server.create(task())
        current = await server.collecting()
        server.send_all(current.context, [0, 1, 2])
        server.send(current.context, noise_under_an_honest_seal(current.context, 3))
        server.clock.advance(DEADLINE_S)
        row = await server.ended()
        assert (row.state, row.reason.partition(":")[0]) == (RoundState.ABORTED, "RELEASE_REFUSED")
        following = await server.collecting(1, 2)
        assert following.model_version == 0
        server.send_all(following.context, [0, 1, 2])
        server.clock.advance(DEADLINE_S)
        assert (await server.ended(1, 2)).state is RoundState.DONE


def noise_under_an_honest_seal(context: RoundContext, index: int) -> Upload:
    """A seed sealed for, and a receipt over, bytes that this seed did not encrypt."""
    from secagg.receipts import Receipt
    from secagg.sealing import seal, seal_info
    from secagg.upload import Admission

    noise = cohort.noise_upload(context, index)
    key, name = cohort.identity(index), noise.admission.receipt.upload_digest
    sealed = seal(bytes(32), context.round_key, seal_info(context.id.digest, key.public, name))
    return Upload(Admission(Receipt.sign(key, context.id, name, sealed), sealed), noise.payload)


@scenario
async def test_the_same_bytes_from_a_second_identity_do_not_end_the_task(folder: Path) -> None:
    """One person with two keys: the second announces the first one's digest, sends other bytes,
    and commits them, so that the server drops what it had."""
    from secagg.receipts import Receipt
    from secagg.upload import Admission

    async with running(folder) as server:
        server.create(task())
        current = await server.collecting()
        server.send_all(current.context, range(3))
        mine = cohort.encrypted(current.context, 3)
        server.send(current.context, mine)
        name, sealed = mine.admission.receipt.upload_digest, mine.admission.sealed_seed
        second = Receipt.sign(cohort.identity(4), current.context.id, name, sealed)
        noise = cohort.noise_upload(current.context, 4).payload
        with_second = (current.context.id, second.client_key, name)
        for step in (
            lambda: server.intake.open(Admission(second, sealed)),
            lambda: server.intake.put_chunk(*with_second, 0, noise),
            lambda: server.intake.commit(*with_second),
        ):
            try:
                step()
            except SecaggError:
                continue
        server.clock.advance(DEADLINE_S)
        await server.ended()
        for _ in range(50):
            await asyncio.sleep(0)
        row = server.store.task("task")
        assert (row.state, row.reason) == (TaskState.RUNNING, "")


@scenario
async def test_a_forged_weight_voids_a_round_but_does_not_end_the_task(folder: Path) -> None:
    """A client may encrypt any integers in range, so that the weights sum to less than nothing."""
    async with running(folder) as server:
        server.create(task())
        current = await server.collecting()
        context = current.context
        server.send_all(context, [0, 1])
        honest = cohort.quantized(context, 2)
        forged = Quantized(np.clip(-honest[0].values * 50, -511, 511))
        server.send(context, encrypt_quantized(context, [forged, honest[1]], cohort.identity(2)))
        server.clock.advance(DEADLINE_S)
        await server.ended()
        following = await server.collecting(*(await next_round(server)))
        server.send_all(following.context, range(3))
        server.clock.advance(DEADLINE_S)
        assert (await server.ended(*following_key(following))).state is RoundState.DONE


def following_key(current: OpenRound) -> tuple[int, int]:
    return current.context.id.round_number, current.context.id.attempt


async def next_round(server: Server) -> tuple[int, int]:
    """Whatever collects next; or the task's end, which fails the test."""

    def found() -> bool:
        ended = server.store.task("task").state is not TaskState.RUNNING
        return ended or server._newest() not in (None, (1, 1))

    await soon(found)
    row = server.store.task("task")
    assert row.state is TaskState.RUNNING, row.reason
    newest = server._newest()
    assert newest is not None
    return newest


# --- a key holder that fails --------------------------------------------------------------------


DOWN = UnavailableError("expected an answer; the other side is unreachable")


@pytest.mark.parametrize("call", ["open_round", "judge", "release"])
def test_a_key_holder_that_fails_costs_an_attempt(call: str, tmp_path: Path) -> None:
    async def work() -> None:
        key_holder = LocalKeyHolder()
        # A release is asked for again, because a lost one cannot be had another way.
        key_holder.fail(call, DOWN, times=RELEASE_ATTEMPTS if call == "release" else 1)
        async with running(tmp_path, key_holder) as server:
            server.create(task(rounds=1))
            if call != "open_round":
                current = await server.collecting(1, 1)
                server.send_all(current.context, range(3))
                server.clock.advance(DEADLINE_S)
            row = await server.ended(1, 1)
            assert (row.state, row.reason.partition(":")[0]) == (RoundState.ABORTED, "UNAVAILABLE")
            current = await server.collecting(1, 2)
            assert current.model_version == 0
            server.send_all(current.context, range(3))
            server.clock.advance(DEADLINE_S)
            assert await server.task_ended() == (TaskState.FINISHED, "")
            exactly(
                server.sums(current.context.plan, 1), cohort.clear_sums(current.context, range(3))
            )

    asyncio.run(work())


@pytest.mark.parametrize("attempts", [1, 3])
def test_a_key_holder_that_stays_away_fails_the_task_after_all_attempts(
    attempts: int, tmp_path: Path
) -> None:
    async def work() -> None:
        key_holder = LocalKeyHolder()
        key_holder.fail("open_round", DOWN, times=100)
        async with running(tmp_path, key_holder) as server:
            server.create(task(max_attempts=attempts))
            assert await server.task_ended() == (TaskState.FAILED, f"UNAVAILABLE: {DOWN}")
            states = [(row.attempt, row.state) for row in server.store.rounds("task")]
            assert states == [(n, RoundState.ABORTED) for n in range(1, attempts + 1)]
            assert server.store.task("task").model_version == 0

    asyncio.run(work())


@scenario
async def test_a_refused_release_aborts_the_attempt_and_leaves_the_model(folder: Path) -> None:
    key_holder = LocalKeyHolder()
    key_holder.fail("release", ReleaseError("expected a sum that opens"))
    async with running(folder, key_holder) as server:
        server.create(task())
        current = await server.collecting()
        server.send_all(current.context, range(3))
        server.clock.advance(DEADLINE_S)
        row = await server.ended()
        assert row.reason == "RELEASE_REFUSED: expected a sum that opens"
        assert (await server.collecting(1, 2)).model_version == 0
        assert key_holder.closed == [current.context]
        assert not (server.folder / "models" / "task" / "1.f32").exists()
        assert not (server.folder / "sums").exists()


@scenario
async def test_a_release_whose_answer_is_lost_is_asked_for_again_and_applied_once(
    folder: Path,
) -> None:
    """The key holder never opens a released round again, so a lost answer must not cost the round:
    the same manifest gets the same bytes."""
    key_holder = LocalKeyHolder()
    key_holder.lose_answer("release", DOWN)
    async with running(folder, key_holder) as server:
        server.create(task(rounds=1))
        current = await server.collecting()
        server.send_all(current.context, range(3))
        server.clock.advance(DEADLINE_S)
        assert await server.task_ended() == (TaskState.FINISHED, "")
        assert server.store.task("task").model_version == 1
        exactly(server.sums(current.context.plan, 1), cohort.clear_sums(current.context, range(3)))


@pytest.mark.parametrize("call", ["open_round", "judge"])
def test_another_lost_answer_costs_an_attempt_at_most(call: str, tmp_path: Path) -> None:
    async def work() -> None:
        key_holder = LocalKeyHolder()
        key_holder.lose_answer(call, DOWN)
        async with running(tmp_path, key_holder) as server:
            server.create(task(rounds=1))
            if call == "judge":
                current = await server.collecting(1, 1)
                server.send_all(current.context, range(3))
                server.clock.advance(DEADLINE_S)
                await server.ended(1, 1)
            current = await server.collecting(1, 2)
            server.send_all(current.context, range(3))
            server.clock.advance(DEADLINE_S)
            assert await server.task_ended() == (TaskState.FINISHED, "")

    asyncio.run(work())


@scenario
async def test_a_key_holder_that_restarts_while_collecting_costs_the_attempt(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task(rounds=1))
        current = await server.collecting()
        server.send_all(current.context, range(3))
        server.key_holder.restart()
        server.clock.advance(DEADLINE_S)
        row = await server.ended()
        assert (row.state, row.reason.partition(":")[0]) == (RoundState.ABORTED, "ROUND_CLOSED")
        current = await server.collecting(1, 2)
        server.send_all(current.context, range(3))
        server.clock.advance(DEADLINE_S)
        assert await server.task_ended() == (TaskState.FINISHED, "")


@scenario
async def test_a_key_holder_that_cannot_be_told_to_close_stops_nothing(folder: Path) -> None:
    key_holder = LocalKeyHolder()
    key_holder.fail("close_round", DOWN)
    async with running(folder, key_holder) as server:
        server.create(task())
        await server.collecting()
        server.clock.advance(DEADLINE_S)
        assert (await server.ended()).reason.startswith("QUORUM")
        await server.collecting(1, 2)


@scenario
async def test_an_error_nobody_thought_of_fails_the_task_without_its_text(folder: Path) -> None:
    key_holder = LocalKeyHolder()
    key_holder.fail("judge", RuntimeError("hunter2"))  # type: ignore[arg-type]
    with structlog.testing.capture_logs() as log:
        async with running(folder, key_holder) as server:
            server.create(task())
            current = await server.collecting()
            server.send_all(current.context, range(3))
            server.clock.advance(DEADLINE_S)
            state, reason = await server.task_ended()
            assert (state, reason) == (TaskState.FAILED, "INTERNAL: see the server's log")
            assert [entry["event"] for entry in log if entry["log_level"] == "error"] == [
                "task_failed"
            ]
            assert server.row(1, 1).ended_at is not None


# --- restarts and operators ---------------------------------------------------------------------


@scenario
async def test_a_restart_aborts_the_half_finished_attempt_and_continues(folder: Path) -> None:
    key_holder = LocalKeyHolder()
    async with running(folder, key_holder) as server:
        server.create(task())
        current = await server.collecting(1)
        server.send_all(current.context, range(3))
        server.clock.advance(DEADLINE_S)
        await server.ended(1)
        current = await server.collecting(2)
        server.send_all(current.context, range(2))
    async with running(folder, key_holder) as server:
        server.coordinator.resume()
        row = server.row(2, 1)
        assert (row.state, row.reason.partition(":")[0]) == (RoundState.ABORTED, "RESTARTED")
        following = await server.collecting(2, 2)
        assert following.model_version == 1
        assert following.context.id.model_digest == current.context.id.model_digest
        with pytest.raises(ClosedError):
            server.send_all(current.context, [0])
        server.send_all(following.context, [0, 3, 4])
        server.clock.advance(DEADLINE_S)
        assert await server.task_ended() == (TaskState.FINISHED, "")
        assert server.store.task("task").model_version == 2
        sums = server.sums(current.context.plan, 2)
        exactly(sums, cohort.clear_sums(following.context, [0, 3, 4]))


class Killed(BaseException):
    """Stands for the process ending on the spot."""


@scenario
async def test_after_a_crash_the_chunks_of_the_abandoned_attempt_are_removed(folder: Path) -> None:
    server = Server(folder, LocalKeyHolder())
    server.create(task())
    current = await server.collecting()
    server.send_all(current.context, range(3))
    kept = {path: path.read_bytes() for path in server.upload_files()}
    await server.coordinator.stop()
    server.store.close()
    for path, data in kept.items():  # what a kill would have left behind
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    async with running(folder) as again:
        again.coordinator.resume()
        await again.collecting(1, 2)
        assert again.upload_files() == []


@scenario
async def test_after_a_crash_between_release_and_record_the_task_continues(folder: Path) -> None:
    """The sum is open, the server died before it wrote that down, the key holder still runs."""
    key_holder = LocalKeyHolder()
    server = Server(folder, key_holder)
    spec = task(rounds=2)
    server.create(spec)
    current = await server.collecting()
    server.send_all(current.context, range(3))
    server.store.finish_round = dies  # type: ignore[method-assign]
    work = server.coordinator._running["task"]
    server.clock.advance(DEADLINE_S)
    with pytest.raises(Killed):
        await work
    server.store.close()
    assert server.store.rounds("task")[0].state is RoundState.RELEASING
    async with running(folder, key_holder) as again:
        again.coordinator.resume()
        number, attempt = await next_round(again)
        following = await again.collecting(number, attempt)
        again.send_all(following.context, range(3))
        again.clock.advance(DEADLINE_S)
        assert (await again.ended(number, attempt)).state is RoundState.DONE
        version = again.store.task("task").model_version
        assert version == number


def dies(*_: object, **__: object) -> int:
    raise Killed


@scenario
async def test_a_restart_does_not_bring_a_failed_or_finished_task_back(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task())
        await server.collecting()
        await server.coordinator.abort("task")
    async with running(folder) as server:
        server.coordinator.resume()
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(server.store.rounds("task")) == 1
        assert server.key_holder.calls == []


@scenario
async def test_a_task_whose_rounds_were_all_done_finishes_after_a_restart(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task(rounds=1))
        current = await server.collecting()
        server.send_all(current.context, range(3))
        server.store.end_task = lambda *_: None  # type: ignore[method-assign]
        server.clock.advance(DEADLINE_S)
        await server.ended()
        for _ in range(50):
            await asyncio.sleep(0)
    async with running(folder) as server:
        server.coordinator.resume()
        assert await server.task_ended() == (TaskState.FINISHED, "")
        assert len(server.store.rounds("task")) == 1


@scenario
async def test_attempts_before_a_restart_count(folder: Path) -> None:
    """Otherwise a server that crashes and restarts tries for ever."""
    async with running(folder) as server:
        server.create(task(max_attempts=2))
        await server.collecting(1, 1)
    for _ in range(3):
        async with running(folder) as server:
            server.coordinator.resume()
            for _ in range(50):
                await asyncio.sleep(0)
    async with running(folder) as server:
        assert [row.key[1:] for row in server.store.rounds("task")] == [(1, 1), (1, 2)]
        assert server.store.task("task").state is TaskState.FAILED


@scenario
async def test_the_operator_ends_a_task_while_it_collects(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task())
        current = await server.collecting()
        server.send_all(current.context, range(2))
        await server.coordinator.abort("task")
        row = server.store.task("task")
        assert (row.state, row.reason) == (TaskState.FAILED, "ABORTED: ended by the operator")
        assert server.row(1, 1).reason == "ABORTED: ended by the operator"
        assert server.upload_files() == []
        assert server.key_holder.closed == [current.context]
        with pytest.raises(ClosedError):
            server.send_all(current.context, [2])
        await server.coordinator.abort("task")
        server.clock.advance(10 * DEADLINE_S)
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(server.store.rounds("task")) == 1


@scenario
async def test_ending_a_finished_task_leaves_its_result(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task(rounds=1))
        current = await server.collecting()
        server.send_all(current.context, range(3))
        server.clock.advance(DEADLINE_S)
        await server.task_ended()
        await server.coordinator.abort("task")
        assert server.store.task("task").state is TaskState.FINISHED
        assert server.row(1, 1).state is RoundState.DONE


@scenario
async def test_tasks_run_beside_one_another(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task())
        other = replace(task(cohort.counts_plan(), rounds=1), task_id="other")
        server.create(other)
        first = await server.collecting()
        await soon(lambda: len(server.key_holder.contexts) == 2)
        second = server.rounds.newest("other", (0, 0))
        server.send_all(first.context, range(3))
        server.send_all(second.context, range(3, 6))
        server.clock.advance(DEADLINE_S)
        await soon(lambda: server.store.task("other").state is TaskState.FINISHED)
        found = sums_from_bytes(server.blobs.sums("other", 1), second.context.plan)
        exactly(found, cohort.clear_sums(second.context, range(3, 6)))
        assert (await server.ended()).state is RoundState.DONE


@scenario
async def test_sums_of_another_size_than_the_plans_are_not_applied(folder: Path) -> None:
    key_holder = LocalKeyHolder()
    key_holder.fail("release", MalformedError("expected sums of 1 bytes"))
    async with running(folder, key_holder) as server:
        plan = make_plan([IntegerSegment("counts", 3, 5)], max_clients=4)
        server.create(task(plan))
        current = await server.collecting()
        server.send_all(current.context, [0, 1, 2])
        server.clock.advance(DEADLINE_S)
        assert (await server.ended()).reason.startswith("MALFORMED")


@scenario
async def test_logs_of_rounds_name_no_client(folder: Path) -> None:
    with structlog.testing.capture_logs() as log:
        async with running(folder) as server:
            server.create(task(rounds=1))
            first = await server.collecting()
            server.send_all(first.context, range(2))
            server.clock.advance(DEADLINE_S)
            second = await server.collecting(1, 2)
            server.send_all(second.context, range(3))
            server.clock.advance(DEADLINE_S)
            await server.task_ended()
    assert [entry["event"] for entry in log] == ["round_aborted", "round_done"]
    assert all(cohort.identity(index).public.hex() not in str(log) for index in range(3))
    assert str(cohort.identity(0).public) not in str(log)
