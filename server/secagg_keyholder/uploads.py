"""The ledger's uploads: what was judged of each, and what norm check and noise audit found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from secagg.audit import Detail, client_hash
from secagg.context import ContextId
from secagg.errors import ClosedError, DuplicateError, NormError, SealError
from secagg.failpoints import failpoint
from secagg.keyholder import Finding
from secagg.transcript import DIGEST_BYTES
from secagg.wire.codec import exact
from secagg_keyholder.database import Database
from secagg_keyholder.schema import ROUNDS, AttemptKey, OpenedRound, attempt_key

__all__ = ["Uploads", "Verdict"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was judged of an upload.

    Attributes:
        upload_digest: SHA-256 of the upload, 32 bytes.
        client: whose it is; empty for an upload that proves nothing.
        reason: the code of the reason why it is refused; empty where it is accepted.
        admission: wire bytes of an accepted upload's admission; None where it is refused.

    Raises:
        MalformedError: a digest of another size.
        ValueError: accepted without an admission, or refused with one.
    """

    upload_digest: bytes
    client: str = field(repr=False)
    reason: str
    admission: bytes | None = field(repr=False)

    def __post_init__(self) -> None:
        exact("upload_digest", self.upload_digest, DIGEST_BYTES)
        if bool(self.reason) == (self.admission is not None):
            raise ValueError("expected the admission of an accepted upload, and of no other")


class Uploads:
    """Uploads by attempt; the first verdict and the first finding stand.

    Args:
        audit_key: 32 bytes under which the audit log hashes clients' names.
    """

    def __init__(self, database: Database, audit_key: bytes) -> None:
        self._database, self._audit_key = database, audit_key

    def record_verdicts(self, context: ContextId, verdicts: Iterable[Verdict]) -> dict[bytes, str]:
        """Record verdicts, all or none of them; the first one on a digest stands.

        Returns:
            The reasons that stand, by upload digest.

        Raises:
            ClosedError: a new upload, and the round has ended.
            DuplicateError: another upload of this client, or this upload of another client, was
                accepted.
        """
        with self._database.transaction():
            found = self._require(context)
            standing = {each.upload_digest: self._record(found, each) for each in verdicts}
        failpoint("upload-admitted")
        return standing

    def _record(self, found: OpenedRound, verdict: Verdict) -> str:
        standing = self._standing(found.key, verdict)
        if standing is not None:
            return standing
        found.require_open()
        self._database.change(
            """INSERT INTO admissions (task_id, round_number, attempt, upload_digest, client,
                admission, verdict) VALUES (?, ?, ?, ?, ?, ?, ?)""",
            *found.key,
            verdict.upload_digest,
            verdict.client,
            verdict.admission,
            verdict.reason,
        )
        event = "upload-refused" if verdict.reason else "upload-admitted"
        self._log_upload(
            found.key, event, verdict.upload_digest, verdict.client, reason=verdict.reason
        )
        return verdict.reason

    def _standing(self, key: AttemptKey, verdict: Verdict) -> str | None:
        """The verdict there is on a digest; refuses to accept what is another's, or a second."""
        rows = self._database.rows(
            """SELECT upload_digest, client, verdict FROM admissions
                WHERE (task_id, round_number, attempt) = (?1, ?2, ?3)
                AND (upload_digest = ?4 OR (client = ?5 AND verdict = ''))""",
            *key,
            verdict.upload_digest,
            verdict.client,
        )
        known: dict[bytes, tuple[str, str | None]] = {row[0]: row[1:] for row in rows}
        owner, standing = known.get(verdict.upload_digest, (verdict.client, None))
        second = standing is None and known
        if not verdict.reason and (owner != verdict.client or second):
            raise DuplicateError(
                "expected one upload a client and round, and each upload once; the first one stands"
            )
        return standing

    def verdicts(self, context: ContextId) -> dict[bytes, str]:
        """What was judged, by upload digest; empty where it was accepted."""
        return dict(
            self._database.rows(
                """SELECT upload_digest, verdict FROM admissions
                    WHERE (task_id, round_number, attempt) = (?, ?, ?) ORDER BY rowid""",
                *self._require(context).key,
            )
        )

    def admissions(self, context: ContextId) -> list[tuple[bytes, str, bytes]]:
        """Upload digest, client and wire bytes of each accepted upload, in order of acceptance.

        None once the round has ended, or in a ledger from a backup: their seals are gone.
        """
        return self._database.rows(
            """SELECT upload_digest, client, admission FROM admissions
                WHERE (task_id, round_number, attempt) = (?, ?, ?)
                AND admission IS NOT NULL ORDER BY rowid""",
            *self._require(context).key,
        )

    def record_audited(self, context: ContextId, upload_digest: bytes, reason: str) -> str:
        """Record what the noise audit found of an accepted upload; the first finding stands.

        Args:
            reason: empty for clean, else the reason's code.

        Returns:
            The finding that stands.

        Raises:
            ClosedError: a new finding, and the round has ended.
            SealError: no such upload was accepted.
        """
        with self._database.transaction():
            found = self._require(context)
            client, standing, _ = self._accepted(found.key, upload_digest)
            if standing is not None:
                return standing
            found.require_open()
            self._database.change(
                """UPDATE admissions SET audited = ?
                    WHERE (task_id, round_number, attempt, upload_digest) = (?, ?, ?, ?)""",
                reason,
                *found.key,
                upload_digest,
            )
            self._log_upload(found.key, "upload-audited", upload_digest, client, reason=reason)
            return reason

    def audited(self, context: ContextId) -> dict[bytes, str]:
        """What the audit found so far, by upload digest; empty where it is clean."""
        return dict(
            self._database.rows(
                """SELECT upload_digest, audited FROM admissions
                    WHERE (task_id, round_number, attempt) = (?, ?, ?)
                    AND audited IS NOT NULL ORDER BY rowid""",
                *self._require(context).key,
            )
        )

    def record_finding(self, context: ContextId, upload_digest: bytes, finding: Finding) -> None:
        """Record what the norm check found of an accepted upload; the same one again is no error.

        Raises:
            ClosedError: a new finding, and the round has ended.
            DuplicateError: another sketch of this upload was judged.
            SealError: no such upload was accepted.
        """
        with self._database.transaction():
            found = self._require(context)
            client, _, standing = self._accepted(found.key, upload_digest)
            if standing is None:
                found.require_open()
                self._database.change(
                    """UPDATE admissions SET sketch_digest = ?, passed = ?
                        WHERE (task_id, round_number, attempt, upload_digest) = (?, ?, ?, ?)""",
                    finding.sketch_digest,
                    finding.passed,
                    *found.key,
                    upload_digest,
                )
                # Not yet whether it passed: the verdicts are given all at once.
                sketch = finding.sketch_digest.hex()
                self._log_upload(
                    found.key, "sketch-judged", upload_digest, client, sketch_digest=sketch
                )
            elif standing != finding.sketch_digest:
                raise DuplicateError("expected one sketch an upload; the first one stands")
        failpoint("sketch-judged")

    def findings(self, context: ContextId) -> dict[bytes, Finding]:
        """What the norm check found so far, by upload digest."""
        rows = self._database.rows(
            """SELECT upload_digest, sketch_digest, passed FROM admissions
                WHERE (task_id, round_number, attempt) = (?, ?, ?)
                AND sketch_digest IS NOT NULL ORDER BY rowid""",
            *self._require(context).key,
        )
        return {name: Finding(sketch, bool(passed)) for name, sketch, passed in rows}

    def record_given(self, context: ContextId, upload_digests: Iterable[bytes]) -> None:
        """Record that the verdicts on these uploads were given; once an attempt, later calls are
        no error and change nothing.

        Raises:
            ClosedError: the round has ended.
            SealError: nothing was found of one of the uploads.
        """
        with self._database.transaction():
            found = self._require(context)
            if not found.judged:
                found.require_open()
                self._give(found.key, upload_digests)
        failpoint("verdicts-given")

    def _give(self, key: AttemptKey, upload_digests: Iterable[bytes]) -> None:
        rows = self._database.rows(
            """SELECT upload_digest, client, passed FROM admissions
                WHERE (task_id, round_number, attempt) = (?, ?, ?) AND passed IS NOT NULL""",
            *key,
        )
        found = {name: (client, passed) for name, client, passed in rows}
        for name in upload_digests:
            if name not in found:
                raise SealError("expected verdicts on what was found; of one upload nothing was")
            client, passed = found[name]
            self._log_upload(
                key, "norm-judged", name, client, reason="" if passed else NormError.reason
            )
        self._database.change(
            "UPDATE rounds SET judged = 1 WHERE (task_id, round_number, attempt) = (?, ?, ?)", *key
        )

    def _accepted(
        self, key: AttemptKey, upload_digest: bytes
    ) -> tuple[str, str | None, bytes | None]:
        """An accepted upload's client, noise audit and sketch digest; refuses any other upload."""
        rows: list[tuple[str, str | None, bytes | None]] = self._database.rows(
            """SELECT client, audited, sketch_digest FROM admissions
                WHERE (task_id, round_number, attempt, upload_digest) = (?, ?, ?, ?)
                AND verdict = ''""",
            *key,
            upload_digest,
        )
        if not rows:
            raise SealError("expected an accepted upload; this one was not accepted")
        return rows[0]

    def _find(self, context: ContextId) -> OpenedRound | None:
        rows = self._database.rows(
            ROUNDS + "WHERE (task_id, round_number, attempt) = (?, ?, ?)", *attempt_key(context)
        )
        return OpenedRound.from_row(rows[0]) if rows else None

    def _require(self, context: ContextId) -> OpenedRound:
        found = self._find(context)
        if found is None:
            raise ClosedError("expected a round that this key holder opened; it knows of none such")
        found.id.require(context)
        return found

    def _log(self, key: AttemptKey, event: str, **details: Detail) -> None:
        task_id, round_number, attempt = key
        self._database.log(
            event, task_id=task_id, round_number=round_number, attempt=attempt, **details
        )

    def _log_upload(
        self, key: AttemptKey, event: str, upload_digest: bytes, client: str, **details: Detail
    ) -> None:
        self._log(
            key,
            event,
            upload_digest=upload_digest.hex(),
            # Whoever sent an upload that proves nothing is unknown.
            client=client_hash(self._audit_key, client) if client else None,
            **details,
        )
