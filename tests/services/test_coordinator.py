"""The coordinator, with a clock that the test moves and a key holder that fails when told to."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from pathlib import Path

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
    Server,
    breathe,
    exactly,
    running,
    scenario,
    task,
)
from serving import soon

from secagg.context import NO_MODEL
from secagg.encryptor import encrypt_quantized
from secagg.errors import ClosedError, MalformedError, SecaggError, StorageError
from secagg.parameters import CHUNK_BLOCKS, IntegerSegment
from secagg.planner import make_plan
from secagg.quantize import Quantized
from secagg.release import Release, sums_sha256
from secagg.wire.codec import sums_from_bytes
from secagg_server.key_holder import KEY_HOLDER_ATTEMPTS
from secagg_server.rounds import OpenRound
from secagg_server.states import RoundState, TaskState


def released(current: OpenRound, contributors: int, sums: tuple[NDArray[np.int64], ...]) -> Release:
    return Release(current.context.plan, current.context.rotation, contributors, sums)


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
        await breathe()
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
        await breathe()
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
        await server.tidied()
        server.send_all(current.context, range(3))
        server.clock.advance(DEADLINE_S)
        await server.task_ended()
        await server.tidied()
        assert server.row(1, 2).state is RoundState.DONE


@scenario
async def test_the_key_holder_is_asked_once_for_each_step(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task(rounds=1))
        current = await server.collecting()
        server.send_all(current.context, range(3))
        server.clock.advance(DEADLINE_S)
        await server.task_ended()
        assert server.key_holder.calls == ["open_round", "judge", "check_sum", "release"]


@scenario
async def test_a_task_that_runs_is_not_started_twice(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task())
        server.coordinator.start(task())
        await server.collecting()
        server.coordinator.start(task())
        await breathe()
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
        await server.tidied()


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
async def test_the_same_bytes_from_a_second_identity_do_not_end_the_task(folder: Path) -> None:
    """One person with two keys: the second announces the first one's digest, sends other bytes,
    and commits them, so that the server drops what it had."""
    async with running(folder) as server:
        server.create(task())
        current = await server.collecting()
        server.send_all(current.context, range(3))
        mine = cohort.encrypted(current.context, 3)
        server.send(current.context, mine)
        second = cohort.replayed(current.context, 4, mine).admission
        noise = cohort.noise_upload(current.context, 4).payload
        receipt = second.receipt
        with_second = (current.context.id, receipt.client_key, receipt.upload_digest)
        for step in (
            lambda: server.intake.open(second),
            lambda: server.intake.put_chunk(*with_second, 0, noise),
            lambda: server.intake.commit(*with_second),
        ):
            try:
                step()
            except SecaggError:
                continue
        server.clock.advance(DEADLINE_S)
        await server.ended()
        await breathe()
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
        return ended or server.newest() not in (None, (1, 1))

    await soon(found)
    row = server.store.task("task")
    assert row.state is TaskState.RUNNING, row.reason
    newest = server.newest()
    assert newest is not None
    return newest


# --- a key holder that fails --------------------------------------------------------------------


CALLS = ["open_round", "judge", "release"]


def test_a_key_holder_that_stays_away_with_the_sum_costs_the_round(tmp_path: Path) -> None:
    """It may have had the sum: another one, over another cohort, could tell the two apart."""

    async def work() -> None:
        key_holder = LocalKeyHolder()
        key_holder.fail("release", DOWN, times=KEY_HOLDER_ATTEMPTS)
        async with running(tmp_path, key_holder) as server:
            server.create(task(rounds=1))
            current = await server.collecting(1, 1)
            server.send_all(current.context, range(3))
            server.clock.advance(DEADLINE_S)
            row = await server.ended(1, 1)
            assert (row.state, row.reason) == (RoundState.ABORTED, f"UNAVAILABLE: {DOWN}")
            assert await server.task_ended() == (TaskState.FINISHED, "")
            assert key_holder.calls.count("release") == KEY_HOLDER_ATTEMPTS
            assert server.store.attempts("task", 1) == 1
            assert server.store.task("task").model_version == 0

    asyncio.run(work())


@pytest.mark.parametrize("call", ["open_round", "judge"])
def test_a_key_holder_that_stays_away_costs_an_attempt(call: str, tmp_path: Path) -> None:
    async def work() -> None:
        key_holder = LocalKeyHolder()
        key_holder.fail(call, DOWN, times=KEY_HOLDER_ATTEMPTS)
        async with running(tmp_path, key_holder) as server:
            server.create(task(rounds=1))
            if call != "open_round":
                current = await server.collecting(1, 1)
                server.send_all(current.context, range(3))
                server.clock.advance(DEADLINE_S)
            row = await server.ended(1, 1)
            assert (row.state, row.reason) == (RoundState.ABORTED, f"UNAVAILABLE: {DOWN}")
            current = await server.collecting(1, 2)
            assert current.model_version == 0
            server.send_all(current.context, range(3))
            server.clock.advance(DEADLINE_S)
            assert await server.task_ended() == (TaskState.FINISHED, "")
            assert key_holder.calls.count(call) == KEY_HOLDER_ATTEMPTS + 1
            exactly(
                server.sums(current.context.plan, 1), cohort.clear_sums(current.context, range(3))
            )

    asyncio.run(work())


@pytest.mark.parametrize("call", ["open_round", "judge", "check_sum", "release"])
@pytest.mark.parametrize("answered", [False, True], ids=["not done", "done, answer lost"])
def test_a_key_holder_whose_disk_fails_for_a_while_costs_nothing(
    call: str, answered: bool, tmp_path: Path
) -> None:
    """It is there and says what is wrong: the same attempt waits for it, not the next ones."""
    full = StorageError("expected a ledger that can be written; the disk is full")

    async def work() -> None:
        key_holder = LocalKeyHolder()
        for _ in range(4 * KEY_HOLDER_ATTEMPTS):
            (key_holder.lose_answer if answered else key_holder.fail)(call, full)
        async with running(tmp_path, key_holder) as server:
            server.create(task(rounds=1))
            while server.store.task("task").state is TaskState.RUNNING:
                await breathe()
                if server.newest() == (1, 1) and not server.store.counts(("task", 1, 1)).accepted:
                    server.send_all(server.open_round().context, range(3))
                server.clock.advance(DEADLINE_S)
            assert await server.task_ended() == (TaskState.FINISHED, "")
            assert [row.attempt for row in server.store.rounds("task")] == [1]
            (context,) = {c.id: c for c in key_holder.contexts}.values()
            exactly(server.sums(context.plan, 1), cohort.clear_sums(context, range(3)))

    asyncio.run(work())


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("answered", [False, True], ids=["not done", "done, answer lost"])
def test_a_key_holder_that_is_back_in_time_costs_nothing(
    call: str, answered: bool, tmp_path: Path
) -> None:
    """Each of its answers is the same one the second time: a released round is never opened again,
    so that a lost sum could be had in no other way."""

    async def work() -> None:
        key_holder = LocalKeyHolder()
        for _ in range(KEY_HOLDER_ATTEMPTS - 1):
            (key_holder.lose_answer if answered else key_holder.fail)(call, DOWN)
        async with running(tmp_path, key_holder) as server:
            server.create(task(rounds=1))
            current = await server.collecting(1, 1)
            server.send_all(current.context, range(3))
            server.clock.advance(DEADLINE_S)
            assert await server.task_ended() == (TaskState.FINISHED, "")
            assert [row.attempt for row in server.store.rounds("task")] == [1]
            assert key_holder.calls.count(call) == KEY_HOLDER_ATTEMPTS
            assert server.store.task("task").model_version == 1
            exactly(
                server.sums(current.context.plan, 1), cohort.clear_sums(current.context, range(3))
            )

    asyncio.run(work())


@pytest.mark.parametrize("attempts", [1, 3])
def test_a_key_holder_that_never_comes_back_fails_the_task_after_all_attempts(
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


# --- operators ----------------------------------------------------------------------------------


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
        await server.tidied()
        assert server.key_holder.closed == [current.context]
        with pytest.raises(ClosedError):
            server.send_all(current.context, [2])
        await server.coordinator.abort("task")
        server.clock.advance(10 * DEADLINE_S)
        await breathe()
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
        second = server.rounds.newest("other", (0, 0), None)
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
