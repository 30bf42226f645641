"""What the key holder promised outlives it; and the noise audit over gRPC."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from pathlib import Path

import cohort
import pytest
from holding import Holder, Judged, digests_of, flipped, holding, summed
from key_holders import durable_rounds
from serving import LoopThread, loop_thread

from secagg import audit
from secagg.context import ContextId, RoundContext
from secagg.errors import ClosedError, ContextError, MalformedError, ReleaseError, SealError
from secagg.noise_audit import dithered, low_to_bytes
from secagg.residues import widen
from secagg.upload import Upload
from secagg.wire import codec
from secagg.wire.v1 import key_holder_service_pb2 as pb
from secagg.wire.v1 import round_pb2
from secagg_keyholder.backup import backup_ledger, restore_ledger
from secagg_keyholder.database import LEDGER
from secagg_keyholder.rounds import Policy

ACCEPTED = round_pb2.VERDICT_STATE_ACCEPTED
REJECTED = round_pb2.VERDICT_STATE_REJECTED
GOOD = (ACCEPTED, "")

Start = Callable[[], AbstractContextManager[Holder]]


@pytest.fixture(scope="module")
def thread() -> Iterator[LoopThread]:
    with loop_thread() as running:
        yield running


@pytest.fixture
def start(thread: LoopThread, tmp_path: Path) -> Start:
    """Starts the key holder over the same folder, as often as it is called."""

    @contextmanager
    def started() -> Iterator[Holder]:
        with holding(thread, durable_rounds(tmp_path / "state")) as holder:
            yield holder

    return started


def judge_all(holder: Holder, count: int = 4) -> Judged:
    context = holder.open()
    uploads = [cohort.encrypted(context, index) for index in range(count)]
    assert holder.judge(context, uploads) == [GOOD] * count
    return Judged(context, uploads)


def refuse_once(holder: Holder, judged: Judged, place: int = 0) -> None:
    with pytest.raises(ReleaseError):
        holder.release(judged.context, judged.digests, flipped(judged.data, place))


# --- after a restart ----------------------------------------------------------------------------


def test_an_open_round_goes_on_after_a_restart(start: Start) -> None:
    with start() as holder:
        judged = judge_all(holder)
    with start() as holder:
        assert holder.open() == judged.context
        late = cohort.encrypted(judged.context, 4)
        assert holder.judge(judged.context, [*judged.uploads, late]) == [GOOD] * 5
        judged.uploads.append(late)
        _, contributors = holder.release(judged.context, judged.digests, judged.data)
    assert contributors == 5


def test_a_release_is_the_same_to_the_byte_after_a_restart(start: Start) -> None:
    with start() as holder:
        judged = judge_all(holder)
        first = holder.release(judged.context, judged.digests, judged.data)
    with start() as holder:
        assert holder.release(judged.context, judged.digests, judged.data) == first
        assert holder.release(judged.context, judged.digests[::-1], judged.data) == first
        fewer = judged.uploads[:3]
        with pytest.raises(ClosedError, match="one release a round"):
            holder.release(judged.context, digests_of(fewer), summed(judged.context, fewer))
        with pytest.raises(ClosedError):
            holder.open(attempt=2)


def test_the_disk_holds_the_sums_of_the_newest_round_alone(start: Start, tmp_path: Path) -> None:
    def kept() -> list[tuple[int, bytes | None]]:
        with closing(sqlite3.connect(tmp_path / "state" / LEDGER)) as ledger:
            query = "SELECT round_number, sums FROM rounds ORDER BY round_number"
            return ledger.execute(query).fetchall()

    with start() as holder:
        judged = judge_all(holder)
        sums, _ = holder.release(judged.context, judged.digests, judged.data)
        assert kept() == [(1, sums)]
        holder.open(number=2)
        assert kept() == [(1, None), (2, None)]


def test_verdicts_are_the_same_after_a_restart(start: Start) -> None:
    with start() as holder:
        context = holder.open()
        first, second = cohort.encrypted(context, 0), cohort.encrypted(context, 0)
        uploads = [first, second, cohort.broken_seal(context, 1), cohort.noise_upload(context, 2)]
        verdicts = holder.judge(context, uploads)
    assert verdicts == [
        GOOD,
        (REJECTED, "DUPLICATE_UPLOAD"),
        (REJECTED, "INVALID_SEAL"),
        (REJECTED, "INVALID_SEAL"),
    ]
    with start() as holder:
        assert holder.judge(context, uploads[::-1]) == verdicts[::-1]
        another = cohort.encrypted(context, 0)
        assert holder.judge(context, [another]) == [(REJECTED, "DUPLICATE_UPLOAD")]


def test_a_restart_does_not_forgive_a_refusal(start: Start) -> None:
    with start() as holder:
        judged = judge_all(holder)
        refuse_once(holder, judged)
    with start() as holder:
        refuse_once(holder, judged, place=1)
        with pytest.raises(ClosedError):
            holder.release(judged.context, judged.digests, judged.data)
    with start() as holder, pytest.raises(ClosedError):
        holder.release(judged.context, judged.digests, judged.data)


def test_a_round_that_was_closed_stays_closed_after_a_restart(start: Start) -> None:
    with start() as holder:
        judged = judge_all(holder)
        holder.close(judged.context)
    with start() as holder:
        for again in (
            lambda: holder.open(),
            lambda: holder.judge(judged.context, judged.uploads),
            lambda: holder.release(judged.context, judged.digests, judged.data),
        ):
            with pytest.raises(ClosedError):
                again()
        assert holder.open(attempt=2).id.attempt == 2


def test_a_round_whose_key_is_lost_is_closed_and_attempted_again(
    start: Start, tmp_path: Path
) -> None:
    with start() as holder:
        judged = judge_all(holder)
    (key,) = (tmp_path / "state" / "round-keys").glob("*.key")
    key.unlink()
    with start() as holder:
        with pytest.raises(ClosedError):
            holder.release(judged.context, judged.digests, judged.data)
        with pytest.raises(ClosedError):
            holder.open()
        assert holder.open(attempt=2).id.attempt == 2
    assert "KEY_LOST" in audit_of(tmp_path / "state")


def test_the_key_of_a_round_is_on_the_disk_for_as_long_as_it_is_open(
    start: Start, tmp_path: Path
) -> None:
    folder = tmp_path / "state" / "round-keys"
    with start() as holder:
        judged = judge_all(holder)
        (first,) = folder.glob("*.key")
        assert judged.context.id.round_key_id.hex() == first.stem
        holder.release(judged.context, judged.digests, judged.data)
        assert not list(folder.glob("*.key"))
        holder.open(number=2)
        holder.open(number=2, attempt=2)
        assert len(list(folder.glob("*.key"))) == 1


def audit_of(state: Path) -> str:
    """The audit log, which must verify."""
    entries = list(audit.read_entries(state / "ledger.sqlite3"))
    assert audit.verify(entries) == entries[-1]
    return "\n".join(f"{entry.event} {entry.details}" for entry in entries)


# --- backups ------------------------------------------------------------------------------------


def test_a_restored_backup_abandons_every_open_round(
    start: Start, thread: LoopThread, tmp_path: Path
) -> None:
    """It does not know what was released since: an open round may have been released."""
    with start() as holder:
        released = judge_all(holder)
        holder.release(released.context, released.digests, released.data)
        context = holder.open(number=2)
        uploads = [cohort.encrypted(context, index) for index in range(3)]
        holder.judge(context, uploads)
        backup_ledger(tmp_path / "state", tmp_path / "copy")
        holder.release(context, digests_of(uploads), summed(context, uploads))
    restore_ledger(tmp_path / "copy", tmp_path / "other")
    with holding(thread, durable_rounds(tmp_path / "other")) as holder:
        with pytest.raises(ClosedError):
            holder.release(context, digests_of(uploads[:3]), summed(context, uploads[:3]))
        with pytest.raises(ClosedError):
            holder.open(number=2)
        # Released before the backup: known to be, although the sums are not in it.
        with pytest.raises((ClosedError, ContextError)):
            holder.release(released.context, released.digests, released.data)
        with pytest.raises(ClosedError):
            holder.open(attempt=2)
        assert holder.open(number=2, attempt=2).id.attempt == 2
    assert "RESTORED" in audit_of(tmp_path / "other")
    # Once: the rounds opened since are this key holder's own.
    with holding(thread, durable_rounds(tmp_path / "other")) as holder:
        assert holder.open(number=2, attempt=2).id.attempt == 2


# --- attempts -----------------------------------------------------------------------------------


def test_the_attempts_on_one_model_are_counted_over_restarts(
    thread: LoopThread, tmp_path: Path
) -> None:
    """A server that never moves on could collect the same updates again and again."""
    policy, model, next_model = Policy(attempts_per_model=2), b"\1" * 32, b"\2" * 32
    for attempt in (1, 2):
        with holding(thread, durable_rounds(tmp_path, policy=policy)) as holder:
            holder.open(attempt=attempt, model_digest=model)
    with holding(thread, durable_rounds(tmp_path, policy=policy)) as holder:
        for number, attempt in ((1, 3), (2, 1), (9, 9)):
            with pytest.raises(ClosedError, match="at most 2 attempts"):
                holder.open(number=number, attempt=attempt, model_digest=model)
        assert holder.open(attempt=2, model_digest=model).id.attempt == 2
        assert holder.open(number=2, model_digest=next_model).id.round_number == 2
        assert holder.open(task_id="other", model_digest=model).id.attempt == 1


def test_without_a_model_the_attempts_at_one_round_are_counted(
    thread: LoopThread, tmp_path: Path
) -> None:
    with holding(thread, durable_rounds(tmp_path, policy=Policy(attempts_per_model=1))) as holder:
        holder.open()
        with pytest.raises(ClosedError, match="at most 1 attempts"):
            holder.open(attempt=2)
        holder.open(number=2)


# --- the noise audit ----------------------------------------------------------------------------


@pytest.fixture
def holder(start: Start) -> Iterator[Holder]:
    with start() as running:
        yield running


@pytest.fixture
def doubted(holder: Holder) -> Judged:
    """A round whose sum was refused once."""
    judged = judge_all(holder)
    refuse_once(holder, judged)
    return judged


def low_bits(context: RoundContext, upload: Upload) -> bytes:
    return low_to_bytes(dithered(context.plan, widen(upload.payload, context.plan.blocks)))


def named(context: ContextId, digest: bytes) -> pb.AuditNoiseRequest:
    upload = pb.NamedUpload(context=codec.context_id_to_wire(context), upload_digest=digest)
    return pb.AuditNoiseRequest(upload=upload)


def chunks(data: bytes) -> list[pb.AuditNoiseRequest]:
    indexes = range(codec.piece_count(len(data)))
    return [pb.AuditNoiseRequest(low_bits=codec.piece(data, index)) for index in indexes]


def audited(holder: Holder, judged: Judged, index: int) -> tuple[int, str]:
    data = low_bits(judged.context, judged.uploads[index])
    return holder.audit([named(judged.context.id, judged.digests[index]), *chunks(data)])


def off_the_grid(upload: Upload, context: RoundContext) -> Upload:
    """Another upload's ciphertext under this one's seed: noise all over."""
    return replace(upload, payload=cohort.encrypted(context, 5).payload)


def test_honest_uploads_pass_and_their_sum_is_opened(holder: Holder, doubted: Judged) -> None:
    assert [audited(holder, doubted, index) for index in range(4)] == [GOOD] * 4
    _, contributors = holder.release(doubted.context, doubted.digests, doubted.data)
    assert contributors == 4


def test_an_upload_off_the_grid_is_named_and_the_others_are_summed(
    holder: Holder, doubted: Judged
) -> None:
    bad = off_the_grid(doubted.uploads[3], doubted.context)
    data = low_bits(doubted.context, bad)
    request = named(doubted.context.id, doubted.digests[3])
    assert holder.audit([request, *chunks(data)]) == (REJECTED, "OFF_GRID")
    assert [audited(holder, doubted, index) for index in range(3)] == [GOOD] * 3
    with pytest.raises(SealError, match="passed the audit"):
        holder.release(doubted.context, doubted.digests, doubted.data)
    doubted.uploads.pop()
    assert holder.release(doubted.context, doubted.digests, doubted.data)[1] == 3


def test_what_was_not_audited_cannot_be_summed_any_more(holder: Holder, doubted: Judged) -> None:
    assert audited(holder, doubted, 0) == GOOD
    with pytest.raises(SealError, match="passed the audit"):
        holder.release(doubted.context, doubted.digests, doubted.data)


def test_a_finding_stands_whatever_is_sent_afterwards_and_after_a_restart(start: Start) -> None:
    with start() as holder:
        judged = judge_all(holder)
        refuse_once(holder, judged)
        name = named(judged.context.id, judged.digests[0])
        bad = low_bits(judged.context, off_the_grid(judged.uploads[0], judged.context))
        assert holder.audit([name, *chunks(bad)]) == (REJECTED, "OFF_GRID")
        assert audited(holder, judged, 0) == (REJECTED, "OFF_GRID")
        assert audited(holder, judged, 1) == GOOD
    with start() as holder:
        assert audited(holder, judged, 0) == (REJECTED, "OFF_GRID")
        assert holder.audit([named(judged.context.id, judged.digests[1]), *chunks(bad)]) == GOOD
        with pytest.raises(SealError):
            holder.release(judged.context, judged.digests, judged.data)


def test_nothing_is_audited_before_a_refusal(holder: Holder) -> None:
    judged = judge_all(holder)
    with pytest.raises(ClosedError, match="whose sum was refused"):
        audited(holder, judged, 0)
    assert holder.release(judged.context, judged.digests, judged.data)[1] == 4


def test_nothing_is_audited_once_the_round_is_over(holder: Holder, doubted: Judged) -> None:
    holder.release(doubted.context, doubted.digests, doubted.data)
    with pytest.raises(ClosedError):
        audited(holder, doubted, 0)


def test_an_upload_that_was_not_accepted_cannot_be_audited(holder: Holder, doubted: Judged) -> None:
    bad = cohort.broken_seal(doubted.context, 5)
    holder.judge(doubted.context, [bad])
    for upload in (bad, cohort.encrypted(doubted.context, 5)):
        (digest,) = digests_of([upload])
        data = low_bits(doubted.context, upload)
        with pytest.raises(SealError, match="admitted"):
            holder.audit([named(doubted.context.id, digest), *chunks(data)])


Part = pb.AuditNoiseRequest
# Streams that are none: of the first message, the low bits, and what becomes of both.
STREAMS: dict[str, Callable[[Part, bytes], list[Part]]] = {
    "nothing": lambda _name, _data: [],
    "nothing in it": lambda _name, _data: [Part()],
    "no name": lambda _name, data: chunks(data),
    "no low bits": lambda name, _data: [name],
    "the name last": lambda name, data: [*chunks(data), name],
    "the name twice": lambda name, data: [name, name, *chunks(data)],
    "the name at the end too": lambda name, data: [name, *chunks(data), name],
    "an empty message between": lambda name, data: [name, Part(), *chunks(data)],
    "the low bits twice": lambda name, data: [name, *chunks(data), *chunks(data)],
    "a byte more": lambda name, data: [name, *chunks(data), Part(low_bits=b"\0")],
    "a number less": lambda name, data: [name, *chunks(data[4:])],
    "a byte less": lambda name, data: [name, *chunks(data[1:])],
    "a number beyond the grid": lambda name, data: [name, *chunks(b"\xff" * 4 + data[4:])],
}


@pytest.mark.parametrize("case", STREAMS)
def test_a_malformed_audit_is_refused_and_finds_nothing(
    case: str, holder: Holder, doubted: Judged
) -> None:
    name = named(doubted.context.id, doubted.digests[0])
    data = low_bits(doubted.context, doubted.uploads[0])
    with pytest.raises(MalformedError):
        holder.audit(STREAMS[case](name, data))
    assert audited(holder, doubted, 0) == GOOD


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_name_of_the_wrong_size_is_malformed(holder: Holder, doubted: Judged, size: int) -> None:
    data = chunks(low_bits(doubted.context, doubted.uploads[0]))
    with pytest.raises(MalformedError, match="upload_digest of 32 bytes"):
        holder.audit([named(doubted.context.id, bytes(size)), *data])


@pytest.mark.parametrize(
    "change", [{"attempt": 2}, {"task_id": "other"}, {"round_key_id": bytes(32)}], ids=str
)
def test_nothing_is_audited_for_a_context_that_differs(
    holder: Holder, doubted: Judged, change: dict[str, object]
) -> None:
    context = replace(doubted.context.id, **change)  # type: ignore[arg-type]
    data = chunks(low_bits(doubted.context, doubted.uploads[0]))
    with pytest.raises((ContextError, ClosedError)):
        holder.audit([named(context, doubted.digests[0]), *data])


def test_an_endless_audit_is_cut_off(holder: Holder, doubted: Judged) -> None:
    sent = 0

    def endless() -> Iterator[pb.AuditNoiseRequest]:
        nonlocal sent
        yield named(doubted.context.id, doubted.digests[0])
        while sent < 2000:
            sent += 1
            yield pb.AuditNoiseRequest(low_bits=bytes(100_000))

    with pytest.raises(MalformedError, match="got more"):
        holder.audit(endless())
    assert sent < 1000
