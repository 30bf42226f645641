"""What the operator's page shows: how tasks, rounds and clients do, by a few bounded queries.

However much is on record, one look costs about the same: it takes the newest tasks, the newest
rounds of each, and as many uploads as somebody may want to see. What an attempt that is long over
came to is kept, and what came when is read from the audit log as it grows.

Reasons are codes, and clients the keyed hashes of the audit log: no name, no released value and
nothing of a model is in it.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from sqlalchemy import Row, and_, func, select
from sqlalchemy.orm import Session

from secagg.audit import client_hash
from secagg.errors import SecaggError
from secagg.instruments import Instrument, Meter
from secagg.rpc import metrics
from secagg.wire.codec import parse
from secagg.wire.v1 import operator_service_pb2
from secagg_server.metrics import DISK_FREE, TASKS
from secagg_server.schema import AuditRow, RoundKey, RoundRow, TaskRow, UploadRow
from secagg_server.spending import standing
from secagg_server.states import FINAL, TaskState, UploadState
from secagg_server.store import Store
from secagg_server.tasks import TaskSpec
from secagg_server.uploads import reason_code

__all__ = ["Overview"]

MAX_TASKS = 50
MAX_ROUNDS = 60
MAX_UPLOADS = 5000
MAX_CLIENTS = 100
MAX_ENTRIES = 20_000
MINUTES = 60
_ROUNDS_OF_A_TASK = 20
_KEPT = 1024
# A client may withdraw what it has announced for as long as it has not heard of the end.
_SETTLED = datetime.timedelta(minutes=1)
_ACCEPTED, _REJECTED = "upload-accepted", "upload-rejected"

_Json = dict[str, Any]


class Overview:
    """Looks at a server's store.

    Args:
        meter: for what is not in the store.
        audit_key: turns clients' names into what the audit log calls them.
    """

    def __init__(self, store: Store, meter: Meter, audit_key: bytes) -> None:
        self._store = store
        self._meter = meter
        self._hashed = functools.lru_cache(maxsize=MAX_UPLOADS)(
            functools.partial(client_hash, audit_key)
        )
        self._settled: OrderedDict[RoundKey, _Came] = OrderedDict()
        self._traffic = _Traffic()
        self._started = _now()

    def document(self) -> bytes:
        """Everything as a JSON document; blocking, and for one thread at a time.

        Raises:
            StorageError: the store does not answer.
        """
        found, grown = self._store.database.read(self._look)
        found["traffic"] = self._traffic.minutes(grown)
        gauges = _Gauges(self._meter)
        found |= {
            "version": version("secagg"),
            "now": _moment(_now()),
            "started": _moment(self._started),
            "ready": gauges.of(metrics.READY) == 1.0,
            "enrolled": gauges.of(metrics.ENROLLED),
            "certificate_expires": gauges.of(metrics.CERTIFICATE_EXPIRY),
            "waiting": gauges.of(metrics.QUEUE_DEPTH),
            "calls": gauges.of(metrics.CALLS_IN_FLIGHT),
            "call_limit": gauges.of(metrics.CALL_LIMIT),
            "disk_free": gauges.of(DISK_FREE),
            "task_counts": gauges.by_label(TASKS),
        }
        return json.dumps(found, separators=(",", ":"), allow_nan=False).encode()

    def _look(self, session: Session) -> tuple[_Json, _Grown]:
        """All that is in the store, in one transaction, which may have to be done again."""
        if session.get_bind().dialect.name == "postgresql":
            # Of what is only shown, no writer shall be made to try again.
            session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        tasks = list(_newest_tasks(session))
        specs = {row.task_id: _spec(row.spec) for row in tasks}
        attempts = _newest_attempts(session, [row.task_id for row in tasks])
        came = {_key(row): self._came(session, row) for row in attempts}
        found = {
            "tasks": [_task(row, specs[row.task_id]) for row in tasks],
            "rounds": [_round(row, specs[row.task_id], came[_key(row)]) for row in attempts],
            "verdicts": dict(sum((each.refused for each in came.values()), Counter[str]())),
            "accepted": sum(each.accepted for each in came.values()),
            **self._clients(session, attempts),
        }
        return found, self._traffic.read(session)

    def _came(self, session: Session, row: Row[Any]) -> _Came:
        key = _key(row)
        if key in self._settled:
            return self._settled[key]
        came = _Came()
        counted = (
            select(UploadRow.state, UploadRow.reason, func.count())
            .where(_of(key))
            .group_by(UploadRow.state, UploadRow.reason)
        )
        for state, reason, count in session.execute(counted):
            came.add(state, reason, count)
        if row.state in FINAL and row.ended_at and _now() - row.ended_at > _SETTLED:
            self._settled[key] = came
            if len(self._settled) > _KEPT:
                self._settled.popitem(last=False)
        return came

    def _clients(self, session: Session, attempts: Iterable[Row[Any]]) -> _Json:
        """Who has uploaded of late; those whose uploads were refused first."""
        seen: dict[str, _Came] = {}
        left = MAX_UPLOADS
        for row in attempts:
            uploads = (
                select(UploadRow.client, UploadRow.state, UploadRow.reason)
                .where(_of(_key(row)))
                .limit(left)
            )
            for client, state, reason in session.execute(uploads):
                left -= 1
                came = seen.setdefault(client, _Came(last=row))
                came.add(state, reason, 1)
            if not left:
                break
        # The newest come first already, and sorting keeps that order.
        order = sorted(seen.items(), key=lambda item: -item[1].refused.total())
        return {
            "clients": [self._client(*item) for item in order[:MAX_CLIENTS]],
            "clients_seen": len(seen),
            "uploads_read": MAX_UPLOADS - left,
        }

    def _client(self, name: str, came: _Came) -> _Json:
        last = came.last
        where = {} if last is None else {"task": last.task_id, "round": last.round_number}
        return {"client": self._hashed(name), **where, **came.to_json()}


@dataclass(slots=True)
class _Came:
    """What uploads came to.

    Attributes:
        refused: how many, by reason.
        last: the newest attempt among those they were made for.
    """

    accepted: int = 0
    receiving: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    last: Row[Any] | None = None

    def add(self, state: UploadState, reason: str, count: int) -> None:
        if state is UploadState.REJECTED:
            self.refused[reason_code(reason) or "OTHER"] += count
        elif state is UploadState.ACCEPTED:
            self.accepted += count
        else:
            self.receiving += count

    def to_json(self) -> _Json:
        return {
            "accepted": self.accepted,
            "receiving": self.receiving,
            "refused": dict(self.refused),
        }


@dataclass(frozen=True, slots=True)
class _Grown:
    """What has come into the audit log.

    Attributes:
        last: number of its newest entry.
        unknown_to: the last minute of which something was passed over; empty for none.
        uploads: minute, whether it was accepted, and bytes of each upload.
    """

    last: int
    unknown_to: str
    uploads: list[tuple[str, bool, int]]


class _Traffic:
    """Uploads of each of the last minutes, by the audit log, which is read as it grows.

    Of a log that has grown by more than `MAX_ENTRIES` since the last look, or at the first look,
    the newest ones: what was before is not known.
    """

    def __init__(self) -> None:
        self._after = 0
        self._unknown_to = ""
        self._minutes: dict[str, list[int]] = {}
        self._sizes: dict[str, int] = {}

    def read(self, session: Session) -> _Grown:
        """What is new since the last look."""
        last = session.scalar(select(func.max(AuditRow.sequence))) or 0
        after, unknown_to = self._after, ""
        if last - MAX_ENTRIES > after:
            after = last - MAX_ENTRIES
            oldest = select(AuditRow.time).where(AuditRow.sequence == after)
            unknown_to = (session.scalar(oldest) or "")[:16]
        wanted = select(AuditRow.time, AuditRow.event, AuditRow.details).where(
            AuditRow.sequence > after,
            AuditRow.sequence <= last,
            AuditRow.event.in_((_ACCEPTED, _REJECTED)),
        )
        uploads = []
        for time, event, details in session.execute(wanted):
            accepted = event == _ACCEPTED
            size = self._size(session, json.loads(details)["task"]) if accepted else 0
            uploads.append((time[:16], accepted, size))
        return _Grown(last, unknown_to, uploads)

    def minutes(self, grown: _Grown) -> list[_Json]:
        """From the oldest to this one, which is not over yet."""
        self._after = grown.last
        self._unknown_to = max(self._unknown_to, grown.unknown_to)
        for minute, accepted, size in grown.uploads:
            found = self._minutes.setdefault(minute, [0, 0, 0])
            found[0] += accepted
            found[1] += size
            found[2] += not accepted
        now = _now()
        shown = [
            f"{now - datetime.timedelta(minutes=ago):%Y-%m-%dT%H:%M}"
            for ago in reversed(range(MINUTES))
        ]
        self._minutes = {name: self._minutes[name] for name in shown if name in self._minutes}
        return [self._minute(name) for name in shown]

    def _size(self, session: Session, task_id: str) -> int:
        """Bytes of an upload of a task."""
        if task_id not in self._sizes:
            if len(self._sizes) > _KEPT:
                self._sizes.clear()
            encoded = session.scalar(select(TaskRow.spec).where(TaskRow.task_id == task_id))
            spec = _spec(encoded or b"")
            self._sizes[task_id] = spec.plan.payload_bytes if spec else 0
        return self._sizes[task_id]

    def _minute(self, name: str) -> _Json:
        if name <= self._unknown_to:
            return {"minute": f"{name}Z"}
        uploads, size, refused = self._minutes.get(name, (0, 0, 0))
        return {"minute": f"{name}Z", "uploads": uploads, "bytes": size, "refused": refused}


class _Gauges:
    """A meter's gauges as they are now."""

    def __init__(self, meter: Meter) -> None:
        self._found = {
            family.name: {
                next(iter(sample.labels.values()), ""): sample.value for sample in family.samples
            }
            for family in meter.collect()
        }

    def by_label(self, instrument: Instrument) -> dict[str, float]:
        """Empty if there is none now."""
        return self._found.get(instrument.prometheus, {})

    def of(self, instrument: Instrument) -> float | None:
        """None if there is none now."""
        return self.by_label(instrument).get("")


def _newest_tasks(session: Session) -> Iterator[TaskRow]:
    """Those that run, then those that have ended; the newest of each first."""
    left = MAX_TASKS
    for running in (TaskRow.state == TaskState.RUNNING, TaskRow.state != TaskState.RUNNING):
        newest = select(TaskRow).where(running).order_by(TaskRow.created_at.desc()).limit(left)
        rows = session.scalars(newest).all()
        left -= len(rows)
        yield from rows


def _newest_attempts(session: Session, task_ids: Sequence[str]) -> list[Row[Any]]:
    """Of all these tasks; without what is large in a row."""
    found: list[Row[Any]] = []
    for task_id in task_ids:
        found += session.execute(
            select(
                RoundRow.task_id,
                RoundRow.round_number,
                RoundRow.attempt,
                RoundRow.state,
                RoundRow.reason,
                RoundRow.contributors,
                RoundRow.aggregate_ms,
                RoundRow.release_ms,
                RoundRow.created_at,
                RoundRow.closes_at,
                RoundRow.ended_at,
            )
            .where(RoundRow.task_id == task_id)
            .order_by(RoundRow.round_number.desc(), RoundRow.attempt.desc())
            .limit(_ROUNDS_OF_A_TASK)
        )
    return sorted(found, key=lambda row: row.created_at, reverse=True)[:MAX_ROUNDS]


def _key(row: Row[Any]) -> RoundKey:
    return row.task_id, row.round_number, row.attempt


def _of(key: RoundKey) -> Any:  # noqa: ANN401 - an SQL expression
    task_id, round_number, attempt = key
    return and_(
        UploadRow.task_id == task_id,
        UploadRow.round_number == round_number,
        UploadRow.attempt == attempt,
    )


@functools.lru_cache(maxsize=_KEPT)
def _spec(encoded: bytes) -> TaskSpec | None:
    """A task's specification; None for one that this version does not understand."""
    try:
        return TaskSpec.from_wire(parse(operator_service_pb2.TaskSpec, encoded))
    except SecaggError:
        return None


def _task(row: TaskRow, spec: TaskSpec | None) -> _Json:
    shown = {
        "task": row.task_id,
        "state": row.state.value,
        "reason": reason_code(row.reason),
        "rounds_done": row.rounds_done,
        "created": _moment(row.created_at),
    }
    if spec is None:
        return shown
    return shown | {
        "rounds": spec.rounds,
        "min_clients": spec.plan.min_clients,
        "target_clients": spec.target_clients,
        "upload_bytes": spec.plan.payload_bytes,
        "checked": spec.plan.norm_check is not None,
        "privacy": _privacy(row.spec, row.rho_spent, row.clip),
    }


@functools.lru_cache(maxsize=_KEPT)
def _privacy(encoded: bytes, rho_spent: float, clip: float | None) -> _Json | None:
    """Where a task stands with its budget; None without one."""
    spec = _spec(encoded)
    if spec is None or spec.plan.privacy is None:
        return None
    privacy = spec.plan.privacy
    shown = {"mode": privacy.mode, "epsilon": privacy.epsilon, "delta": privacy.delta}
    try:
        found = standing(spec, TaskRow(rho_spent=rho_spent, clip=clip))
    except SecaggError:  # the accountant is not installed
        return shown
    if found is None:
        return shown
    return shown | {"spent": found.epsilon_spent, "releases_left": found.releases_left}


def _round(row: Row[Any], spec: TaskSpec | None, came: _Came) -> _Json:
    return {
        "task": row.task_id,
        "round": row.round_number,
        "attempt": row.attempt,
        "state": row.state.value,
        "reason": reason_code(row.reason),
        "target_clients": spec.target_clients if spec else None,
        "contributors": row.contributors,
        "add_ms": row.aggregate_ms,
        "open_ms": row.release_ms,
        "created": _moment(row.created_at),
        "closes": _moment(row.closes_at),
        "ended": _moment(row.ended_at),
        **came.to_json(),
    }


def _moment(when: datetime.datetime | None) -> str | None:
    return None if when is None else when.isoformat(timespec="milliseconds")


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
