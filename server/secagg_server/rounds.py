"""The rounds that are collecting now, shared between the coordinator and the services."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from secagg.challenger import Challenger
from secagg.context import ContextId, RoundContext
from secagg.endorsement import Endorsement
from secagg.errors import RETRY_S, ClosedError, NotReadyError
from secagg_server.clock import Clock
from secagg_server.tasks import TaskSpec

__all__ = ["LONGEST_TURN_S", "TURNS_PER_S", "OpenRound", "OpenRounds", "Turns"]

TURNS_PER_S = 200.0
LONGEST_TURN_S = 5.0  # a client waits no longer, whatever it is told


@dataclass(frozen=True)
class OpenRound:
    """A round that accepts uploads.

    Attributes:
        spec: its task.
        context: what uploads must be made for.
        endorsement: the key holder's signature on it.
        model_version: what clients start from.
        deadline: clock time in seconds at which it closes.
        selected: names of the clients drawn for it; None lets everybody in.
        challenger: commits to what uploads will be asked; None without a norm check.
        filled: set once as many uploads as wanted have been accepted.
    """

    spec: TaskSpec
    context: RoundContext
    endorsement: Endorsement
    model_version: int
    deadline: float
    selected: frozenset[str] | None = None
    challenger: Challenger | None = None
    filled: asyncio.Event = field(default_factory=asyncio.Event)


class Turns:
    """When those who are told to come back are to come: one after the other, not all at once.

    A few come back soon. A thousand that wait for a round would otherwise be all that a server has
    time for.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last = 0.0

    def next_s(self) -> float:
        """Seconds until the next free turn."""
        now = self._clock.now()
        soonest, latest = now + RETRY_S, now + LONGEST_TURN_S
        self._last = min(max(self._last + 1 / TURNS_PER_S, soonest), latest)
        return self._last - now


class OpenRounds:
    """At most one open round for each task."""

    def __init__(self, clock: Clock) -> None:
        self._open: dict[str, OpenRound] = {}
        self._clock = clock
        self._turns = Turns(clock)

    def open(self, current: OpenRound) -> None:
        """Let uploads in."""
        self._open[current.spec.task_id] = current

    def close(self, task_id: str) -> None:
        """Let no more uploads in."""
        self._open.pop(task_id, None)

    def note_upload(self, context: ContextId, accepted: int) -> None:
        """Wake the coordinator once as many uploads as wanted have been accepted."""
        current = self._open.get(context.task_id)
        if current and current.context.id == context and accepted >= current.spec.target_clients:
            current.filled.set()

    def remaining_ms(self, current: OpenRound) -> int:
        """Milliseconds until the deadline, 0 once it has passed."""
        return max(0, round((current.deadline - self._clock.now()) * 1000))

    def newest(self, task_id: str, after: tuple[int, int], client: str | None) -> OpenRound:
        """The open round of a task, if it is later than one a client is done with.

        Args:
            client: who asks; None where nobody can be told apart.

        Raises:
            NotReadyError: there is none yet, or none for which this client was drawn.
        """
        current = self._open.get(task_id)
        if current is None or _order(current.context.id) <= after:
            raise NotReadyError(
                "expected an open round; the next one has not started; ask again",
                self._turns.next_s(),
            )
        if current.selected is not None and client not in current.selected:
            raise NotReadyError(
                "expected to be drawn for this round; others were; ask again",
                self._turns.next_s(),
            )
        return current

    def require(self, context: ContextId) -> OpenRound:
        """The open round that an upload is for.

        Raises:
            ClosedError: the task has no open round, or a later one.
            ContextError: the context differs in more than the attempt's name.
        """
        current = self._open.get(context.task_id)
        if current is None or _order(context) < _order(current.context.id):
            raise ClosedError(
                "expected an open round; this one is closed; what was accepted is safe; fetch the "
                "next round"
            )
        current.context.id.require(context)
        return current


def _order(context: ContextId) -> tuple[int, int]:
    return context.round_number, context.attempt
