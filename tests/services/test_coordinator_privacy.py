"""Tasks with a privacy budget or an adaptive clip norm, through coordinator and key holder."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cohort
import numpy as np
import pytest
import structlog
from key_holders import LocalKeyHolder
from servers import DEADLINE_S, DOWN, START, Server, exactly, running, scenario, task

from secagg.accounting import spent
from secagg.context import RoundContext, rotation_string
from secagg.encryptor import Encryptor
from secagg.errors import BudgetError
from secagg.parameters import (
    CHUNK_BYTES,
    NOISE_TAIL,
    FloatSegment,
    IntegerSegment,
    NormCheck,
    Plan,
    Privacy,
    RowThreshold,
    TensorSpec,
)
from secagg.planner import PRIVATE_MARGIN, make_plan
from secagg.privacy import release_rho
from secagg.release import Release
from secagg.residues import narrow
from secagg.sampling import Stream, uniform_polynomials
from secagg.upload import Upload
from secagg_server import coordinator
from secagg_server.key_holder import KEY_HOLDER_ATTEMPTS, _release_requests
from secagg_server.rounds import OpenRound
from secagg_server.spending import loss
from secagg_server.states import RoundState, TaskState
from secagg_server.tasks import AdaptiveClip, TaskSpec

DELTA = 1e-5
MODES = ["release", "distributed", "local"]
SPENT = BudgetError("expected room for a release; there is none")


def private_plan(
    mode: str = "release",
    *,
    epsilon: float = 1000.0,
    noise: float = 1.0,
    norm_check: NormCheck | None = None,
    clip: float = 2.0,
    clip_bit: bool = False,
) -> Plan:
    """An update and counts of every client, with noise."""
    return make_plan(
        [
            FloatSegment("update", cohort.TENSORS, clip, 10, clip_bit=clip_bit),
            IntegerSegment("counts", cohort.COUNTS, 64, 200.0),
        ],
        max_clients=6,
        norm_check=norm_check,
        privacy=Privacy(mode, noise, epsilon, DELTA),
    )


def room_for(releases: int, mode: str = "release", **options: Any) -> Plan:  # noqa: ANN401
    """A plan whose budget has room for exactly so many releases."""
    rho = release_rho(private_plan(mode, **options))
    return private_plan(mode, epsilon=spent(releases * rho, DELTA) * 1.0001, **options)


async def a_round(
    server: Server, number: int, attempt: int = 1, clients: Iterable[int] = range(3)
) -> RoundContext:
    """One whole round."""
    current = await server.collecting(number, attempt)
    server.send_all(current.context, clients)
    server.clock.advance(DEADLINE_S)
    await server.ended(number, attempt)
    return current.context


def released(server: Server, context: RoundContext) -> Release:
    """A round's release, as anybody reads it."""
    number = context.id.round_number
    row = next(r for r in server.store.rounds("task") if r.key[1:] == (number, context.id.attempt))
    sums = server.sums(context.plan, number)
    return Release(context.plan, context.rotation, row.contributors, sums)


# --- sums with noise ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "check"),
    [("distributed", NormCheck(PRIVATE_MARGIN, 8)), ("distributed", None), ("local", None)],
)
def test_where_clients_add_the_noise_the_sum_is_exactly_that_of_updates_and_noises(
    mode: str, check: NormCheck | None, tmp_path: Path
) -> None:
    async def work() -> None:
        plan = private_plan(mode, norm_check=check)
        assert (plan.blocks == 2 * plan.sum_blocks) == (mode == "distributed")
        async with running(tmp_path) as server:
            server.create(task(plan, rounds=1))
            context = await a_round(server, 1, clients=[0, 2, 3, 5])
            assert server.row(1, 1).state is RoundState.DONE, server.row(1, 1).reason
            exactly(server.sums(plan, 1), cohort.clear_sums(context, [0, 2, 3, 5]))
            noiseless = [
                sum(cohort.quantized(context, index)[place].values for index in (0, 2, 3, 5))
                for place in range(2)
            ]
            for found, bare in zip(server.sums(plan, 1), noiseless, strict=True):
                assert np.any(found != bare)
            assert await server.task_ended() == (TaskState.FINISHED, "")
            mean = released(server, context).mean()
            flat = np.concatenate([mean[t.name].reshape(-1) for t in cohort.TENSORS])
            np.testing.assert_array_equal(server.model(1), START + flat.astype(np.float32))

    asyncio.run(work())


@scenario
async def test_what_the_key_holder_adds_is_noise_of_the_planned_size(folder: Path) -> None:
    plan = private_plan("release")
    assert plan.blocks == plan.sum_blocks
    async with running(folder) as server:
        server.create(task(plan, rounds=1))
        context = await a_round(server, 1)
        parts = zip(
            server.sums(plan, 1),
            cohort.clear_sums(context, range(3)),
            plan.noise_stds,
            strict=True,
        )
        for found, exact, std in parts:
            noise = found - exact
            assert np.abs(noise).max() <= NOISE_TAIL * std
            # 16 or more samples; all within a tenth of a deviation: below 1e-17.
            assert np.abs(noise).max() > std / 10


@scenario
async def test_an_upload_that_is_off_the_grid_in_its_noise_is_left_out(folder: Path) -> None:
    plan = private_plan("distributed")
    async with running(folder) as server:
        server.create(task(plan, rounds=1))
        current = await server.collecting()
        server.send_all(current.context, [0, 2, 5])
        server.send(current.context, cohort.off_grid(current.context, 1))
        server.clock.advance(DEADLINE_S)
        row = await server.ended()
        assert (row.state, row.contributors, row.audited) == (RoundState.DONE, 3, True)
        exactly(server.sums(plan, 1), cohort.clear_sums(current.context, [0, 2, 5]))


def wide_plan(mode: str) -> Plan:
    """A sum of several messages; of an upload, twice as much where clients add the noise."""
    return make_plan(
        [IntegerSegment("wide", 70 * 4096, 10**7)],
        max_clients=6,
        privacy=Privacy(mode, 1e-2, 1000.0, DELTA),
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_sum_is_sent_in_messages_of_its_own_number(mode: str) -> None:
    plan = wide_plan(mode)
    assert plan.sum_blocks > 64
    context = cohort.round_context(plan)
    residues = uniform_polynomials(Stream(bytes(32)), plan.sum_blocks)

    async def messages() -> list[bytes]:
        found = [request async for request in _release_requests(context, [bytes(32)], residues)]
        assert [each.WhichOneof("part") for each in found[:2]] == ["manifest", "residues"]
        return [each.residues for each in found[1:]]

    sent = asyncio.run(messages())
    assert b"".join(sent) == narrow(residues)
    assert {len(each) for each in sent[:-1]} == {CHUNK_BYTES}
    assert 0 < len(sent[-1]) <= CHUNK_BYTES


def threshold_plan(mode: str = "release", noise: float = 0.01) -> Plan:
    """A table of 8 rows, and who counts them."""
    return make_plan(
        [
            FloatSegment("update", (TensorSpec("t", (8, 2)),), 1.0, 13, rows=8),
            IntegerSegment("contributors", 8, 1, math.sqrt(8)),
        ],
        max_clients=6,
        privacy=Privacy(mode, noise, 1e6, DELTA),
        threshold=RowThreshold("contributors", 2),
    )


@scenario
async def test_counts_of_a_threshold_are_stored_as_zeros(folder: Path) -> None:
    plan = threshold_plan()
    async with running(folder) as server:
        spec = task(plan, rounds=1)
        server.blobs.put_model("task", 0, bytes(64))
        server.store.create_task(spec, bytes(32))
        server.coordinator.start(spec)
        current = await server.collecting()
        for index in range(3):
            values = {
                "update": {"t": np.full((8, 2), 0.1)},
                "contributors": np.array([1] * 7 + [int(index == 0)]),
            }
            server.send(current.context, _encrypted(current.context, index, values))
        server.clock.advance(DEADLINE_S)
        assert (await server.ended()).state is RoundState.DONE
        update, counts = server.sums(plan, 1)
        assert not counts.any()
        assert update.any()


def _encrypted(context: RoundContext, index: int, values: dict[str, Any]) -> Upload:

    return Encryptor(context, cohort.identity(index)).encrypt_segments(values)


# --- the budget ---------------------------------------------------------------------------------


def reason_of(done: int, rounds: int, plan: Plan, more: str = "") -> str:
    assert plan.privacy is not None
    epsilon = spent(sum([release_rho(plan)] * done), DELTA)
    return (
        f"BUDGET_SPENT: {done} of {rounds} rounds released, epsilon {epsilon:.4g} of "
        f"{plan.privacy.epsilon:g} spent{more}"
    )


@pytest.mark.parametrize("mode", ["release", "distributed"])
@pytest.mark.parametrize("releases", [1, 3])
def test_a_task_ends_at_exactly_the_round_that_its_budget_has_no_room_for(
    releases: int, mode: str, tmp_path: Path
) -> None:
    async def work() -> None:
        plan = room_for(releases, mode)
        async with running(tmp_path) as server:
            server.create(task(plan, rounds=5))
            for number in range(1, releases + 1):
                await a_round(server, number)
                assert server.row(number, 1).state is RoundState.DONE
            with structlog.testing.capture_logs() as logs:
                ended = await server.task_ended()
            assert ended == (TaskState.FINISHED, reason_of(releases, 5, plan))
            assert len(server.store.rounds("task")) == releases
            assert server.key_holder.calls.count("open_round") == releases
            assert {"event": "budget_spent", "log_level": "info", "rounds": releases} in logs
            # The key holder's own account agrees to the bit.
            rho = server.store.task("task").rho_spent
            assert rho == server.key_holder.rounds._ledger.account("task").rho
            assert server.key_holder.rounds._ledger.account("task").left == 0

    asyncio.run(work())


@scenario
async def test_a_budget_for_every_round_leaves_no_reason(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task(room_for(2), rounds=2))
        for number in (1, 2):
            await a_round(server, number)
        assert await server.task_ended() == (TaskState.FINISHED, "")


@scenario
async def test_restarts_do_not_give_a_budget_back(folder: Path) -> None:
    plan, key_holder = room_for(2), LocalKeyHolder()
    async with running(folder, key_holder) as server:
        server.create(task(plan, rounds=9))
        await a_round(server, 1)
        await server.collecting(2)
    async with running(folder, key_holder) as server:
        server.coordinator.resume()
        await a_round(server, 2)
        assert await server.task_ended() == (TaskState.FINISHED, reason_of(2, 9, plan))
    async with running(folder, key_holder) as server:
        server.coordinator.resume()
        assert len(server.store.rounds("task")) == 2


@scenario
async def test_a_server_that_died_before_it_ended_the_task_ends_it_at_the_next_start(
    folder: Path,
) -> None:
    plan, key_holder = room_for(1), LocalKeyHolder()
    async with running(folder, key_holder) as server:
        server.create(task(plan, rounds=9))
        server.store.end_task = lambda *_: None  # type: ignore[method-assign]
        await a_round(server, 1)
    async with running(folder, key_holder) as server:
        server.coordinator.resume()
        assert await server.task_ended() == (TaskState.FINISHED, reason_of(1, 9, plan))
        assert key_holder.calls.count("open_round") == 1


@pytest.mark.parametrize("restart", [False, True])
def test_a_void_round_has_cost_what_a_release_costs(restart: bool, tmp_path: Path) -> None:
    """The sum was handed over: somebody may have seen it."""

    async def work() -> None:
        plan, key_holder = room_for(2), LocalKeyHolder()
        key_holder.fail("release", DOWN, times=KEY_HOLDER_ATTEMPTS)
        async with running(tmp_path, key_holder) as server:
            server.create(task(plan, rounds=9))
            await a_round(server, 1)
            assert server.row(1, 1).state is RoundState.ABORTED
            assert server.store.task("task").rho_spent == release_rho(plan)
            if not restart:
                await the_end(server, plan)
                return
            await server.collecting(2)
        async with running(tmp_path, key_holder) as server:
            server.coordinator.resume()
            await the_end(server, plan)

    async def the_end(server: Server, plan: Plan) -> None:
        await a_round(server, 2)
        assert await server.task_ended() == (TaskState.FINISHED, reason_of(2, 9, plan))
        assert server.store.task("task").model_version == 1
        assert [row.state for row in server.store.rounds("task")] == [
            RoundState.ABORTED,
            RoundState.DONE,
        ]

    asyncio.run(work())


@scenario
async def test_attempts_that_handed_over_no_sum_cost_nothing(folder: Path) -> None:
    plan = room_for(1)
    async with running(folder) as server:
        server.create(task(plan, rounds=9))
        await server.collecting(1, 1)
        server.clock.advance(DEADLINE_S)
        await server.collecting(1, 2)
        assert server.store.task("task").rho_spent == 0.0
        await a_round(server, 1, 2)
        assert server.row(1, 2).state is RoundState.DONE
        assert await server.task_ended() == (TaskState.FINISHED, reason_of(1, 9, plan))


MORE = "; the key holder has counted more"


@pytest.mark.parametrize("call", ["open_round", "judge", "check_sum"])
def test_a_key_holder_that_has_counted_more_ends_the_task_and_not_one_attempt_after_the_other(
    call: str, tmp_path: Path
) -> None:
    async def work() -> None:
        plan, key_holder = private_plan(), LocalKeyHolder()
        async with running(tmp_path, key_holder) as server:
            server.create(task(plan, rounds=9))
            current = await server.collecting(1)
            if call == "open_round":
                key_holder.fail(call, SPENT)  # the next one
            server.send_all(current.context, range(3))
            server.clock.advance(DEADLINE_S)
            await server.ended(1)
            if call != "open_round":
                current = await server.collecting(2)
                key_holder.fail(call, SPENT)
                server.send_all(current.context, range(3))
                server.clock.advance(DEADLINE_S)
            ended = await server.task_ended()
            assert ended == (TaskState.FINISHED, reason_of(1, 9, plan, MORE))
            row = server.row(2, 1)
            assert (row.state, row.reason.partition(":")[0]) == (
                RoundState.ABORTED,
                "BUDGET_SPENT",
            )
            assert server.store.attempts("task", 2) == 1
            await server.tidied()

    asyncio.run(work())


@scenario
async def test_a_key_holder_that_refuses_the_attempt_a_restart_goes_on_with_ends_the_task(
    folder: Path,
) -> None:
    plan, key_holder = private_plan(), LocalKeyHolder()
    async with running(folder, key_holder) as server:
        server.create(task(plan, rounds=9))
        current = await server.collecting()
        server.send_all(current.context, range(3))
    key_holder.fail("judge", SPENT)
    async with running(folder, key_holder) as server:
        server.coordinator.resume()
        await server.collecting()
        server.clock.advance(DEADLINE_S)
        assert await server.task_ended() == (TaskState.FINISHED, reason_of(0, 9, plan, MORE))


def test_the_key_holders_own_account_ends_a_task_that_the_server_would_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that forgets, or lies about, what it has spent gains nothing."""

    async def work() -> None:
        plan = room_for(2)
        async with running(tmp_path) as server:
            server.create(task(plan, rounds=9))
            for number in (1, 2):
                await a_round(server, number)
            state, reason = await server.task_ended()
            assert state is TaskState.FINISHED
            assert reason.startswith("BUDGET_SPENT: 2 of 9 rounds released, epsilon 0 of ")
            assert reason.endswith(MORE)
            assert "by 2 releases" in server.row(3, 1).reason
            assert server.store.attempts("task", 3) == 1

    monkeypatch.setattr(coordinator, "loss", lambda _: 0.0)
    asyncio.run(work())


@scenario
async def test_the_log_has_what_each_release_cost_to_the_bit(folder: Path) -> None:
    plan, key_holder = room_for(2), LocalKeyHolder()
    key_holder.fail("release", DOWN, times=KEY_HOLDER_ATTEMPTS)
    async with running(folder, key_holder) as server:
        server.create(task(plan, rounds=9))
        await a_round(server, 1)
        await a_round(server, 2)
        await server.task_ended()
        for event in ("round-voided", "round-finished"):
            (entry,) = server.events(event)
            details = json.loads(entry.details)
            assert details["rho"] == release_rho(plan).hex()
            assert "clip" not in details


def test_a_plan_without_privacy_costs_nothing_that_is_counted() -> None:
    assert loss(cohort.mixed_plan()) == 0.0
    assert loss(private_plan()) == release_rho(private_plan())


# --- the clip norm ------------------------------------------------------------------------------

# Client i's update has a norm of 0.0332 (i + 1).
LENGTH = 0.01 * math.sqrt(11)


def adaptive_task(
    clip: float, *, rounds: int = 3, rate: float = 0.2, quantile: float = 0.5
) -> TaskSpec:
    segments: list[Any] = [FloatSegment("update", cohort.TENSORS, clip, 10, clip_bit=True)]
    plan = make_plan(segments, max_clients=6)
    return task(plan, rounds=rounds, adaptive_clip=AdaptiveClip(quantile, rate))


def clip_of(current: OpenRound | RoundContext) -> float:
    plan = current.plan if isinstance(current, RoundContext) else current.context.plan
    segment = plan.segments[0]
    assert isinstance(segment, FloatSegment)
    return segment.clip


def followed(clip: float, fraction: float, rate: float = 0.2, quantile: float = 0.5) -> float:
    return clip * math.exp(-rate * (fraction - quantile))


@pytest.mark.parametrize(
    ("first", "within"), [(100 * LENGTH, 1.0), (LENGTH / 100, 0.0), (3.5 * LENGTH, 0.5)]
)
def test_the_clip_norm_follows_the_released_share_exactly(
    first: float, within: float, tmp_path: Path
) -> None:
    async def work() -> None:
        spec, clip = adaptive_task(first), first
        async with running(tmp_path) as server:
            server.create(spec)
            for number in (1, 2, 3):
                context = await a_round(server, number, clients=range(6))
                assert clip_of(context) == clip
                assert server.row(number, 1).state is RoundState.DONE
                release = released(server, context)
                exactly(release.sums, cohort.clear_sums(context, range(6)))
                fraction = release.clip_fraction()
                assert fraction == pytest.approx(within, abs=0.1)  # rounded to 10 bits
                clip = followed(clip, fraction)
                assert server.store.task("task").clip == clip
            assert await server.task_ended() == (TaskState.FINISHED, "")

    asyncio.run(work())


@scenario
async def test_models_move_by_the_mean_at_each_rounds_own_clip_norm(folder: Path) -> None:
    async with running(folder) as server:
        server.create(adaptive_task(2 * LENGTH, rounds=2, rate=1.0))
        for number in (1, 2):
            context = await a_round(server, number, clients=range(6))
            mean = released(server, context).mean()
            flat = np.concatenate([mean[t.name].reshape(-1) for t in cohort.TENSORS])
            expected = server.model(number - 1) + flat.astype(np.float32)
            np.testing.assert_array_equal(server.model(number), expected)
        assert clip_of(context) != 2 * LENGTH


@scenario
async def test_a_round_goes_on_with_its_clip_norm_after_a_restart(folder: Path) -> None:
    """An upload from before the restart is for the plan of before, and must count after it."""
    key_holder = LocalKeyHolder()
    async with running(folder, key_holder) as server:
        server.create(adaptive_task(3.5 * LENGTH))
        first = await a_round(server, 1, clients=range(6))
        clip = followed(3.5 * LENGTH, released(server, first).clip_fraction())
        current = await server.collecting(2)
        assert clip_of(current) == clip
        server.send_all(current.context, [0, 1])
    async with running(folder, key_holder) as server:
        server.coordinator.resume()
        resumed = await server.collecting(2)
        assert resumed.context == current.context
        server.send_all(resumed.context, [2])
        server.clock.advance(DEADLINE_S)
        assert (await server.ended(2)).state is RoundState.DONE
        exactly(server.sums(resumed.context.plan, 2), cohort.clear_sums(resumed.context, range(3)))
        following = followed(clip, released(server, resumed.context).clip_fraction())
        assert clip_of(await server.collecting(3)) == following


@scenario
async def test_every_attempt_at_a_round_has_the_same_clip_norm(folder: Path) -> None:
    async with running(folder) as server:
        server.create(adaptive_task(100 * LENGTH))
        await a_round(server, 1)
        first = await server.collecting(2, 1)
        server.clock.advance(DEADLINE_S)
        second = await server.collecting(2, 2)
        assert first.context.plan == second.context.plan
        assert first.context.rotation == second.context.rotation
        assert clip_of(second) < 100 * LENGTH


@scenario
async def test_a_void_round_leaves_the_clip_norm(folder: Path) -> None:
    key_holder = LocalKeyHolder()
    async with running(folder, key_holder) as server:
        server.create(adaptive_task(100 * LENGTH))
        await a_round(server, 1)
        key_holder.fail("release", DOWN, times=KEY_HOLDER_ATTEMPTS)
        clip = clip_of(await a_round(server, 2))
        assert server.row(2, 1).state is RoundState.ABORTED
        assert clip_of(await server.collecting(3)) == clip < 100 * LENGTH


@pytest.mark.parametrize("mode", MODES)
def test_clip_norm_and_budget_go_together(mode: str, tmp_path: Path) -> None:
    """What a release costs does not depend on the clip norm, and both end where they should."""

    async def work() -> None:
        plan = room_for(2, mode, clip=100 * LENGTH, clip_bit=True)
        async with running(tmp_path) as server:
            server.create(task(plan, rounds=9, adaptive_clip=AdaptiveClip()))
            contexts = [await a_round(server, number, clients=range(4)) for number in (1, 2)]
            assert await server.task_ended() == (TaskState.FINISHED, reason_of(2, 9, plan))
            releases = [released(server, context) for context in contexts]
            clips = [100 * LENGTH]
            for release in releases:
                clips.append(followed(clips[-1], release.clip_fraction()))
            assert [clip_of(context) for context in contexts] == clips[:-1]
            assert server.store.task("task").clip == clips[-1]
            if mode != "release":
                for context in contexts:
                    number = context.id.round_number
                    exactly(server.sums(context.plan, number), cohort.clear_sums(context, range(4)))

    asyncio.run(work())


@scenario
async def test_a_direction_check_goes_along_with_a_clip_norm_that_moves(folder: Path) -> None:
    tensors = (TensorSpec("w", (300, 20)),)
    plan = make_plan(
        [FloatSegment("update", tensors, 50.0, 8, clip_bit=True)],
        max_clients=6,
        norm_check=NormCheck(sketches=8, min_cosine=-0.5),
    )
    spec = task(plan, rounds=2, adaptive_clip=AdaptiveClip())
    async with running(folder) as server:
        server.blobs.put_model("task", 0, bytes(4 * 6000))
        server.store.create_task(spec, bytes(32))
        server.coordinator.start(spec)
        contexts = [await a_round(server, number) for number in (1, 2)]
        assert await server.task_ended() == (TaskState.FINISHED, "")
        assert [server.row(number, 1).contributors for number in (1, 2)] == [3, 3]
        assert clip_of(contexts[0]) != clip_of(contexts[1])


@scenario
async def test_a_task_without_an_adaptive_clip_norm_keeps_the_plan_that_it_has(
    folder: Path,
) -> None:
    plan = private_plan(clip_bit=True)
    async with running(folder) as server:
        server.create(task(plan))
        contexts = [await a_round(server, number) for number in (1, 2)]
        assert {context.id.plan_digest for context in contexts} == {plan.digest}
        assert server.store.task("task").clip is None


@scenario
async def test_the_rotation_of_a_stored_sum_is_found_again_by_its_rounds_clip_norm(
    folder: Path,
) -> None:
    spec = adaptive_task(100 * LENGTH, rounds=2)
    async with running(folder) as server:
        server.create(spec)
        contexts = [await a_round(server, number) for number in (1, 2)]
        rows = server.store.rounds("task")
        for context, row in zip(contexts, rows, strict=True):
            plan = spec.plan_at(row.clip)
            assert plan == context.plan
            assert rotation_string("task", row.round_number, plan) == context.rotation
        digests = [context.id.plan_digest for context in contexts]
        assert all(one != other for one, other in itertools.pairwise(digests))
