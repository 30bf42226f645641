"""Programs that are broken on purpose: what a simulation must find, or it finds nothing."""

# ruff: noqa: ANN401 - stands in for functions of any kind

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from secagg import keyholder
from secagg_client.outbox import Outbox
from secagg_keyholder.ledger import Ledger
from secagg_keyholder.rounds import Rounds
from secagg_keyholder.vault import RoundKeys
from secagg_server import coordinator, judging, uploads
from secagg_server.blobs import BlobStore
from secagg_server.intake import Intake
from secagg_server.schema import AuditRow, UploadRow
from secagg_server.states import UploadState
from secagg_server.store import Store
from secagg_server.uploads import Uploads

__all__ = ["MUTANTS"]


@contextlib.contextmanager
def _changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    with mock.patch.object(owner, name, value):
        yield


def _nothing(*_: object) -> None:
    """In place of something that should be done."""


@contextlib.contextmanager
def withdrawal_ignored() -> Iterator[None]:
    """The server says "withdrawn", and sums the upload."""
    with (
        _changed(Uploads, "withdraw_upload", _nothing),
        _changed(BlobStore, "drop_upload", _nothing),
    ):
        yield


@contextlib.contextmanager
def withdrawal_too_late() -> Iterator[None]:
    """An upload can be withdrawn when its round has closed."""
    with _changed(uploads, "_require_time_left", _nothing):
        yield


@contextlib.contextmanager
def refusal_forgotten() -> Iterator[None]:
    """What the key holder refuses is left out, and stays "accepted" on record."""
    with _changed(Uploads, "reject_upload", _nothing):
        yield


@contextlib.contextmanager
def second_upload_accepted() -> Iterator[None]:
    """A client's second upload takes the place of its first."""
    real = Uploads.open_upload

    def open_upload(self: Any, context: Any, admission: Any, client: str) -> Any:
        def forget(session: Any) -> None:
            row = session.get(UploadRow, (*uploads.round_key(context), client))
            if row is not None and row.upload_digest != admission.receipt.upload_digest:
                session.delete(row)

        self.database.write(forget)
        return real(self, context, admission, client)

    with _changed(Uploads, "open_upload", open_upload):
        yield


@contextlib.contextmanager
def late_upload_accepted() -> Iterator[None]:
    """An upload that is complete when its round has just closed is accepted."""
    real = uploads.require_round

    def accept_upload(self: Any, context: Any, client: str) -> None:
        def accept(session: Any) -> None:
            real(session, uploads.round_key(context))
            row = session.get(UploadRow, (*uploads.round_key(context), client))
            row.state = UploadState.ACCEPTED

        self.database.write(accept)

    with _changed(Uploads, "accept_upload", accept_upload):
        yield


@contextlib.contextmanager
def bytes_not_compared() -> Iterator[None]:
    """The server does not look whether the chunks are what the receipt signs."""
    with _changed(Intake, "_sha256", lambda _self, _current, digest: digest):
        yield


@contextlib.contextmanager
def no_quorum() -> Iterator[None]:
    """Neither server nor key holder counts the cohort."""
    real = keyholder.KeyHolder._check_cohort

    def check(self: Any, digests: Any) -> None:
        with contextlib.suppress(keyholder.QuorumError):
            real(self, digests)

    with (
        _changed(coordinator, "check_quorum", _nothing),
        _changed(judging, "check_quorum", _nothing),
        _changed(keyholder.KeyHolder, "_check_cohort", check),
    ):
        yield


@contextlib.contextmanager
def log_rewritten() -> Iterator[None]:
    """The server's log loses its last entry at each start."""
    real = Store.__init__

    def init(self: Any, *arguments: Any, **options: Any) -> None:
        real(self, *arguments, **options)

        def cut(session: Any) -> None:
            last = session.query(AuditRow).order_by(AuditRow.sequence.desc()).first()
            if last is not None:
                session.delete(last)

        self.database.write(cut)

    with _changed(Store, "__init__", init):
        yield


@contextlib.contextmanager
def sums_stored_last() -> Iterator[None]:
    """Sums are on the disk only after the round is on record as done."""
    waiting: dict[int, tuple[Any, ...]] = {}
    put, drop = BlobStore.put_sums, BlobStore.drop_uploads

    def put_sums(self: Any, *arguments: Any) -> None:
        waiting[id(self)] = arguments

    def drop_uploads(self: Any, task_id: str) -> None:
        if id(self) in waiting:
            put(self, *waiting.pop(id(self)))
        drop(self, task_id)

    with (
        _changed(BlobStore, "put_sums", put_sums),
        _changed(BlobStore, "drop_uploads", drop_uploads),
    ):
        yield


@contextlib.contextmanager
def key_erased_first() -> Iterator[None]:
    """The key holder erases the round's key before it has recorded the release."""
    record = Ledger.record_release

    def release(self: Any, context: Any, digests: Any, residues: Any) -> Any:
        def recorded(ledger: Any, *arguments: Any) -> None:
            self._keys.erase(context.round_key_id)
            record(ledger, *arguments)

        with _changed(Ledger, "record_release", recorded):
            return real(self, context, digests, residues)

    real = Rounds.release
    with _changed(Rounds, "release", release):
        yield


@contextlib.contextmanager
def admissions_forgotten() -> Iterator[None]:
    """A key holder that starts again does not know whom it has admitted."""
    with _changed(Ledger, "admissions", lambda *_: []):
        yield


@contextlib.contextmanager
def keys_kept() -> Iterator[None]:
    """The key holder keeps the keys of rounds that are over."""
    with _changed(RoundKeys, "erase", _nothing):
        yield


@contextlib.contextmanager
def outbox_ignored() -> Iterator[None]:
    """A client that starts again encrypts anew."""
    with _changed(Outbox, "load", _nothing):
        yield


MUTANTS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    each.__name__: each
    for each in (
        withdrawal_ignored,
        withdrawal_too_late,
        refusal_forgotten,
        second_upload_accepted,
        late_upload_accepted,
        bytes_not_compared,
        no_quorum,
        log_rewritten,
        sums_stored_last,
        key_erased_first,
        admissions_forgotten,
        keys_kept,
        outbox_ignored,
    )
}
"""By name; each is a context in which the programs are broken so."""
