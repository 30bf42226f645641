"""The ledger in words for people, and in one document for programs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from secagg.commands import out, print_table
from secagg_client.ledger import Account, Entry, Fate

__all__ = ["accounts_table", "as_json", "entries_table"]

_NO_BOUND = "no bound"
_WORDS = {
    Fate.SENT: "sent, answer unknown",
    Fate.ACCEPTED: "accepted",
    Fate.REFUSED: "refused",
    Fate.WITHDRAWN: "withdrawn",
    Fate.MISSED: "too late",
}
_LEGEND = (
    "Spent: what the releases may tell about this client's data, as epsilon; 0 is nothing, 1 "
    "little, above 10 much. At most: the same if the server used what it said it left out; budgets "
    "are held against this. No bound: the task adds no noise, and nothing limits what it tells."
)


def accounts_table(accounts: Sequence[Account], max_epsilon: float | None) -> None:
    """What each task has cost.

    Args:
        max_epsilon: the user's own limit.
    """
    rows = [
        (
            account.task,
            account.rounds,
            _plain(account.clip),
            _noise(account.clip, account.privacy),
            _epsilon(account.spent),
            _epsilon(account.at_most),
            _budget(account.privacy),
            _epsilon(_left(account, max_epsilon)) if account.privacy else "-",
        )
        for account in accounts
    ]
    columns = ("task", "rounds", "first clip", "noise", "spent", "at most", "budget", "left")
    print_table(columns, rows)
    out.print(_LEGEND, highlight=False)


def entries_table(entries: Sequence[Entry]) -> None:
    """Each contribution."""
    rows = [
        (
            entry.round_number,
            entry.attempt,
            entry.at.replace("T", " ").removesuffix("+00:00"),
            _plain(entry.clip),
            _plain(entry.bits),
            _much(entry.clip, entry.privacy),
            _what_became(entry),
        )
        for entry in entries
    ]
    columns = ("round", "attempt", "when (UTC)", "clip norm", "bits", "noise", "what became of it")
    print_table(columns, rows)


def as_json(
    accounts: Sequence[Account],
    entries: Sequence[Entry],
    since: str | None,
    max_epsilon: float | None,
) -> dict[str, Any]:
    """All of it; an epsilon of null is one without bound."""
    return {
        "paused_since": since,
        "max_epsilon": max_epsilon,
        "tasks": [
            asdict(account)
            | {
                "spent": _finite(account.spent),
                "at_most": _finite(account.at_most),
                "left": _left(account, max_epsilon),
                "contributions": [
                    {name: value for name, value in asdict(entry).items() if name != "task"}
                    for entry in entries
                    if entry.task == account.task
                ],
            }
            for account in accounts
        ],
    }


def _left(account: Account, max_epsilon: float | None) -> float:
    """What the budget leaves, and the user's own limit."""
    own = math.inf if max_epsilon is None else max(0.0, max_epsilon - account.at_most)
    return min(account.left, own)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _epsilon(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else _NO_BOUND


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _much(clip: float | None, privacy: Mapping[str, Any] | None) -> str:
    """How much noise: by the clip norm, or by the largest norm of integers."""
    if privacy is None:
        return "none"
    return f"{privacy['noise_multiplier']:g} x {'norm' if clip is None else 'clip'}"


def _noise(clip: float | None, privacy: Mapping[str, Any] | None) -> str:
    """How much, and whose."""
    if privacy is None:
        return "none"
    whose = {
        "release": "by the key holder",
        "distributed": f"by {privacy['honest_clients']} clients together",
        "local": "by this client",
    }
    return f"{_much(clip, privacy)}, {whose[privacy['mode']]}"


def _budget(privacy: Mapping[str, Any] | None) -> str:
    if privacy is None:
        return "none"
    return f"{privacy['epsilon']:g} (delta {privacy['delta']:g})"


def _what_became(entry: Entry) -> str:
    nothing_left = entry.certain and entry.fate is not Fate.ACCEPTED
    return _WORDS[entry.fate] + (", in no sum" if nothing_left else "")
