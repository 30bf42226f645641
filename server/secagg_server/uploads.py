"""The store's uploads: who announced which bytes, and what became of them."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, func, select, tuple_, update
from sqlalchemy.orm import Session

from secagg.context import ContextId, RoundContext, round_key_id
from secagg.errors import ClosedError, ConfigurationError, ContextError, DuplicateError
from secagg.upload import Admission
from secagg.verdicts import Verdict
from secagg.wire.codec import (
    admission_from_wire,
    admission_to_wire,
    parse,
    verdict_from_wire,
    verdict_to_wire,
)
from secagg.wire.v1 import round_pb2
from secagg_server.audit_log import AuditLog, where
from secagg_server.schema import RoundKey, RoundRow, TaskRow, UploadRow
from secagg_server.states import RoundState, UploadState
from secagg_server.transactions import reading, writing

__all__ = ["UploadCounts", "Uploads", "reason_code", "require_round", "round_key", "storable"]

_CODE = re.compile(r"[A-Z][A-Z0-9_]{0,63}")
_WITHDRAWN = "WITHDRAWN: by the client itself"


@dataclass(frozen=True, slots=True)
class UploadCounts:
    """How many uploads of an attempt stand where."""

    accepted: int
    rejected: int


class Uploads(AuditLog):
    """Uploads by attempt and client. Digests are never forgotten, so that none counts twice."""

    @writing
    def open_upload(
        self, session: Session, context: RoundContext, admission: Admission, client: str
    ) -> UploadState:
        """Record an announced upload of an enrolled client; the same one again returns its state.

        Raises:
            ConfigurationError: no such attempt.
            DuplicateError: the client announced a different upload, another client this one, or
                anybody this one in another round or attempt.
        """
        key, digest = round_key(context), admission.receipt.upload_digest
        require_round(session, key)
        row = session.get(UploadRow, (*key, client))
        if row is None:
            _refuse_copy(session, key, digest)
            self._announce(session, key, admission, client)
            return UploadState.RECEIVING
        if row.upload_digest != digest:
            raise DuplicateError(
                "expected one upload a client and round; this client sent a different one "
                "before; the first one stands"
            )
        return row.state

    def _announce(self, session: Session, key: RoundKey, admission: Admission, client: str) -> None:
        task_id, round_number, attempt = key
        digest = admission.receipt.upload_digest
        session.add(
            UploadRow(
                task_id=task_id,
                round_number=round_number,
                attempt=attempt,
                client=client,
                client_key=admission.receipt.client_key,
                upload_digest=digest,
                admission=admission_to_wire(admission).SerializeToString(),
                state=UploadState.RECEIVING,
            )
        )
        self._record_upload(session, "upload-announced", key, client, digest)

    def _record_upload(
        self,
        session: Session,
        event: str,
        key: RoundKey,
        client: str,
        digest: bytes,
        **details: str,
    ) -> None:
        named = {"client": self._hashed(client), "upload": digest.hex()}
        self._record(session, event, **where(key), **named, **details)

    @writing
    def withdraw_upload(
        self,
        session: Session,
        context: ContextId,
        client: str,
        client_key: bytes,
        upload_digest: bytes,
    ) -> None:
        """Refuse a client's upload at its own wish, announced or not, and forget its sealed seed.

        Not once as many uploads as wanted are there: the round closes for their sake, and would be
        one short. So a count that has come that far never falls again.

        Raises:
            ConfigurationError: no such attempt.
            ContextError: it has another round key.
            DuplicateError: the client announced a different upload, or another client this one.
            ClosedError: it is among those that are summed.
        """
        key = _key(context)
        attempt = require_round(session, key)
        if round_key_id(attempt.round_key) != context.round_key_id:
            raise ContextError(
                "expected the context of the round that was uploaded to; its round key differs; "
                "withdraw with the context that was announced"
            )
        row = session.get(UploadRow, (*key, client))
        if row is not None and row.upload_digest != upload_digest:
            raise DuplicateError(
                "expected the upload that this client announced; this is another one; withdraw "
                "that one"
            )
        if row is None:
            if attempt.state is not RoundState.COLLECTING:
                return  # it cannot come any more
            _refuse_copy(session, key, upload_digest)
            row = UploadRow(
                task_id=key[0],
                round_number=key[1],
                attempt=key[2],
                client=client,
                client_key=client_key,
                upload_digest=upload_digest,
                state=UploadState.RECEIVING,
            )
            session.add(row)
        if row.state is UploadState.REJECTED:
            return  # the first reason stands
        if row.state is UploadState.ACCEPTED:
            _require_time_left(session, attempt)
        row.admission = None
        self._reject(session, row, _WITHDRAWN)

    @reading
    def upload(
        self, session: Session, context: ContextId, client: str
    ) -> tuple[bytes, UploadState] | None:
        """Digest and state of a client's upload; None when it has announced none."""
        row = session.get(UploadRow, (*_key(context), client))
        return (row.upload_digest, row.state) if row else None

    @writing
    def accept_upload(self, session: Session, context: RoundContext, client: str) -> None:
        """Accept a complete upload, in one transaction with the check that it still may be.

        Accepting it again changes nothing.

        Raises:
            ConfigurationError: no such attempt.
            ClosedError: the upload was not announced, or was refused; or the round no longer
                collects, or its cohort is full.
        """
        key = round_key(context)
        row = session.get(UploadRow, (*key, client))
        if row is not None and row.state is UploadState.ACCEPTED:
            return
        if require_round(session, key).state is not RoundState.COLLECTING:
            raise ClosedError("expected a collecting round; it has closed; fetch the next one")
        if row is None or row.state is not UploadState.RECEIVING:
            raise ClosedError("expected an announced upload; this is not one; announce it first")
        if _counts(session, key).accepted >= context.plan.max_clients:
            raise ClosedError("expected room in the cohort; it is full; join the next round")
        row.state = UploadState.ACCEPTED
        self._record_upload(session, "upload-accepted", key, client, row.upload_digest)

    @writing
    def reject_upload(
        self, session: Session, context: RoundContext, upload_digest: bytes, reason: str
    ) -> None:
        """Record the key holder's refusal of an upload; its first reason stands."""
        key = round_key(context)
        named = select(UploadRow).where(_of(key), UploadRow.upload_digest == upload_digest)
        row = session.scalar(named)
        if row is not None:
            self._reject(session, row, reason)

    def _reject(self, session: Session, row: UploadRow, reason: str) -> None:
        if row.state is UploadState.REJECTED:
            return
        row.state, row.reason = UploadState.REJECTED, storable(reason)
        key, code = (row.task_id, row.round_number, row.attempt), reason_code(reason)
        self._record_upload(
            session, "upload-rejected", key, row.client, row.upload_digest, reason=code
        )

    @writing
    def record_verdicts(
        self, session: Session, key: RoundKey, verdicts: Sequence[Verdict], reason: str
    ) -> None:
        """Keep the verdicts on all uploads of an attempt, and refuse the uploads that they refuse.

        All in one transaction: whoever finds one verdict of an attempt finds them all.

        Args:
            verdicts: on uploads of this attempt; verified.
            reason: why those are refused that are.

        Raises:
            ConfigurationError: no such attempt.
        """
        require_round(session, key)
        rows = {
            row.upload_digest: row for row in session.scalars(select(UploadRow).where(_of(key)))
        }
        for verdict in verdicts:
            row = rows[verdict.receipt.upload_digest]
            row.verdict = verdict_to_wire(verdict).SerializeToString()
            if not verdict.accepted:
                self._reject(session, row, reason)
        accepted = sum(verdict.accepted for verdict in verdicts)
        counts = {"accepted": accepted, "refused": len(verdicts) - accepted}
        self._record(session, "norms-judged", **where(key), **counts)

    @reading
    def norms_judged(self, session: Session, key: RoundKey) -> bool:
        """Whether the verdicts on an attempt's uploads have been recorded."""
        judged = select(UploadRow.client).where(_of(key), UploadRow.verdict.is_not(None)).limit(1)
        return session.scalar(judged) is not None

    @reading
    def verdict(
        self, session: Session, context: ContextId, client: str
    ) -> tuple[RoundState, Verdict | None] | None:
        """The attempt's state, and the verdict on a client's upload if there is one.

        None when the client has announced no upload.
        """
        key = _key(context)
        row = session.get(UploadRow, (*key, client))
        if row is None:
            return None
        kept = row.verdict
        verdict = verdict_from_wire(parse(round_pb2.NormVerdict, kept)) if kept else None
        return require_round(session, key).state, verdict

    @reading
    def accepted(self, session: Session, context: RoundContext) -> list[Admission]:
        """Receipts and seals of the accepted uploads that are still kept, ordered by digest."""
        wanted = (
            select(UploadRow.admission)
            .where(_of(round_key(context)), UploadRow.state == UploadState.ACCEPTED)
            .order_by(UploadRow.upload_digest)
        )
        kept = [row for row in session.scalars(wanted) if row is not None]
        return [admission_from_wire(parse(round_pb2.Admission, row)) for row in kept]

    @reading
    def counts(self, session: Session, key: RoundKey) -> UploadCounts:
        """Accepted and rejected uploads of an attempt."""
        return _counts(session, key)

    @reading
    def all_counts(self, session: Session, task_id: str) -> dict[RoundKey, UploadCounts]:
        """The counts of every attempt of a task, in order; those without uploads too."""
        keys = (RoundRow.task_id, RoundRow.round_number, RoundRow.attempt)
        uploads = (UploadRow.task_id, UploadRow.round_number, UploadRow.attempt)
        wanted = (
            select(*keys, _number_of(UploadState.ACCEPTED), _number_of(UploadState.REJECTED))
            .outerjoin(UploadRow, and_(*(a == b for a, b in zip(keys, uploads, strict=True))))
            .where(RoundRow.task_id == task_id)
            .group_by(*keys)
            .order_by(*keys)
        )
        rows = session.execute(wanted)
        return {(task, number, attempt): UploadCounts(a, r) for task, number, attempt, a, r in rows}

    @writing
    def drop_admissions(self, session: Session, before: datetime.datetime) -> int:
        """Forget receipts, seals and verdicts of rounds that ended before a moment.

        Digests, clients and states stay: an upload of then is refused now.

        Returns:
            How many uploads had them.
        """
        attempt = (RoundRow.task_id, RoundRow.round_number, RoundRow.attempt)
        ended = select(*attempt).where(RoundRow.ended_at < before)
        key = tuple_(UploadRow.task_id, UploadRow.round_number, UploadRow.attempt)
        old = and_(UploadRow.admission.is_not(None), key.in_(ended))
        tasks = select(UploadRow.task_id, func.count()).where(old).group_by(UploadRow.task_id)
        counted = session.execute(tasks.order_by(UploadRow.task_id))
        dropped = {task_id: count for task_id, count in counted}  # noqa: C416 - of rows, not pairs
        session.execute(update(UploadRow).where(old).values(admission=None, verdict=None))
        for task_id, count in dropped.items():
            self._record(session, "retained-dropped", task=task_id, uploads=count)
        return sum(dropped.values())


def _refuse_copy(session: Session, key: RoundKey, upload_digest: bytes) -> None:
    """Nobody may announce the bytes of somebody else, or bytes of another round."""
    seen = select(UploadRow.task_id, UploadRow.round_number, UploadRow.attempt).where(
        UploadRow.upload_digest == upload_digest
    )
    known = {tuple(row) for row in session.execute(seen)}
    if key in known:
        raise DuplicateError("expected an upload of your own; another client has announced these")
    if known:
        raise DuplicateError(
            "expected an upload made for this round; these bytes were announced in another round "
            "or attempt; encrypt anew"
        )


def _require_time_left(session: Session, attempt: RoundRow) -> None:
    """Refuse to take an accepted upload out of an attempt that has closed, or closes now."""
    if attempt.state is RoundState.ABORTED:
        raise ClosedError(
            "expected a round that collects; this attempt has ended without a result; there is "
            "nothing to withdraw from"
        )
    wanted = session.get_one(TaskRow, attempt.task_id).task_spec().target_clients
    full = _counts(session, attempt.key).accepted >= wanted
    if full or attempt.state is not RoundState.COLLECTING:
        raise ClosedError(
            "expected a round that collects and waits for more; this one has closed: the upload is "
            "part of its sum, which is published, and cannot be taken out; it tells of this client "
            "what one release of the plan does; stay paused to be in no other"
        )


def _of(key: RoundKey) -> ColumnElement[bool]:
    return and_(
        UploadRow.task_id == key[0],
        UploadRow.round_number == key[1],
        UploadRow.attempt == key[2],
    )


def _number_of(state: UploadState) -> ColumnElement[int]:
    return func.count().filter(UploadRow.state == state)


def _counts(session: Session, key: RoundKey) -> UploadCounts:
    wanted = select(_number_of(UploadState.ACCEPTED), _number_of(UploadState.REJECTED))
    accepted, rejected = session.execute(wanted.where(_of(key))).one()
    return UploadCounts(accepted, rejected)


def require_round(session: Session, key: RoundKey) -> RoundRow:
    """An attempt's row.

    Raises:
        ConfigurationError: unknown.
    """
    row = session.get(RoundRow, key)
    if row is None:
        raise ConfigurationError(
            f"expected a known round; {key[0]!r} has no round {key[1]}, attempt {key[2]}; list its "
            "rounds"
        )
    return row


def reason_code(reason: str) -> str:
    """What the log takes of a reason: the code before its colon, and never any other text."""
    code = reason.split(":", 1)[0]
    return code if not reason or _CODE.fullmatch(code) else "OTHER"


def storable(reason: str) -> str:
    """A reason without the one character that not every database keeps; it may be a stranger's."""
    return reason.replace("\0", "\N{REPLACEMENT CHARACTER}")


def round_key(context: RoundContext) -> RoundKey:
    """The key of a context's row."""
    return _key(context.id)


def _key(context: ContextId) -> RoundKey:
    return context.task_id, context.round_number, context.attempt
