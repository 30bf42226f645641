"""Server optimisers, compression and stop criteria, through coordinator and key holder."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cohort
import numpy as np
import pytest
from key_holders import LocalKeyHolder
from numpy.typing import NDArray
from servers import DEADLINE_S, START, Killed, Server, dies_at, running, scenario, task

from secagg.context import RoundContext
from secagg.encryptor import encrypt_quantized
from secagg.optimisers import Optimiser
from secagg.parameters import (
    Compression,
    FloatSegment,
    IntegerSegment,
    LowRank,
    NormCheck,
    Plan,
    RandomSubset,
)
from secagg.planner import make_plan
from secagg.quantize import quantize
from secagg.release import Release
from secagg_server.retention import sweep
from secagg_server.states import RoundState, TaskState
from secagg_server.stopping import Stop
from secagg_server.tasks import TaskSpec

HONEST = range(3)


def plan(compression: Compression | None = None, *figures: IntegerSegment) -> Plan:
    update = FloatSegment("update", cohort.TENSORS, 2.0, 12, compression=compression)
    return make_plan([update, *figures], max_clients=6)


def learning(
    rounds: int = 3, compression: Compression | None = None, **changes: object
) -> TaskSpec:
    return replace(task(plan(compression), rounds=rounds), **changes)


async def one_round(server: Server, number: int) -> RoundContext:
    context = (await server.collecting(number)).context
    server.send_all(context, HONEST)
    server.clock.advance(DEADLINE_S)
    assert (await server.ended(number)).state is RoundState.DONE
    return context


def in_the_clear(
    contexts: Sequence[RoundContext], optimiser: Optimiser
) -> list[NDArray[np.float32]]:
    """The models of all rounds, without cipher, server or files."""
    model, state, models = START, optimiser.initial(START.size), []
    for context in contexts:
        sums = tuple(cohort.clear_sums(context, HONEST))
        mean = Release(context.plan, context.rotation, len(HONEST), sums).flat_mean()
        model, state = optimiser.step(model, mean, state)
        models.append(model)
    return models


@pytest.mark.parametrize(
    ("name", "compression"),
    [
        ("average", RandomSubset(0.4)),
        ("momentum", None),
        ("adam", LowRank(1)),
        pytest.param("adagrad", None, marks=pytest.mark.slow),
        pytest.param("yogi", RandomSubset(0.9), marks=pytest.mark.slow),
    ],
)
def test_three_rounds_are_those_in_the_clear_bit_for_bit_over_a_restart(
    name: str, compression: Compression | None, tmp_path: Path
) -> None:
    optimiser = Optimiser(name, 0.05)

    @scenario
    async def work(folder: Path) -> None:
        async with running(folder) as server:
            server.create(learning(3, compression, optimiser=optimiser))
            contexts = [await one_round(server, number) for number in (1, 2)]
            await server.collecting(3)
            key_holder = server.key_holder
        async with running(folder, key_holder) as server:
            server.coordinator.resume()
            contexts.append(await one_round(server, 3))
            assert await server.task_ended() == (TaskState.FINISHED, "")
            for version, wanted in enumerate(in_the_clear(contexts, optimiser), 1):
                np.testing.assert_array_equal(server.model(version), wanted)

    work(tmp_path)


@pytest.mark.parametrize(
    ("owner", "method", "done"),
    [
        pytest.param("blobs", "put_optimiser", False, marks=pytest.mark.slow),
        ("blobs", "put_optimiser", True),
        ("blobs", "put_model", True),
        pytest.param("store", "finish_round", False, marks=pytest.mark.slow),
        pytest.param("store", "finish_round", True, marks=pytest.mark.slow),
    ],
)
def test_a_crash_at_any_write_moves_neither_model_nor_state_twice(
    owner: str, method: str, done: bool, tmp_path: Path
) -> None:
    optimiser = Optimiser("adam", 0.05)

    @scenario
    async def work(folder: Path) -> None:
        key_holder = LocalKeyHolder()
        server = Server(folder, key_holder)
        server.create(learning(3, optimiser=optimiser))
        contexts = [await one_round(server, 1)]
        dies_at(getattr(server, owner), method, done=done)
        contexts.append((await server.collecting(2)).context)
        server.send_all(contexts[1], HONEST)
        running_task = server.coordinator._running["task"]
        server.clock.advance(DEADLINE_S)
        with pytest.raises(Killed):
            await running_task
        server.store.close()
        async with running(folder, key_holder) as again:
            again.coordinator.resume()
            contexts.append(await one_round(again, 3))
            assert await again.task_ended() == (TaskState.FINISHED, "")
            for version, wanted in enumerate(in_the_clear(contexts, optimiser), 1):
                np.testing.assert_array_equal(again.model(version), wanted)

    work(tmp_path)


@scenario
async def test_a_step_that_is_not_finite_voids_its_round_and_changes_nothing(
    folder: Path,
) -> None:
    async with running(folder) as server:
        server.create(learning(2, optimiser=Optimiser("momentum")))
        await one_round(server, 1)
        await server.collecting(2)
        far = np.full(START.size, 1e308).tobytes()
        server.blobs.put_optimiser("task", 1, far)
        server.send_all(server.open_round().context, HONEST)
        server.clock.advance(DEADLINE_S)
        row = await server.ended(2)
        assert row.state is RoundState.ABORTED
        assert row.reason.startswith("RELEASE_REFUSED: expected a finite model after a step of")
        assert (await server.task_ended())[0] is TaskState.FINISHED
        assert server.store.task("task").model_version == 1
        assert states(server) == {"0.f32", "1.f32", "1.f64"}


def states(server: Server) -> set[str]:
    return {path.name for path in (server.folder / "models" / "task").iterdir()}


@scenario
async def test_old_states_go_with_their_models_and_the_last_one_with_the_task(
    folder: Path,
) -> None:
    async with running(folder) as server:
        server.create(learning(3, optimiser=Optimiser("yogi")))
        for number in (1, 2):
            await one_round(server, number)
        later = server.row(2, 1).ended_at
        assert later is not None
        assert states(server) == {"0.f32", "1.f32", "2.f32", "1.f64", "2.f64"}
        sweep(server.store, server.blobs, later.replace(year=later.year + 1))
        assert states(server) == {"2.f32", "2.f64"}
        await one_round(server, 3)
        await server.task_ended()
        sweep(server.store, server.blobs, later.replace(year=later.year + 1))
        assert states(server) == {"3.f32"}


@scenario
async def test_averaging_keeps_no_state(folder: Path) -> None:
    async with running(folder) as server:
        server.create(learning(1, optimiser=Optimiser("average", 0.5)))
        await one_round(server, 1)
        await server.task_ended()
        assert states(server) == {"0.f32", "1.f32"}


@pytest.mark.slow
@scenario
async def test_a_direction_check_sees_compressed_updates_where_they_are(folder: Path) -> None:
    """Clients that push on are let through, whichever coordinates a round looks at."""
    tensors = (replace(cohort.TENSORS[0], shape=(400, 32)),)
    update = FloatSegment("update", tensors, 2.0, 12, compression=RandomSubset(0.5))
    check = NormCheck(min_cosine=-0.1)
    planned = make_plan([update], max_clients=6, norm_check=check)
    async with running(folder) as server:
        spec = task(planned, rounds=3)
        model = bytes(spec.model_bytes)
        server.blobs.put_model("task", 0, model)
        server.store.create_task(spec, bytes(32))
        server.coordinator.start(spec)
        for number in (1, 2, 3):
            await one_round(server, number)
            assert server.store.counts(("task", number, 1)).rejected == 0


# --- stop criteria ------------------------------------------------------------------------------


def figures(hits: Sequence[int], stop: Stop) -> TaskSpec:
    """A task in whose round i all clients together have so many hits of 30 users."""
    return replace(
        task(plan(None, IntegerSegment("validation", 2, 1000)), rounds=len(hits)), stop=stop
    )


async def tell(server: Server, number: int, hits: int, users: int = 30) -> None:
    context = (await server.collecting(number)).context
    for index in HONEST:
        values = cohort.contribution(context.plan, index)
        mine = hits - 2 * (hits // 3) if index == 0 else hits // 3
        values["validation"] = np.array([mine, users // 3])
        parts = quantize(
            context.plan,
            values,
            samples=1,
            rotation=context.rotation,
            randomness=cohort.rounding(context, index),
        )
        commitment = server.commitment(index)
        server.send(context, encrypt_quantized(context, parts, cohort.identity(index), commitment))
    server.clock.advance(DEADLINE_S)
    await server.ended(number)


@pytest.mark.parametrize(
    ("hits", "stop", "rounds", "best"),
    [
        ([3, 9, 9, 8, 20], Stop(2, figure="validation"), 4, (0.3, 2)),
        ([3, 6], Stop(1, figure="validation"), 2, None),
        ([9, 31, 3, 9], Stop(1, figure="validation"), 3, (0.3, 1)),  # 31 of 30 tells nothing
    ],
)
def test_a_task_stops_once_its_figure_has_not_risen_for_long_enough(
    hits: list[int], stop: Stop, rounds: int, best: tuple[float, int] | None, tmp_path: Path
) -> None:
    @scenario
    async def work(folder: Path) -> None:
        async with running(folder) as server:
            server.create(figures(hits, stop))
            for number in range(1, rounds + 1):
                await tell(server, number, hits[number - 1])
            state, reason = await server.task_ended()
            assert state is TaskState.FINISHED
            assert server.store.task("task").rounds_done == rounds
            if best is None:
                assert reason == ""
                return
            assert reason == (
                f"CONVERGED: validation did not rise in {stop.patience} rounds above "
                f"{best[0]:.4f}, that of the model that round {best[1]} started from"
            )
            (entry,) = server.events("task-ended")
            assert json.loads(entry.details)["reason"] == "CONVERGED"

    work(tmp_path)


@scenario
async def test_what_a_task_has_learned_is_known_after_a_restart(folder: Path) -> None:
    hits = [9, 9, 9, 9]
    async with running(folder) as server:
        server.create(figures(hits, Stop(2, figure="validation")))
        for number in (1, 2):
            await tell(server, number, 9)
        await server.collecting(3)
        key_holder = server.key_holder
    async with running(folder, key_holder) as server:
        server.coordinator.resume()
        await tell(server, 3, 9)
        assert (await server.task_ended())[1].startswith("CONVERGED: ")
        assert [outcome.figure for outcome in server.store.outcomes("task")] == [0.3] * 3


@scenario
async def test_a_task_stops_once_its_model_has_stopped_to_change(folder: Path) -> None:
    optimiser, stop = Optimiser("average", 1e-3), Stop(2, least_change=1e-3)
    async with running(folder) as server:
        server.create(learning(9, optimiser=optimiser, stop=stop))
        for number in (1, 2):
            await one_round(server, number)
        state, reason = await server.task_ended()
        assert state is TaskState.FINISHED
        assert reason == "CONVERGED: the model changed by less than 0.001 in 2 rounds"
        for before, after in itertools.pairwise(range(3)):
            old, new = server.model(before).astype(float), server.model(after).astype(float)
            change = np.linalg.norm(new - old) / np.linalg.norm(old)
            assert server.row(after, 1).model_change == pytest.approx(change)


@scenario
async def test_from_a_model_of_zeros_no_change_is_told(folder: Path) -> None:
    async with running(folder) as server:
        spec = learning(2, stop=Stop(1, least_change=0.9))
        server.blobs.put_model("task", 0, bytes(spec.model_bytes))
        server.store.create_task(spec, bytes(32))
        server.coordinator.start(spec)
        for number in (1, 2):
            await one_round(server, number)
        await server.task_ended()
        first, second = server.store.outcomes("task")
        assert first.change is None
        assert second.change is not None
