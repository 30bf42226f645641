"""The ledger's tables, and what their rows say."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from secagg.context import ContextId
from secagg.errors import ClosedError

__all__ = [
    "MIGRATIONS",
    "ROUNDS",
    "AttemptKey",
    "OpenedRound",
    "RecordedRelease",
    "RoundState",
    "attempt_key",
]

# Migration i takes the file from version i to i + 1; a migration that was published never changes.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
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
            manifest BLOB,
            contributors INTEGER NOT NULL DEFAULT 0,
            sums BLOB,
            opened_at TEXT NOT NULL,
            ended_at TEXT,
            PRIMARY KEY (task_id, round_number, attempt)
        )""",
        # The two promises that no code may break, whatever calls it.
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
    # What the norm check found of an upload, and whether its attempt's verdicts were given.
    (
        "ALTER TABLE admissions ADD COLUMN sketch_digest BLOB",
        "ALTER TABLE admissions ADD COLUMN passed INTEGER",
        "ALTER TABLE rounds ADD COLUMN judged INTEGER NOT NULL DEFAULT 0",
    ),
    # The privacy that a task began with, and what a release of each round costs; REAL is exact.
    # Whatever was opened before there was privacy had none.
    (
        """CREATE TABLE tasks (
            task_id TEXT PRIMARY KEY,
            mode TEXT,
            noise_multiplier REAL,
            epsilon REAL,
            delta REAL,
            honest_clients INTEGER,
            integer_share REAL,
            CHECK (mode IS NULL OR
                noise_multiplier + epsilon + delta + honest_clients + integer_share IS NOT NULL)
        )""",
        """INSERT INTO tasks (task_id)
            SELECT task_id FROM rounds GROUP BY task_id ORDER BY min(rowid)""",
        "ALTER TABLE rounds ADD COLUMN rho REAL",
    ),
)

ROUNDS = """SELECT task_id, round_number, attempt, plan_digest, model_digest, round_key_id,
    state, plan, public_key, refusals, judged FROM rounds """
"""The start of a query for :meth:`OpenedRound.from_row`."""

AttemptKey = tuple[str, int, int]
"""Task id, round number, attempt."""


def attempt_key(context: ContextId) -> AttemptKey:
    """Which row of ``rounds`` a context is."""
    return context.task_id, context.round_number, context.attempt


class RoundState(StrEnum):
    """Where an attempt stands; only the first step out of OPEN is ever taken."""

    OPEN = "OPEN"
    RELEASED = "RELEASED"
    CLOSED = "CLOSED"


@dataclass(frozen=True, slots=True)
class OpenedRound:
    """One attempt at a round, as it stands.

    Attributes:
        id: the context's name.
        plan: the plan's wire bytes.
        public_key: the public round key.
        refusals: sums that did not open.
        judged: whether the norm check's verdicts were given.
    """

    id: ContextId
    state: RoundState
    plan: bytes = field(repr=False)
    public_key: bytes = field(repr=False)
    refusals: int
    judged: bool

    @classmethod
    def from_row(cls, row: tuple[Any, ...]) -> OpenedRound:
        """What a query that starts with `ROUNDS` finds."""
        state, plan, public_key, refusals, judged = row[6:]
        name = ContextId(*row[:6])
        return cls(name, RoundState(state), plan, public_key, refusals, bool(judged))

    @property
    def key(self) -> AttemptKey:
        """Task id, round number, attempt."""
        return attempt_key(self.id)

    @property
    def round_key_id(self) -> bytes:
        """What the round's private key is kept under."""
        return self.id.round_key_id

    def require_open(self) -> None:
        """Refuse an attempt that has ended.

        Raises:
            ClosedError: it is released or closed.
        """
        if self.state is not RoundState.OPEN:
            raise ClosedError("expected an open round; this one is released or closed")


class RecordedRelease(NamedTuple):
    """A release as it was recorded; ``sums`` is None once they were dropped."""

    manifest: bytes
    contributors: int
    sums: bytes | None
