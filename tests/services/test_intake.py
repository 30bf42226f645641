"""How uploads come in, and everything that must not: over the real service, store and disk."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cohort
import grpc.aio
import numpy as np
import pytest
from clocks import EPOCH, ManualClock
from serving import loop_thread, serving

from secagg.context import ContextId, RoundContext
from secagg.endorsement import Endorsement
from secagg.enrolment import OpenEnrolment
from secagg.errors import (
    ClosedError,
    ConfigurationError,
    ContextError,
    DuplicateError,
    MalformedError,
    NotReadyError,
    ReceiptError,
    RoundError,
    SecaggError,
)
from secagg.parameters import BLOCK_BYTES, CHUNK_BYTES, Plan
from secagg.receipts import Receipt
from secagg.residues import widen
from secagg.rpc import channels
from secagg.rpc.status import from_rpc_error
from secagg.upload import Admission, Upload
from secagg.wire import codec
from secagg.wire.v1 import aggregation_service_pb2 as pb
from secagg.wire.v1 import aggregation_service_pb2_grpc, round_pb2
from secagg_server.blobs import BlobStore
from secagg_server.intake import Intake
from secagg_server.rounds import OpenRound, OpenRounds
from secagg_server.services import AggregationService
from secagg_server.states import RoundState, TaskState, UploadState
from secagg_server.store import Store, round_key
from secagg_server.tasks import TaskSpec


ENDORSED = Endorsement(bytes(32), bytes(64))


@dataclass
class Desk:
    """A server's intake for one collecting round."""

    store: Store
    blobs: BlobStore
    rounds: OpenRounds
    intake: Intake
    context: RoundContext
    root: Path
    roster: cohort.ChangingRoster
    caller: str | None = None

    def announce(self, upload: Upload) -> tuple[UploadState, list[int]]:
        return self.intake.open(upload.admission, self.caller)

    def put(self, upload: Upload, index: int, data: bytes | None = None) -> None:
        receipt = upload.admission.receipt
        payload = cohort.chunk(upload, index) if data is None else data
        self.intake.put_chunk(
            receipt.context, receipt.client_key, receipt.upload_digest, index, payload, self.caller
        )

    def commit(self, upload: Upload) -> None:
        receipt = upload.admission.receipt
        self.intake.commit(receipt.context, receipt.client_key, receipt.upload_digest, self.caller)

    def send(self, upload: Upload) -> None:
        _, missing = self.announce(upload)
        for index in missing:
            self.put(upload, index)
        self.commit(upload)

    def accepted(self) -> int:
        return self.store.counts(("task", 1, 1)).accepted

    def open_round(self, spec: TaskSpec, context: RoundContext) -> None:
        closes_at = EPOCH + datetime.timedelta(minutes=1)
        signed = {"identity": ENDORSED.identity, "signature": ENDORSED.signature}
        self.store.open_round(
            round_key(context), round_key=context.round_key, closes_at=closes_at, **signed
        )
        self.rounds.open(OpenRound(spec, context, ENDORSED, 0, 60.0))

    def close_round(self) -> None:
        self.rounds.close("task")
        self.store.advance(("task", 1, 1), RoundState.CHECKING)

    def stored(self, upload: Upload, index: int) -> bytes:
        return self.blobs.chunk(self.context.id, upload.admission.receipt.upload_digest, index)

    def files(self) -> list[Path]:
        return sorted(path for path in self.root.rglob("*") if path.is_file())


def desk_for(plan: Plan, folder: Path) -> Desk:
    store = Store(f"sqlite:///{folder}/store.sqlite3")
    blobs, rounds = BlobStore(folder / "blobs"), OpenRounds(ManualClock())
    spec = TaskSpec("task", plan, 3, 60_000, 2, plan.max_clients)
    context = cohort.round_context(plan, task_id="task")
    store.create_task(spec, bytes(32))
    store.create_round("task", 1)
    roster = cohort.ChangingRoster(OpenEnrolment())
    intake = Intake(store, blobs, rounds, roster)
    desk = Desk(store, blobs, rounds, intake, context, folder / "blobs", roster)
    desk.open_round(spec, context)
    return desk


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """A round whose uploads have one chunk."""
    made = desk_for(cohort.mixed_plan(max_clients=3), tmp_path)
    yield made
    made.store.close()


@pytest.fixture
def wide_desk(tmp_path: Path) -> Iterator[Desk]:
    """A round whose uploads have chunks of 32, 32 and 6 polynomials."""
    made = desk_for(cohort.long_plan(), tmp_path)
    yield made
    made.store.close()


# --- the good way -----------------------------------------------------------------------------


def test_an_upload_is_accepted_once_it_is_announced_sent_and_committed(desk: Desk) -> None:
    upload = cohort.noise_upload(desk.context, 0)
    assert desk.announce(upload) == (UploadState.RECEIVING, [0])
    desk.put(upload, 0)
    assert desk.accepted() == 0
    desk.commit(upload)
    assert desk.accepted() == 1
    assert desk.stored(upload, 0) == upload.payload
    assert desk.store.accepted(desk.context) == [upload.admission]


def test_repeating_any_step_changes_nothing(desk: Desk) -> None:
    upload = cohort.noise_upload(desk.context, 0)
    for _ in range(2):
        desk.announce(upload)
    for _ in range(2):
        desk.put(upload, 0)
    for _ in range(2):
        desk.commit(upload)
    assert desk.announce(upload) == (UploadState.ACCEPTED, [])
    assert desk.accepted() == 1


def test_a_client_that_reconnects_is_told_exactly_what_is_missing(wide_desk: Desk) -> None:
    upload = cohort.noise_upload(wide_desk.context, 0)
    assert wide_desk.announce(upload) == (UploadState.RECEIVING, [0, 1, 2])
    wide_desk.put(upload, 1)
    assert wide_desk.announce(upload) == (UploadState.RECEIVING, [0, 2])
    wide_desk.put(upload, 2)
    assert wide_desk.announce(upload) == (UploadState.RECEIVING, [0])
    wide_desk.put(upload, 0)
    wide_desk.commit(upload)
    assert wide_desk.accepted() == 1


def test_what_was_sent_is_still_known_after_a_restart_of_the_server(
    wide_desk: Desk, tmp_path: Path
) -> None:
    upload = cohort.noise_upload(wide_desk.context, 0)
    wide_desk.announce(upload)
    wide_desk.put(upload, 1)
    reopened = Store(f"sqlite:///{tmp_path}/store.sqlite3")
    try:
        again = Intake(reopened, BlobStore(wide_desk.root), wide_desk.rounds, wide_desk.roster)
        assert again.open(upload.admission) == (UploadState.RECEIVING, [0, 2])
    finally:
        reopened.close()


def test_chunks_that_arrive_at_once_are_all_there(wide_desk: Desk) -> None:
    uploads = [cohort.noise_upload(wide_desk.context, index) for index in range(3)]
    for upload in uploads:
        wide_desk.announce(upload)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda job: wide_desk.put(*job), [(u, i) for u in uploads for i in range(3)]))
        list(pool.map(wide_desk.commit, uploads))
    assert wide_desk.accepted() == 3


# --- chunks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [-CHUNK_BYTES, -BLOCK_BYTES, -7, -1, 1, 7, BLOCK_BYTES])
@pytest.mark.parametrize("index", [0, 2])
def test_a_chunk_of_the_wrong_size_is_refused_and_not_stored(
    wide_desk: Desk, change: int, index: int
) -> None:
    upload = cohort.noise_upload(wide_desk.context, 0)
    wide_desk.announce(upload)
    good = cohort.chunk(upload, index)
    data = good + bytes(change) if change > 0 else good[: max(0, len(good) + change)]
    with pytest.raises(MalformedError, match=f"exactly {len(good)} bytes"):
        wide_desk.put(upload, index, data)
    assert wide_desk.files() == []


@pytest.mark.parametrize("place", [0, 4095, 8191])
def test_a_residue_of_q_is_refused_and_not_stored(desk: Desk, place: int) -> None:
    upload = cohort.noise_upload(desk.context, 0)
    desk.announce(upload)
    data = bytearray(upload.payload)
    data[7 * place : 7 * place + 7] = cohort.ABOVE_MODULUS
    with pytest.raises(MalformedError, match=f"block={place // 4096}, position={place % 4096}"):
        desk.put(upload, 0, bytes(data))
    assert desk.files() == []


@pytest.mark.parametrize("index", [3, 4, 255, (1 << 32) - 1])
def test_a_chunk_index_beyond_the_plan_is_refused(wide_desk: Desk, index: int) -> None:
    upload = cohort.noise_upload(wide_desk.context, 0)
    wide_desk.announce(upload)
    with pytest.raises(MalformedError, match="chunk below 3"):
        wide_desk.put(upload, index, cohort.chunk(upload, 0))
    assert wide_desk.files() == []


def test_a_chunk_in_the_place_of_another_is_found_at_the_commit(wide_desk: Desk) -> None:
    upload = cohort.noise_upload(wide_desk.context, 0)
    wide_desk.announce(upload)
    for place, part in enumerate((1, 0, 2)):
        wide_desk.put(upload, place, cohort.chunk(upload, part))
    with pytest.raises(MalformedError, match="SHA-256 differs"):
        wide_desk.commit(upload)
    assert wide_desk.accepted() == 0


def test_a_chunk_sent_twice_counts_once_and_the_last_one_stands(wide_desk: Desk) -> None:
    upload = cohort.noise_upload(wide_desk.context, 0)
    wide_desk.announce(upload)
    wide_desk.put(upload, 0, cohort.chunk(upload, 1))
    for index in (0, 1, 2, 2):
        wide_desk.put(upload, index)
    wide_desk.commit(upload)
    assert wide_desk.accepted() == 1


def test_a_chunk_of_an_upload_that_was_not_announced_is_refused(desk: Desk) -> None:
    upload = cohort.noise_upload(desk.context, 0)
    with pytest.raises(ClosedError, match="announce it first"):
        desk.put(upload, 0)
    desk.announce(cohort.noise_upload(desk.context, 1))
    with pytest.raises(ClosedError, match="announce it first"):
        desk.put(upload, 0)
    assert desk.files() == []


def test_a_chunk_under_another_digest_than_the_announced_one_is_refused(desk: Desk) -> None:
    announced, other = (cohort.noise_upload(desk.context, 0, nonce) for nonce in (1, 2))
    desk.announce(announced)
    with pytest.raises(ClosedError, match="announce it first"):
        desk.put(other, 0)
    assert desk.files() == []


def test_a_chunk_in_the_name_of_another_client_is_refused(desk: Desk) -> None:
    upload = cohort.noise_upload(desk.context, 0)
    desk.announce(upload)
    digest = upload.admission.receipt.upload_digest
    stranger = cohort.identity(1).public
    with pytest.raises(ClosedError):
        desk.intake.put_chunk(desk.context.id, stranger, digest, 0, upload.payload)


def test_chunks_of_an_accepted_upload_cannot_be_replaced(desk: Desk) -> None:
    upload, other = (cohort.noise_upload(desk.context, 0, nonce) for nonce in (1, 2))
    desk.send(upload)
    with pytest.raises(ClosedError, match="incomplete upload"):
        desk.put(upload, 0, other.payload)
    assert desk.stored(upload, 0) == upload.payload


# --- commits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [{0}, {1}, {2}, {0, 2}, {0, 1, 2}])
def test_a_commit_with_missing_chunks_is_refused_and_what_came_is_kept(
    wide_desk: Desk, missing: set[int]
) -> None:
    upload = cohort.noise_upload(wide_desk.context, 0)
    wide_desk.announce(upload)
    for index in {0, 1, 2} - missing:
        wide_desk.put(upload, index)
    with pytest.raises(MalformedError, match=f"{len(missing)} are missing"):
        wide_desk.commit(upload)
    assert wide_desk.announce(upload) == (UploadState.RECEIVING, sorted(missing))
    for index in missing:
        wide_desk.put(upload, index)
    wide_desk.commit(upload)
    assert wide_desk.accepted() == 1


def test_a_commit_of_other_bytes_drops_them_and_a_correct_resend_works(wide_desk: Desk) -> None:
    upload = cohort.noise_upload(wide_desk.context, 0)
    damaged = bytearray(cohort.chunk(upload, 1))
    damaged[0] ^= 1
    wide_desk.announce(upload)
    for index in range(3):
        wide_desk.put(upload, index, bytes(damaged) if index == 1 else None)
    with pytest.raises(MalformedError, match="send them again"):
        wide_desk.commit(upload)
    assert wide_desk.files() == []
    assert wide_desk.announce(upload) == (UploadState.RECEIVING, [0, 1, 2])
    wide_desk.send(upload)
    assert wide_desk.accepted() == 1


def test_a_commit_of_an_upload_that_was_not_announced_is_refused(desk: Desk) -> None:
    with pytest.raises(ClosedError):
        desk.commit(cohort.noise_upload(desk.context, 0))


def test_a_commit_in_the_name_of_another_client_is_refused(desk: Desk) -> None:
    upload = cohort.noise_upload(desk.context, 0)
    desk.announce(upload)
    desk.put(upload, 0)
    digest = upload.admission.receipt.upload_digest
    with pytest.raises(ClosedError):
        desk.intake.commit(desk.context.id, cohort.identity(1).public, digest)
    assert desk.accepted() == 0


def test_a_commit_again_after_the_round_closed_still_says_that_it_was_accepted(desk: Desk) -> None:
    """The answer to the commit that fills the cohort may be lost; the client must not be told
    that nothing of it is in the sum."""
    upload = cohort.noise_upload(desk.context, 0)
    desk.send(upload)
    desk.close_round()
    desk.commit(upload)
    assert desk.accepted() == 1


# --- clients that lie about who they are --------------------------------------------------------


def test_a_client_that_announces_anothers_digest_cannot_replace_its_chunks(desk: Desk) -> None:
    """One person with two identities is enough to try."""
    upload, other = (cohort.noise_upload(desk.context, 0, nonce) for nonce in (1, 2))
    desk.send(upload)
    thief = cohort.replayed(desk.context, 1, upload)
    try:
        desk.announce(thief)
        desk.put(thief, 0, other.payload)
    except SecaggError:
        pass
    assert desk.stored(upload, 0) == upload.payload


def test_a_client_that_announces_anothers_digest_cannot_drop_its_chunks(desk: Desk) -> None:
    upload, other = (cohort.noise_upload(desk.context, 0, nonce) for nonce in (1, 2))
    desk.send(upload)
    thief = cohort.replayed(desk.context, 1, upload)
    try:
        desk.announce(thief)
        desk.put(thief, 0, other.payload)
        desk.commit(thief)
    except SecaggError:
        pass
    assert desk.stored(upload, 0) == upload.payload


def test_a_client_that_announces_anothers_digest_does_not_count_without_sending(
    desk: Desk,
) -> None:
    upload = cohort.noise_upload(desk.context, 0)
    desk.send(upload)
    thief = cohort.replayed(desk.context, 1, upload)
    with contextlib.suppress(SecaggError):
        desk.announce(thief)
        desk.commit(thief)
    assert desk.accepted() == 1


def forged(desk: Desk, change: str) -> Admission:
    admission = cohort.noise_upload(desk.context, 0).admission
    receipt = admission.receipt
    if change == "sealed seed":
        return replace(admission, sealed_seed=bytes(len(admission.sealed_seed)))
    if change == "nothing":
        return admission
    values: dict[str, Any] = {
        "signature": bytes(64),
        "client_key": cohort.identity(1).public,
        "upload_digest": bytes(32),
        "sealed_seed_sha256": bytes(32),
    }
    return replace(admission, receipt=replace(receipt, **{change: values[change]}))


@pytest.mark.parametrize(
    "change", ["signature", "client_key", "upload_digest", "sealed_seed_sha256", "sealed seed"]
)
def test_a_forged_receipt_is_refused_and_leaves_no_trace(desk: Desk, change: str) -> None:
    admission = forged(desk, change)
    with pytest.raises(ReceiptError):
        desk.intake.open(admission)
    for client in (0, 1):
        assert desk.store.upload(desk.context.id, cohort.identity(client).public.hex()) is None


def test_the_receipt_that_the_forgeries_change_is_good(desk: Desk) -> None:
    assert desk.intake.open(forged(desk, "nothing")) == (UploadState.RECEIVING, [0])


@pytest.mark.parametrize("key", [bytes(32), b"\xff" * 32, b"\x01" + bytes(31)])
def test_a_client_key_that_is_no_or_a_weak_point_is_refused(desk: Desk, key: bytes) -> None:
    admission = forged(desk, "nothing")
    weak = replace(admission, receipt=replace(admission.receipt, client_key=key))
    with pytest.raises(ReceiptError):
        desk.intake.open(weak)


def test_a_second_different_upload_of_a_client_is_refused(desk: Desk) -> None:
    first, second = (cohort.noise_upload(desk.context, 0, nonce) for nonce in (1, 2))
    desk.announce(first)
    with pytest.raises(DuplicateError):
        desk.announce(second)
    desk.send(first)
    with pytest.raises(DuplicateError):
        desk.announce(second)
    assert desk.accepted() == 1


# --- contexts ---------------------------------------------------------------------------------


CHANGES: dict[str, Any] = {
    "task_id": "other",
    "round_number": 2,
    "attempt": 2,
    "plan_digest": bytes(32),
    "model_digest": b"\1" * 32,
    "round_key_id": bytes(32),
}


@pytest.mark.parametrize("field", CHANGES)
def test_an_upload_for_another_context_is_refused_at_every_step(desk: Desk, field: str) -> None:
    other: ContextId = replace(desk.context.id, **{field: CHANGES[field]})
    upload = cohort.noise_upload(desk.context, 0)
    desk.announce(upload)
    receipt, sealed = upload.admission.receipt, upload.admission.sealed_seed
    foreign = Receipt.sign(cohort.identity(0), other, receipt.upload_digest, sealed)
    kind = ClosedError if field == "task_id" else ContextError
    for step in (
        lambda: desk.intake.open(Admission(foreign, sealed)),
        lambda: desk.intake.put_chunk(
            other, receipt.client_key, receipt.upload_digest, 0, upload.payload
        ),
        lambda: desk.intake.commit(other, receipt.client_key, receipt.upload_digest),
    ):
        with pytest.raises(kind) as caught:
            step()
        assert field == "task_id" or field in str(caught.value)
    assert desk.files() == []


def test_a_receipt_that_was_signed_for_another_context_cannot_be_relabelled(desk: Desk) -> None:
    other = replace(desk.context.id, attempt=2)
    upload = cohort.noise_upload(desk.context, 0)
    receipt, sealed = upload.admission.receipt, upload.admission.sealed_seed
    replayed = Receipt.sign(cohort.identity(0), other, receipt.upload_digest, sealed)
    with pytest.raises(ReceiptError):
        desk.intake.open(Admission(replace(replayed, context=desk.context.id), sealed))


def test_everything_is_refused_once_the_round_has_closed(desk: Desk) -> None:
    announced, late = (cohort.noise_upload(desk.context, index) for index in (0, 1))
    desk.announce(announced)
    desk.close_round()
    for step in (
        lambda: desk.announce(late),
        lambda: desk.announce(announced),
        lambda: desk.put(announced, 0),
        lambda: desk.commit(announced),
    ):
        with pytest.raises(ClosedError, match="closed"):
            step()
    assert desk.files() == []
    assert desk.accepted() == 0


def test_an_upload_for_an_earlier_attempt_is_closed_not_foreign(desk: Desk) -> None:
    later = cohort.round_context(desk.context.plan, task_id="task", attempt=2)
    spec = desk.rounds.require(desk.context.id).spec
    desk.rounds.open(OpenRound(spec, later, ENDORSED, 0, 60.0))
    with pytest.raises(ClosedError):
        desk.announce(cohort.noise_upload(desk.context, 0))


def test_no_upload_beyond_the_largest_cohort_is_even_announced(desk: Desk) -> None:
    early = cohort.noise_upload(desk.context, 4)
    desk.announce(early)
    for index in range(3):
        desk.send(cohort.noise_upload(desk.context, index))
    with pytest.raises(ClosedError, match="full"):
        desk.announce(cohort.noise_upload(desk.context, 3))
    with pytest.raises(ClosedError, match="full"):
        desk.send(early)
    assert desk.accepted() == 3


def test_commits_at_once_never_exceed_the_largest_cohort(desk: Desk) -> None:
    uploads = [cohort.noise_upload(desk.context, index) for index in range(8)]
    for upload in uploads:
        desk.announce(upload)
        desk.put(upload, 0)
    barrier = threading.Barrier(8)

    def commit(upload: Upload) -> int:
        barrier.wait()
        try:
            desk.commit(upload)
        except ClosedError:
            return 0
        return 1

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(commit, uploads)) == 3
    assert desk.accepted() == 3


# --- blobs ------------------------------------------------------------------------------------


def test_a_chunk_is_there_whole_or_not_at_all(
    wide_desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = cohort.noise_upload(wide_desk.context, 0)
    wide_desk.announce(upload)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        wide_desk.put(upload, 0)
    assert wide_desk.announce(upload) == (UploadState.RECEIVING, [0, 1, 2])


def test_a_failed_write_leaves_no_file_behind(
    wide_desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk must not fill up further with drafts."""
    upload = cohort.noise_upload(wide_desk.context, 0)
    wide_desk.announce(upload)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        wide_desk.put(upload, 0)
    assert wide_desk.files() == []


def test_blobs_are_for_their_owner_only(desk: Desk) -> None:
    desk.send(cohort.noise_upload(desk.context, 0))
    assert desk.root.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o077 == 0 for path in desk.files())


def test_dropping_a_round_leaves_other_rounds_and_models(desk: Desk) -> None:
    later = replace(desk.context.id, attempt=2)
    desk.blobs.put_model("task", 0, b"model")
    desk.blobs.put_sums("task", 1, b"sums")
    desk.blobs.put_chunk(desk.context.id, bytes(32), 0, b"old")
    desk.blobs.put_chunk(later, bytes(32), 0, b"new")
    desk.blobs.drop_round(desk.context.id)
    desk.blobs.drop_round(desk.context.id)
    with pytest.raises(FileNotFoundError):
        desk.blobs.chunk(desk.context.id, bytes(32), 0)
    assert desk.blobs.chunk(later, bytes(32), 0) == b"new"
    assert desk.blobs.model("task", 0) == b"model"
    assert desk.blobs.sums("task", 1) == b"sums"


# --- over the wire ------------------------------------------------------------------------------


@pytest.fixture
def stub(desk: Desk) -> Iterator[aggregation_service_pb2_grpc.AggregationServiceStub]:
    def add(server: grpc.aio.Server) -> None:
        service = AggregationService(desk.store, desk.blobs, desk.rounds, desk.intake)
        aggregation_service_pb2_grpc.add_AggregationServiceServicer_to_server(service, server)

    with (
        loop_thread() as thread,
        serving(thread, add) as address,
        channels.channel(address, None) as channel,
    ):
        yield aggregation_service_pb2_grpc.AggregationServiceStub(channel)


def error_of(call: Any, request: object) -> SecaggError:  # noqa: ANN401 - a method of a stub
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=20)
    return from_rpc_error(caught.value)


def chunk_request(desk: Desk, upload: Upload) -> pb.PutChunkRequest:
    return pb.PutChunkRequest(
        context=codec.context_id_to_wire(desk.context.id),
        client_key=upload.admission.receipt.client_key,
        upload_digest=upload.admission.receipt.upload_digest,
        data=upload.payload,
    )


HOSTILE_IDS = ["../../../escaped", "/tmp/escaped", "..", ".", "a/../../escaped", "task\0", ""]  # noqa: S108


@pytest.mark.parametrize("task_id", HOSTILE_IDS)
def test_a_hostile_task_id_never_reaches_the_disk(
    desk: Desk,
    stub: aggregation_service_pb2_grpc.AggregationServiceStub,
    task_id: str,
    tmp_path: Path,
) -> None:
    before = sorted(tmp_path.rglob("*"))
    upload = cohort.noise_upload(desk.context, 0)
    admission = codec.admission_to_wire(upload.admission)
    admission.receipt.context.task_id = task_id
    chunk = chunk_request(desk, upload)
    chunk.context.task_id = task_id
    commit = pb.CommitUploadRequest(
        context=chunk.context, client_key=chunk.client_key, upload_digest=chunk.upload_digest
    )
    for call, request in [
        (stub.OpenUpload, pb.OpenUploadRequest(admission=admission)),
        (stub.PutChunk, chunk),
        (stub.CommitUpload, commit),
        (stub.GetModel, pb.GetModelRequest(task_id=task_id)),
        (stub.GetRound, pb.GetRoundRequest(task_id=task_id)),
    ]:
        kinds = (MalformedError, ClosedError, ConfigurationError)
        assert isinstance(error_of(call, request), kinds)
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/escaped").exists()  # noqa: S108


@pytest.mark.parametrize("size", [0, 31, 33, 64])
@pytest.mark.parametrize("field", ["client_key", "upload_digest"])
def test_names_of_the_wrong_size_are_refused(
    desk: Desk,
    stub: aggregation_service_pb2_grpc.AggregationServiceStub,
    field: str,
    size: int,
) -> None:
    request = chunk_request(desk, cohort.noise_upload(desk.context, 0))
    setattr(request, field, bytes(size))
    error = error_of(stub.PutChunk, request)
    assert (type(error), field in str(error)) == (MalformedError, True)


def test_an_upload_goes_over_the_wire_and_the_answers_say_where_it_stands(
    desk: Desk, stub: aggregation_service_pb2_grpc.AggregationServiceStub
) -> None:
    upload = cohort.noise_upload(desk.context, 0)
    opening = pb.OpenUploadRequest(admission=codec.admission_to_wire(upload.admission))
    answer = stub.OpenUpload(opening, timeout=20)
    assert answer == pb.OpenUploadResponse(
        state=round_pb2.UPLOAD_STATE_RECEIVING, missing_chunks=[0]
    )
    chunk = chunk_request(desk, upload)
    stub.PutChunk(chunk, timeout=20)
    commit = pb.CommitUploadRequest(
        context=chunk.context, client_key=chunk.client_key, upload_digest=chunk.upload_digest
    )
    assert stub.CommitUpload(commit, timeout=20).state == round_pb2.UPLOAD_STATE_ACCEPTED
    again = stub.OpenUpload(opening, timeout=20)
    assert again == pb.OpenUploadResponse(state=round_pb2.UPLOAD_STATE_ACCEPTED)


def test_the_round_is_handed_out_with_all_that_a_client_needs(
    desk: Desk, stub: aggregation_service_pb2_grpc.AggregationServiceStub
) -> None:
    answer = stub.GetRound(pb.GetRoundRequest(task_id="task"), timeout=20)
    found = codec.round_context_from_wire(answer.context, answer.plan, answer.round_key)
    assert found == desk.context
    assert (answer.remaining_ms, answer.rounds_total, answer.model_version) == (60_000, 3, 0)


@pytest.mark.parametrize("done", [(1, 1), (1, 2), (2, 0)])
def test_a_client_that_is_done_with_the_round_is_asked_to_wait(
    desk: Desk, stub: aggregation_service_pb2_grpc.AggregationServiceStub, done: tuple[int, int]
) -> None:
    request = pb.GetRoundRequest(task_id="task", after_round=done[0], after_attempt=done[1])
    assert type(error_of(stub.GetRound, request)) is NotReadyError


def test_between_rounds_clients_are_asked_to_wait(
    desk: Desk, stub: aggregation_service_pb2_grpc.AggregationServiceStub
) -> None:
    desk.close_round()
    assert type(error_of(stub.GetRound, pb.GetRoundRequest(task_id="task"))) is NotReadyError


@pytest.mark.parametrize(
    ("state", "kind", "text"),
    [
        (TaskState.FINISHED, ClosedError, "finished"),
        (TaskState.FAILED, RoundError, "QUORUM: too few"),
    ],
)
def test_a_task_that_has_ended_says_never_again_and_why(
    desk: Desk,
    stub: aggregation_service_pb2_grpc.AggregationServiceStub,
    state: TaskState,
    kind: type[SecaggError],
    text: str,
) -> None:
    desk.store.end_task("task", state, "QUORUM: too few")
    error = error_of(stub.GetRound, pb.GetRoundRequest(task_id="task"))
    assert type(error) is kind
    assert text in str(error)


def test_the_commit_that_fills_the_target_wakes_the_coordinator(desk: Desk) -> None:
    current = replace(desk.rounds.require(desk.context.id), filled=asyncio.Event())
    desk.rounds.open(current)
    desk.rounds.note_upload(desk.context.id, 2)
    assert not current.filled.is_set()
    desk.rounds.note_upload(replace(desk.context.id, attempt=9), 3)
    assert not current.filled.is_set()
    desk.rounds.note_upload(desk.context.id, 3)
    assert current.filled.is_set()


def test_what_the_server_adds_is_what_was_sent(wide_desk: Desk) -> None:
    """Chunks are stored as bytes; residues read back from them are those that were sent."""
    upload = cohort.noise_upload(wide_desk.context, 0)
    wide_desk.send(upload)
    parts = [
        widen(wide_desk.stored(upload, i), wide_desk.context.plan.chunk_blocks(i)) for i in range(3)
    ]
    assert np.array_equal(np.concatenate(parts), widen(upload.payload, 70))
    stored = b"".join(wide_desk.stored(upload, index) for index in range(3))
    assert hashlib.sha256(stored).digest() == upload.admission.receipt.upload_digest
    shutil.rmtree(wide_desk.root)
