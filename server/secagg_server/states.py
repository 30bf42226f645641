"""The states of a round and the only ways between them.

::

    CREATED ─▶ COLLECTING ─▶ CHECKING ─▶ SUMMING ─▶ RELEASING ─▶ DONE
       │            │            │        │   ▲        │   │
       │            │            │        │ AUDITING ◀─┘   │
       │            │            │        │     │          │
       └────────────┴────────────┴────────┴──┬──┴──────────┘
                                             ▼
                                      ABORTED(reason)
"""

from __future__ import annotations

from enum import StrEnum

from secagg.errors import ClosedError

__all__ = ["FINAL", "TRANSITIONS", "RoundState", "TaskState", "UploadState", "check_transition"]


class RoundState(StrEnum):
    """Where an attempt at a round stands."""

    CREATED = "CREATED"
    COLLECTING = "COLLECTING"
    CHECKING = "CHECKING"
    SUMMING = "SUMMING"
    RELEASING = "RELEASING"
    AUDITING = "AUDITING"
    DONE = "DONE"
    ABORTED = "ABORTED"


class TaskState(StrEnum):
    """Where a task stands."""

    RUNNING = "RUNNING"
    FINISHED = "FINISHED"
    FAILED = "FAILED"


class UploadState(StrEnum):
    """What has become of an upload."""

    RECEIVING = "RECEIVING"
    ACCEPTED = "ACCEPTED"
    REJECTED = "REJECTED"


FINAL = frozenset({RoundState.DONE, RoundState.ABORTED})

TRANSITIONS: dict[RoundState, frozenset[RoundState]] = {
    RoundState.CREATED: frozenset({RoundState.COLLECTING, RoundState.ABORTED}),
    RoundState.COLLECTING: frozenset({RoundState.CHECKING, RoundState.ABORTED}),
    RoundState.CHECKING: frozenset({RoundState.SUMMING, RoundState.ABORTED}),
    RoundState.SUMMING: frozenset({RoundState.RELEASING, RoundState.ABORTED}),
    RoundState.RELEASING: frozenset({RoundState.DONE, RoundState.AUDITING, RoundState.ABORTED}),
    RoundState.AUDITING: frozenset({RoundState.SUMMING, RoundState.ABORTED}),
    RoundState.DONE: frozenset(),
    RoundState.ABORTED: frozenset(),
}


def check_transition(old: RoundState, new: RoundState) -> None:
    """Refuse a step that the table does not have.

    Raises:
        ClosedError: the round has moved on.
    """
    if new not in TRANSITIONS[old]:
        raise ClosedError(f"expected a round that can become {new}; it is {old} already")
