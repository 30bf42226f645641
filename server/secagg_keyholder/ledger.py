"""What the key holder must never forget: which rounds it opened, what it judged, what it released.

One SQLite file. Every method is one transaction, on the disk before it returns, and every change
appends its entry to the audit log in that same transaction. Nothing in here opens a seed: the
round keys lie elsewhere (`vault`), and seals are removed when their round ends.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import astuple, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from secagg.audit import Detail, Entry, client_hash, next_entry
from secagg.context import NO_MODEL, ContextId, RoundContext
from secagg.errors import (
    ClosedError,
    ConfigurationError,
    DuplicateError,
    SealError,
    SecaggError,
    UnavailableError,
)
from secagg.failpoints import failpoint
from secagg.transcript import DIGEST_BYTES
from secagg.wire.codec import exact
from secagg_keyholder.vault import flush

__all__ = ["AuditState", "Ledger", "OpenedRound", "RecordedRelease", "RoundState"]

_BUSY_SECONDS = 10.0

# FULL: a commit is on the disk when it returns. secure_delete: what is deleted is overwritten.
_SETTINGS = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON")

# Migration i takes the file from version i to i + 1; a migration that was published never changes.
_MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE rounds (
            task_id TEXT NOT NULL,
            round_number INTEGER NOT NULL,
            attempt INTEGER NOT NULL,
            plan_digest BLOB NOT NULL,
            model_digest BLOB NOT NULL,
            round_key_id BLOB NOT NULL UNIQUE,
            plan BLOB NOT NULL,
            public_key BLOB NOT NULL,
            state TEXT NOT NULL DEFAULT 'OPEN' CHECK (state IN ('OPEN', 'RELEASED', 'CLOSED')),
            refusals INTEGER NOT NULL DEFAULT 0,
            audit_state TEXT NOT NULL DEFAULT 'NONE'
                CHECK (audit_state IN ('NONE', 'OPEN', 'DONE')),
            manifest BLOB,
            contributors INTEGER NOT NULL DEFAULT 0,
            sums BLOB,
            opened_at TEXT NOT NULL,
            ended_at TEXT,
            PRIMARY KEY (task_id, round_number, attempt)
        )""",
        # The two promises that no code of this module may break, whatever calls it.
        "CREATE UNIQUE INDEX one_open_round ON rounds (task_id) WHERE state = 'OPEN'",
        """CREATE UNIQUE INDEX one_release ON rounds (task_id, round_number)
            WHERE state = 'RELEASED'""",
        "CREATE INDEX rounds_by_model ON rounds (task_id, model_digest)",
        """CREATE TABLE admissions (
            task_id TEXT NOT NULL,
            round_number INTEGER NOT NULL,
            attempt INTEGER NOT NULL,
            upload_digest BLOB NOT NULL,
            client TEXT NOT NULL,
            admission BLOB,
            verdict TEXT NOT NULL,
            audited TEXT,
            PRIMARY KEY (task_id, round_number, attempt, upload_digest),
            FOREIGN KEY (task_id, round_number, attempt) REFERENCES rounds
        )""",
        """CREATE UNIQUE INDEX one_upload ON admissions (task_id, round_number, attempt, client)
            WHERE verdict = ''""",
        """CREATE TABLE audit (
            sequence INTEGER PRIMARY KEY,
            time TEXT NOT NULL,
            event TEXT NOT NULL,
            details TEXT NOT NULL,
            previous BLOB NOT NULL,
            hash BLOB NOT NULL
        )""",
        "CREATE TABLE facts (key TEXT PRIMARY KEY, value BLOB NOT NULL)",
    ),
)

_ROUNDS = """SELECT state, audit_state, task_id, round_number, attempt, plan_digest, model_digest,
    round_key_id, plan, public_key, refusals, manifest, contributors, opened_at, ended_at
    FROM rounds """
_ENTRIES = "SELECT sequence, time, event, details, previous, hash FROM audit "
_PUT_FACT = """INSERT INTO facts VALUES (?, ?)
    ON CONFLICT (key) DO UPDATE SET value = excluded.value"""

_Key = tuple[str, int, int]


class RoundState(StrEnum):
    """Where an attempt stands; only the first step out of OPEN is ever taken."""

    OPEN = "OPEN"
    RELEASED = "RELEASED"
    CLOSED = "CLOSED"


class AuditState(StrEnum):
    """Where the noise audit of an attempt stands; there is one at most."""

    NONE = "NONE"
    OPEN = "OPEN"
    DONE = "DONE"


@dataclass(frozen=True, slots=True)
class OpenedRound:
    """One attempt at a round, as it stands.

    Attributes:
        plan: the plan's wire bytes.
        public_key: the public round key.
        refusals: sums that did not open.
        manifest: 32 bytes that name the released manifest; None before.
        contributors: clients in the released sum; 0 before.
        opened_at, ended_at: UTC, ISO 8601.
    """

    state: RoundState
    audit_state: AuditState
    task_id: str
    round_number: int
    attempt: int
    plan_digest: bytes
    model_digest: bytes
    round_key_id: bytes
    plan: bytes = field(repr=False)
    public_key: bytes = field(repr=False)
    refusals: int
    manifest: bytes | None
    contributors: int
    opened_at: str
    ended_at: str | None

    @property
    def id(self) -> ContextId:
        """The context's name."""
        return ContextId(
            self.task_id,
            self.round_number,
            self.attempt,
            self.plan_digest,
            self.model_digest,
            self.round_key_id,
        )

    @property
    def key(self) -> _Key:
        """Task id, round number, attempt."""
        return self.task_id, self.round_number, self.attempt


class RecordedRelease(NamedTuple):
    """A release as it was recorded; ``sums`` is None once they were dropped."""

    manifest: bytes
    contributors: int
    sums: bytes | None


class Ledger:
    """The key holder's memory. Safe to call from several threads.

    Every method raises UnavailableError when the file cannot be read or written; then nothing has
    changed. A method that takes a context raises ClosedError when no such attempt was ever opened,
    and ContextError when it was opened with another plan, model or key.

    Args:
        path: the SQLite file; made, for its owner alone, if it is not there.
        audit_key: 32 bytes under which the audit log hashes clients' names.

    Raises:
        ConfigurationError: not a ledger, one of a newer version, or not to be opened.
    """

    def __init__(self, path: Path, audit_key: bytes) -> None:
        self._path, self._audit_key = path, audit_key
        self._lock = threading.RLock()
        with _as_error(ConfigurationError, path):
            self._db = _connected(path)
            try:
                with _committed(self._db):
                    self._migrate()
            except BaseException:
                self._db.close()
                raise

    def _migrate(self) -> None:
        version = _version(self._db)
        for number in range(version, len(_MIGRATIONS)):
            for statement in _MIGRATIONS[number]:
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {number + 1}")
        if version == 0:
            self._db.execute(_PUT_FACT, ("created", _now().encode()))
        if version < len(_MIGRATIONS):
            self._append("ledger-migrated", version=len(_MIGRATIONS), before=version)

    def close(self) -> None:
        """Release the file."""
        with self._lock:
            self._db.close()

    def ping(self) -> None:
        """Write something and forget it.

        Raises:
            UnavailableError: the ledger cannot be written.
        """
        with self._transaction():
            self._db.execute(_PUT_FACT, ("ping", _now().encode()))

    # --- rounds -------------------------------------------------------------------------------

    def open_round(
        self, context: RoundContext, plan_bytes: bytes, *, attempts_limit: int
    ) -> list[bytes]:
        """Record a new attempt; whatever was open of its task is closed by that.

        Args:
            plan_bytes: the plan's wire bytes.
            attempts_limit: attempts there may be on one model of a task; without a model, at one
                round.

        Returns:
            The round key ids of the attempts that this one closed; their keys are to be erased.

        Raises:
            ClosedError: the task is at a later attempt, the round or a later one was released, or
                the attempts are used up.
            DuplicateError: this attempt is recorded; see :meth:`current`.
        """
        name = context.id
        with self._transaction():
            self._check_new(name, attempts_limit)
            closed = self._close_all("superseded", name.task_id)
            digests = {
                "plan_digest": name.plan_digest,
                "model_digest": name.model_digest,
                "round_key_id": name.round_key_id,
            }
            self._db.execute(
                """INSERT INTO rounds (task_id, round_number, attempt, plan_digest, model_digest,
                    round_key_id, plan, public_key, opened_at)
                    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)""",
                (*_key(name), *digests.values(), plan_bytes, context.round_key, _now()),
            )
            hexes = {part: value.hex() for part, value in digests.items()}
            self._append_for(_key(name), "round-opened", **hexes)
        failpoint("round-recorded")
        return closed

    def _check_new(self, name: ContextId, attempts_limit: int) -> None:
        newest = self.current(name.task_id)
        if newest is not None and newest.key == _key(name):
            raise DuplicateError("expected a new attempt; this one is recorded; read it instead")
        released = self._rows(
            "SELECT max(round_number) FROM rounds WHERE task_id = ? AND state = 'RELEASED'",
            name.task_id,
        )[0][0]
        if (newest and _key(name) < newest.key) or name.round_number <= (released or 0):
            raise ClosedError(
                "expected a later round or attempt; this one is over; one release a round; a task "
                "that starts afresh needs an id that this key holder has not seen"
            )
        number = name.round_number if name.model_digest == NO_MODEL else None
        if self.attempts(name.task_id, name.model_digest, number) >= attempts_limit:
            raise ClosedError(
                f"expected at most {attempts_limit} attempts on one model, or at one round without "
                "a model; they are used up; end the task and start another"
            )

    def attempts(self, task_id: str, model_digest: bytes, round_number: int | None = None) -> int:
        """Attempts of a task on one model, whatever became of them; at one round, if given."""
        rows = self._rows(
            """SELECT count(*) FROM rounds WHERE task_id = ?1 AND model_digest = ?2
                AND (?3 IS NULL OR round_number = ?3)""",
            task_id,
            model_digest,
            round_number,
        )
        return int(rows[0][0])

    def current(self, task_id: str) -> OpenedRound | None:
        """The newest attempt of a task, whatever its state."""
        rows = self._rows(
            _ROUNDS + "WHERE task_id = ? ORDER BY round_number DESC, attempt DESC LIMIT 1", task_id
        )
        return _round(rows[0]) if rows else None

    def open_rounds(self) -> list[OpenedRound]:
        """Every open attempt: one a task at most."""
        return [_round(row) for row in self._rows(_ROUNDS + "WHERE state = 'OPEN' ORDER BY rowid")]

    def close_round(self, context: ContextId, reason: str) -> None:
        """End an attempt without a release and drop its seals; one that has ended stays as it is.

        An attempt that was never opened is none to close, and no error.
        """
        with self._transaction():
            found = self._find(context)
            if found is None:
                return
            found.id.require(context)
            if found.state is RoundState.OPEN:
                self._close(found, reason)
        failpoint("round-closed")

    def close_all_open(self, reason: str) -> list[bytes]:
        """End every open attempt, as after a restore; their round key ids."""
        with self._transaction():
            return self._close_all(reason)

    def _close_all(self, reason: str, task_id: str | None = None) -> list[bytes]:
        found = [each for each in self.open_rounds() if task_id in (None, each.task_id)]
        for each in found:
            self._close(each, reason)
        return [each.round_key_id for each in found]

    def _close(self, found: OpenedRound, reason: str) -> None:
        self._end(found.key, RoundState.CLOSED)
        self._append_for(found.key, "round-closed", reason=reason)

    def _end(self, key: _Key, state: RoundState) -> None:
        self._db.execute(
            """UPDATE rounds SET state = ?, ended_at = ?
                WHERE (task_id, round_number, attempt) = (?, ?, ?)""",
            (state.value, _now(), *key),
        )
        self._db.execute(
            """UPDATE admissions SET admission = NULL
                WHERE (task_id, round_number, attempt) = (?, ?, ?)""",
            key,
        )

    # --- uploads ------------------------------------------------------------------------------

    def record_verdict(
        self,
        context: ContextId,
        admission: bytes | None,
        upload_digest: bytes,
        client: str,
        verdict: str,
    ) -> str:
        """Record what was judged of an upload; the first verdict on a digest stands.

        Args:
            admission: wire bytes of the admission; kept only where it is accepted.
            upload_digest: SHA-256 of the upload, 32 bytes.
            verdict: empty for accepted, else the reason's code.

        Returns:
            The verdict that stands.

        Raises:
            ClosedError: a new upload, and the round has ended.
            DuplicateError: another upload of this client, or this upload of another client, was
                accepted.
        """
        if not verdict and admission is None:
            raise ValueError("expected the admission of an accepted upload; got None")
        exact("upload_digest", upload_digest, DIGEST_BYTES)
        key = _key(context)
        with self._transaction():
            found = self._require(context)
            standing = self._standing(key, upload_digest, client, verdict)
            if standing is not None:
                return standing
            _require_open(found)
            self._db.execute(
                "INSERT INTO admissions VALUES (?, ?, ?, ?, ?, ?, ?, NULL)",
                (*key, upload_digest, client, None if verdict else admission, verdict),
            )
            event = "upload-refused" if verdict else "upload-admitted"
            self._append_upload(key, event, upload_digest, client, verdict)
        failpoint("upload-admitted")
        return verdict

    def _standing(self, key: _Key, upload_digest: bytes, client: str, verdict: str) -> str | None:
        """The verdict there is on a digest; refuses to accept what is another's, or a second."""
        rows = self._rows(
            """SELECT upload_digest, client, verdict FROM admissions
                WHERE (task_id, round_number, attempt) = (?1, ?2, ?3)
                AND (upload_digest = ?4 OR (client = ?5 AND verdict = ''))""",
            *key,
            upload_digest,
            client,
        )
        known: dict[bytes, tuple[str, str | None]] = {row[0]: row[1:] for row in rows}
        owner, standing = known.get(upload_digest, (client, None))
        if not verdict and (owner != client or (standing is None and known)):
            raise DuplicateError(
                "expected one upload a client and round, and each upload once; the first one stands"
            )
        return standing

    def verdicts(self, context: ContextId) -> dict[bytes, str]:
        """What was judged, by upload digest; empty where it was accepted."""
        with self._lock:
            self._require(context)
            return dict(
                self._rows(
                    """SELECT upload_digest, verdict FROM admissions
                        WHERE (task_id, round_number, attempt) = (?, ?, ?) ORDER BY rowid""",
                    *_key(context),
                )
            )

    def admissions(self, context: ContextId) -> list[tuple[bytes, str, bytes]]:
        """Upload digest, client and wire bytes of each accepted upload, in order of acceptance.

        None once the round has ended, or in a ledger from a backup: their seals are gone.
        """
        with self._lock:
            self._require(context)
            return self._rows(
                """SELECT upload_digest, client, admission FROM admissions
                    WHERE (task_id, round_number, attempt) = (?, ?, ?)
                    AND verdict = '' AND admission IS NOT NULL ORDER BY rowid""",
                *_key(context),
            )

    # --- releases -----------------------------------------------------------------------------

    def count_refusal(self, context: ContextId) -> int:
        """Record that a sum of this round did not open; how many did not, this one included.

        Raises:
            ClosedError: the round has ended.
        """
        with self._transaction():
            count = _require_open(self._require(context)).refusals + 1
            self._db.execute(
                """UPDATE rounds SET refusals = ?
                    WHERE (task_id, round_number, attempt) = (?, ?, ?)""",
                (count, *_key(context)),
            )
            self._append_for(_key(context), "release-refused", refusals=count)
            return count

    def record_release(
        self, context: ContextId, manifest: bytes, contributors: int, sums: bytes
    ) -> None:
        """Record the one release of a round and drop its seals; the same one again is no error.

        Args:
            manifest: 32 bytes that name the uploads and the sum over them.
            contributors: how many clients are in it.
            sums: the exact sums' bytes.

        Raises:
            ClosedError: the round has ended in another way, or with another release.
        """
        exact("manifest", manifest, DIGEST_BYTES)
        with self._transaction():
            known = self.release(context)
            if known is not None:
                _require_same(known, RecordedRelease(manifest, contributors, sums))
                return
            found = _require_open(self._require(context))
            self._db.execute(
                """UPDATE rounds SET manifest = ?, contributors = ?, sums = ?
                    WHERE (task_id, round_number, attempt) = (?, ?, ?)""",
                (manifest, contributors, sums, *found.key),
            )
            self._end(found.key, RoundState.RELEASED)
            self._append_for(
                found.key,
                "round-released",
                manifest=manifest.hex(),
                contributors=contributors,
                sums_sha256=sha256(sums).hexdigest(),
            )
        failpoint("release-recorded")

    def release(self, context: ContextId) -> RecordedRelease | None:
        """What was released of an attempt; None when nothing was."""
        with self._lock:
            if self._require(context).state is not RoundState.RELEASED:
                return None
            rows = self._rows(
                """SELECT manifest, contributors, sums FROM rounds
                    WHERE (task_id, round_number, attempt) = (?, ?, ?)""",
                *_key(context),
            )
            return RecordedRelease(*rows[0])

    def drop_sums(self, task_id: str, before_round: int) -> None:
        """Drop the sums of a task's rounds before this one; that they were released stays known."""
        with self._transaction():
            dropped = self._db.execute(
                """UPDATE rounds SET sums = NULL
                    WHERE task_id = ? AND round_number < ? AND sums IS NOT NULL""",
                (task_id, before_round),
            ).rowcount
            if dropped:
                self._append(
                    "sums-dropped", task_id=task_id, before_round=before_round, rounds=dropped
                )

    # --- noise audits -------------------------------------------------------------------------

    def begin_audit(self, context: ContextId) -> None:
        """Begin the one noise audit of an open round; one that is under way goes on.

        Raises:
            ClosedError: the round has ended, or was audited.
        """
        with self._transaction():
            self._begin_audit(self._require(context))

    def _begin_audit(self, found: OpenedRound) -> None:
        if _require_open(found).audit_state is AuditState.DONE:
            raise ClosedError("expected a round that was not audited; one audit a round")
        if found.audit_state is AuditState.NONE:
            self._set_audit(found.key, AuditState.OPEN)
            self._append_for(found.key, "noise-audit-begun")

    def record_audited(self, context: ContextId, upload_digest: bytes, verdict: str) -> str:
        """Record what the audit found of an accepted upload; the first finding stands.

        The first one of a round begins its audit.

        Args:
            verdict: empty for clean, else the reason's code.

        Returns:
            The finding that stands.

        Raises:
            ClosedError: a new finding, and the audit or the round has ended.
            SealError: no such upload was accepted.
        """
        with self._transaction():
            found = self._require(context)
            rows = self._rows(
                """SELECT client, audited FROM admissions
                    WHERE (task_id, round_number, attempt, upload_digest) = (?, ?, ?, ?)
                    AND verdict = ''""",
                *found.key,
                upload_digest,
            )
            if not rows:
                raise SealError("expected an accepted upload to audit; this one was not accepted")
            client, standing = rows[0]
            if standing is not None:
                return str(standing)
            self._begin_audit(found)
            self._db.execute(
                """UPDATE admissions SET audited = ?
                    WHERE (task_id, round_number, attempt, upload_digest) = (?, ?, ?, ?)""",
                (verdict, *found.key, upload_digest),
            )
            self._append_upload(found.key, "upload-audited", upload_digest, client, verdict)
            return verdict

    def finish_audit(self, context: ContextId) -> None:
        """End the noise audit of a round for good; again, it is no error.

        Raises:
            ClosedError: none was begun, or the round has ended.
        """
        with self._transaction():
            found = self._require(context)
            if found.audit_state is AuditState.DONE:
                return
            if _require_open(found).audit_state is AuditState.NONE:
                raise ClosedError("expected an audit under way; begin it first")
            self._set_audit(found.key, AuditState.DONE)
            self._append_for(found.key, "noise-audit-finished")

    def audited(self, context: ContextId) -> dict[bytes, str]:
        """What the audit found so far, by upload digest; empty where it is clean."""
        with self._lock:
            self._require(context)
            return dict(
                self._rows(
                    """SELECT upload_digest, audited FROM admissions
                        WHERE (task_id, round_number, attempt) = (?, ?, ?)
                        AND audited IS NOT NULL ORDER BY rowid""",
                    *_key(context),
                )
            )

    def _set_audit(self, key: _Key, state: AuditState) -> None:
        self._db.execute(
            """UPDATE rounds SET audit_state = ?
                WHERE (task_id, round_number, attempt) = (?, ?, ?)""",
            (state.value, *key),
        )

    # --- the audit log ------------------------------------------------------------------------

    def record(self, event: str, **details: Detail) -> None:
        """Append an entry to the audit log; it must not name clients (see `audit.client_hash`)."""
        with self._transaction():
            self._append(event, **details)

    def audit_entries(self, after: int = 0, limit: int = -1) -> list[Entry]:
        """Entries past a sequence number, in order; at most ``limit`` if it is not negative."""
        rows = self._rows(
            _ENTRIES + "WHERE sequence > ? ORDER BY sequence LIMIT ?", after, max(limit, -1)
        )
        return [Entry(*row) for row in rows]

    def _append(self, event: str, **details: Detail) -> None:
        rows = self._db.execute(_ENTRIES + "ORDER BY sequence DESC LIMIT 1").fetchall()
        last = Entry(*rows[0]) if rows else None
        entry = next_entry(last, event, details, datetime.now(UTC))
        self._db.execute("INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?)", astuple(entry))

    def _append_for(self, key: _Key, event: str, **details: Detail) -> None:
        task_id, round_number, attempt = key
        self._append(event, task_id=task_id, round_number=round_number, attempt=attempt, **details)

    def _append_upload(
        self, key: _Key, event: str, upload_digest: bytes, client: str, reason: str
    ) -> None:
        self._append_for(
            key,
            event,
            upload_digest=upload_digest.hex(),
            # Whoever sent an upload that proves nothing is unknown.
            client=client_hash(self._audit_key, client) if client else None,
            reason=reason,
        )

    # --- backups ------------------------------------------------------------------------------

    def backup(self, target: Path) -> None:
        """Write a consistent copy, without seals and sums, to a new file for its owner alone.

        The copy knows that it is one (:meth:`restored`). What it lacks never reaches the target's
        disk: it is removed from a copy in memory first.

        Raises:
            ConfigurationError: the file exists, or its folder does not.
            UnavailableError: it cannot be written; no half of it is left.
        """
        if target.exists() or not target.parent.is_dir():
            raise ConfigurationError(
                f"expected a new file in a folder that exists; got {target}; choose another name"
            )
        self.record("backup-begun")
        with _as_error(UnavailableError, target), _draft_of(target) as draft:
            with closing(sqlite3.connect(":memory:", isolation_level=None)) as copy:
                with self._lock:
                    self._db.backup(copy)
                with _committed(copy):
                    copy.execute("UPDATE rounds SET sums = NULL")
                    copy.execute("UPDATE admissions SET admission = NULL")
                    copy.execute(_PUT_FACT, ("backup", _now().encode()))
                # Unlike a plain copy, this leaves the pages of what was removed behind.
                copy.execute("VACUUM INTO ?", (str(draft),))
            flush(draft)
            draft.replace(target)
            flush(target.parent)

    def restored(self) -> bool:
        """Whether this ledger was a backup: it may not know of the last releases."""
        return bool(self._rows("SELECT 1 FROM facts WHERE key = 'backup'"))

    def clear_restored(self) -> None:
        """Forget that this ledger was a backup, once what follows from it was done."""
        with self._transaction():
            if self._db.execute("DELETE FROM facts WHERE key = 'backup'").rowcount:
                self._append("restore-cleared")

    # --- shared -------------------------------------------------------------------------------

    def _find(self, context: ContextId) -> OpenedRound | None:
        rows = self._rows(
            _ROUNDS + "WHERE (task_id, round_number, attempt) = (?, ?, ?)", *_key(context)
        )
        return _round(rows[0]) if rows else None

    def _require(self, context: ContextId) -> OpenedRound:
        found = self._find(context)
        if found is None:
            raise ClosedError("expected a round that this key holder opened; it knows of none such")
        found.id.require(context)
        return found

    def _rows(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        with self._lock, _as_error(UnavailableError, self._path):
            return self._db.execute(statement, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, _as_error(UnavailableError, self._path), _committed(self._db):
            yield


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _key(context: ContextId) -> _Key:
    return context.task_id, context.round_number, context.attempt


def _round(row: tuple[Any, ...]) -> OpenedRound:
    return OpenedRound(RoundState(row[0]), AuditState(row[1]), *row[2:])


def _require_open(found: OpenedRound) -> OpenedRound:
    if found.state is not RoundState.OPEN:
        raise ClosedError("expected an open round; this one is released or closed")
    return found


def _require_same(known: RecordedRelease, offered: RecordedRelease) -> None:
    if known.sums is None:
        known = known._replace(sums=offered.sums)
    if known != offered:
        raise ClosedError("expected the release already recorded; one release a round")


@contextmanager
def _committed(db: sqlite3.Connection) -> Iterator[None]:
    # The write lock is taken at once, so that what a transaction reads is true when it commits.
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        # Some failures have rolled back already.
        with suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise


@contextmanager
def _as_error(kind: type[SecaggError], path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        # Not the error's text: it may quote a statement.
        what = getattr(error, "sqlite_errorname", None) or getattr(error, "strerror", None)
        raise kind(
            f"expected a ledger that can be read and written; {path}: "
            f"{what or type(error).__name__}; check that it is one, its owner and the space left"
        ) from None


def _connected(path: Path) -> sqlite3.Connection:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        flush(path.parent)
    db = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        _check_version(db, path)
        for setting in _SETTINGS:
            db.execute(f"PRAGMA {setting}")
    except BaseException:
        db.close()
        raise
    return db


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _check_version(db: sqlite3.Connection, path: Path) -> None:
    version = _version(db)
    if version > len(_MIGRATIONS):
        raise ConfigurationError(
            f"expected a ledger of version {len(_MIGRATIONS)} or older; {path} has version "
            f"{version}; run the newer key holder that wrote it"
        )
    if version == 0 and db.execute("SELECT 1 FROM sqlite_master").fetchone():
        raise ConfigurationError(
            f"expected a key holder's ledger; {path} is another database; choose another file"
        )


@contextmanager
def _draft_of(target: Path) -> Iterator[Path]:
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".draft")
    os.close(descriptor)
    draft = Path(name)
    try:
        yield draft
    finally:
        draft.unlink(missing_ok=True)
