"""The store's tables. A change here comes with a migration, which the tests compare with it."""

from __future__ import annotations

import datetime
import json

from sqlalchemy import (
    BigInteger,
    DateTime,
    Dialect,
    Double,
    ForeignKeyConstraint,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

from secagg.audit import Entry
from secagg.wire.codec import parse
from secagg.wire.v1 import operator_service_pb2
from secagg_server.states import RoundState, TaskState, UploadState
from secagg_server.tasks import TaskSpec

__all__ = [
    "AuditRow",
    "Base",
    "HeartbeatRow",
    "RoundKey",
    "RoundRow",
    "TaskRow",
    "UploadRow",
    "UtcDateTime",
]

RoundKey = tuple[str, int, int]
"""Task id, round number, attempt."""


class UtcDateTime(TypeDecorator[datetime.datetime]):
    """Moments: stored as UTC without a zone, which every database has, and read back with it."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(
        self, value: datetime.datetime | None, dialect: Dialect
    ) -> datetime.datetime | None:
        """To UTC; ValueError for a moment that does not say its zone."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("expected a time with its zone; got one without; use UTC")
        return value.astimezone(datetime.UTC).replace(tzinfo=None)

    def process_result_value(
        self, value: datetime.datetime | None, dialect: Dialect
    ) -> datetime.datetime | None:
        """With its zone."""
        return None if value is None else value.replace(tzinfo=datetime.UTC)


class Base(DeclarativeBase):
    """All tables."""

    type_annotation_map = {datetime.datetime: UtcDateTime}  # noqa: RUF012 - the base's own form


class TaskRow(Base):
    """A task and its progress.

    Attributes:
        rho_spent: zCDP of all releases so far, those of void rounds too.
        clip: clip norm of the next round, once that is another than the plan's.
    """

    __tablename__ = "tasks"
    task_id: Mapped[str] = mapped_column(primary_key=True)
    spec: Mapped[bytes]
    initial_model_digest: Mapped[bytes]
    state: Mapped[TaskState] = mapped_column(default=TaskState.RUNNING)
    reason: Mapped[str] = mapped_column(default="")
    rounds_done: Mapped[int] = mapped_column(default=0)
    model_version: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[datetime.datetime]
    rho_spent: Mapped[float] = mapped_column(Double, default=0.0)
    clip: Mapped[float | None] = mapped_column(Double)

    def task_spec(self) -> TaskSpec:
        """The specification."""
        return TaskSpec.from_wire(parse(operator_service_pb2.TaskSpec, self.spec))


class RoundRow(Base):
    """One attempt at a round.

    Attributes:
        closes_at: when it stops collecting; None until it is open.
        round_key_identity, round_key_signature: the key holder's public identity key, and its
            signature that makes the round key its own.
        selected: JSON list of the clients drawn for this attempt; None for everybody.
        audited: whether the noise audit has judged its uploads.
        clip: clip norm of its plan, where that is another than the task's.
        figure, model_change: what it tells of the model; see `stopping.Outcome`.
    """

    __tablename__ = "rounds"
    task_id: Mapped[str] = mapped_column(primary_key=True)
    round_number: Mapped[int] = mapped_column(primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    state: Mapped[RoundState] = mapped_column(default=RoundState.CREATED)
    reason: Mapped[str] = mapped_column(default="")
    round_key: Mapped[bytes] = mapped_column(default=b"")
    contributors: Mapped[int] = mapped_column(default=0)
    sums_sha256: Mapped[bytes] = mapped_column(default=b"")
    model_version: Mapped[int] = mapped_column(default=0)
    aggregate_ms: Mapped[float] = mapped_column(Double, default=0.0)
    release_ms: Mapped[float] = mapped_column(Double, default=0.0)
    created_at: Mapped[datetime.datetime]
    ended_at: Mapped[datetime.datetime | None]
    closes_at: Mapped[datetime.datetime | None]
    round_key_identity: Mapped[bytes] = mapped_column(default=b"")
    round_key_signature: Mapped[bytes] = mapped_column(default=b"")
    selected: Mapped[str | None]
    audited: Mapped[bool] = mapped_column(default=False)
    clip: Mapped[float | None] = mapped_column(Double)
    figure: Mapped[float | None] = mapped_column(Double)
    model_change: Mapped[float | None] = mapped_column(Double)

    @property
    def endorsed(self) -> bool:
        """Whether a key holder has signed for its key; none did before version 0.2."""
        return bool(self.round_key_signature)

    @property
    def key(self) -> RoundKey:
        """Task id, round number, attempt."""
        return self.task_id, self.round_number, self.attempt

    @property
    def selected_clients(self) -> list[str] | None:
        """Names of the clients drawn for this attempt; None for everybody."""
        return None if self.selected is None else list(json.loads(self.selected))


class UploadRow(Base):
    """A client's upload in one attempt; without its admission, a reminder that it has been.

    Attributes:
        admission, verdict: `Admission` and `NormVerdict` messages of the wire.
    """

    __tablename__ = "uploads"
    __table_args__ = (
        ForeignKeyConstraint(
            ["task_id", "round_number", "attempt"],
            ["rounds.task_id", "rounds.round_number", "rounds.attempt"],
        ),
        UniqueConstraint("task_id", "round_number", "attempt", "upload_digest"),
    )
    task_id: Mapped[str] = mapped_column(primary_key=True)
    round_number: Mapped[int] = mapped_column(primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    client: Mapped[str] = mapped_column(primary_key=True)
    client_key: Mapped[bytes]
    upload_digest: Mapped[bytes] = mapped_column(index=True)
    admission: Mapped[bytes | None]
    state: Mapped[UploadState] = mapped_column(default=UploadState.RECEIVING)
    reason: Mapped[str] = mapped_column(default="")
    verdict: Mapped[bytes | None]


class AuditRow(Base):
    """An entry of the audit log."""

    __tablename__ = "audit"
    sequence: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    time: Mapped[str]
    event: Mapped[str]
    details: Mapped[str]
    previous: Mapped[bytes]
    hash: Mapped[bytes]

    def entry(self) -> Entry:
        """The entry."""
        return Entry(self.sequence, self.time, self.event, self.details, self.previous, self.hash)


class HeartbeatRow(Base):
    """One row that changes with every probe, because a write that changes nothing may be none.

    Where a database has no write lock of its own, writers queue at this table.
    """

    __tablename__ = "heartbeat"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    beat: Mapped[int]
