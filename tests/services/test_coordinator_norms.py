"""The norm check through the coordinator: what is beyond the plan costs its client, not the round.

Client 1 sends what the plan forbids, under its own receipt and a valid seal; the others are honest.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import attacker
import cohort
import numpy as np
import pytest
import structlog
from clocks import EPOCH
from key_holders import LocalKeyHolder
from servers import (
    DEADLINE_S,
    DOWN,
    Killed,
    Server,
    dies_at,
    exactly,
    running,
    scenario,
    task,
)
from serving import soon

from secagg import audit
from secagg.challenges import challenge_key
from secagg.context import RoundContext
from secagg.direction import Direction
from secagg.encryptor import encrypt_quantized
from secagg.errors import ContextError, ReceiptError
from secagg.parameters import IntegerSegment, NormCheck, Plan
from secagg.planner import make_plan, plan_tensors
from secagg.quantize import Quantized
from secagg.receipts import SigningKey
from secagg.recheck import require_asked
from secagg.release import Release
from secagg.upload import Upload
from secagg.verdicts import Verdict
from secagg.wire.codec import model_digest
from secagg_server import ciphertexts, norms, retention
from secagg_server.ciphertexts import Ciphertexts
from secagg_server.key_holder import KEY_HOLDER_ATTEMPTS
from secagg_server.schema import UploadRow
from secagg_server.states import RoundState, TaskState, UploadState
from secagg_server.tasks import TaskSpec

HONEST = [0, 2, 5]
CHECK = NormCheck(sketches=8)
PLAN = cohort.mixed_plan(norm_check=CHECK)
# The same with one segment, for tests that are not about what is judged.
SMALL = make_plan(
    [IntegerSegment("counts", cohort.COUNTS, 1 << 20, cohort.COUNTS_NORM)],
    max_clients=6,
    norm_check=CHECK,
)
Lie = Callable[[RoundContext, int, bytes], Upload]


def upload_of(
    context: RoundContext, index: int, commitment: bytes, parts: list[attacker.Integers]
) -> Upload:
    """Client i's upload of any integers at all."""
    seed = attacker.named("seed", context.id.digest.hex(), index)
    return attacker.upload_under(
        context, parts, cohort.identity(index), seed, commitment=commitment
    )


def beyond(context: RoundContext, index: int, commitment: bytes, *, segment: int) -> Upload:
    """Client i's upload with one segment spread evenly to ten times its bound."""
    parts = [part.values for part in cohort.quantized(context, index)]
    layout = context.plan.layouts[segment]
    largest = round(10 * layout.norm / layout.values**0.5)
    parts[segment] = np.where(np.arange(layout.values) % 2, largest, -largest)
    return upload_of(context, index, commitment, parts)


def beyond_in_floats(context: RoundContext, index: int, commitment: bytes) -> Upload:
    """The update is too long, and the counts are honest."""
    return beyond(context, index, commitment, segment=0)


def beyond_in_counts(context: RoundContext, index: int, commitment: bytes) -> Upload:
    """The counts are too long, and the update is honest."""
    return beyond(context, index, commitment, segment=-1)


def loud(context: RoundContext, index: int, commitment: bytes) -> Upload:
    """An update whose every value is in range, and all of them at its end."""
    layouts = context.plan.layouts
    signs = np.where(np.arange(layouts[0].values) % 3, 1, -1)
    first = Quantized(signs * layouts[0].max_abs)
    rest = cohort.quantized(context, index)[1:]
    return encrypt_quantized(context, [first, *rest], cohort.identity(index), commitment)


async def collect(
    server: Server,
    number: int = 1,
    attempt: int = 1,
    *,
    honest: Iterable[int] = HONEST,
    liars: Iterable[int] = (1,),
    lie: Lie = beyond_in_counts,
) -> RoundContext:
    """A round with these clients, closed."""
    context = (await server.collecting(number, attempt)).context
    for index in liars:
        server.send(context, lie(context, index, server.commitment(index)))
    server.send_all(context, honest)
    server.clock.advance(DEADLINE_S)
    return context


def standing(server: Server, context: RoundContext) -> dict[bytes, tuple[UploadState, str]]:
    """State and reason code of each upload, by signing key."""
    return {
        row.client_key: (row.state, row.reason.partition(":")[0])
        for row in upload_rows(server, context)
    }


def upload_rows(server: Server, context: RoundContext) -> list[UploadRow]:
    def rows(session) -> list[UploadRow]:  # type: ignore[no-untyped-def]  # noqa: ANN001
        found = session.query(UploadRow).filter_by(
            round_number=context.id.round_number, attempt=context.id.attempt
        )
        return list(found)

    return server.store.database.read(rows)


def verify_left_out(
    server: Server, context: RoundContext, *liars: int, honest: Iterable[int] = HONEST
) -> None:
    """The liars are out with the reason, the others are the sum, and everybody has a verdict."""
    honest = list(honest)
    wanted = {cohort.identity(i).public: (UploadState.REJECTED, "NORM_REFUSED") for i in liars}
    wanted |= {cohort.identity(i).public: (UploadState.ACCEPTED, "") for i in honest}
    assert standing(server, context) == wanted
    number, attempt = context.id.round_number, context.id.attempt
    row = server.row(number, attempt)
    assert (row.state, row.contributors) == (RoundState.DONE, len(honest))
    exactly(server.sums(context.plan, number), cohort.clear_sums(context, honest))
    for index in [*liars, *honest]:
        verdict = verdict_of(server, context, index)
        assert verdict.accepted is (index in honest)
        verdict.verify(context.id, [server.key_holder.identity.public])


def verdict_of(server: Server, context: RoundContext, index: int) -> Verdict:
    found = server.store.verdict(context.id, cohort.identity(index).public.hex())
    assert found is not None
    assert found[1] is not None
    return found[1]


def no_verdicts(server: Server, context: RoundContext) -> None:
    assert [row.verdict for row in upload_rows(server, context) if row.verdict] == []
    assert server.events("norms-judged") == []


# --- uploads beyond the plan are left out ---------------------------------------------------------


@pytest.mark.parametrize("liars", [[1], [4, 1]])
@pytest.mark.parametrize("lie", [beyond_in_floats, beyond_in_counts])
def test_whatever_is_beyond_the_plan_is_left_out_of_an_exact_sum(
    lie: Lie, liars: list[int], tmp_path: Path
) -> None:
    async def work() -> None:
        async with running(tmp_path) as server:
            server.create(task(PLAN, rounds=2))
            for number in (1, 2):
                context = await collect(server, number, liars=liars, lie=lie)
                await server.ended(number)
                verify_left_out(server, context, *liars)
            assert await server.task_ended() == (TaskState.FINISHED, "")
            assert server.store.task("task").model_version == 2

    asyncio.run(work())


@scenario
async def test_the_model_moves_by_the_weighted_mean_of_those_who_passed(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task(PLAN, rounds=1))
        context = await collect(server)
        await server.task_ended()
        sums = tuple(cohort.clear_sums(context, HONEST))
        oracle = Release(context.plan, context.rotation, len(HONEST), sums)
        np.testing.assert_array_equal(server.model(1), oracle.applied_to(server.model(0)))


@scenario
async def test_an_update_whose_values_are_all_in_range_is_too_long_all_the_same(
    folder: Path,
) -> None:
    plan = plan_tensors(2000, max_clients=6, clip=1.0, norm_check=CHECK)
    async with running(folder) as server:
        create(server, task(plan, rounds=1))
        context = await collect(server, lie=loud)
        await server.ended()
        verify_left_out(server, context, 1)


@scenario
async def test_uploads_of_several_chunks_are_sketched_whole(folder: Path) -> None:
    """The lie is in the last chunk alone."""
    wide, last = 33 * 3 * 4096, 9
    segments = [
        IntegerSegment("wide", wide, 1000, 3 * wide**0.5),
        IntegerSegment("last", last, 5, 3 * last**0.5),
    ]
    plan = make_plan(segments, max_clients=6, norm_check=CHECK)
    assert plan.chunks > 1
    async with running(folder) as server:
        server.create(task(plan, rounds=1))
        honest = [0, 2, 3]
        context = (await server.collecting()).context
        for index in honest:
            server.send(context, small(context, index, server.commitment(index)))
        parts = [part.values for part in small_parts(context, 1)]
        parts[1] = np.full(9, 50)
        server.send(context, upload_of(context, 1, server.commitment(1), parts))
        server.clock.advance(DEADLINE_S)
        await server.ended()
        assert standing(server, context)[cohort.identity(1).public][1] == "NORM_REFUSED"
        wanted = [small_parts(context, index) for index in honest]
        exactly(
            server.sums(plan, 1),
            [sum(part.values for part in parts) for parts in zip(*wanted, strict=True)],
        )


def small_parts(context: RoundContext, index: int) -> list[Quantized]:
    """Values of both signs: all alike, they would sit at few roots, and be refused now and then."""
    drawn = np.random.default_rng(index)
    return [
        Quantized(drawn.integers(-2, 3, layout.values).astype(np.int64))
        for layout in context.plan.layouts
    ]


def small(context: RoundContext, index: int, commitment: bytes) -> Upload:
    return encrypt_quantized(
        context, small_parts(context, index), cohort.identity(index), commitment
    )


@scenario
async def test_a_refused_seal_is_not_sketched_and_both_reasons_stand(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task(PLAN, rounds=1))
        context = (await server.collecting()).context
        honest = cohort.encrypted(context, 4, server.commitment(4))
        broken = bytearray(honest.admission.sealed_seed)
        broken[-1] ^= 1
        receipt = resigned(honest, 4, server.commitment(4), bytes(broken))
        server.send(context, receipt)
        await collect(server)
        await server.ended()
        found = standing(server, context)
        assert found[cohort.identity(4).public] == (UploadState.REJECTED, "INVALID_SEAL")
        assert found[cohort.identity(1).public] == (UploadState.REJECTED, "NORM_REFUSED")
        assert len(server.key_holder.sketches) == len(HONEST) + 1
        exactly(server.sums(context.plan, 1), cohort.clear_sums(context, HONEST))


def resigned(upload: Upload, index: int, commitment: bytes, sealed: bytes) -> Upload:
    """An upload under another seal."""
    receipt = upload.admission.receipt
    signed = type(receipt).sign(
        cohort.identity(index), receipt.context, receipt.upload_digest, sealed, commitment
    )
    return replace(upload, admission=replace(upload.admission, receipt=signed, sealed_seed=sealed))


@pytest.mark.parametrize("honest", [[], [0, 2]])
def test_too_few_that_pass_end_the_attempt_and_nothing_is_summed(
    honest: list[int], tmp_path: Path
) -> None:
    async def work() -> None:
        async with running(tmp_path) as server:
            server.create(task(PLAN, rounds=1))
            await collect(server, honest=honest, liars=[1, 3, 4, 5])
            row = await server.ended()
            assert row.reason.startswith("QUORUM_NOT_REACHED: ")
            assert server.store.counts(row.key).rejected == 4
            assert not {"check_sum", "release"} & set(server.key_holder.calls)
            again = await collect(server, 1, 2, liars=[])
            await server.ended(1, 2)
            verify_left_out(server, again)

    asyncio.run(work())


@scenario
async def test_too_few_good_seals_are_not_even_sketched(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task(PLAN, rounds=1))
        server.key_holder.judge = refuses_all  # type: ignore[method-assign]
        await collect(server)
        assert (await server.ended()).reason.startswith("QUORUM_NOT_REACHED: ")
        assert "submit_sketch" not in server.key_holder.calls


async def refuses_all(_context: RoundContext, admissions: Iterable[Any]) -> dict[bytes, str]:
    return {admission.receipt.upload_digest: "INVALID_SEAL" for admission in admissions}


@scenario
async def test_a_plan_without_a_check_is_not_sketched(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task(rounds=1))
        context = await collect(server, liars=[])
        await server.task_ended()
        assert server.key_holder.calls == ["open_round", "judge", "check_sum", "release"]
        no_verdicts(server, context)


@scenario
async def test_each_upload_is_sketched_once_and_the_verdicts_are_asked_for_once(
    folder: Path,
) -> None:
    async with running(folder) as server:
        server.create(task(PLAN, rounds=1))
        await collect(server)
        await server.task_ended()
        sketched = ["submit_sketch"] * (len(HONEST) + 1)
        steps = ["open_round", "judge", *sketched, "verdicts", "check_sum", "release"]
        assert server.key_holder.calls == steps


@scenario
async def test_logs_have_the_counts_and_name_nobody(folder: Path) -> None:
    with structlog.testing.capture_logs() as log:
        async with running(folder) as server:
            server.create(task(PLAN, rounds=1))
            context = await collect(server)
            await server.task_ended()
            entries = list(server.store.audit())
            audit.verify(entries)
    (line,) = [entry for entry in log if entry["event"] == "norms_judged"]
    assert line.pop("sketch_s") > 0
    assert line == {
        **{"event": "norms_judged", "log_level": "info", "round": 1, "attempt": 1},
        **{"accepted": len(HONEST), "refused": 1},
    }
    (judged,) = [json.loads(e.details) for e in entries if e.event == "norms-judged"]
    where = {"task": "task", "round": 1, "attempt": 1}
    assert judged == {**where, "accepted": len(HONEST), "refused": 1}
    (refused,) = [json.loads(e.details) for e in entries if e.event == "upload-rejected"]
    assert refused["reason"] == "NORM_REFUSED"
    assert refused["upload"] == verdict_of(server, context, 1).receipt.upload_digest.hex()
    said = json.dumps([log, [entry.details for entry in entries]], default=str)
    assert all(cohort.identity(index).public.hex() not in said for index in range(6))


@scenario
async def test_the_reason_tells_no_number(folder: Path) -> None:
    """A number in it would be a statistic of somebody's update."""
    async with running(folder) as server:
        server.create(task(PLAN, rounds=1))
        context = await collect(server)
        await server.ended()
        (reason,) = {row.reason for row in upload_rows(server, context) if row.reason}
        assert not any(character.isdigit() for character in reason)


# --- what clients commit to -----------------------------------------------------------------------


@scenario
async def test_a_receipt_with_another_commitment_is_refused_and_nothing_of_it_kept(
    folder: Path,
) -> None:
    async with running(folder) as server:
        server.create(task(PLAN, rounds=1))
        context = (await server.collecting()).context
        stranger = server.commitment(2)
        with pytest.raises(ReceiptError, match="commitment"):
            server.intake.open(cohort.encrypted(context, 0, stranger).admission)
        with pytest.raises(ContextError, match="commitment"):
            cohort.encrypted(context, 0)
        assert upload_rows(server, context) == []
        assert server.events("upload-announced") == []
        server.send_all(context, [0])


@scenario
async def test_each_client_and_attempt_has_a_challenge_of_its_own(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task(PLAN, rounds=1))
        await server.collecting()
        first = [server.commitment(index) for index in range(3)]
        server.clock.advance(DEADLINE_S)
        await server.collecting(1, 2)
        second = [server.commitment(index) for index in range(3)]
        assert len({*first, *second}) == 6


# --- a key holder that fails ----------------------------------------------------------------------

CALLS = ["submit_sketch", "verdicts"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("answered", [False, True], ids=["not done", "done, answer lost"])
def test_a_key_holder_that_is_away_for_a_while_delays_verdicts_and_skips_none(
    call: str, answered: bool, tmp_path: Path
) -> None:
    async def work() -> None:
        key_holder = LocalKeyHolder()
        for _ in range(KEY_HOLDER_ATTEMPTS - 1):
            (key_holder.lose_answer if answered else key_holder.fail)(call, DOWN)
        async with running(tmp_path, key_holder) as server:
            # One at a time: the first upload is the one that meets every failure.
            server.coordinator._norms._at_once = 1
            server.create(task(SMALL, rounds=1))
            context = await collect(server)
            assert await server.task_ended() == (TaskState.FINISHED, "")
            assert [row.attempt for row in server.store.rounds("task")] == [1]
            verify_left_out(server, context, 1)

    asyncio.run(work())


@pytest.mark.parametrize("call", CALLS)
def test_a_key_holder_that_stays_away_costs_an_attempt_and_nothing_is_summed(
    call: str, tmp_path: Path
) -> None:
    async def work() -> None:
        key_holder = LocalKeyHolder()
        key_holder.fail(call, DOWN, times=2 * KEY_HOLDER_ATTEMPTS)
        async with running(tmp_path, key_holder) as server:
            server.create(task(SMALL, rounds=1))
            context = await collect(server)
            row = await server.ended()
            assert (row.state, row.reason) == (RoundState.ABORTED, f"UNAVAILABLE: {DOWN}")
            assert not {"check_sum", "release"} & set(key_holder.calls)
            no_verdicts(server, context)
            key_holder._before.clear()
            again = await collect(server, 1, 2)
            await server.ended(1, 2)
            verify_left_out(server, again, 1)

    asyncio.run(work())


@scenario
async def test_the_first_error_ends_the_sketching_of_all(folder: Path) -> None:
    key_holder = LocalKeyHolder()
    async with running(folder, key_holder) as server:
        server.coordinator._norms._at_once = 1
        server.create(task(SMALL, rounds=1, max_attempts=1))
        key_holder.fail("submit_sketch", ReceiptError("expected something else"))
        await collect(server)
        assert (await server.ended()).reason.startswith("INVALID_RECEIPT: ")
        assert key_holder.calls.count("submit_sketch") == 1


# --- a key holder that lies -----------------------------------------------------------------------


def of_a_stranger(verdict: Verdict) -> Verdict:
    """The same, signed by somebody else."""
    found = verdict.sketch_digest
    return Verdict.sign(SigningKey.generate(), verdict.receipt, found, accepted=verdict.accepted)


def under_its_name(verdict: Verdict) -> Verdict:
    """Somebody else's signature under the key holder's name."""
    return replace(of_a_stranger(verdict), identity=verdict.identity)


LIES: dict[str, Callable[[list[Verdict]], list[Verdict]]] = {
    "none": lambda _given: [],
    "one is missing": lambda given: given[:-1],
    "the refused one is missing": lambda given: [each for each in given if each.accepted],
    "one comes twice": lambda given: [*given, given[0]],
    "one in another's place": lambda given: [*given[:-1], given[0]],
    "the sketches of two are swapped": lambda given: [
        replace(given[0], sketch_digest=given[1].sketch_digest),
        replace(given[1], sketch_digest=given[0].sketch_digest),
        *given[2:],
    ],
    "on another sketch": lambda given: [replace(given[0], sketch_digest=bytes(32)), *given[1:]],
    "turned": lambda given: [replace(given[0], accepted=not given[0].accepted), *given[1:]],
    "all accepted": lambda given: [replace(each, accepted=True) for each in given],
    "of a stranger": lambda given: [of_a_stranger(given[0]), *given[1:]],
    "under its name": lambda given: [*given[:-1], under_its_name(given[-1])],
    "on another receipt": lambda given: [
        replace(given[0], receipt=replace(given[0].receipt, signature=bytes(64))),
        *given[1:],
    ],
}


@pytest.mark.parametrize("lie", LIES)
def test_verdicts_that_are_not_the_key_holders_on_these_sketches_end_the_attempt(
    lie: str, tmp_path: Path
) -> None:
    async def work() -> None:
        key_holder = LocalKeyHolder()
        key_holder.change = LIES[lie]
        async with running(tmp_path, key_holder) as server:
            server.create(task(SMALL, rounds=1))
            context = await collect(server)
            row = await server.ended()
            assert row.state is RoundState.ABORTED
            assert row.reason.partition(":")[0] in ("MALFORMED", "UNTRUSTED_KEY")
            assert "verdict" in row.reason
            assert not {"check_sum", "release"} & set(key_holder.calls)
            no_verdicts(server, context)
            key_holder.change = lambda given: given
            again = await collect(server, 1, 2)
            await server.ended(1, 2)
            verify_left_out(server, again, 1)

    asyncio.run(work())


@scenario
async def test_an_own_verdict_on_another_sketch_ends_the_attempt(folder: Path) -> None:
    """A good signature is not enough."""
    key_holder = LocalKeyHolder()

    def other(given: list[Verdict]) -> list[Verdict]:
        receipt = given[0].receipt
        mine = Verdict.sign(key_holder.identity, receipt, bytes(32), accepted=True)
        return [mine, *given[1:]]

    key_holder.change = other
    async with running(folder, key_holder) as server:
        server.create(task(SMALL, rounds=1))
        context = await collect(server)
        assert (await server.ended()).reason.startswith("MALFORMED: ")
        no_verdicts(server, context)


# --- a server that dies ---------------------------------------------------------------------------

Arm = Callable[[Server], None]


def at_store(method: str, *, done: bool, call: int = 1) -> Arm:
    return lambda server: dies_at(server.store, method, done=done, call=call)


def at_answer(call: str) -> Arm:
    return lambda server: server.key_holder.lose_answer(call, Killed())


# Where it dies, and whether the verdicts are on its disk then.
POINTS: dict[str, tuple[Arm, bool]] = {
    "closed": (at_store("advance", done=True), False),
    "judged": (at_answer("judge"), False),
    "before the sketches": (at_store("norms_judged", done=True), False),
    "sketch submitted": (at_answer("submit_sketch"), False),
    "verdicts given": (at_answer("verdicts"), False),
    "before they are recorded": (at_store("record_verdicts", done=False), False),
    "verdicts recorded": (at_store("record_verdicts", done=True), True),
    "manifest recorded": (at_store("record_manifest", done=True), True),
    "manifest fixed": (at_store("advance", done=True, call=2), True),
}


@pytest.mark.parametrize("restarted", [False, True], ids=["the server", "both"])
@pytest.mark.parametrize("point", POINTS)
def test_the_next_process_judges_the_same_and_finishes_the_round(
    point: str, restarted: bool, tmp_path: Path
) -> None:
    async def work() -> None:
        key_holder, (arm, recorded) = LocalKeyHolder(), POINTS[point]
        server = Server(tmp_path, key_holder)
        arm(server)
        server.create(task(SMALL, rounds=1))
        running_task = server.coordinator._running["task"]
        context = await collect(server)
        with pytest.raises(Killed):
            await running_task
        server.store.close()
        if restarted:
            key_holder.restart()
        before = key_holder.calls.count("verdicts"), len(key_holder.sketches)
        async with running(tmp_path, key_holder) as again:
            again.coordinator.resume()
            assert await again.task_ended() == (TaskState.FINISHED, "")
            assert [row.attempt for row in again.store.rounds("task")] == [1]
            verify_left_out(again, context, 1)
            assert len(again.events("norms-judged")) == 1
            assert len(again.events("upload-rejected")) == 1
            audit.verify(again.store.audit())
        asked = key_holder.calls.count("verdicts"), len(key_holder.sketches)
        assert (asked == before) is recorded
        by_upload = {(sketch.upload_digest, sketch.digest) for sketch in key_holder.sketches}
        assert len(by_upload) == len(HONEST) + 1, "an upload was shown in two ways"

    asyncio.run(work())


@scenario
async def test_a_server_that_has_lost_its_secret_starts_another_attempt(folder: Path) -> None:
    """It can no longer ask what it had committed to, and must not ask anything else."""
    key_holder = LocalKeyHolder()
    async with running(folder, key_holder) as server:
        dies_at(server.store, "advance", done=True)
        server.create(task(SMALL, rounds=1))
        running_task = server.coordinator._running["task"]
        await collect(server)
        with pytest.raises(Killed):
            await running_task
    async with running(folder, key_holder) as again:
        again.coordinator._norms._secret = b"another secret of thirty-two B.."
        again.coordinator.resume()
        assert (await again.ended(1, 1)).reason.startswith("INVALID_RECEIPT: ")
        assert "submit_sketch" not in key_holder.calls
        context = await collect(again, 1, 2)
        await again.ended(1, 2)
        verify_left_out(again, context, 1)


# --- the direction --------------------------------------------------------------------------------

COMPARED = plan_tensors(
    12_288, max_clients=6, clip=1.0, norm_check=NormCheck(sketches=8, min_cosine=-0.2)
)


def create(server: Server, spec: TaskSpec) -> None:
    """A task whose model is of any size, and zero at first."""
    model = bytes(spec.model_bytes)
    server.blobs.put_model(spec.task_id, 0, model)
    server.store.create_task(spec, model_digest(model))
    server.coordinator.start(spec)


def opposed(context: RoundContext, index: int, commitment: bytes) -> Upload:
    """Client i's update with every sign turned."""
    parts = [Quantized(-part.values) for part in cohort.quantized(context, index)]
    return encrypt_quantized(context, parts, cohort.identity(index), commitment)


@scenario
async def test_updates_are_compared_with_the_step_before_from_the_second_round_on(
    folder: Path,
) -> None:
    async with running(folder) as server:
        create(server, task(COMPARED, rounds=3))
        await collect(server, 1, liars=[1], lie=opposed)
        await server.ended(1)
        assert {sketch.direction for sketch in server.key_holder.sketches} == {None}
        assert server.store.counts(("task", 1, 1)).rejected == 0
        for number in (2, 3):
            server.key_holder.sketches.clear()
            context = await collect(server, number, liars=[1], lie=opposed)
            await server.ended(number)
            verify_left_out(server, context, 1)
            assert None not in [sketch.direction for sketch in server.key_holder.sketches]


@scenario
async def test_a_client_can_recompute_what_it_was_asked(folder: Path) -> None:
    async with running(folder) as server:
        create(server, task(COMPARED, rounds=2))
        for number in (1, 2):
            context = (await server.collecting(number)).context
            uploads = {i: cohort.encrypted(context, i, server.commitment(i)) for i in HONEST}
            for upload in uploads.values():
                server.send(context, upload)
            server.clock.advance(DEADLINE_S)
            await server.ended(number)
            direction = None
            if number == 2:
                step = server.model(1) - server.model(0)
                assert COMPARED.segments[0] == task(COMPARED).model
                direction = Direction.of(task(COMPARED).model, step, context.rotation)  # type: ignore[arg-type]
            for index, upload in uploads.items():
                shown = server.verdicts.show(context.id, cohort.identity(index).public)
                assert (shown.direction, shown.model_version) == (number == 2, number - 1)
                require_asked(shown.verdict, context, upload, shown.challenge_key, direction)


@scenario
async def test_the_models_that_updates_are_compared_with_outlive_retention(folder: Path) -> None:
    async with running(folder) as server:
        create(server, task(COMPARED, rounds=4))
        for number in (1, 2, 3):
            context = await collect(server, number, liars=[1], lie=opposed)
            await server.ended(number)
            await server.collecting(number + 1)
            retention.sweep(server.store, server.blobs, EPOCH.replace(year=EPOCH.year + 100))
        assert standing(server, context)[cohort.identity(1).public][1] == "NORM_REFUSED"
        kept = sorted(path.name for path in server.folder.glob("models/*/*.f32"))
        assert kept == ["2.f32", "3.f32"]


@scenario
async def test_a_model_that_did_not_move_is_no_direction(folder: Path) -> None:
    async with running(folder) as server:
        create(server, task(COMPARED, rounds=2))
        spec, context = task(COMPARED), cohort.round_context(COMPARED, task_id="task")
        server.store.task = lambda _id: Moved()  # type: ignore[assignment,method-assign,return-value]
        server.blobs.model = lambda *_: bytes(spec.model_bytes)  # type: ignore[method-assign]
        challenger = server.coordinator._norms.challenger(spec, context)
        assert challenger is not None
        assert challenger._direction is None


class Moved:
    """A task one version on."""

    model_version = 1


@pytest.mark.parametrize(
    ("plan", "version", "compared"),
    [
        (COMPARED, 0, False),
        (COMPARED, 1, True),
        (PLAN, 7, False),
        (cohort.mixed_plan(), 7, False),
    ],
)
def test_only_what_started_from_a_step_is_compared(
    plan: Plan, version: int, compared: bool
) -> None:
    assert norms.compares(plan, version) is compared


# --- how it is computed ---------------------------------------------------------------------------


def elsewhere(work: Callable[..., Any], *arguments: object) -> Any:  # noqa: ANN401 - any result
    """As another process would."""
    name, *parts = pickle.loads(pickle.dumps((work, *arguments)))  # noqa: S301 - our own
    return pickle.loads(pickle.dumps(name(*parts)))  # noqa: S301


@scenario
async def test_sketches_can_be_computed_in_another_process_a_few_at_a_time(folder: Path) -> None:
    running_now, most, lock = 0, 0, threading.Lock()
    together = threading.Barrier(2, timeout=20)

    def counted(work: Callable[..., Any], *arguments: object) -> Any:  # noqa: ANN401 - any result
        nonlocal running_now, most
        with lock:
            running_now += 1
            most = max(most, running_now)
        together.wait()  # two at a time, or the test fails
        try:
            return elsewhere(work, *arguments)
        finally:
            with lock:
                running_now -= 1

    async with running(folder) as server:
        # Its own: the low bits of the sum are no sketches.
        server.coordinator._norms._ciphertexts = Ciphertexts(server.blobs, counted, bytes(32))
        server.create(task(PLAN, rounds=1))
        context = await collect(server, liars=[1, 3, 4])
        await server.ended()
        verify_left_out(server, context, 1, 3, 4)
    assert most == 2


def test_one_chunk_of_an_upload_is_in_memory_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live: list[int] = []

    class Watched:
        """Blobs that see whether the chunk before is looked at still."""

        def chunk(self, _context: object, _name: bytes, index: int) -> bytes:
            live.append(index)
            return b""

    class Consuming:
        def sketch_validated(self, _receipt: object, chunks: Iterable[object]) -> list[int]:
            return [len(live) for _ in chunks]

    plan = cohort.long_plan()
    monkeypatch.setattr(ciphertexts, "widen", lambda data, _blocks: data)
    receipt = cohort.noise_upload(cohort.round_context(plan), 0).admission.receipt
    seen = ciphertexts._sketch(Consuming(), Watched(), plan, receipt)  # type: ignore[arg-type]
    assert (seen, live) == ([1, 2, 3], [0, 1, 2])


def test_challenges_follow_from_the_secret_that_outlives_the_server(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.store.create_task(task(SMALL), bytes(32))
    context = cohort.round_context(SMALL, task_id="task")
    challenger = server.coordinator._norms.challenger(task(SMALL), context)
    assert challenger is not None
    key = cohort.identity(0).public
    secret = server.coordinator._norms._secret
    assert challenger.key(key) == challenge_key(secret, context.id.digest, key)
    server.store.close()


@scenario
async def test_tasks_with_a_check_survive_their_wire_form(folder: Path) -> None:
    async with running(folder) as server:
        spec = task(PLAN)
        server.create(spec)
        await soon(lambda: server.store.task_exists("task"))
        assert server.store.task("task").task_spec() == spec
