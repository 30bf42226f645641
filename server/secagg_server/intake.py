"""How uploads come in: header first, then chunks, then one commit.

Cheap checks come before dear ones, and everything is checked before anything counts: a refused
upload leaves no trace in the sum. All three steps are idempotent by the upload's digest, so that a
client may repeat any of them after a lost answer, or after a restart of either side.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

from secagg.context import ContextId
from secagg.enrolment import Roster
from secagg.errors import (
    ClosedError,
    MalformedError,
    MismatchError,
    OverloadedError,
    SecaggError,
    UnavailableError,
)
from secagg.failpoints import failpoint
from secagg.instruments import SILENT, Meter
from secagg.residues import widen
from secagg.rpc.metrics import OPERATIONS
from secagg.upload import Admission
from secagg_server.blobs import BlobStore
from secagg_server.metrics import BYTES_IN
from secagg_server.rounds import OpenRound, OpenRounds
from secagg_server.states import UploadState
from secagg_server.store import Store, round_key
from secagg_server.tally import Refusals

__all__ = ["Intake", "client_of_caller"]


def client_of_caller(roster: Roster, caller: str | None, signing_key: bytes) -> str:
    """The client behind a signing key, if it is the one that calls.

    Args:
        caller: see `Intake`.

    Raises:
        NotEnrolledError, RevokedError, MismatchError: it is not.
    """
    client = roster.client_of(signing_key)
    if caller is not None and client != caller:
        raise MismatchError(
            "expected a receipt signed by the client whose certificate this is; it is signed "
            "by another one; use certificate and signing key of one kit"
        )
    return client


class Intake:
    """Receives uploads into store and blobs.

    In every method ``caller`` is the name in the certificate of whoever calls; None where the
    listener speaks plaintext, and the signing key alone says who a client is.

    Args:
        meter: counts refusals and bytes.
    """

    def __init__(
        self,
        store: Store,
        blobs: BlobStore,
        rounds: OpenRounds,
        roster: Roster,
        *,
        meter: Meter = SILENT,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._rounds = rounds
        self._roster = roster
        self._meter = meter
        self._refusals = Refusals(meter)

    def open(
        self, admission: Admission, caller: str | None = None
    ) -> tuple[UploadState, list[int]]:
        """Announce an upload.

        Returns:
            Its state, and the chunks that are still missing.

        Raises:
            NotEnrolledError, RevokedError, MismatchError: not the caller's own signing key.
            ClosedError: the round is closed, or its cohort is full.
            ContextError, ReceiptError: made for something else, not signed, or with another
                challenge commitment than the one that this client was given.
            DuplicateError: the client announced a different upload before.
            OverloadedError: the disk is almost full.
        """
        receipt = admission.receipt
        with self._refused(receipt.context, receipt.client_key, receipt.upload_digest):
            client = client_of_caller(self._roster, caller, receipt.client_key)
            if self._is_accepted(receipt.context, client, receipt.upload_digest):
                return UploadState.ACCEPTED, []
            current = self._rounds.require(receipt.context)
            admission.verify(current.context)
            if current.challenger is not None:
                current.challenger.require_committed(receipt)
            self._check_room(current, client)
            state = self._store.open_upload(current.context, admission, client)
            failpoint("upload-announced")
            if state is not UploadState.RECEIVING:
                return state, []
            return state, self._missing(current, receipt.upload_digest)

    def _check_room(self, current: OpenRound, client: str) -> None:
        plan, context = current.context.plan, current.context
        if self._store.upload(context.id, client) is not None:
            return
        if current.selected is not None and client not in current.selected:
            raise ClosedError("expected a client that was drawn for this round; this one was not")
        if self._store.counts(round_key(context)).accepted >= plan.max_clients:
            raise ClosedError(
                f"expected at most max_clients={plan.max_clients} uploads; the cohort is full; "
                "join the next round"
            )
        if self._blobs.free_bytes() < 2 * plan.payload_bytes:
            raise _no_room()

    def put_chunk(
        self,
        context: ContextId,
        client_key: bytes,
        upload_digest: bytes,
        index: int,
        data: bytes,
        caller: str | None = None,
    ) -> None:
        """Store one chunk of an announced upload.

        Raises:
            NotEnrolledError, RevokedError, MismatchError: not the caller's own signing key.
            ClosedError: the round is closed, or the upload was not announced or is complete.
            ContextError: made for another round.
            MalformedError: no such chunk, the wrong size, or a residue of q or more.
            OverloadedError: the disk is full.
        """
        with self._refused(context, client_key, upload_digest):
            client = client_of_caller(self._roster, caller, client_key)
            current = self._require_receiving(context, client, upload_digest)
            plan = current.context.plan
            if index >= plan.chunks:
                raise MalformedError(f"expected a chunk below {plan.chunks}; got {index=}")
            with self._meter.timed(OPERATIONS, operation="validate"):
                widen(data, plan.chunk_blocks(index))
            try:
                new = self._blobs.put_chunk(context, upload_digest, index, data)
            except OSError:
                raise _no_room() from None
            if new:
                self._meter.add(BYTES_IN, len(data))
            failpoint("chunk-stored")

    def _is_accepted(self, context: ContextId, client: str, upload_digest: bytes) -> bool:
        """Whether a repeated call is about an upload that counts already, its round open or not."""
        known = self._store.upload(context, client)
        return known == (upload_digest, UploadState.ACCEPTED)

    def _require_receiving(
        self, context: ContextId, client: str, upload_digest: bytes
    ) -> OpenRound:
        current = self._rounds.require(context)
        known = self._store.upload(context, client)
        if known is None or known != (upload_digest, UploadState.RECEIVING):
            raise ClosedError(
                "expected chunks of an announced, incomplete upload; this is not one; announce it "
                "first"
            )
        return current

    def commit(
        self,
        context: ContextId,
        client_key: bytes,
        upload_digest: bytes,
        caller: str | None = None,
    ) -> None:
        """Complete an upload; completing it again changes nothing.

        Raises:
            NotEnrolledError, RevokedError, MismatchError: not the caller's own signing key.
            ClosedError: the round is closed, the upload was not announced, or the cohort is full.
            ContextError: made for another round.
            MalformedError: chunks are missing, or the bytes are not the signed ones; then all of
                them are dropped and may be sent again.
        """
        with self._refused(context, client_key, upload_digest):
            client = client_of_caller(self._roster, caller, client_key)
            if self._is_accepted(context, client, upload_digest):
                return
            current = self._require_receiving(context, client, upload_digest)
            if missing := self._missing(current, upload_digest):
                # If it was withdrawn a moment ago, that is why, and nothing is to be sent again.
                self._require_receiving(context, client, upload_digest)
                raise MalformedError(f"expected all chunks; {len(missing)} are missing; send them")
            try:
                found = self._sha256(current, upload_digest)
            except FileNotFoundError:
                raise ClosedError(
                    "expected the chunks of an upload until it is complete; they were withdrawn; "
                    "the round goes on without them"
                ) from None
            if found != upload_digest:
                self._blobs.drop_upload(context, upload_digest)
                raise MalformedError(
                    "expected the bytes that the receipt signs; their SHA-256 differs; send them "
                    "again"
                )
            self._store.accept_upload(current.context, client)
            failpoint("upload-accepted")

    def withdraw(
        self,
        context: ContextId,
        client_key: bytes,
        upload_digest: bytes,
        caller: str | None = None,
    ) -> None:
        """Take an upload out of a round that collects; withdrawing it again changes nothing.

        Raises:
            NotEnrolledError, RevokedError, MismatchError: not the caller's own signing key.
            ClosedError: too late; it is among those that are summed.
            ContextError: made for another round.
            ConfigurationError: no such round.
            DuplicateError: not the upload that this client announced, or somebody else's.
        """
        client = client_of_caller(self._roster, caller, client_key)
        self._store.withdraw_upload(context, client, client_key, upload_digest)
        # After the record: what dies in between is erased with the round.
        self._blobs.drop_upload(context, upload_digest)

    @contextlib.contextmanager
    def _refused(
        self, context: ContextId, client_key: bytes, upload_digest: bytes
    ) -> Iterator[None]:
        """Count a refusal, unless the upload may come again as it is, or its fate is on record."""
        try:
            yield
        except (OverloadedError, UnavailableError):
            raise
        except SecaggError as error:
            if not self._is_settled(context, client_key, upload_digest):
                self._refusals.add(context, upload_digest, error.reason)
            raise

    def _is_settled(self, context: ContextId, client_key: bytes, upload_digest: bytes) -> bool:
        with contextlib.suppress(SecaggError):
            known = self._store.upload(context, self._roster.client_of(client_key))
            settled = (UploadState.ACCEPTED, UploadState.REJECTED)
            return known in [(upload_digest, state) for state in settled]
        return False

    def _missing(self, current: OpenRound, upload_digest: bytes) -> list[int]:
        count = current.context.plan.chunks
        return self._blobs.missing_chunks(current.context.id, upload_digest, count)

    def _sha256(self, current: OpenRound, upload_digest: bytes) -> bytes:
        running = hashlib.sha256()
        for index in range(current.context.plan.chunks):
            running.update(self._blobs.chunk(current.context.id, upload_digest, index))
        return running.digest()


def _no_room() -> OverloadedError:
    return OverloadedError(
        "expected room on the server's disk for another upload; there is none; try again later, "
        "and tell the operator"
    )
