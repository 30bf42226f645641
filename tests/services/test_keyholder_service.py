"""The key holder over gRPC: what it opens, what it refuses, and what it never says."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cohort
import grpc
import grpc.aio
import numpy as np
import pytest
import structlog
from holding import (
    Holder,
    Judged,
    digests_of,
    flipped,
    holding,
    manifest,
    numbers,
    pieces,
    summed,
)
from key_holders import durable_rounds
from serving import LoopThread, loop_thread

from secagg.errors import (
    ClosedError,
    ConfigurationError,
    ContextError,
    DuplicateError,
    MalformedError,
    PlanError,
    QuorumError,
    ReleaseError,
    SealError,
    SecaggError,
)
from secagg.parameters import MODULUS
from secagg.rpc.status import from_rpc_error
from secagg.wire import codec
from secagg.wire.v1 import key_holder_service_pb2 as pb
from secagg.wire.v1 import round_pb2
from secagg_keyholder.rounds import Policy

ACCEPTED = round_pb2.VERDICT_STATE_ACCEPTED
REJECTED = round_pb2.VERDICT_STATE_REJECTED


@pytest.fixture(scope="module")
def thread() -> Iterator[LoopThread]:
    with loop_thread() as running:
        yield running


@pytest.fixture
def holder(thread: LoopThread, tmp_path: Path) -> Iterator[Holder]:
    with holding(thread, durable_rounds(tmp_path)) as held:
        yield held


@pytest.fixture
def judged(holder: Holder) -> Judged:
    context = holder.open()
    uploads = [cohort.encrypted(context, index) for index in range(4)]
    assert holder.judge(context, uploads) == [(ACCEPTED, "")] * 4
    return Judged(context, uploads)


def refused(holder: Holder, judged: Judged, kind: type[SecaggError]) -> None:
    """The honest sum is refused too, with this error."""
    with pytest.raises(kind):
        holder.release(judged.context, judged.digests, judged.data)


def opens(holder: Holder, judged: Judged) -> None:
    """The honest sum is opened, exactly, whatever was tried before."""
    data, contributors = holder.release(judged.context, judged.digests, judged.data)
    assert contributors == len(judged.uploads)
    wanted = cohort.clear_sums(judged.context, range(len(judged.uploads)))
    for found, part in zip(numbers(data, judged.context.plan), wanted, strict=True):
        np.testing.assert_array_equal(found, part)


# --- opening ----------------------------------------------------------------------------------


def test_opening_again_gives_the_same_key(holder: Holder) -> None:
    first = holder.open()
    assert holder.open() == first
    assert first.id.attempt == 1


@pytest.mark.parametrize("change", ["plan", "model"])
def test_opening_again_with_another_plan_or_model_is_refused(holder: Holder, change: str) -> None:
    first = holder.open()
    plan = cohort.counts_plan() if change == "plan" else None
    model_digest = bytes(32) if change == "plan" else b"\1" * 32
    with pytest.raises(DuplicateError):
        holder.open(plan, model_digest=model_digest)
    assert holder.open() == first


@pytest.mark.parametrize(("number", "attempt"), [(1, 9), (2, 1), (2, 2)])
def test_an_earlier_round_or_attempt_is_refused(holder: Holder, number: int, attempt: int) -> None:
    later = holder.open(number=2, attempt=3)
    with pytest.raises(ClosedError):
        holder.open(number=number, attempt=attempt)
    assert holder.open(number=2, attempt=3) == later


def test_a_later_attempt_has_another_key_and_ends_the_earlier_one(holder: Holder) -> None:
    first = holder.open()
    upload = cohort.encrypted(first, 0)
    second = holder.open(attempt=2)
    assert second.id.round_key_id != first.id.round_key_id
    with pytest.raises((ClosedError, ContextError)):
        holder.judge(first, [upload])


def test_tasks_do_not_disturb_one_another(holder: Holder) -> None:
    first = holder.open(number=5)
    second = holder.open(task_id="other")
    assert first.id.round_key_id != second.id.round_key_id
    assert holder.open(number=5) == first


@pytest.mark.parametrize("attempt", [1, 2, 9])
def test_a_released_round_is_never_opened_again(
    holder: Holder, judged: Judged, attempt: int
) -> None:
    opens(holder, judged)
    with pytest.raises(ClosedError, match="one release a round"):
        holder.open(attempt=attempt)
    with pytest.raises(ClosedError):
        holder.judge(judged.context, [cohort.encrypted(judged.context, 5)])
    assert holder.open(number=2).id.round_number == 2
    with pytest.raises(ClosedError):
        holder.open(attempt=attempt)


def test_a_cohort_below_the_floor_is_refused(thread: LoopThread, tmp_path: Path) -> None:
    with holding(thread, durable_rounds(tmp_path, policy=Policy(min_clients=5))) as holder:
        with pytest.raises(ConfigurationError, match=r"min_clients=5.*min_clients=4"):
            holder.open(cohort.mixed_plan(min_clients=4))
        holder.open(cohort.mixed_plan(min_clients=5))


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"task_id": "../x"}, SecaggError),
        ({"task_id": ""}, SecaggError),
        ({"task_id": "x" * 65}, SecaggError),
        ({"number": 0}, SecaggError),
        ({"attempt": 0}, SecaggError),
        ({"model_digest": b"short"}, MalformedError),
        ({"model_digest": bytes(33)}, MalformedError),
    ],
    ids=str,
)
def test_a_round_without_a_proper_name_is_refused(
    holder: Holder, changes: dict[str, object], kind: type[SecaggError]
) -> None:
    with pytest.raises(kind) as caught:
        holder.open(**changes)  # type: ignore[arg-type]
    assert caught.value.reason != "INTERNAL"


def test_a_refused_request_does_not_end_the_open_round(holder: Holder, judged: Judged) -> None:
    with pytest.raises(SecaggError):
        holder.open(number=2, attempt=0)
    opens(holder, judged)


def test_a_plan_that_cannot_be_exact_is_refused(holder: Holder) -> None:
    message = codec.plan_to_wire(cohort.counts_plan())
    message.segments[0].integers.max_abs = 1 << 60
    with pytest.raises(grpc.RpcError) as caught:
        holder.stub.OpenRound(
            pb.OpenRoundRequest(
                task_id="task", round_number=1, attempt=1, plan=message, model_digest=bytes(32)
            ),
            timeout=20,
        )
    assert type(from_rpc_error(caught.value)) is PlanError


# --- judging ----------------------------------------------------------------------------------


def test_verdicts_are_the_same_when_asked_again(holder: Holder) -> None:
    context = holder.open()
    uploads = [
        cohort.encrypted(context, 0),
        cohort.broken_seal(context, 1),
        cohort.noise_upload(context, 2),
        cohort.encrypted(context, 3),
    ]
    wanted = [
        (ACCEPTED, ""),
        (REJECTED, "INVALID_SEAL"),
        (REJECTED, "INVALID_SEAL"),
        (ACCEPTED, ""),
    ]
    assert holder.judge(context, uploads) == wanted
    assert holder.judge(context, uploads) == wanted
    assert holder.judge(context, uploads[::-1]) == wanted[::-1]


def test_a_second_upload_of_a_client_is_refused_and_the_first_stays(holder: Holder) -> None:
    context = holder.open()
    first, second = cohort.encrypted(context, 0), cohort.encrypted(context, 0)
    assert holder.judge(context, [first, second]) == [
        (ACCEPTED, ""),
        (REJECTED, "DUPLICATE_UPLOAD"),
    ]
    assert holder.judge(context, [second, first]) == [
        (REJECTED, "DUPLICATE_UPLOAD"),
        (ACCEPTED, ""),
    ]


def test_an_upload_with_a_forged_receipt_is_refused(holder: Holder) -> None:
    context = holder.open()
    upload = cohort.encrypted(context, 0)
    receipt = replace(upload.admission.receipt, signature=bytes(64))
    forged = replace(upload, admission=replace(upload.admission, receipt=receipt))
    assert holder.judge(context, [forged]) == [(REJECTED, "INVALID_RECEIPT")]
    # The first verdict on an upload stands; nobody else's is touched by it.
    assert holder.judge(context, [upload]) == [(REJECTED, "INVALID_RECEIPT")]
    assert holder.judge(context, [cohort.encrypted(context, 1)]) == [(ACCEPTED, "")]


def test_an_upload_made_for_an_earlier_attempt_is_refused(holder: Holder) -> None:
    old = cohort.encrypted(holder.open(), 0)
    context = holder.open(attempt=2)
    assert holder.judge(context, [old]) == [(REJECTED, "CONTEXT_MISMATCH")]


def test_a_seal_that_was_moved_to_another_client_is_refused(holder: Holder) -> None:
    from secagg.receipts import Receipt
    from secagg.upload import Admission

    context = holder.open()
    upload = cohort.encrypted(context, 0)
    name, sealed = upload.admission.receipt.upload_digest, upload.admission.sealed_seed
    stolen = Admission(Receipt.sign(cohort.identity(1), context.id, name, sealed), sealed)
    assert holder.judge(context, [replace(upload, admission=stolen)]) == [
        (REJECTED, "INVALID_SEAL")
    ]


def test_as_many_as_256_are_judged_at_once_and_not_one_more(holder: Holder) -> None:
    context = holder.open()
    upload = cohort.encrypted(context, 0)
    assert holder.judge(context, [upload] * 256) == [(ACCEPTED, "")] * 256
    with pytest.raises(MalformedError, match="at most 256 uploads; got 257"):
        holder.judge(context, [upload] * 257)


def test_one_malformed_upload_does_not_cost_the_others_their_verdicts(holder: Holder) -> None:
    context = holder.open()
    good = cohort.encrypted(context, 0)
    bad = replace(good, admission=replace(good.admission, sealed_seed=b"short"))
    with pytest.raises(MalformedError):
        holder.judge(context, [bad])
    assert holder.judge(context, [good]) == [(ACCEPTED, "")]


def test_nothing_is_judged_for_a_round_that_was_never_opened(holder: Holder) -> None:
    context = cohort.round_context(cohort.mixed_plan(), task_id="task")
    with pytest.raises(ClosedError):
        holder.judge(context, [cohort.encrypted(context, 0)])


def test_nothing_new_is_judged_once_the_round_is_closed(holder: Holder, judged: Judged) -> None:
    holder.close(judged.context)
    with pytest.raises(ClosedError):
        holder.judge(judged.context, [cohort.encrypted(judged.context, 5)])


# --- releasing --------------------------------------------------------------------------------


def test_the_sum_is_exactly_that_in_the_clear(holder: Holder, judged: Judged) -> None:
    opens(holder, judged)


def test_the_same_manifest_gets_the_same_bytes_again(holder: Holder, judged: Judged) -> None:
    first = holder.release(judged.context, judged.digests, judged.data)
    assert holder.release(judged.context, judged.digests, judged.data) == first
    assert holder.release(judged.context, judged.digests[::-1], judged.data) == first


def test_another_manifest_after_the_release_is_refused(holder: Holder, judged: Judged) -> None:
    """Two sums that differ by one client would open that client's values."""
    opens(holder, judged)
    fewer = judged.uploads[:3]
    with pytest.raises(ClosedError, match="one release a round"):
        holder.release(judged.context, digests_of(fewer), summed(judged.context, fewer))


def test_another_sum_after_the_release_is_refused(holder: Holder, judged: Judged) -> None:
    opens(holder, judged)
    data = bytearray(judged.data)
    data[0] ^= 1
    with pytest.raises(ClosedError):
        holder.release(judged.context, judged.digests, bytes(data))


def test_fewer_than_the_quorum_stay_closed(holder: Holder, judged: Judged) -> None:
    few = judged.uploads[:2]
    with pytest.raises(QuorumError, match="min_clients=3"):
        holder.release(judged.context, digests_of(few), summed(judged.context, few))
    opens(holder, judged)


def test_nobody_at_all_stays_closed(holder: Holder, judged: Judged) -> None:
    with pytest.raises(QuorumError):
        holder.release(judged.context, [], bytes(judged.context.plan.payload_bytes))


def test_one_upload_named_several_times_is_no_cohort(holder: Holder, judged: Judged) -> None:
    thrice = [judged.uploads[0]] * 3
    with pytest.raises(DuplicateError):
        holder.release(judged.context, digests_of(thrice), summed(judged.context, thrice))
    opens(holder, judged)


def test_an_upload_that_was_never_judged_cannot_be_in_a_manifest(
    holder: Holder, judged: Judged
) -> None:
    unknown = cohort.encrypted(judged.context, 5)
    uploads = [*judged.uploads, unknown]
    with pytest.raises(SealError, match="admitted"):
        holder.release(judged.context, digests_of(uploads), summed(judged.context, uploads))
    opens(holder, judged)


def test_a_refused_upload_cannot_be_in_a_manifest(holder: Holder, judged: Judged) -> None:
    bad = cohort.broken_seal(judged.context, 5)
    holder.judge(judged.context, [bad])
    uploads = [*judged.uploads, bad]
    with pytest.raises(SealError):
        holder.release(judged.context, digests_of(uploads), summed(judged.context, uploads))


@pytest.mark.parametrize("fault", ["one left out", "one twice", "one bit", "zeros"])
def test_a_sum_that_is_not_that_of_the_manifest_is_not_opened(
    holder: Holder, judged: Judged, fault: str
) -> None:
    data = bytearray(judged.data)
    data[0] ^= fault == "one bit"
    wrong = {
        "one left out": summed(judged.context, judged.uploads[:3]),
        "one twice": summed(judged.context, [*judged.uploads, judged.uploads[0]]),
        "one bit": bytes(data),
        "zeros": bytes(len(data)),
    }[fault]
    with pytest.raises(ReleaseError):
        holder.release(judged.context, judged.digests, wrong)


def test_a_sum_may_be_refused_twice_and_then_the_round_is_over(
    holder: Holder, judged: Judged
) -> None:
    """Refusals are answers about secret noise: a server that may ask again and again, a little
    differently, learns it bit by bit."""
    for place in range(2):
        with pytest.raises(ReleaseError):
            holder.release(judged.context, judged.digests, flipped(judged.data, place))
    refused(holder, judged, ClosedError)
    with pytest.raises(ClosedError):
        holder.open()
    assert holder.open(attempt=2).id.attempt == 2


def test_a_stream_without_a_manifest_is_malformed(holder: Holder, judged: Judged) -> None:
    with pytest.raises(MalformedError, match="manifest"):
        holder.stream(pieces(judged.data))
    opens(holder, judged)


def test_an_empty_stream_is_malformed(holder: Holder, judged: Judged) -> None:
    for empty in ([], [pb.ReleaseRequest()]):
        with pytest.raises(MalformedError, match="manifest"):
            holder.stream(empty)


def test_a_message_of_neither_kind_is_malformed(holder: Holder, judged: Judged) -> None:
    with pytest.raises(MalformedError):
        holder.stream([manifest(judged.context, judged.digests), pb.ReleaseRequest()])


def test_a_manifest_after_the_sum_has_begun_is_malformed(holder: Holder, judged: Judged) -> None:
    first = manifest(judged.context, judged.digests)
    with pytest.raises(MalformedError):
        holder.stream([first, *pieces(judged.data), first])
    opens(holder, judged)


def test_a_manifest_may_come_in_parts(holder: Holder, judged: Judged) -> None:
    parts = [manifest(judged.context, [name]) for name in judged.digests]
    data, contributors = holder.stream([*parts, *pieces(judged.data)])
    assert contributors == 4
    assert holder.release(judged.context, judged.digests, judged.data) == (data, 4)


def test_parts_of_a_manifest_for_different_rounds_are_refused(
    holder: Holder, judged: Judged
) -> None:
    other = holder.open(task_id="other")
    parts = [manifest(other, judged.digests[:1]), manifest(judged.context, judged.digests[1:])]
    with pytest.raises((MalformedError, ContextError)):
        holder.stream([*parts, *pieces(judged.data)])


def test_a_manifest_of_more_than_the_largest_cohort_is_cut_off(
    holder: Holder, judged: Judged
) -> None:
    many = [index.to_bytes(32, "little") for index in range(7)]
    with pytest.raises(MalformedError, match="at most 6 uploads"):
        holder.release(judged.context, many, judged.data)
    parts = [manifest(judged.context, many[:4]), manifest(judged.context, many[4:])]
    with pytest.raises(MalformedError, match="at most 6 uploads"):
        holder.stream([*parts, *pieces(judged.data)])


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_manifest_of_names_of_the_wrong_size_is_malformed(
    holder: Holder, judged: Judged, size: int
) -> None:
    with pytest.raises(MalformedError, match="upload_digest of 32 bytes"):
        holder.release(judged.context, [*judged.digests[:3], bytes(size)], judged.data)


@pytest.mark.parametrize("change", [-28672, -7, -1, 1, 7, 28672])
def test_a_sum_of_the_wrong_size_is_malformed(holder: Holder, judged: Judged, change: int) -> None:
    data = judged.data + bytes(max(0, change))
    data = data[: len(judged.data) + change]
    with pytest.raises(MalformedError):
        holder.release(judged.context, judged.digests, data)
    opens(holder, judged)


def test_a_residue_of_q_is_malformed(holder: Holder, judged: Judged) -> None:
    data = cohort.ABOVE_MODULUS + judged.data[7:]
    with pytest.raises(MalformedError, match=f"below q={MODULUS}"):
        holder.release(judged.context, judged.digests, data)
    opens(holder, judged)


def test_an_endless_stream_is_cut_off(holder: Holder, judged: Judged) -> None:
    sent = 0

    def endless() -> Iterator[pb.ReleaseRequest]:
        nonlocal sent
        yield manifest(judged.context, judged.digests)
        while sent < 2000:
            sent += 1
            yield pb.ReleaseRequest(residues=bytes(100_000))

    with pytest.raises(MalformedError, match="got more"):
        holder.stream(endless())
    assert sent < 1000


def test_nothing_is_released_for_a_context_that_differs(holder: Holder, judged: Judged) -> None:
    for change in ({"attempt": 2}, {"model_digest": b"\1" * 32}, {"round_key_id": bytes(32)}):
        name = codec.context_id_to_wire(replace(judged.context.id, **change))
        first = pb.ReleaseRequest(manifest=pb.Manifest(context=name, upload_digests=judged.digests))
        with pytest.raises((ContextError, ClosedError)):
            holder.stream([first, *pieces(judged.data)])
    opens(holder, judged)


def test_a_sum_of_several_pieces_and_chunks_is_exact(holder: Holder) -> None:
    plan = cohort.long_plan()
    context = holder.open(plan)
    uploads = [cohort.encrypted(context, index) for index in range(3)]
    holder.judge(context, uploads)
    data, _ = holder.release(context, digests_of(uploads), summed(context, uploads))
    assert len(data) > codec.PIECE_BYTES
    (wanted,) = cohort.clear_sums(context, range(3))
    np.testing.assert_array_equal(numbers(data, plan)[0], wanted)


# --- closing ----------------------------------------------------------------------------------


def test_a_closed_round_cannot_be_released(holder: Holder, judged: Judged) -> None:
    holder.close(judged.context)
    holder.close(judged.context)
    refused(holder, judged, ClosedError)


def test_closing_another_attempt_or_task_closes_nothing(holder: Holder, judged: Judged) -> None:
    for change in ({"attempt": 2}, {"task_id": "other"}, {"round_key_id": bytes(32)}):
        name = codec.context_id_to_wire(replace(judged.context.id, **change))
        holder.stub.CloseRound(pb.CloseRoundRequest(context=name), timeout=20)
    opens(holder, judged)


def test_a_released_sum_can_be_read_again_after_closing(holder: Holder, judged: Judged) -> None:
    first = holder.release(judged.context, judged.digests, judged.data)
    holder.close(judged.context)
    assert holder.release(judged.context, judged.digests, judged.data) == first


# --- what is never said -------------------------------------------------------------------------


def forms(secret: bytes) -> list[str]:
    """How bytes look in a log."""
    return [secret.hex(), base64.b64encode(secret).decode(), repr(secret)[2:-1]]


def test_neither_logs_nor_errors_carry_clients_seeds_or_sums(holder: Holder) -> None:
    with structlog.testing.capture_logs() as log:
        context = holder.open()
        uploads = [cohort.encrypted(context, index) for index in range(4)]
        bad = cohort.broken_seal(context, 5)
        holder.judge(context, [*uploads, bad, cohort.encrypted(context, 0)])
        names, data = digests_of(uploads), summed(context, uploads)
        damaged = bytearray(data)
        damaged[3] ^= 255
        for wrong_names, wrong in [
            (names[:2], data),
            ([*names, names[0]], data),
            ([*names, bad.admission.receipt.upload_digest], data),
            (names, cohort.ABOVE_MODULUS + data[7:]),
            (names, data[:-1]),
            (names, summed(context, uploads[:3])),
        ]:
            with pytest.raises(SecaggError):
                holder.release(context, wrong_names, wrong)
        sums, _ = holder.release(context, names, data)
        with pytest.raises(SecaggError):
            holder.release(context, names, bytes(damaged))
    text = json.dumps(log) + "".join(holder.said)
    assert {"round_opened", "round_released"} <= {entry["event"] for entry in log}
    assert len(holder.said) == 7
    for upload in [*uploads, bad]:
        receipt = upload.admission.receipt
        for secret in (receipt.client_key, receipt.signature, upload.admission.sealed_seed[:32]):
            assert not [form for form in forms(secret) if form in text]
    for part in numbers(sums, context.plan):
        assert ", ".join(str(value) for value in part[:4]) not in text
