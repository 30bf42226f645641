"""What the key holder must never forget: which rounds it opened, what it judged, what it released.

And what that has cost in privacy: see `accounts`.

One SQLite file. Every method is one transaction, on the disk before it returns, and every change
appends its entry to the audit log in that same transaction. Nothing in here opens a seed: the
round keys lie elsewhere (`vault`), and seals are removed when their round ends.
"""

from __future__ import annotations

from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

from secagg.audit import Detail
from secagg.context import NO_MODEL, ContextId, RoundContext
from secagg.errors import ClosedError, DuplicateError
from secagg.failpoints import failpoint
from secagg.instruments import SILENT, Meter
from secagg.transcript import DIGEST_BYTES
from secagg.wire.codec import exact
from secagg_keyholder.accounts import Account, account, admit
from secagg_keyholder.backup import clear_backup, is_backup, write_backup
from secagg_keyholder.database import Database, utc_now
from secagg_keyholder.schema import (
    ROUNDS,
    AttemptKey,
    OpenedRound,
    RecordedRelease,
    RoundState,
    attempt_key,
)
from secagg_keyholder.tally import Tally
from secagg_keyholder.uploads import Uploads, Verdict

__all__ = ["Ledger", "OpenedRound", "RecordedRelease", "RoundState", "Verdict"]

_RECENT_ROUNDS = 200


class Ledger(Uploads):
    """The key holder's memory. Safe to call from several threads.

    Every method raises StorageError when the file cannot be read or written; then nothing has
    changed. A method that takes a context raises ClosedError when no such attempt was ever opened,
    and ContextError when it was opened with another plan, model or key.

    Args:
        path: the SQLite file; made, for its owner alone, if it is not there.
        audit_key: 32 bytes under which the audit log hashes clients' names.
        meter: counts what is recorded here; see `Tally`.

    Raises:
        ConfigurationError: not a ledger, one of a newer version, or not to be opened.
    """

    def __init__(self, path: Path, audit_key: bytes, *, meter: Meter = SILENT) -> None:
        super().__init__(Database(path, Tally(meter).changed), audit_key)

    def close(self) -> None:
        """Release the file."""
        self._database.close()

    def ping(self) -> None:
        """Write something and forget it.

        Raises:
            StorageError: the ledger cannot be written.
        """
        self._database.ping()

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
            ConfigurationError: the task began with another privacy.
            BudgetError: its budget has no room for a release; see `accounts`.
        """
        name = context.id
        key = attempt_key(name)
        digests = {
            "plan_digest": name.plan_digest,
            "model_digest": name.model_digest,
            "round_key_id": name.round_key_id,
        }
        with self._database.transaction():
            self._check_new(name, attempts_limit)
            found = admit(self._database, context)
            closed = self._close_all("superseded", name.task_id)
            self._database.change(
                """INSERT INTO rounds (task_id, round_number, attempt, plan_digest, model_digest,
                    round_key_id, plan, public_key, opened_at, rho)
                    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)""",
                *key,
                *digests.values(),
                plan_bytes,
                context.round_key,
                utc_now(),
                found.rho_each if found.privacy else None,
            )
            hexes = {part: value.hex() for part, value in digests.items()}
            self._log(key, "round-opened", **hexes, **_public(found))
        failpoint("round-recorded")
        return closed

    def _check_new(self, name: ContextId, attempts_limit: int) -> None:
        key, newest = attempt_key(name), self.current(name.task_id)
        if newest is not None and newest.key == key:
            raise DuplicateError("expected a new attempt; this one is recorded; read it instead")
        released = self._database.rows(
            "SELECT max(round_number) FROM rounds WHERE task_id = ? AND state = 'RELEASED'",
            name.task_id,
        )[0][0]
        if (newest and key < newest.key) or name.round_number <= (released or 0):
            raise ClosedError(
                "expected a later round or attempt; this one is over; one release a round; a task "
                "that starts afresh needs an id that this key holder has not seen"
            )
        if self._attempts(name) >= attempts_limit:
            raise ClosedError(
                f"expected at most {attempts_limit} attempts on one model, or at one round without "
                "a model; they are used up; end the task and start another"
            )

    def _attempts(self, name: ContextId) -> int:
        """Attempts on the same model, whatever became of them; without one, at the same round."""
        rows = self._database.rows(
            """SELECT count(*) FROM rounds WHERE task_id = ?1 AND model_digest = ?2
                AND (?3 IS NULL OR round_number = ?3)""",
            name.task_id,
            name.model_digest,
            name.round_number if name.model_digest == NO_MODEL else None,
        )
        return int(rows[0][0])

    def most_attempts(self) -> int:
        """Attempts so far of the open round that has had the most of what its model may have."""
        return max((self._attempts(each.id) for each in self.open_rounds()), default=0)

    def current(self, task_id: str) -> OpenedRound | None:
        """The newest attempt of a task, whatever its state."""
        rows = self._database.rows(
            ROUNDS + "WHERE task_id = ? ORDER BY round_number DESC, attempt DESC LIMIT 1", task_id
        )
        return OpenedRound.from_row(rows[0]) if rows else None

    def open_rounds(self) -> list[OpenedRound]:
        """Every open attempt: one a task at most."""
        rows = self._database.rows(ROUNDS + "WHERE state = 'OPEN' ORDER BY rowid")
        return [OpenedRound.from_row(row) for row in rows]

    def recent_tasks(self, since: datetime) -> list[str]:
        """Tasks of which a round was opened after a moment, among the newest rounds there are.

        Not among all of them: somebody asks every few seconds.
        """
        rows = self._database.rows(
            """SELECT DISTINCT task_id FROM rounds
                WHERE rowid > (SELECT max(rowid) FROM rounds) - ? AND opened_at > ?""",
            _RECENT_ROUNDS,
            since.astimezone(UTC).isoformat(timespec="microseconds"),
        )
        return [task_id for (task_id,) in rows]

    def close_round(self, context: ContextId, reason: str) -> None:
        """End an attempt without a release and drop its seals; one that has ended stays as it is.

        An attempt that was never opened is none to close, and no error.
        """
        with self._database.transaction():
            found = self._find(context)
            if found is None:
                return
            found.id.require(context)
            if found.state is RoundState.OPEN:
                self._close(found, reason)
        failpoint("round-closed")

    def close_all_open(self, reason: str) -> list[bytes]:
        """End every open attempt, as after a restore; their round key ids."""
        with self._database.transaction():
            return self._close_all(reason)

    def _close_all(self, reason: str, task_id: str | None = None) -> list[bytes]:
        found = [each for each in self.open_rounds() if task_id in (None, each.id.task_id)]
        for each in found:
            self._close(each, reason)
        return [each.round_key_id for each in found]

    def _close(self, found: OpenedRound, reason: str) -> None:
        self._end(found.key, RoundState.CLOSED)
        self._log(found.key, "round-closed", reason=reason)

    def _end(self, key: AttemptKey, state: RoundState) -> None:
        self._database.change(
            """UPDATE rounds SET state = ?, ended_at = ?
                WHERE (task_id, round_number, attempt) = (?, ?, ?)""",
            state.value,
            utc_now(),
            *key,
        )
        self._database.change(
            """UPDATE admissions SET admission = NULL
                WHERE (task_id, round_number, attempt) = (?, ?, ?)""",
            *key,
        )

    # --- releases -----------------------------------------------------------------------------

    def count_refusal(self, context: ContextId) -> int:
        """Record that a sum of this round did not open; how many did not, this one included.

        Raises:
            ClosedError: the round has ended.
        """
        with self._database.transaction():
            found = self._require(context)
            found.require_open()
            count = found.refusals + 1
            self._database.change(
                """UPDATE rounds SET refusals = ?
                    WHERE (task_id, round_number, attempt) = (?, ?, ?)""",
                count,
                *found.key,
            )
            self._log(found.key, "release-refused", refusals=count)
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
            BudgetError: the task's budget has no room for it.
        """
        exact("manifest", manifest, DIGEST_BYTES)
        with self._database.transaction():
            known = self.release(context)
            if known is not None:
                _require_same(known, RecordedRelease(manifest, contributors, sums))
                return
            found = self._require(context)
            found.require_open()
            self.account(context.task_id).require_room()
            self._database.change(
                """UPDATE rounds SET manifest = ?, contributors = ?, sums = ?
                    WHERE (task_id, round_number, attempt) = (?, ?, ?)""",
                manifest,
                contributors,
                sums,
                *found.key,
            )
            self._end(found.key, RoundState.RELEASED)
            self._log(
                found.key,
                "round-released",
                manifest=manifest.hex(),
                contributors=contributors,
                sums_sha256=sha256(sums).hexdigest(),
                **_public(self.account(context.task_id)),
            )
        failpoint("release-recorded")

    def release(self, context: ContextId) -> RecordedRelease | None:
        """What was released of an attempt; None when nothing was."""
        rows = self._database.rows(
            """SELECT manifest, contributors, sums FROM rounds
                WHERE (task_id, round_number, attempt) = (?, ?, ?) AND state = 'RELEASED'""",
            *self._require(context).key,
        )
        return RecordedRelease(*rows[0]) if rows else None

    def account(self, task_id: str) -> Account:
        """What a task has spent of its privacy budget.

        Raises:
            ClosedError: a task that was never seen.
        """
        found = account(self._database, task_id)
        if found is None:
            raise ClosedError("expected a task of this key holder; it has opened no round of it")
        return found

    def drop_sums(self, task_id: str, before_round: int) -> None:
        """Drop the sums of a task's rounds before this one; that they were released stays known."""
        with self._database.transaction():
            dropped = self._database.change(
                """UPDATE rounds SET sums = NULL
                    WHERE task_id = ? AND round_number < ? AND sums IS NOT NULL""",
                task_id,
                before_round,
            )
            if dropped:
                self._database.log(
                    "sums-dropped", task_id=task_id, before_round=before_round, rounds=dropped
                )

    # --- backups ------------------------------------------------------------------------------

    def backup(self, target: Path) -> None:
        """Write a copy that opens nothing; see `write_backup`."""
        write_backup(self._database, target)

    def restored(self) -> bool:
        """Whether this ledger was a backup: it may not know of the last releases."""
        return is_backup(self._database)

    def clear_restored(self) -> None:
        """Forget that this ledger was a backup, once what follows from it was done."""
        clear_backup(self._database)


def _public(found: Account) -> dict[str, Detail]:
    """What the audit log has of an account: counters that everybody may know."""
    if found.privacy is None:
        return {}
    return {
        "rho": found.rho_each.hex(),
        "rho_spent": found.rho.hex(),
        "epsilon_spent": f"{found.epsilon:.6g}",
        "delta": f"{found.privacy.delta:g}",
        "passed_over": found.passed_over,
        "releases_left": found.left,
    }


def _require_same(known: RecordedRelease, offered: RecordedRelease) -> None:
    if known.sums is None:
        known = known._replace(sums=offered.sums)
    if known != offered:
        raise ClosedError("expected the release already recorded; one release a round")
