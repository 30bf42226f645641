"""What this client has contributed and what that cost in privacy, on its own disk before it leaves.

One file of lines, each a JSON object, that only grows: a line before the first byte of an upload
is sent, and one when it is known what became of it. What a crash cuts off is the last line, and
nothing was sent on its account; it is dropped by the next one that is written.

Every attempt at a round is an entry of its own, and a round counts once: the key holder opens one
sum of a round, however often it is attempted, and losses of zCDP add up over rounds. There are two
totals, because nobody can check what a server says that it has left out:

* *spent* takes it at its word: contributions that it refused, closed the round to, or let be
  withdrawn cost nothing;
* *at most* counts them as well. Budgets and limits are held against this one.

In neither is a contribution of which no ciphertext ever left, nor one whose refusal the key holder
has signed.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import structlog

from secagg.context import ContextId, RoundContext
from secagg.errors import ClosedError, ConfigurationError, PrivacyError
from secagg.parameters import FloatSegment, Plan
from secagg.privacy import release_rho
from secagg.private_files import flush, make_folder

__all__ = ["Account", "Entry", "Fate", "Ledger", "Limits"]

_FILE = "ledger.jsonl"
_ROUNDING = 1 + 1e-9  # sums of rho in another order than the budget was made from
_LOG = structlog.get_logger(__name__)


class Fate(StrEnum):
    """What became of a contribution."""

    SENT = "sent"
    ACCEPTED = "accepted"
    REFUSED = "refused"
    WITHDRAWN = "withdrawn"
    MISSED = "missed"


_SPENT = (Fate.SENT, Fate.ACCEPTED)
_DETAILS = ("at", "clip", "bits", "privacy", "rho", "upload")  # in the order of an entry


@dataclass(frozen=True, slots=True)
class Limits:
    """What a user allows, beyond what a task's plan does.

    Attributes:
        max_epsilon: refuse to spend more in any one task, at the delta of its budget; with it,
            tasks without privacy are refused.
        require_privacy: refuse tasks without privacy.
    """

    max_epsilon: float | None = None
    require_privacy: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """One attempt to contribute to a round.

    Attributes:
        task, round_number, attempt: which one.
        at: when it was first about to be sent; ISO 8601, UTC.
        clip: L2 norm, in model units, that the update was clipped to; None without an update.
        bits: of one quantised coordinate; None without an update.
        privacy: the fields of the plan's `Privacy`, its budget among them; None without one.
        rho: zCDP of one release; None without privacy: there is no bound.
        upload: digest of the upload in hexadecimal, by which the audit logs of server and key
            holder know it.
        fate: what became of it.
        certain: it is in no sum, whatever the server did.
    """

    task: str
    round_number: int
    attempt: int
    at: str
    clip: float | None
    bits: int | None
    privacy: Mapping[str, Any] | None
    rho: float | None
    upload: str = ""
    fate: Fate = Fate.SENT
    certain: bool = False

    @classmethod
    def of(cls, context: RoundContext, upload_digest: bytes = b"") -> Entry:
        """A contribution that is about to be sent."""
        plan, name = context.plan, context.id
        update = next((s for s in plan.segments if isinstance(s, FloatSegment)), None)
        return cls(
            name.task_id,
            name.round_number,
            name.attempt,
            datetime.now(UTC).isoformat(timespec="seconds"),
            update.clip if update else None,
            update.bits if update else None,
            _fields(plan),
            release_rho(plan) if plan.privacy else None,
            upload_digest.hex(),
        )

    @property
    def key(self) -> tuple[str, int, int]:
        """Task, round and attempt."""
        return self.task, self.round_number, self.attempt

    def then(self, fate: Fate, certain: bool) -> Entry:
        """With what was heard of it next; what is certain, or withdrawn, stays so."""
        settled = self.certain or self.fate is Fate.WITHDRAWN
        return replace(self, fate=self.fate if settled else fate, certain=self.certain or certain)


@dataclass(frozen=True, slots=True)
class Account:
    """What a task has cost this client.

    Attributes:
        task: which one.
        rounds: rounds that count as spent.
        clip, bits, privacy: as the task began; see `Entry`.
        spent: epsilon at the budget's delta, by the server's word; infinite without privacy.
        at_most: the same whatever the server did.
        left: what the budget leaves beyond that; infinite, or 0, without a budget.
    """

    task: str
    rounds: int
    clip: float | None
    bits: int | None
    privacy: Mapping[str, Any] | None
    spent: float
    at_most: float
    left: float


class Ledger:
    """The contributions of one client, to all of its tasks.

    Args:
        folder: private to this client; None keeps them in memory only.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._memory = b""

    def entries(self, task: str | None = None) -> list[Entry]:
        """Every attempt to contribute, in order; those to one task if one is given.

        Raises:
            ConfigurationError: the file is damaged, or cannot be read.
        """
        found: dict[tuple[str, int, int], Entry] = {}
        whole = self._read()
        lines = whole[: whole.rfind(b"\n") + 1].split(b"\n")[:-1]
        for number, line in enumerate(lines, 1):
            try:
                self._take(found, json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                raise ConfigurationError(
                    f"expected a ledger of whole lines; line {number} of {self._file} is damaged; "
                    "nothing is sent; put a copy of the file in its place, or move it away, which "
                    "forgets what was spent"
                ) from None
        return [entry for entry in found.values() if task in (None, entry.task)]

    def require(self, context: RoundContext, limits: Limits) -> None:
        """Refuse a contribution that would cost more than allowed, or other than agreed.

        Raises:
            PrivacyError: the plan's privacy is not what the task began with, or what this client
                would have spent at most is beyond the plan's budget or its own limits.
            ConfigurationError: the file is damaged, or cannot be read.
        """
        plan, past = context.plan, self.entries(context.id.task_id)
        if past:
            _require_same(past[0].privacy, _fields(plan))
        if plan.privacy is None:
            if limits.require_privacy or limits.max_epsilon is not None:
                raise PrivacyError(
                    "expected a task with privacy, as your settings ask for; this one adds no "
                    "noise and has no bound; nothing was sent; leave it, or drop require_privacy "
                    "and max_epsilon"
                )
            return
        counted = [entry for entry in past if not entry.certain]
        would = _epsilon(_rho([*counted, Entry.of(context)]), plan.privacy.delta)
        for what, allowed in (
            ("the task's budget", plan.privacy.epsilon),
            ("your max_epsilon", limits.max_epsilon),
        ):
            if allowed is not None and would > allowed * _ROUNDING:
                raise PrivacyError(
                    f"expected to stay within {what}, epsilon={allowed:g} at "
                    f"delta={plan.privacy.delta:g}; with this round it could have spent "
                    f"epsilon={would:.4g}; nothing was sent; this client is done with the task"
                )

    def sent(self, context: RoundContext, upload_digest: bytes = b"") -> bool:
        """Note that a contribution is about to be sent; returns whether none of it has left before.

        Raises:
            ClosedError: it was withdrawn.
            ConfigurationError: it cannot be noted; it must not be sent.
        """
        new = Entry.of(context, upload_digest)
        known = next((e for e in self.entries(new.task) if e.key == new.key), None)
        if known and known.fate is Fate.WITHDRAWN:
            raise ClosedError(
                "expected a contribution that was not withdrawn; this one was; nothing was sent; "
                "join the next round"
            )
        key = {"task": new.task, "round": new.round_number, "attempt": new.attempt}
        details = {name: getattr(new, name) for name in _DETAILS}
        try:
            self._append(key | {"fate": Fate.SENT} | details)
        except OSError as error:
            raise ConfigurationError(
                f"expected a ledger that can be written; {self._file}: {error.strerror}; nothing "
                "was sent"
            ) from None
        return known is None or known.certain

    def ended(self, context: ContextId, fate: Fate, *, certain: bool = False) -> None:
        """Note what became of a contribution; if that fails, it goes on counting.

        Args:
            certain: it is in no sum, whatever the server did.
        """
        line = {"task": context.task_id, "round": context.round_number}
        at = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            self._append(
                line | {"attempt": context.attempt, "fate": fate, "at": at, "certain": certain}
            )
        except OSError as error:
            _LOG.warning("ledger_not_written", why=error.strerror)

    def fate(self, context: ContextId) -> Fate | None:
        """What became of the contribution to an attempt, as far as is known; None without one."""
        number = (context.round_number, context.attempt)
        found = (e for e in self.entries(context.task_id) if (e.round_number, e.attempt) == number)
        return next((entry.fate for entry in found), None)

    def accounts(self, task: str | None = None) -> list[Account]:
        """What each task has cost, in the order in which they began.

        Raises:
            ConfigurationError: the file is damaged, or cannot be read.
        """
        entries = self.entries(task)
        names = dict.fromkeys(entry.task for entry in entries)
        return [_account([e for e in entries if e.task == name]) for name in names]

    @property
    def _file(self) -> Path:
        return (self._folder or Path()) / _FILE

    def _take(self, found: dict[tuple[str, int, int], Entry], line: dict[str, Any]) -> None:
        key, fate = (line["task"], line["round"], line["attempt"]), Fate(line["fate"])
        if [type(part) for part in key] != [str, int, int]:
            raise TypeError("expected a task's name, a round and an attempt")
        if fate is not Fate.SENT:
            if key in found:
                found[key] = found[key].then(fate, line["certain"] is True)
            return
        new = Entry(*key, *(line[name] for name in _DETAILS))
        _check_costs(new)
        if (known := found.get(key)) is not None:
            new = replace(new, at=known.at)
        found[key] = new

    def _read(self) -> bytes:
        if self._folder is None:
            return self._memory
        try:
            return self._file.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return b""
        except OSError as error:
            raise ConfigurationError(
                f"expected a ledger that can be read; {self._file}: {error.strerror}; nothing is "
                "sent"
            ) from None

    def _append(self, line: Mapping[str, Any]) -> None:
        """Add a line and have it on the disk; what a crash left of the one before is dropped."""
        data = json.dumps(line, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        if self._folder is None:
            self._memory += data
            return
        make_folder(self._folder)
        descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "r+b") as file:
            # A command that withdraws writes beside a client that takes part.
            fcntl.flock(file, fcntl.LOCK_EX)
            whole = file.read()
            file.truncate(whole.rfind(b"\n") + 1)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if not whole:
            flush(self._folder)


def _fields(plan: Plan) -> dict[str, Any] | None:
    return asdict(plan.privacy) if plan.privacy else None


def _check_costs(entry: Entry) -> None:
    """Refuse figures that no contribution has: a sum over them would be too small.

    Raises:
        ValueError, TypeError, KeyError: they are damaged.
    """
    known = [] if entry.rho is None else [entry.rho]
    if entry.privacy is not None:
        known += [entry.privacy["epsilon"], entry.privacy["delta"]]
    if len(known) not in (0, 3) or not all(0 < number < math.inf for number in known):
        raise ValueError("expected figures above 0, or none")


def _require_same(began: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> None:
    """Refuse other terms than those that a task began with, as far as they were known then."""
    if (began is None) == (now is None):
        changed = [name for name, was in (began or {}).items() if (now or {}).get(name) != was]
        if not changed:
            return
        what = f"another {', '.join(changed)}"
    else:
        what = "none" if now is None else "one, where there was none"
    raise PrivacyError(
        "expected the privacy that this task began with for this client; got "
        f"{what}; nothing was sent; ask whoever runs the task, and join another one"
    )


def _rho(entries: Iterable[Entry]) -> float:
    """zCDP of these contributions: the dearest attempt of each round."""
    rounds: dict[int, float] = {}
    for entry in entries:
        rho = math.inf if entry.rho is None else entry.rho
        rounds[entry.round_number] = max(rho, rounds.get(entry.round_number, 0.0))
    return math.fsum(rounds.values())


def _epsilon(rho: float, delta: float) -> float:
    if rho == 0 or math.isinf(rho):
        return rho
    # Loads SciPy, which takes its time; most commands do without.
    from secagg.accounting import spent

    return spent(rho, delta)


def _account(entries: Sequence[Entry]) -> Account:
    first = entries[0]
    counted = [entry for entry in entries if entry.fate in _SPENT]
    privacy = first.privacy
    delta, budget = (privacy["delta"], privacy["epsilon"]) if privacy else (0.0, 0.0)
    cost: Callable[[Iterable[Entry]], float] = lambda some: _epsilon(_rho(some), delta)  # noqa: E731
    at_most = cost(entry for entry in entries if not entry.certain)
    return Account(
        first.task,
        len({entry.round_number for entry in counted}),
        first.clip,
        first.bits,
        privacy,
        cost(counted),
        at_most,
        max(0.0, budget - at_most) if privacy else 0.0,
    )
