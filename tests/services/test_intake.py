"""How uploads come in: announced, sent in chunks, committed, stored."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import cohort
import numpy as np
import pytest
from desks import Desk, desk_for

from secagg.errors import ClosedError, MalformedError, OverloadedError
from secagg.parameters import BLOCK_BYTES, CHUNK_BYTES
from secagg.residues import widen
from secagg_server.blobs import BlobStore
from secagg_server.intake import Intake
from secagg_server.states import UploadState
from secagg_server.store import Store


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


# --- blobs ------------------------------------------------------------------------------------


def test_a_chunk_is_there_whole_or_not_at_all(
    wide_desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = cohort.noise_upload(wide_desk.context, 0)
    wide_desk.announce(upload)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OverloadedError, match="disk"):
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
    with pytest.raises(OverloadedError, match="disk"):
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
