"""Who may upload what: identities, contexts, replays, and room on the disk."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import cohort
import pytest
from desks import ENDORSED, Desk, desk_for

from secagg.context import ContextId, RoundContext
from secagg.errors import (
    ClosedError,
    ContextError,
    DuplicateError,
    MismatchError,
    NotEnrolledError,
    OverloadedError,
    ReceiptError,
    RevokedError,
    SecaggError,
)
from secagg.receipts import Receipt
from secagg.upload import Admission, Upload
from secagg_server.rounds import OpenRound
from secagg_server.states import UploadState


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """A round whose uploads have one chunk."""
    made = desk_for(cohort.mixed_plan(max_clients=3), tmp_path)
    yield made
    made.store.close()


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


# --- callers ------------------------------------------------------------------------------------


def enrolled(desk: Desk, *indexes: int, **changes: Any) -> None:  # noqa: ANN401 - see `enrolment`
    desk.roster.enrolment = cohort.enrolment(indexes or range(6), **changes)


def steps(desk: Desk, upload: Upload) -> list[Callable[[], object]]:
    return [lambda: desk.announce(upload), lambda: desk.put(upload, 0), lambda: desk.commit(upload)]


def test_a_client_with_its_own_certificate_and_key_is_let_in(desk: Desk) -> None:
    enrolled(desk)
    desk.caller = cohort.name_of(0)
    upload = cohort.noise_upload(desk.context, 0)
    desk.send(upload)
    assert desk.accepted() == 1
    assert desk.store.upload(desk.context.id, "client-0") is not None
    assert desk.announce(upload) == (UploadState.ACCEPTED, [])


@pytest.mark.parametrize("sent", [0, 1, 2, 3], ids=["nothing", "announced", "sent", "committed"])
def test_the_certificate_of_one_client_with_the_key_of_another_is_refused(
    desk: Desk, sent: int
) -> None:
    """However far client 1 is, nobody else goes on with, or learns of, its upload."""
    enrolled(desk)
    upload = cohort.noise_upload(desk.context, 1)
    desk.caller = cohort.name_of(1)
    for step in steps(desk, upload)[:sent]:
        step()
    before = desk.files(), desk.accepted()
    desk.caller = cohort.name_of(0)
    for step in steps(desk, upload):
        with pytest.raises(MismatchError) as caught:
            step()
        assert "client-" not in str(caught.value)
    assert (desk.files(), desk.accepted()) == before
    assert desk.store.upload(desk.context.id, "client-0") is None


def test_a_certificate_of_another_name_than_any_clients_is_refused(desk: Desk) -> None:
    enrolled(desk)
    upload = cohort.noise_upload(desk.context, 1)
    for desk.caller in ("admin", "", "client-01", "Client-1", cohort.identity(1).public.hex()):
        for step in steps(desk, upload):
            with pytest.raises(MismatchError):
                step()


def test_somebody_who_is_not_enrolled_is_refused_at_every_step(desk: Desk) -> None:
    enrolled(desk, 0, 1, 2)
    upload = cohort.noise_upload(desk.context, 4)
    for desk.caller in (None, "client-4", "client-0"):
        for step in steps(desk, upload):
            with pytest.raises(NotEnrolledError):
                step()
    assert desk.files() == []
    assert [e for e in desk.store.audit() if e.event.startswith("upload")] == []


@pytest.mark.parametrize("sent", [0, 1, 2], ids=["at the start", "announced", "sent"])
def test_a_client_that_is_revoked_on_the_way_gets_no_further(desk: Desk, sent: int) -> None:
    enrolled(desk)
    upload = cohort.noise_upload(desk.context, 1)
    desk.caller = cohort.name_of(1)
    for step in steps(desk, upload)[:sent]:
        step()
    enrolled(desk, revoked=[1])
    for step in steps(desk, upload):
        with pytest.raises(RevokedError):
            step()
    assert desk.accepted() == 0
    assert desk.store.accepted(desk.context) == []


def test_a_client_that_is_revoked_after_its_commit_is_told_so(desk: Desk) -> None:
    enrolled(desk)
    upload = cohort.noise_upload(desk.context, 1)
    desk.send(upload)
    enrolled(desk, revoked=[1])
    for step in steps(desk, upload):
        with pytest.raises(RevokedError):
            step()


# --- keys that are rotated ----------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [(1, 5), (5, 1)], ids=["old, new", "new, old"])
def test_two_keys_of_one_client_count_once_in_a_round(desk: Desk, first: int, second: int) -> None:
    enrolled(desk, 0, 1, 2, second_keys={1: 5})
    desk.caller = cohort.name_of(1)
    desk.send(cohort.noise_upload(desk.context, first))
    other = cohort.noise_upload(desk.context, second)
    with pytest.raises(DuplicateError, match="one upload a client"):
        desk.announce(other)
    with pytest.raises(ClosedError):
        desk.commit(other)
    assert desk.accepted() == 1


def test_one_client_with_two_keys_does_not_make_a_quorum(desk: Desk) -> None:
    enrolled(desk, 0, 1, second_keys={0: 4, 1: 5})
    for index in (0, 1):
        desk.send(cohort.noise_upload(desk.context, index))
    for index in (4, 5):
        with pytest.raises(DuplicateError):
            desk.send(cohort.noise_upload(desk.context, index))
    assert desk.accepted() == 2


def test_the_same_bytes_under_the_other_key_are_the_same_upload(desk: Desk) -> None:
    """Bytes once sent are sent again, even by a client whose kit was replaced in between."""
    enrolled(desk, 0, 1, 2, second_keys={1: 5})
    upload = cohort.noise_upload(desk.context, 1)
    desk.send(upload)
    assert desk.announce(cohort.replayed(desk.context, 5, upload)) == (UploadState.ACCEPTED, [])
    assert desk.accepted() == 1


# --- replays ------------------------------------------------------------------------------------


def next_round(desk: Desk, number: int, attempt: int) -> RoundContext:
    """Close the round, and open one that follows."""
    spec = desk.rounds.require(desk.context.id).spec
    desk.close_round()
    if number == 1:
        desk.store.abort_round(("task", 1, 1), "QUORUM_NOT_REACHED: too few")
    desk.store.create_round("task", number)
    context = cohort.round_context(
        desk.context.plan, task_id="task", round_number=number, attempt=attempt
    )
    desk.open_round(spec, context)
    return context


@pytest.mark.parametrize(("number", "attempt"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("client", [0, 1])
@pytest.mark.parametrize("complete", [False, True])
def test_bytes_of_an_earlier_round_are_refused_whoever_signs_for_them(
    desk: Desk, number: int, attempt: int, client: int, complete: bool
) -> None:
    upload = cohort.noise_upload(desk.context, 0)
    desk.send(upload) if complete else desk.announce(upload)
    later = next_round(desk, number, attempt)
    replayed = cohort.replayed(later, client, upload)
    with pytest.raises(DuplicateError, match="another round"):
        desk.announce(replayed)
    for step in steps(desk, replayed)[1:]:
        with pytest.raises(ClosedError):
            step()
    assert desk.store.counts(("task", number, attempt)).accepted == 0
    desk.send(cohort.noise_upload(later, client, nonce=1))
    assert desk.store.counts(("task", number, attempt)).accepted == 1


# --- a full disk --------------------------------------------------------------------------------


def test_no_upload_is_announced_without_room_for_it(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 2 * desk.context.plan.payload_bytes
    under_way, late = (cohort.noise_upload(desk.context, index) for index in (0, 1))
    monkeypatch.setattr(desk.blobs, "free_bytes", lambda: needed)
    desk.announce(under_way)
    monkeypatch.setattr(desk.blobs, "free_bytes", lambda: needed - 1)
    with pytest.raises(OverloadedError, match="disk"):
        desk.announce(late)
    assert desk.store.upload(desk.context.id, cohort.identity(1).public.hex()) is None
    # What was let in before has its room.
    desk.send(under_way)
    assert desk.announce(under_way) == (UploadState.ACCEPTED, [])
    monkeypatch.setattr(desk.blobs, "free_bytes", lambda: needed)
    desk.send(late)
    assert desk.accepted() == 2


def test_the_room_on_the_disk_is_that_of_the_blobs(desk: Desk) -> None:
    assert 0 < desk.blobs.free_bytes() <= shutil.disk_usage(desk.root).total
