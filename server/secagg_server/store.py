"""What the server must never forget, in SQL: tasks, rounds, uploads.

SQLite by default, any SQLAlchemy URL otherwise. Every method is one transaction. Clients appear by
their public keys, which never leave the store.
"""

from __future__ import annotations

import datetime
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import (
    Engine,
    ForeignKeyConstraint,
    UniqueConstraint,
    create_engine,
    event,
    func,
    select,
    update,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from secagg.context import ContextId, RoundContext
from secagg.errors import ClosedError, ConfigurationError, DuplicateError
from secagg.upload import Admission
from secagg.wire.codec import admission_from_wire, admission_to_wire, parse
from secagg.wire.v1 import operator_service_pb2, round_pb2
from secagg_server.states import FINAL, RoundState, TaskState, UploadState, check_transition
from secagg_server.tasks import TaskSpec

__all__ = ["RoundKey", "RoundRow", "Store", "TaskRow", "UploadCounts", "round_key"]

RoundKey = tuple[str, int, int]
"""Task id, round number, attempt."""


class _Base(DeclarativeBase):
    pass


class TaskRow(_Base):
    """A task and its progress."""

    __tablename__ = "tasks"
    task_id: Mapped[str] = mapped_column(primary_key=True)
    spec: Mapped[bytes]
    initial_model_digest: Mapped[bytes]
    state: Mapped[TaskState] = mapped_column(default=TaskState.RUNNING)
    reason: Mapped[str] = mapped_column(default="")
    rounds_done: Mapped[int] = mapped_column(default=0)
    model_version: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[datetime.datetime]

    def task_spec(self) -> TaskSpec:
        """The specification."""
        return TaskSpec.from_wire(parse(operator_service_pb2.TaskSpec, self.spec))


class RoundRow(_Base):
    """One attempt at a round."""

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
    aggregate_ms: Mapped[float] = mapped_column(default=0.0)
    release_ms: Mapped[float] = mapped_column(default=0.0)
    created_at: Mapped[datetime.datetime]
    ended_at: Mapped[datetime.datetime | None]

    @property
    def key(self) -> RoundKey:
        """Task id, round number, attempt."""
        return self.task_id, self.round_number, self.attempt


class _UploadRow(_Base):
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
    client_key: Mapped[bytes] = mapped_column(primary_key=True)
    upload_digest: Mapped[bytes]
    admission: Mapped[bytes]
    state: Mapped[UploadState] = mapped_column(default=UploadState.RECEIVING)
    reason: Mapped[str] = mapped_column(default="")


@dataclass(frozen=True, slots=True)
class UploadCounts:
    """How many uploads of an attempt stand where."""

    accepted: int
    rejected: int


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
        # Parameters hold receipts and keys; they stay out of the text of errors.
        engine = create_engine(parsed, hide_parameters=True)
    except (SQLAlchemyError, ImportError, ValueError) as error:
        # Not the error's text: it may quote the URL, and the URL may hold a password.
        raise ConfigurationError(
            "expected a usable store_url such as sqlite:////folder/file.sqlite3; got "
            f"{type(error).__name__}; check its form and that the database's driver is installed"
        ) from None
    if engine.dialect.name != "sqlite":
        return engine
    if parsed.database in (None, "", ":memory:"):
        raise ConfigurationError("expected store_url to name a file; a database in memory forgets")
    event.listen(engine, "connect", _configure_sqlite)
    # Transactions take the write lock at once, so that what they read stays true until they
    # commit; the driver's own deferred BEGIN would not.
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return engine


def _configure_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=10000", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


class Store:
    """The server's memory."""

    def __init__(self, url: str) -> None:
        self._engine = _engine(url)
        try:
            _Base.metadata.create_all(self._engine)
        except SQLAlchemyError as error:
            self._engine.dispose()
            raise ConfigurationError(
                f"expected a database that answers at store_url; got {type(error).__name__}; check "
                "that it runs and that its folder is writable"
            ) from None
        self._session: sessionmaker[Session] = sessionmaker(self._engine, expire_on_commit=False)

    def close(self) -> None:
        """Release the connections."""
        self._engine.dispose()

    def create_task(self, spec: TaskSpec, initial_model_digest: bytes) -> TaskRow:
        """Record a task; the same one again is no error.

        Raises:
            DuplicateError: another task has this id.
        """
        encoded = spec.to_wire().SerializeToString(deterministic=True)
        with self._session.begin() as session:
            row = session.get(TaskRow, spec.task_id)
            if row is None:
                row = TaskRow(
                    task_id=spec.task_id,
                    spec=encoded,
                    initial_model_digest=initial_model_digest,
                    created_at=_now(),
                )
                session.add(row)
            elif (row.spec, row.initial_model_digest) != (encoded, initial_model_digest):
                raise DuplicateError(
                    f"expected a new task id; a different task {spec.task_id!r} exists; choose "
                    "another id"
                )
            return row

    def tasks(self) -> Sequence[TaskRow]:
        """All tasks, oldest first."""
        with self._session() as session:
            return session.scalars(select(TaskRow).order_by(TaskRow.created_at)).all()

    def task(self, task_id: str) -> TaskRow:
        """One task.

        Raises:
            ConfigurationError: unknown.
        """
        with self._session() as session:
            row = session.get(TaskRow, task_id)
        if row is None:
            raise ConfigurationError(f"expected a known task; {task_id!r} is not; list the tasks")
        return row

    def end_task(self, task_id: str, state: TaskState, reason: str = "") -> None:
        """Finish or fail a running task; a task that has ended stays as it is."""
        with self._session.begin() as session:
            row = session.get_one(TaskRow, task_id)
            if row.state is TaskState.RUNNING:
                row.state, row.reason = state, reason

    def rounds(self, task_id: str) -> Sequence[RoundRow]:
        """Every attempt at every round of a task, in order."""
        ordered = (
            select(RoundRow)
            .where(RoundRow.task_id == task_id)
            .order_by(RoundRow.round_number, RoundRow.attempt)
        )
        with self._session() as session:
            return session.scalars(ordered).all()

    def create_round(self, task_id: str, round_number: int) -> RoundRow:
        """Record the next attempt at a round."""
        with self._session.begin() as session:
            last = session.scalar(
                select(func.max(RoundRow.attempt)).where(
                    RoundRow.task_id == task_id, RoundRow.round_number == round_number
                )
            )
            row = RoundRow(
                task_id=task_id,
                round_number=round_number,
                attempt=(last or 0) + 1,
                state=RoundState.CREATED,
                created_at=_now(),
            )
            session.add(row)
            return row

    def advance(self, key: RoundKey, state: RoundState, *, round_key: bytes | None = None) -> None:
        """Move an attempt to its next state.

        Raises:
            ClosedError: the table of states has no such step.
        """
        with self._session.begin() as session:
            row = session.get_one(RoundRow, key)
            check_transition(row.state, state)
            row.state = state
            if round_key is not None:
                row.round_key = round_key

    def finish_round(
        self,
        key: RoundKey,
        sums_sha256: bytes,
        contributors: int,
        *,
        aggregate_ms: float,
        release_ms: float,
        has_model: bool,
    ) -> int:
        """Record a release and the model version it made, together with the task's progress.

        Returns:
            The model version; unchanged for a task without a model.
        """
        with self._session.begin() as session:
            row = session.get_one(RoundRow, key)
            check_transition(row.state, RoundState.DONE)
            task = session.get_one(TaskRow, row.task_id)
            task.rounds_done = row.round_number
            task.model_version += int(has_model)
            row.state, row.ended_at = RoundState.DONE, _now()
            row.sums_sha256, row.contributors = sums_sha256, contributors
            row.model_version = task.model_version
            row.aggregate_ms, row.release_ms = aggregate_ms, release_ms
            return task.model_version

    def attempts(self, task_id: str, round_number: int) -> int:
        """Attempts at a round so far."""
        with self._session() as session:
            last = select(func.max(RoundRow.attempt)).where(
                RoundRow.task_id == task_id, RoundRow.round_number == round_number
            )
            return session.scalar(last) or 0

    def void_round(self, key: RoundKey, reason: str) -> None:
        """End a round whose released sum cannot be used; the task continues with the next one."""
        with self._session.begin() as session:
            row = session.get_one(RoundRow, key)
            check_transition(row.state, RoundState.ABORTED)
            row.state, row.reason, row.ended_at = RoundState.ABORTED, reason, _now()
            session.get_one(TaskRow, row.task_id).rounds_done = row.round_number

    def abort_round(self, key: RoundKey, reason: str) -> None:
        """End an attempt without a result; one that has ended stays as it is."""
        with self._session.begin() as session:
            row = session.get_one(RoundRow, key)
            if row.state not in FINAL:
                row.state, row.reason, row.ended_at = RoundState.ABORTED, reason, _now()

    def abort_open_rounds(self, task_id: str, reason: str) -> None:
        """End every unfinished attempt of a task, as after a restart."""
        for row in self.rounds(task_id):
            self.abort_round(row.key, reason)

    def open_upload(self, context: RoundContext, admission: Admission) -> UploadState:
        """Record an announced upload; the same one again returns its state.

        Raises:
            DuplicateError: the client announced a different upload, or another client this one.
        """
        receipt, encoded = admission.receipt, admission_to_wire(admission).SerializeToString()
        key = (*round_key(context), receipt.client_key)
        with self._session.begin() as session:
            row = session.get(_UploadRow, key)
            if row is None:
                _refuse_copy(session, key[:3], receipt.upload_digest)
                row = _UploadRow(
                    task_id=key[0],
                    round_number=key[1],
                    attempt=key[2],
                    client_key=receipt.client_key,
                    upload_digest=receipt.upload_digest,
                    admission=encoded,
                    state=UploadState.RECEIVING,
                )
                session.add(row)
            if row.upload_digest != receipt.upload_digest:
                raise DuplicateError(
                    "expected one upload a client and round; this client sent a different one "
                    "before; the first one stands"
                )
            return row.state

    def upload(self, context: ContextId, client_key: bytes) -> tuple[bytes, UploadState] | None:
        """Digest and state of a client's upload; None when it has announced none."""
        with self._session() as session:
            row = session.get(_UploadRow, (*_key(context), client_key))
            return (row.upload_digest, row.state) if row else None

    def accept_upload(self, context: RoundContext, client_key: bytes) -> None:
        """Accept a complete upload, in one transaction with the check that it still may be.

        Raises:
            ClosedError: the round no longer collects, or its cohort is full.
        """
        key = round_key(context)
        with self._session.begin() as session:
            if session.get_one(RoundRow, key).state is not RoundState.COLLECTING:
                raise ClosedError("expected a collecting round; it has closed; fetch the next one")
            if _count(session, key, UploadState.ACCEPTED) >= context.plan.max_clients:
                raise ClosedError("expected room in the cohort; it is full; join the next round")
            session.get_one(_UploadRow, (*key, client_key)).state = UploadState.ACCEPTED

    def reject_upload(self, context: RoundContext, upload_digest: bytes, reason: str) -> None:
        """Record the key holder's refusal of an upload."""
        task_id, round_number, attempt = round_key(context)
        with self._session.begin() as session:
            session.execute(
                update(_UploadRow)
                .where(
                    _UploadRow.task_id == task_id,
                    _UploadRow.round_number == round_number,
                    _UploadRow.attempt == attempt,
                    _UploadRow.upload_digest == upload_digest,
                )
                .values(state=UploadState.REJECTED, reason=reason)
            )

    def accepted(self, context: RoundContext) -> list[Admission]:
        """Receipts and seals of the accepted uploads, ordered by digest."""
        task_id, round_number, attempt = round_key(context)
        wanted = (
            select(_UploadRow.admission)
            .where(
                _UploadRow.task_id == task_id,
                _UploadRow.round_number == round_number,
                _UploadRow.attempt == attempt,
                _UploadRow.state == UploadState.ACCEPTED,
            )
            .order_by(_UploadRow.upload_digest)
        )
        with self._session() as session:
            rows = session.scalars(wanted).all()
        return [admission_from_wire(parse(round_pb2.Admission, row)) for row in rows]

    def counts(self, key: RoundKey) -> UploadCounts:
        """Accepted and rejected uploads of an attempt."""
        with self._session() as session:
            return UploadCounts(
                _count(session, key, UploadState.ACCEPTED),
                _count(session, key, UploadState.REJECTED),
            )


def _count(session: Session, key: RoundKey, state: UploadState) -> int:
    wanted = select(func.count()).where(
        _UploadRow.task_id == key[0],
        _UploadRow.round_number == key[1],
        _UploadRow.attempt == key[2],
        _UploadRow.state == state,
    )
    return session.scalar(wanted) or 0


def _refuse_copy(session: Session, key: RoundKey, upload_digest: bytes) -> None:
    """No client may announce the bytes of another one."""
    taken = select(func.count()).where(
        _UploadRow.task_id == key[0],
        _UploadRow.round_number == key[1],
        _UploadRow.attempt == key[2],
        _UploadRow.upload_digest == upload_digest,
    )
    if session.scalar(taken):
        raise DuplicateError("expected an upload of your own; another client has announced these")


def round_key(context: RoundContext) -> RoundKey:
    """The key of a context's row."""
    return _key(context.id)


def _key(context: ContextId) -> RoundKey:
    return context.task_id, context.round_number, context.attempt
