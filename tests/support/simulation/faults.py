"""What can go wrong in a run: a list of data, that can be printed, drawn and shrunk."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

__all__ = [
    "CLIENT_METHODS",
    "EVENTS",
    "KEY_HOLDER",
    "KEY_HOLDER_METHODS",
    "KINDS",
    "LIES",
    "MESSAGES",
    "METHODS",
    "SERVER",
    "At",
    "Die",
    "Fault",
    "Happening",
    "Lie",
    "Run",
]

SERVER, KEY_HOLDER = "server", "key holder"

CLIENT_METHODS = (
    "GetRound",
    "GetModel",
    "OpenUpload",
    "PutChunk",
    "CommitUpload",
    "GetVerdict",
    "WithdrawUpload",
)
KEY_HOLDER_METHODS = (
    "OpenRound",
    "JudgeUploads",
    "SubmitSketch",
    "GetVerdicts",
    "CheckSum",
    "Release",
    "AuditNoise",
    "CloseRound",
)
METHODS = CLIENT_METHODS + KEY_HOLDER_METHODS

MESSAGES = (
    "lose request",
    "lose answer",
    "time out",
    "deliver late",
    "deliver twice",
    "replay",
    "change request",
    "change answer",
)
"""What can happen to a call. "deliver late": its caller has given up by then, and tried again."""

LIES = (
    "beyond the norm",
    "off the grid",
    "noise",
    "broken seal",
    "another's signature",
    "two uploads",
)
"""What a client can send instead of its update."""

EVENTS = (
    "kill the server",
    "kill the key holder",
    "kill both",
    "stop the server",
    "crash a client",
    "crash a client, losing its outbox",
    "a client leaves",
    "a client comes late",
    "withdraw",
    "rotate a key",
    "revoke at the server",
    "revoke at the key holder",
    "revoke everywhere",
    "blobs full",
    "store full",
    "round keys full",
    "ledger full",
    "store locked",
    "ledger locked",
    "clock jumps",
    "abort the task",
)
KINDS = ("fault", "die", "at", "lie")


@dataclass(frozen=True)
class Fault:
    """Something happens to the n-th call of a method.

    Attributes:
        method: its name.
        nth: which call, from 1.
        what: one of `MESSAGES`.
        number: which byte, which earlier message, or how many seconds; what fits.
    """

    method: str
    nth: int
    what: str
    number: int = 0


@dataclass(frozen=True)
class Die:
    """A process dies where it passes a failpoint for the n-th time, and starts again later."""

    failpoint: str
    nth: int = 1
    down_s: int = 1


@dataclass(frozen=True)
class At:
    """Something happens at a moment.

    Attributes:
        second: since the start.
        what: one of `EVENTS`.
        client: to whom, if to a client.
        number: for how many seconds, or by how many.
    """

    second: float
    what: str
    client: int = 0
    number: int = 1


@dataclass(frozen=True)
class Lie:
    """A client sends something else, once, in a round.

    Attributes:
        client: which one.
        round_number: when.
        what: one of `LIES`.
    """

    client: int
    round_number: int
    what: str


Happening = Fault | Die | At | Lie


@dataclass(frozen=True)
class Run:
    """One run: who takes part in what, and everything that goes wrong.

    Attributes:
        seed: from which delays and keys follow; 0 for the same short delay everywhere.
        clients: how many are enrolled.
        rounds: of the task.
        target: uploads after which a round closes.
        plan: what is summed: "checked" and "unchecked" have a model, "counts" has none.
        happenings: what goes wrong.
    """

    seed: int = 0
    clients: int = 4
    rounds: int = 2
    target: int = 3
    plan: Literal["checked", "unchecked", "counts"] = "checked"
    happenings: tuple[Happening, ...] = field(default=())
