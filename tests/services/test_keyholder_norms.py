"""The norm check at the key holder, over gRPC: one sketch an upload, all verdicts at once, one bit.

Nothing is summed that was not accepted, and what was answered outlives a restart.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import cohort
import grpc
import numpy as np
import pytest
import structlog
from holding import Holder, digests_of, holding, manifest, numbers, summed
from key_holders import durable_rounds
from serving import LoopThread, loop_thread

from secagg import audit, keyholder, norm_check
from secagg.challenger import Challenger
from secagg.challenges import challenge_key
from secagg.context import ContextId, RoundContext
from secagg.direction import Direction
from secagg.encryptor import Encryptor, encrypt_integers
from secagg.enrolment import Roster
from secagg.errors import (
    ClosedError,
    ConfigurationError,
    ContextError,
    DuplicateError,
    MalformedError,
    NormError,
    SealError,
    SecaggError,
    UnavailableError,
    UntrustedKeyError,
)
from secagg.noise_audit import dithered, low_to_bytes
from secagg.parameters import MODULUS, IntegerSegment, NormCheck, Plan
from secagg.planner import make_plan, plan_tensors
from secagg.quantize import quantize
from secagg.receipts import SigningKey
from secagg.residues import widen
from secagg.rpc.status import from_rpc_error
from secagg.sampling import Stream
from secagg.sketch_shape import norm_shapes, sketch_bytes
from secagg.sketches import sketch
from secagg.upload import Upload
from secagg.verdicts import Verdict
from secagg.wire import codec
from secagg.wire.v1 import key_holder_service_pb2 as pb
from secagg.wire.v1 import round_pb2
from secagg_keyholder import service
from secagg_keyholder.backup import backup_ledger, restore_ledger

GOOD = (round_pb2.VERDICT_STATE_ACCEPTED, "")
IDENTITY = SigningKey.from_bytes(b"the key holder's identity, fixed")
PLAN = plan_tensors(60, max_clients=6, clip=1.0, norm_check=NormCheck())
LIAR = 2  # of clients 0 to 3
TIMES = 10  # the bound

Part = pb.SubmitSketchRequest
Start = Callable[..., AbstractContextManager[Holder]]


@pytest.fixture(scope="module")
def thread() -> Iterator[LoopThread]:
    with loop_thread() as running:
        yield running


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def start(thread: LoopThread, state: Path) -> Start:
    """Starts the key holder over the same folder, as often as it is called."""

    @contextmanager
    def started(roster: Roster | None = None, folder: Path = state) -> Iterator[Holder]:
        rounds = durable_rounds(folder, roster=roster, identity=IDENTITY)
        with holding(thread, rounds) as holder:
            yield holder

    return started


@pytest.fixture
def holder(start: Start) -> Iterator[Holder]:
    with start() as running:
        yield running


@dataclass
class Desk:
    """What the server knows of one attempt: its challenges and uploads, all of them admitted."""

    context: RoundContext
    challenger: Challenger
    uploads: list[Upload] = field(default_factory=list)

    def name(self, index: int) -> bytes:
        return self.uploads[index].admission.receipt.upload_digest

    def data(self, index: int) -> bytes:
        return self.challenger.sketch(self.uploads[index]).to_bytes()

    def other_data(self, index: int) -> bytes:
        """A well-formed sketch of the same upload, by another challenge."""
        key = challenge_key(b"another secret", self.context.id.digest, b"")
        residues = widen(self.uploads[index].payload, self.context.plan.blocks)
        return sketch(self.context, self.name(index), [residues], key).to_bytes()


def update(context: RoundContext, index: int, times: float) -> list[np.ndarray]:
    """Client i's integers: of a random update of half the bound, or of so many times the bound."""
    rng = np.random.default_rng(index)
    values = {}
    for segment in context.plan.segments:
        if isinstance(segment, IntegerSegment):
            values[segment.name] = rng.integers(-1, 2, segment.size)
        else:
            drawn = rng.normal(size=sum(tensor.size for tensor in segment.tensors))
            values[segment.name] = 0.5 * segment.clip * drawn / np.linalg.norm(drawn)
    parts = quantize(
        context.plan,
        values,
        samples=1,
        rotation=context.rotation,
        randomness=Stream.derive("test rounding", index),
    )
    return [np.rint(2 * times * part.values).astype(np.int64) for part in parts]


def contributed(desk: Desk, index: int, times: float = 0.5) -> Upload:
    key = cohort.identity(index)
    commitment = desk.challenger.commitment(key.public)
    return encrypt_integers(desk.context, update(desk.context, index, times), key, commitment)


def admitted(
    holder: Holder, plan: Plan = PLAN, *, clients: int = 4, liar: int | None = LIAR
) -> Desk:
    context = holder.open(plan)
    desk = Desk(context, Challenger(context))
    for index in range(clients):
        desk.uploads.append(contributed(desk, index, TIMES if index == liar else 0.5))
    assert holder.judge(context, desk.uploads) == [GOOD] * clients
    return desk


def sketched(holder: Holder, *, liar: int | None = LIAR) -> Desk:
    desk = admitted(holder, liar=liar)
    for index in range(len(desk.uploads)):
        submit(holder, desk, index)
    return desk


def named(context: ContextId, upload_digest: bytes) -> Part:
    name = codec.context_id_to_wire(context)
    return Part(upload=pb.NamedUpload(context=name, upload_digest=upload_digest))


def pieces(data: bytes, size: int = codec.PIECE_BYTES) -> list[Part]:
    return [Part(sketch=data[at : at + size]) for at in range(0, len(data), size)]


def submit_parts(holder: Holder, parts: Iterable[Part]) -> None:
    answer = holder._call(lambda: holder.stub.SubmitSketch(iter(parts), timeout=20))
    assert answer == pb.SubmitSketchResponse()


def submit(holder: Holder, desk: Desk, index: int, data: bytes | None = None) -> None:
    data = desk.data(index) if data is None else data
    submit_parts(holder, [named(desk.context.id, desk.name(index)), *pieces(data)])


def messages(holder: Holder, context: ContextId) -> list[pb.GetVerdictsResponse]:
    request = pb.GetVerdictsRequest(context=codec.context_id_to_wire(context))
    found = holder._call(lambda: list(holder.stub.GetVerdicts(request, timeout=20)))
    assert isinstance(found, list)
    return found


def raw_verdicts(holder: Holder, desk: Desk) -> list[bytes]:
    """As they were sent, to the byte."""
    said = [verdict for part in messages(holder, desk.context.id) for verdict in part.verdicts]
    return [verdict.SerializeToString(deterministic=True) for verdict in said]


def verdicts(holder: Holder, desk: Desk) -> list[Verdict]:
    return [
        codec.verdict_from_wire(codec.parse(round_pb2.NormVerdict, data))
        for data in raw_verdicts(holder, desk)
    ]


def accepted(holder: Holder, desk: Desk) -> dict[bytes, bool]:
    return {each.receipt.upload_digest: each.accepted for each in verdicts(holder, desk)}


def wanted(desk: Desk, liar: int | None = LIAR) -> dict[bytes, bool]:
    return {desk.name(index): index != liar for index in range(len(desk.uploads))}


def without(desk: Desk, *left_out: int) -> list[Upload]:
    return [upload for index, upload in enumerate(desk.uploads) if index not in left_out]


def release(holder: Holder, desk: Desk, uploads: list[Upload]) -> tuple[bytes, int]:
    return holder.release(desk.context, digests_of(uploads), summed(desk.context, uploads))


def check(holder: Holder, desk: Desk, uploads: list[Upload]) -> None:
    residues = widen(summed(desk.context, uploads), desk.context.plan.blocks)
    low = low_to_bytes(dithered(desk.context.plan, residues))
    first = pb.CheckSumRequest(manifest=manifest(desk.context, digests_of(uploads)).manifest)
    rest = [
        pb.CheckSumRequest(low_bits=codec.piece(low, index))
        for index in range(codec.piece_count(len(low)))
    ]
    holder._call(lambda: holder.stub.CheckSum(iter([first, *rest]), timeout=20))


def opens(holder: Holder, desk: Desk, *left_out: int) -> None:
    """The sum over the others is opened, exactly."""
    uploads = without(desk, *left_out)
    check(holder, desk, uploads)
    data, contributors = release(holder, desk, uploads)
    assert contributors == len(uploads)
    parts = [
        update(desk.context, index, 0.5)
        for index in range(len(desk.uploads))
        if index not in left_out
    ]
    for found, part in zip(numbers(data, desk.context.plan), zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(found, sum(part[1:], start=part[0]))


def entries(state: Path) -> list[audit.Entry]:
    found = list(audit.read_entries(state / "ledger.sqlite3"))
    assert audit.verify(found) == found[-1]
    return found


# --- what is found ------------------------------------------------------------------------------


def test_an_update_of_ten_times_the_bound_is_refused_and_the_others_are_summed(
    holder: Holder,
) -> None:
    desk = sketched(holder)
    assert accepted(holder, desk) == wanted(desk)
    for attempt in (release, check):
        with pytest.raises(NormError):
            attempt(holder, desk, desk.uploads)
    opens(holder, desk, LIAR)


def test_verdicts_are_signed_for_this_upload_sketch_and_attempt(holder: Holder) -> None:
    desk = sketched(holder)
    for index, verdict in enumerate(verdicts(holder, desk)):
        verdict.verify(desk.context.id, [IDENTITY.public])
        assert verdict.receipt == desk.uploads[index].admission.receipt
        assert verdict.sketch_digest == desk.challenger.sketch(desk.uploads[index]).digest
        with pytest.raises(UntrustedKeyError):
            replace(verdict, accepted=not verdict.accepted).verify(
                desk.context.id, [IDENTITY.public]
            )
        with pytest.raises(ContextError):
            verdict.verify(replace(desk.context.id, attempt=2), [IDENTITY.public])


def test_each_segment_is_held_to_its_own_bound(holder: Holder) -> None:
    segments = [*PLAN.segments, IntegerSegment("votes", 40, 3, 8.0)]
    plan = make_plan(segments, max_clients=6, norm_check=NormCheck())
    context = holder.open(plan)
    desk = Desk(context, Challenger(context))
    for index in range(4):
        parts = update(context, index, 0.5)
        parts[1] *= 3 if index == LIAR else 1  # 3 * sqrt(27) or so
        key = cohort.identity(index)
        commitment = desk.challenger.commitment(key.public)
        desk.uploads.append(encrypt_integers(context, parts, key, commitment))
    holder.judge(context, desk.uploads)
    for index in range(4):
        submit(holder, desk, index)
    assert accepted(holder, desk) == wanted(desk)
    opens(holder, desk, LIAR)


def test_an_update_that_points_away_is_refused_by_a_sketch_that_knows_the_direction(
    holder: Holder,
) -> None:
    plan = plan_tensors(20_000, max_clients=6, clip=1.0, norm_check=NormCheck(min_cosine=0.0))
    context = holder.open(plan)
    ahead = np.random.default_rng(0).normal(size=20_000).astype(np.float32)
    knows = Challenger(context, bytes(32), Direction.of(plan.segments[0], ahead, context.rotation))
    desk = Desk(context, Challenger(context, bytes(32)))
    for index in range(4):
        sign, key = (-1 if index in (LIAR, 3) else 1), cohort.identity(index)
        encryptor = Encryptor(context, key, commitment=knows.commitment(key.public))
        desk.uploads.append(encryptor.encrypt(sign * 0.5 * ahead / np.linalg.norm(ahead)))
    holder.judge(context, desk.uploads)
    # Nothing to compare with: a sketch may come without.
    submit(holder, desk, 3)
    for index in (0, 1, LIAR):
        data = knows.sketch(desk.uploads[index]).to_bytes()
        assert len(data) == sketch_bytes(plan, direction=True) > len(desk.data(index))
        with pytest.raises(MalformedError):
            submit(holder, desk, index, data[:-1])
        submit(holder, desk, index, data)
    assert accepted(holder, desk) == wanted(desk)


def test_verdicts_come_in_parts(holder: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MAX_VERDICTS", 3)
    desk = sketched(holder)
    assert [len(part.verdicts) for part in messages(holder, desk.context.id)] == [3, 1]
    assert accepted(holder, desk) == wanted(desk)


def test_what_is_heavy_is_computed_where_the_key_holder_computes(
    thread: LoopThread, state: Path
) -> None:
    done: list[str] = []

    def compute(work: Callable[..., object], *arguments: object) -> object:
        done.append(work.__name__)
        return work(*arguments)

    rounds = durable_rounds(state)
    rounds._compute = compute
    with holding(thread, rounds) as holder:
        desk = admitted(holder)
        submit(holder, desk, 0)
    assert done == [keyholder._judge_sketch.__name__]


# --- when nothing is said -----------------------------------------------------------------------


def test_no_verdict_is_given_before_every_upload_has_its_sketch(
    holder: Holder, state: Path
) -> None:
    desk = admitted(holder)
    request = pb.GetVerdictsRequest(context=codec.context_id_to_wire(desk.context.id))
    for index in range(4):
        with pytest.raises(grpc.RpcError) as refused:
            list(holder.stub.GetVerdicts(request, timeout=20))
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert type(from_rpc_error(refused.value)) is ClosedError
        submit(holder, desk, index)
    assert "norm-judged" not in [entry.event for entry in entries(state)]
    assert accepted(holder, desk) == wanted(desk)


def test_an_upload_admitted_late_needs_its_sketch_too(holder: Holder) -> None:
    desk = sketched(holder)
    desk.uploads.append(contributed(desk, 4))
    assert holder.judge(desk.context, desk.uploads) == [GOOD] * 5
    with pytest.raises(ClosedError, match="one is missing"):
        verdicts(holder, desk)
    submit(holder, desk, 4)
    assert accepted(holder, desk) == wanted(desk)


@pytest.mark.parametrize("restarts", [False, True])
def test_nobody_is_admitted_once_the_verdicts_are_given(start: Start, restarts: bool) -> None:
    with start() as holder:
        desk = sketched(holder)
        late = contributed(desk, 4)
        said = raw_verdicts(holder, desk)
        if not restarts:
            admits_nobody(holder, desk, late)
            assert raw_verdicts(holder, desk) == said
            return
    with start() as holder:
        admits_nobody(holder, desk, late)
        assert raw_verdicts(holder, desk) == said


def admits_nobody(holder: Holder, desk: Desk, late: Upload) -> None:
    with pytest.raises(ClosedError, match="before the verdicts"):
        holder.judge(desk.context, [late])
    with pytest.raises(ClosedError, match="before the verdicts"):
        holder.judge(desk.context, [*desk.uploads, late])
    assert holder.judge(desk.context, desk.uploads) == [GOOD] * 4
    with pytest.raises(SealError):
        release(holder, desk, [*without(desk, LIAR), late])


@pytest.mark.parametrize("restarts", [False, True])
def test_nothing_is_summed_before_the_verdicts_are_given(start: Start, restarts: bool) -> None:
    with start() as holder:
        desk = sketched(holder, liar=None)
        if not restarts:
            sums_nothing(holder, desk)
    with start() as holder:
        sums_nothing(holder, desk)
        assert accepted(holder, desk) == wanted(desk, None)
        opens(holder, desk)


def sums_nothing(holder: Holder, desk: Desk) -> None:
    for attempt in (release, check):
        with pytest.raises(NormError) as refused:
            attempt(holder, desk, desk.uploads)
        assert refused.value.reason == "NORM_REFUSED"


def test_verdicts_that_could_not_be_recorded_are_not_given(
    thread: LoopThread, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that knew more than the disk would release what a restart judges anew."""
    rounds = durable_rounds(state, identity=IDENTITY)
    with holding(thread, rounds) as holder:
        desk = sketched(holder, liar=None)
        with monkeypatch.context() as patched:
            patched.setattr(rounds._ledger, "record_given", unavailable)
            with pytest.raises(UnavailableError):
                verdicts(holder, desk)
        sums_nothing(holder, desk)
        desk.uploads.append(contributed(desk, 4))
        assert holder.judge(desk.context, desk.uploads) == [GOOD] * 5
        submit(holder, desk, 4)
        assert accepted(holder, desk) == wanted(desk, None)
        opens(holder, desk)


def test_a_finding_that_could_not_be_recorded_is_none(
    thread: LoopThread, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = durable_rounds(state, identity=IDENTITY)
    with holding(thread, rounds) as holder:
        desk = sketched(holder)
        desk.uploads.append(contributed(desk, 4))
        holder.judge(desk.context, desk.uploads)
        with monkeypatch.context() as patched:
            patched.setattr(rounds._ledger, "record_finding", unavailable)
            with pytest.raises(UnavailableError):
                submit(holder, desk, 4)
        with pytest.raises(ClosedError, match="one is missing"):
            verdicts(holder, desk)
        submit(holder, desk, 4)
        assert accepted(holder, desk) == wanted(desk)


def unavailable(*_: object) -> None:
    raise UnavailableError("expected a ledger that can be written; the disk is full")


@pytest.mark.parametrize(
    "change", [{"attempt": 2}, {"task_id": "other"}, {"round_key_id": bytes(32)}], ids=str
)
def test_nothing_is_judged_or_said_for_a_context_that_differs(
    holder: Holder, change: dict[str, object]
) -> None:
    desk = sketched(holder)
    other = replace(desk.context.id, **change)  # type: ignore[arg-type]
    with pytest.raises((ContextError, ClosedError)):
        messages(holder, other)
    with pytest.raises((ContextError, ClosedError)):
        submit_parts(holder, [named(other, desk.name(0)), *pieces(desk.data(0))])
    assert accepted(holder, desk) == wanted(desk)


def test_an_earlier_attempt_is_not_judged_any_more(holder: Holder) -> None:
    desk = sketched(holder)
    holder.open(PLAN, attempt=2)
    with pytest.raises((ContextError, ClosedError)):
        verdicts(holder, desk)
    with pytest.raises((ContextError, ClosedError)):
        submit(holder, desk, 0)


@pytest.mark.parametrize("how", ["released", "closed"])
def test_nothing_is_judged_or_said_once_the_round_is_over(holder: Holder, how: str) -> None:
    desk = sketched(holder)
    verdicts(holder, desk)
    if how == "released":
        opens(holder, desk, LIAR)
    else:
        holder.close(desk.context)
    with pytest.raises(ClosedError):
        verdicts(holder, desk)
    with pytest.raises(ClosedError):
        submit(holder, desk, 0)


# --- sketches that are none ---------------------------------------------------------------------


def test_a_sketch_of_an_upload_that_was_not_admitted_is_refused(holder: Holder) -> None:
    desk = admitted(holder)
    desk.uploads.append(contributed(desk, 4))
    with pytest.raises(SealError):
        submit(holder, desk, 4)
    parts = [named(desk.context.id, bytes(32)), *pieces(desk.data(0))]
    with pytest.raises(SealError):
        submit_parts(holder, parts)


def test_a_sketch_of_a_refused_upload_is_refused(holder: Holder) -> None:
    desk = admitted(holder)
    desk.uploads.append(replace(desk.uploads[0], admission=desk.uploads[1].admission))
    admission = desk.uploads[0].admission
    forged = replace(admission, receipt=replace(admission.receipt, upload_digest=b"f" * 32))
    desk.uploads[4] = replace(desk.uploads[0], admission=forged)
    assert holder.judge(desk.context, [desk.uploads[4]])[0][1] == "INVALID_RECEIPT"
    with pytest.raises(SealError):
        submit(holder, desk, 4, desk.data(0))


def test_a_sketch_for_a_round_that_was_never_opened_is_refused(holder: Holder) -> None:
    context = cohort.round_context(PLAN)
    with pytest.raises(ClosedError):
        submit_parts(holder, [named(context.id, bytes(32)), *pieces(bytes(100))])


def test_a_round_without_a_norm_check_takes_no_sketch_and_gives_no_verdict(holder: Holder) -> None:
    context = holder.open(cohort.counts_plan())
    uploads = [cohort.encrypted(context, index) for index in range(3)]
    assert holder.judge(context, uploads) == [GOOD] * 3
    (first, *_) = digests_of(uploads)
    with pytest.raises(ConfigurationError):
        submit_parts(holder, [named(context.id, first), *pieces(bytes(100))])
    with pytest.raises(ConfigurationError):
        messages(holder, context.id)
    _, contributors = holder.release(context, digests_of(uploads), summed(context, uploads))
    assert contributors == 3


@pytest.mark.parametrize("restarts", [False, True])
def test_the_first_sketch_of_an_upload_stands(start: Start, restarts: bool) -> None:
    """Each sketch that is judged tells something; a server that may ask again learns the rest."""
    with start() as holder:
        desk = sketched(holder)
        before = raw_verdicts(holder, desk)
        if not restarts:
            takes_no_other(holder, desk)
    with start() as holder:
        takes_no_other(holder, desk)
        assert raw_verdicts(holder, desk) == before


def takes_no_other(holder: Holder, desk: Desk) -> None:
    for index in range(4):
        with pytest.raises(DuplicateError, match="one sketch an upload"):
            submit(holder, desk, index, desk.other_data(index))
        submit(holder, desk, index)


def test_of_two_sketches_at_once_one_is_judged(holder: Holder) -> None:
    desk = admitted(holder)
    offers = [desk.data(0), desk.other_data(0)]

    def offer(data: bytes) -> bool:
        try:
            submit(holder, desk, 0, data)
        except DuplicateError:
            return False
        return True

    with ThreadPoolExecutor(2) as pool:
        taken = list(pool.map(offer, offers))
    assert sorted(taken) == [False, True]
    assert [offer(data) for data in offers] == taken


# Streams that are none: of the first message, the sketch, and what becomes of both.
STREAMS: dict[str, Callable[[Part, bytes], list[Part]]] = {
    "nothing": lambda _name, _data: [],
    "nothing in it": lambda _name, _data: [Part()],
    "no name": lambda _name, data: pieces(data),
    "no sketch": lambda name, _data: [name],
    "an empty sketch": lambda name, _data: [name, Part(sketch=b"")],
    "the name last": lambda name, data: [*pieces(data), name],
    "the name twice": lambda name, data: [name, name, *pieces(data)],
    "the name at the end too": lambda name, data: [name, *pieces(data), name],
    "an empty message between": lambda name, data: [name, Part(), *pieces(data)],
    "an empty piece at the end": lambda name, data: [name, *pieces(data), Part(sketch=b"")],
    "the sketch twice": lambda name, data: [name, *pieces(data), *pieces(data)],
    "a byte more": lambda name, data: [name, *pieces(data), Part(sketch=b"\0")],
    "a byte less": lambda name, data: [name, *pieces(data[:-1])],
    "a byte less in front": lambda name, data: [name, *pieces(data[1:])],
}


@pytest.mark.parametrize("case", STREAMS)
def test_a_malformed_stream_is_refused_and_finds_nothing(case: str, holder: Holder) -> None:
    desk = admitted(holder)
    with pytest.raises(MalformedError):
        submit_parts(holder, STREAMS[case](named(desk.context.id, desk.name(0)), desk.data(0)))
    submit(holder, desk, 0, desk.other_data(0))  # nothing was judged of it before


SHAPE = norm_shapes(PLAN)[0]
SHOWN = SHAPE.rows * SHAPE.values
LARGEST = MODULUS - 1
LARGEST_MASK = LARGEST >> (8 * SHAPE.dropped)
# Where the numbers of each kind lie, how long one is, and the largest there may be.
FIELDS = {
    "position": (0, SHOWN, 2, 4095),
    "value": (2 * SHOWN, SHOWN, 7, LARGEST),
    "mask": (9 * SHOWN, SHAPE.rows * 4096, SHAPE.mask_bytes, LARGEST_MASK),
}


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("kind", FIELDS)
def test_a_number_out_of_range_is_refused_and_the_largest_is_not(
    kind: str, place: str, holder: Holder
) -> None:
    desk = admitted(holder)
    start, count, size, largest = FIELDS[kind]
    at = start + (0 if place == "first" else size * (count - 1))

    def with_number(number: int) -> bytes:
        data = desk.data(0)
        return data[:at] + number.to_bytes(size, "little") + data[at + size :]

    for number in (largest + 1, (1 << 8 * size) - 1):
        with pytest.raises(MalformedError, match="positions below 4096 and residues below q"):
            submit(holder, desk, 0, with_number(number))
    submit(holder, desk, 0, with_number(largest))


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_name_of_the_wrong_size_is_malformed(holder: Holder, size: int) -> None:
    desk = admitted(holder)
    with pytest.raises(MalformedError, match="upload_digest of 32 bytes"):
        submit_parts(holder, [named(desk.context.id, bytes(size)), *pieces(desk.data(0))])


@pytest.mark.parametrize("size", [1, 100_000])
def test_a_sketch_comes_in_pieces_of_any_size(holder: Holder, size: int) -> None:
    desk = admitted(holder)
    data, head = desk.data(0), 50
    parts = [*pieces(data[:head], size), *pieces(data[head:], 100_000)]
    submit_parts(holder, [named(desk.context.id, desk.name(0)), *parts])
    with pytest.raises(DuplicateError):
        submit(holder, desk, 0, desk.other_data(0))


def test_an_endless_sketch_is_cut_off(holder: Holder) -> None:
    desk, sent = admitted(holder), 0

    def endless() -> Iterator[Part]:
        nonlocal sent
        yield named(desk.context.id, desk.name(0))
        while sent < 2000:
            sent += 1
            yield Part(sketch=bytes(100_000))

    size = sketch_bytes(PLAN, direction=True)
    with pytest.raises(MalformedError, match=f"expected {size} bytes in all; got more"):
        submit_parts(holder, endless())
    assert sent < 1000


# --- after a restart ----------------------------------------------------------------------------


def test_a_check_goes_on_where_a_restart_interrupted_it(start: Start) -> None:
    with start() as holder:
        desk = admitted(holder)
        submit(holder, desk, 0)
        submit(holder, desk, LIAR)
    with start() as holder:
        with pytest.raises(ClosedError, match="one is missing"):
            verdicts(holder, desk)
        for index in (1, 3):
            submit(holder, desk, index)
        assert accepted(holder, desk) == wanted(desk)
        opens(holder, desk, LIAR)


def test_verdicts_are_the_same_to_the_byte_after_a_restart(start: Start, state: Path) -> None:
    """A server may have died between the answer and its own record of it."""
    with start() as holder:
        desk = sketched(holder)
        said = raw_verdicts(holder, desk)
        assert raw_verdicts(holder, desk) == said
    with start() as holder:
        assert raw_verdicts(holder, desk) == said
        with pytest.raises(NormError):
            release(holder, desk, desk.uploads)
    with start() as holder:
        opens(holder, desk, LIAR)
    given = [entry.event for entry in entries(state)].count("norm-judged")
    assert given == 4


def test_whoever_is_revoked_between_is_out_and_the_others_verdicts_stay(start: Start) -> None:
    roster, without_three = cohort.enrolment(range(6)), cohort.enrolment(range(6), revoked=[3])
    with start(roster) as holder:
        desk = sketched(holder)
        said = raw_verdicts(holder, desk)
    with start(without_three) as holder:
        assert raw_verdicts(holder, desk) == said[:3]
        with pytest.raises(SealError):
            release(holder, desk, without(desk, LIAR))
        with pytest.raises(SealError):
            submit(holder, desk, 3)
    with start(roster) as holder:
        assert raw_verdicts(holder, desk) == said


def test_whoever_was_not_judged_with_the_others_stays_out(start: Start) -> None:
    """Verdicts are given once: nobody's comes when the others' are known."""
    roster, without_three = cohort.enrolment(range(6)), cohort.enrolment(range(6), revoked=[3])
    with start(roster) as holder:
        desk = admitted(holder)
    with start(without_three) as holder:
        for index in range(3):
            submit(holder, desk, index)
        said = raw_verdicts(holder, desk)
        assert len(said) == 3
    with start(roster) as holder:
        with pytest.raises(SealError):
            submit(holder, desk, 3)
        assert raw_verdicts(holder, desk) == said


@pytest.mark.parametrize("given", [False, True])
def test_a_restored_backup_judges_and_sums_nothing_of_an_open_round(
    start: Start, state: Path, tmp_path: Path, given: bool
) -> None:
    with start() as holder:
        desk = sketched(holder)
        if given:
            verdicts(holder, desk)
        backup_ledger(state, tmp_path / "copy")
    restore_ledger(tmp_path / "copy", tmp_path / "other")
    with start(folder=tmp_path / "other") as holder:
        for again in (
            lambda: verdicts(holder, desk),
            lambda: submit(holder, desk, 0),
            lambda: release(holder, desk, without(desk, LIAR)),
        ):
            with pytest.raises(ClosedError):
                again()
        assert holder.open(PLAN, attempt=2).id.attempt == 2


# --- what is never said -------------------------------------------------------------------------


def test_one_bit_of_an_estimate_is_kept_and_none_is_told_early(
    thread: LoopThread, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimates: list[float] = []
    honest = norm_check._energy

    def overheard(*arguments: object) -> float:
        estimates.append(honest(*arguments))  # type: ignore[arg-type]
        return estimates[-1]

    monkeypatch.setattr(norm_check, "_energy", overheard)
    with (
        structlog.testing.capture_logs() as log,
        holding(thread, durable_rounds(state)) as holder,
    ):
        desk = sketched(holder)
        early = json.dumps(log) + "".join(entry.details for entry in entries(state))
        for call in (release, check):
            with pytest.raises(SecaggError):
                call(holder, desk, desk.uploads)
        verdicts(holder, desk)
        for call in (release, check):
            with pytest.raises(SecaggError):
                call(holder, desk, desk.uploads)
    assert "NORM_REFUSED" not in early
    assert len(estimates) == 4
    with closing(sqlite3.connect(state / "ledger.sqlite3")) as db:
        text = "\n".join(db.iterdump()) + json.dumps(log) + "".join(holder.said)
        kept = db.execute(
            "SELECT typeof(passed), passed, length(sketch_digest) FROM admissions"
        ).fetchall()
    assert sorted(kept) == [("integer", 0, 32)] + [("integer", 1, 32)] * 3
    for estimate in estimates:
        for number in (estimate, estimate**0.5):
            assert f"{number:.3f}"[:-1] not in text
    logged = [json.loads(entry.details) for entry in entries(state) if "judged" in entry.event]
    assert {key for each in logged for key in each} == {
        "task_id",
        "round_number",
        "attempt",
        "upload_digest",
        "client",
        "sketch_digest",
        "reason",
    }
    assert {
        "event": "norms_judged",
        "log_level": "info",
        "round": 1,
        "uploads": 4,
        "refused": 1,
    } in log
