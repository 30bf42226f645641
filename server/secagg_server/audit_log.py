"""The audit log in the store: an entry for each change, in the transaction of the change itself."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from secagg.audit import Detail, Entry, client_hash, next_entry
from secagg.errors import StorageError
from secagg_server.schema import AuditRow, HeartbeatRow, RoundKey
from secagg_server.transactions import Database, noted, reading, writing

__all__ = ["AuditLog", "where"]


class AuditLog:
    """A database whose changes are on record.

    Args:
        database: where.
        audit_key: 32 bytes that turn clients' names into what the log calls them. Without one, a
            key that nobody keeps: the log then names no client that anybody could recognise.
    """

    def __init__(self, database: Database, audit_key: bytes | None) -> None:
        self.database = database
        self._audit_key = audit_key or os.urandom(32)

    @writing
    def record(self, session: Session, event: str, /, **details: Detail) -> None:
        """Append an entry about something that is not in the store.

        Raises:
            StorageError: the store cannot be written.
            TypeError, ValueError: details that the log does not take.
        """
        self._record(session, event, **details)

    @reading
    def audit(self, session: Session, after: int = 0, limit: int = 1000) -> Sequence[Entry]:
        """Up to ``limit`` entries of the log that follow number ``after``, in order."""
        wanted = (
            select(AuditRow)
            .where(AuditRow.sequence > after)
            .order_by(AuditRow.sequence)
            .limit(limit)
        )
        return [row.entry() for row in session.scalars(wanted)]

    @writing
    def ping(self, session: Session) -> None:
        """Write something, to see that the store can be written; it does not grow.

        Raises:
            StorageError: it cannot.
        """
        changed = session.execute(
            update(HeartbeatRow).values(beat=1 - HeartbeatRow.beat).returning(HeartbeatRow.id)
        )
        if not changed.all():
            raise StorageError(
                "expected the store's heartbeat; its row is gone; restore the database"
            )

    def close(self) -> None:
        """Release the connections."""
        self.database.close()

    def _record(self, session: Session, event: str, /, **details: Detail) -> None:
        last = session.scalar(select(AuditRow).order_by(AuditRow.sequence.desc()).limit(1))
        now = datetime.datetime.now(datetime.UTC)
        entry = next_entry(last.entry() if last else None, event, details, now)
        session.add(
            AuditRow(
                sequence=entry.sequence,
                time=entry.time,
                event=entry.event,
                details=entry.details,
                previous=entry.previous,
                hash=entry.hash,
            )
        )
        # The next entry of this transaction must see this one.
        session.flush()
        noted(session, event, details)

    def _hashed(self, client: str) -> str:
        return client_hash(self._audit_key, client)


def where(key: RoundKey) -> dict[str, Detail]:
    """An attempt, as details of an entry."""
    return {"task": key[0], "round": key[1], "attempt": key[2]}
