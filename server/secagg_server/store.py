"""What the server must never forget, in SQL: tasks, rounds, uploads, and the log of it all.

SQLite or PostgreSQL. Every method is one transaction, and whatever it changes is in the audit log
in that same transaction. Clients appear by name and key, neither of which leaves the store: the log
knows them by a keyed hash.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence

from sqlalchemy import func, select, tuple_
from sqlalchemy.orm import Session

from secagg.context import ContextId, check_task_id, round_key_id
from secagg.errors import ConfigurationError, DuplicateError
from secagg.instruments import SILENT, Meter
from secagg.transcript import digest
from secagg_server import migrations
from secagg_server.audit_log import where
from secagg_server.schema import RoundKey, RoundRow, TaskRow
from secagg_server.states import FINAL, RoundState, TaskState, check_transition
from secagg_server.stopping import Outcome
from secagg_server.tally import Tally
from secagg_server.tasks import TaskSpec
from secagg_server.transactions import Database, reading, writing
from secagg_server.uploads import (
    UploadCounts,
    Uploads,
    reason_code,
    require_round,
    round_key,
    storable,
)

__all__ = ["RoundKey", "RoundRow", "Store", "TaskRow", "UploadCounts", "round_key"]

_STEPS = (
    RoundState.CHECKING,
    RoundState.SUMMING,
    RoundState.RELEASING,
    RoundState.AUDITING,
)


class Store(Uploads):
    """The server's memory.

    Args:
        url: SQLAlchemy URL of a SQLite file or a PostgreSQL database.
        audit_key: see `AuditLog`.
        migrate: bring the database to this version; otherwise it is only looked at, nothing is
            made, and it can be used if it is of this version already.
        meter: counts what is recorded here; see `Tally`.

    Raises:
        ConfigurationError: a URL that names no usable database, one that does not answer, or one of
            a newer version.

    Every method raises `StorageError` when the database does not do its work.
    """

    def __init__(
        self,
        url: str,
        audit_key: bytes | None = None,
        *,
        migrate: bool = True,
        meter: Meter = SILENT,
    ) -> None:
        super().__init__(Database(url, meter, Tally(meter).changed), audit_key)
        try:
            (migrations.upgrade if migrate else migrations.check)(self.database.engine)
        except BaseException:
            self.close()
            raise

    @writing
    def create_task(self, session: Session, spec: TaskSpec, initial_model_digest: bytes) -> TaskRow:
        """Record a task; the same one again is no error.

        Raises:
            DuplicateError: another task has this id.
        """
        encoded = spec.to_wire().SerializeToString(deterministic=True)
        row = session.get(TaskRow, spec.task_id)
        if row is None:
            row = TaskRow(
                task_id=spec.task_id,
                spec=encoded,
                initial_model_digest=initial_model_digest,
                created_at=_now(),
            )
            session.add(row)
            self._record(session, "task-created", task=spec.task_id, plan=spec.plan.digest.hex())
        elif (row.spec, row.initial_model_digest) != (encoded, initial_model_digest):
            raise DuplicateError(
                f"expected a new task id; a different task {spec.task_id!r} exists; choose "
                "another id"
            )
        return row

    @reading
    def tasks(self, session: Session, after: str = "", limit: int = 200) -> Sequence[TaskRow]:
        """A page of the tasks, oldest first: those that follow the task ``after``.

        Raises:
            ConfigurationError: no such task.
        """
        order = tuple_(TaskRow.created_at, TaskRow.task_id)
        wanted = select(TaskRow).order_by(TaskRow.created_at, TaskRow.task_id).limit(limit)
        if after:
            last = _require_task(session, after)
            wanted = wanted.where(order > tuple_(last.created_at, last.task_id))
        return session.scalars(wanted).all()

    @reading
    def running_tasks(self, session: Session) -> Sequence[TaskRow]:
        """The tasks that run, oldest first."""
        wanted = select(TaskRow).where(TaskRow.state == TaskState.RUNNING)
        return session.scalars(wanted.order_by(TaskRow.created_at, TaskRow.task_id)).all()

    @reading
    def tasks_by_state(self, session: Session) -> dict[TaskState, int]:
        """How many tasks are in each state."""
        wanted = select(TaskRow.state, func.count()).group_by(TaskRow.state)
        found = session.execute(wanted)
        return dict.fromkeys(TaskState, 0) | {state: count for state, count in found}  # noqa: C416 - of rows, not pairs

    @reading
    def open_rounds_by_state(self, session: Session) -> dict[RoundState, int]:
        """How many attempts of running tasks are in each state before the last.

        Of those that have ended nothing is read, however many they are.
        """
        running = select(TaskRow.task_id).where(TaskRow.state == TaskState.RUNNING)
        wanted = (
            select(RoundRow.state, func.count())
            .where(RoundRow.task_id.in_(running), RoundRow.state.not_in(FINAL))
            .group_by(RoundRow.state)
        )
        found = session.execute(wanted)
        none = {state: 0 for state in RoundState if state not in FINAL}
        return none | {state: count for state, count in found}  # noqa: C416 - of rows, not pairs

    @reading
    def task(self, session: Session, task_id: str) -> TaskRow:
        """One task.

        Raises:
            ConfigurationError: unknown.
        """
        return _require_task(session, task_id)

    @reading
    def task_exists(self, session: Session, task_id: str) -> bool:
        """Whether there is a task of this id."""
        return session.get(TaskRow, task_id) is not None

    @writing
    def end_task(self, session: Session, task_id: str, state: TaskState, reason: str = "") -> None:
        """Finish or fail a running task; a task that has ended stays as it is.

        Raises:
            ConfigurationError: unknown.
        """
        row = _require_task(session, task_id)
        if row.state is TaskState.RUNNING:
            row.state, row.reason = state, storable(reason)
            code = reason_code(reason)
            self._record(session, "task-ended", task=task_id, state=state.value, reason=code)

    @reading
    def rounds(
        self,
        session: Session,
        task_id: str,
        after: tuple[int, int] = (0, 0),
        limit: int | None = None,
    ) -> Sequence[RoundRow]:
        """Attempts at the rounds of a task, in order: those that follow a round and attempt."""
        order = tuple_(RoundRow.round_number, RoundRow.attempt)
        wanted = (
            select(RoundRow)
            .where(RoundRow.task_id == task_id, order > tuple_(*after))
            .order_by(RoundRow.round_number, RoundRow.attempt)
            .limit(limit)
        )
        return session.scalars(wanted).all()

    @reading
    def round(self, session: Session, key: RoundKey) -> RoundRow:
        """One attempt.

        Raises:
            ConfigurationError: unknown.
        """
        return require_round(session, key)

    @writing
    def create_round(
        self,
        session: Session,
        task_id: str,
        round_number: int,
        selected: Sequence[str] | None = None,
    ) -> RoundRow:
        """Record the next attempt at a round, for the clients drawn for it or for everybody.

        It is planned with the clip norm that the task has now, as all attempts at a round are.

        Raises:
            ConfigurationError: unknown task.
        """
        task = _require_task(session, task_id)
        row = RoundRow(
            task_id=task_id,
            round_number=round_number,
            attempt=_attempts(session, task_id, round_number) + 1,
            state=RoundState.CREATED,
            created_at=_now(),
            selected=None if selected is None else json.dumps(list(selected)),
            clip=task.clip,
        )
        session.add(row)
        drawn = None if selected is None else len(selected)
        self._record(session, "round-created", **where(row.key), selected=drawn)
        return row

    @reading
    def attempts(self, session: Session, task_id: str, round_number: int) -> int:
        """Attempts at a round so far."""
        return _attempts(session, task_id, round_number)

    @reading
    def started_from(self, session: Session, context: ContextId) -> int:
        """The model version that an attempt started from, however long ago."""
        newest = select(func.max(RoundRow.model_version)).where(
            RoundRow.task_id == context.task_id,
            RoundRow.round_number < context.round_number,
            RoundRow.state == RoundState.DONE,
        )
        return session.scalar(newest) or 0

    @reading
    def outcomes(self, session: Session, task_id: str) -> list[Outcome]:
        """What the rounds that are done tell of a task's model, in order."""
        wanted = (
            select(RoundRow.round_number, RoundRow.figure, RoundRow.model_change)
            .where(RoundRow.task_id == task_id, RoundRow.state == RoundState.DONE)
            .order_by(RoundRow.round_number)
        )
        return [Outcome(*row) for row in session.execute(wanted)]

    @writing
    def open_round(
        self,
        session: Session,
        key: RoundKey,
        *,
        round_key: bytes,
        identity: bytes,
        signature: bytes,
        closes_at: datetime.datetime,
    ) -> None:
        """Let a created attempt collect until a moment, under a key that the key holder signed.

        Raises:
            ConfigurationError: unknown.
            ClosedError: it collects already, or is over.
        """
        row = require_round(session, key)
        check_transition(row.state, RoundState.COLLECTING)
        row.state, row.closes_at, row.round_key = RoundState.COLLECTING, closes_at, round_key
        row.round_key_identity, row.round_key_signature = identity, signature
        name = round_key_id(round_key).hex()
        self._record(session, "round-opened", **where(key), round_key=name)

    @writing
    def advance(self, session: Session, key: RoundKey, state: RoundState) -> None:
        """Move an open attempt to its next state: checking, summing, releasing or auditing.

        Raises:
            ConfigurationError: unknown.
            ClosedError: the table of states has no such step.
            ValueError: a state that another method is for.
        """
        row = require_round(session, key)
        check_transition(row.state, state)
        if state not in _STEPS:
            raise ValueError(f"expected a step to one of {', '.join(_STEPS)}; got {state}")
        row.state = state
        self._record(session, "round-advanced", **where(key), state=state.value)

    @writing
    def set_audited(self, session: Session, key: RoundKey) -> None:
        """Note that the noise audit has judged an attempt's uploads.

        Raises:
            ConfigurationError: unknown.
        """
        row = require_round(session, key)
        if not row.audited:
            row.audited = True
            self._record(session, "round-audited", **where(key))

    @writing
    def record_manifest(self, session: Session, key: RoundKey, digests: Sequence[bytes]) -> None:
        """Record exactly which uploads will be summed, by one digest over theirs.

        Raises:
            ConfigurationError: unknown attempt.
        """
        require_round(session, key)
        name = digest("manifest uploads", *sorted(digests)).hex()
        self._record(session, "manifest-fixed", **where(key), uploads=len(digests), manifest=name)

    @writing
    def finish_round(
        self,
        session: Session,
        key: RoundKey,
        sums_sha256: bytes,
        contributors: int,
        *,
        aggregate_ms: float,
        release_ms: float,
        has_model: bool,
        rho: float = 0.0,
        clip: float | None = None,
        figure: float | None = None,
        change: float | None = None,
    ) -> int:
        """Record a release and the model version it made, together with the task's progress.

        Args:
            rho: zCDP of the release.
            clip: clip norm of the rounds that follow, if that is another than the plan's.
            figure, change: what it tells of the model; see `Outcome`.

        Returns:
            The model version; unchanged for a task without a model.

        Raises:
            ConfigurationError: unknown.
            ClosedError: the attempt is not releasing.
        """
        row = require_round(session, key)
        check_transition(row.state, RoundState.DONE)
        task = _require_task(session, row.task_id)
        task.rounds_done = row.round_number
        task.model_version += int(has_model)
        task.rho_spent += rho
        task.clip = clip
        row.state, row.ended_at = RoundState.DONE, _now()
        row.sums_sha256, row.contributors = sums_sha256, contributors
        row.model_version = task.model_version
        row.aggregate_ms, row.release_ms = aggregate_ms, release_ms
        row.figure, row.model_change = figure, change
        self._record(
            session,
            "round-finished",
            **where(key),
            sums=sums_sha256.hex(),
            contributors=contributors,
            model_version=task.model_version,
            **_exactly(rho=rho, clip=clip, figure=figure, change=change),
        )
        return task.model_version

    @writing
    def void_round(self, session: Session, key: RoundKey, reason: str, rho: float = 0.0) -> None:
        """End a round whose released sum cannot be used; the task continues with the next one.

        Args:
            rho: zCDP of the release, which may have been seen.

        Raises:
            ConfigurationError: unknown.
            ClosedError: it has ended.
        """
        row = require_round(session, key)
        check_transition(row.state, RoundState.ABORTED)
        task = _require_task(session, row.task_id)
        task.rounds_done = row.round_number
        task.rho_spent += rho
        self._end(session, row, "round-voided", reason, **_exactly(rho=rho))

    @writing
    def abort_round(self, session: Session, key: RoundKey, reason: str) -> None:
        """End an attempt without a result; one that has ended stays as it is.

        Raises:
            ConfigurationError: unknown.
        """
        row = require_round(session, key)
        if row.state not in FINAL:
            self._end(session, row, "round-aborted", reason)

    @writing
    def abort_open_rounds(self, session: Session, task_id: str, reason: str) -> None:
        """End every unfinished attempt of a task, as after a restart."""
        unfinished = (
            select(RoundRow)
            .where(RoundRow.task_id == task_id, RoundRow.state.not_in(FINAL))
            .order_by(RoundRow.round_number, RoundRow.attempt)
        )
        for row in session.scalars(unfinished).all():
            self._end(session, row, "round-aborted", reason)

    def _end(
        self, session: Session, row: RoundRow, event: str, reason: str, **details: str
    ) -> None:
        row.state, row.reason = RoundState.ABORTED, storable(reason)
        row.ended_at = _now()
        self._record(session, event, **where(row.key), reason=reason_code(reason), **details)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _exactly(**numbers: float | None) -> dict[str, str]:
    """Numbers for the log, which takes no floats: exactly, and those alone that there are."""
    return {name: number.hex() for name, number in numbers.items() if number}


def _require_task(session: Session, task_id: str) -> TaskRow:
    check_task_id(task_id)  # not every database can be asked for any text
    row = session.get(TaskRow, task_id)
    if row is None:
        raise ConfigurationError(f"expected a known task; {task_id!r} is not; list the tasks")
    return row


def _attempts(session: Session, task_id: str, round_number: int) -> int:
    last = select(func.max(RoundRow.attempt)).where(
        RoundRow.task_id == task_id, RoundRow.round_number == round_number
    )
    return session.scalar(last) or 0
