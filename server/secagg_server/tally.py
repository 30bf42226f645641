"""Counts what becomes of rounds and uploads: whatever the store records, and once it is committed.

So counters say what the audit log says. What is asked for again, tried again or done again after a
restart changes nothing in the store, is in no log, and counts once. Durations that a restart falls
into are unknown, and in no histogram.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from secagg.audit import Detail
from secagg.context import ContextId
from secagg.instruments import Meter
from secagg_server.metrics import (
    ACCEPTED,
    PHASES,
    REJECTED,
    ROUND_DURATION,
    ROUND_FAILURES,
    ROUNDS,
    VERDICTS,
)

__all__ = ["Refusals", "Tally"]

_REMEMBERED = 4096
_OUTCOMES = {"round-finished": "DONE", "round-aborted": "ABORTED", "round-voided": "VOID"}


@dataclass(slots=True)
class _Attempt:
    """An attempt that goes on: when it was opened, if that was seen; what it is at, since when."""

    opened: float | None
    state: str
    since: float
    judged: bool = False


class Tally:
    """Counts entries of the audit log.

    Args:
        clock: seconds since some fixed moment.
    """

    def __init__(self, meter: Meter, clock: Callable[[], float] = time.monotonic) -> None:
        self._meter = meter
        self._clock = clock
        self._open: dict[tuple[Detail, ...], _Attempt] = {}

    def changed(self, event: str, details: Mapping[str, Detail]) -> None:
        """Count one entry that is committed."""
        key = (details.get("task"), details.get("round"), details.get("attempt"))
        match event:
            case "upload-accepted":
                self._meter.add(ACCEPTED)
            case "upload-rejected":
                self._meter.add(REJECTED, reason=str(details["reason"]))
            case "round-opened":
                now = self._clock()
                self._open[key] = _Attempt(now, "COLLECTING", now)
            case "round-advanced":
                self._advance(key, str(details["state"]))
            case "norms-judged" | "manifest-fixed":
                self._judge(key)
            case "round-finished" | "round-aborted" | "round-voided":
                self._end(key, event, str(details.get("reason", "")))

    def _advance(self, key: tuple[Detail, ...], state: str) -> None:
        left = self._leave(key)
        opened, judged = (left.opened, left.judged) if left else (None, False)
        self._open[key] = _Attempt(opened, state, self._clock(), judged)

    def _leave(self, key: tuple[Detail, ...]) -> _Attempt | None:
        """Time the state that an attempt was in, if it was seen to enter it."""
        left = self._open.pop(key, None)
        if left is not None:
            self._meter.record(PHASES, self._clock() - left.since, state=left.state)
        return left

    def _judge(self, key: tuple[Detail, ...]) -> None:
        """The first manifest of an attempt is of uploads that are all judged, as its norms are."""
        found = self._open.get(key)
        if found is not None and found.state == "CHECKING" and not found.judged:
            found.judged = True
            self._meter.record(VERDICTS, self._clock() - found.since)

    def _end(self, key: tuple[Detail, ...], event: str, reason: str) -> None:
        left, outcome = self._leave(key), _OUTCOMES[event]
        self._meter.add(ROUNDS, outcome=outcome)
        if outcome != "DONE":
            self._meter.add(ROUND_FAILURES, reason=reason)
        elif left is not None and left.opened is not None:
            self._meter.record(ROUND_DURATION, self._clock() - left.opened)


class Refusals:
    """Counts refusals of uploads on their way in, of which there is no record.

    The same one again is a client that has not heard, and counts once; so far back as it is
    remembered.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._lock = threading.Lock()
        self._seen: OrderedDict[tuple[ContextId, bytes, str], None] = OrderedDict()

    def add(self, context: ContextId, upload_digest: bytes, reason: str) -> None:
        """Count that an upload was refused for a reason."""
        name = context, upload_digest, reason
        with self._lock:
            known = name in self._seen
            self._seen[name] = None
            self._seen.move_to_end(name)
            if len(self._seen) > _REMEMBERED:
                self._seen.popitem(last=False)
        if not known:
            self._meter.add(REJECTED, reason=reason)
