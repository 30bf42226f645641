"""What each task has spent of its privacy budget, by the key holder's own count of releases.

The first plan that is opened for a task pins its privacy, or that it has none: a server cannot open
one round of it without noise. A release costs what `privacy.release_rho` says of its plan, losses
add up, and what does not fit into (epsilon, delta) by `accounting` is neither opened nor released.
The count lies in the ledger, exact to the bit, and is the same after a restart.

What is counted:

* *Releases.* Reading one again costs nothing. A sum that was handed over and refused, or not
  released for another reason, left the key holder as one bit, and is not counted here, although in
  the modes where clients add the noise somebody has seen it: the key holder itself, and a client
  whose noise is in it counts it for itself.
* *Rounds that were passed over.* A round below the newest one that has no recorded release counts
  as released. A ledger that was restored from a backup, or begun anew, does not know of the last
  releases; clients, who never go back to a round before the newest they took part in, do. So the
  count is never too low for any of them, and no other rule is needed for restored ledgers. A server
  that moves on after a round only if it was released, or void, has the same count. What a task
  began with is lost with a ledger that is not restored; clients know it of their own.
"""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import astuple, dataclass
from pathlib import Path

from secagg.accounting import Budget
from secagg.context import RoundContext
from secagg.errors import BudgetError, ConfigurationError
from secagg.parameters import Privacy
from secagg.privacy import release_rho
from secagg_keyholder.database import Database, of_state

__all__ = ["Account", "account", "accounts", "admit"]

_PRIVACY = "mode, noise_multiplier, epsilon, delta, honest_clients, integer_share"


@dataclass(frozen=True, slots=True)
class Account:
    """What a task has spent.

    Attributes:
        task_id: the task.
        privacy: pinned by its first round; None for exact sums, which nothing bounds.
        releases: how many were made.
        passed_over: rounds that count as released without a record of it.
        rho: zCDP of all of them; infinite without privacy, once there is one.
        rho_each: zCDP of one release more, of the newest round's plan; infinite without privacy.
    """

    task_id: str
    privacy: Privacy | None
    releases: int
    passed_over: int
    rho: float
    rho_each: float

    @property
    def epsilon(self) -> float:
        """What was spent, at the budget's delta."""
        if self.privacy is None:
            return self.rho
        return self._budget(self.privacy).spent(self.rho)

    @property
    def left(self) -> int | None:
        """Releases that still fit; None for no bound."""
        if self.privacy is None:
            return None
        return self._budget(self.privacy).left(self.rho, self.rho_each)

    @property
    def part_left(self) -> float:
        """The part of epsilon that was not spent, from 0 to 1; 1 for no bound."""
        if self.privacy is None:
            return 1.0
        return max(0.0, 1.0 - self.epsilon / self.privacy.epsilon)

    @staticmethod
    def _budget(privacy: Privacy) -> Budget:
        return Budget(privacy.epsilon, privacy.delta)

    def require_room(self) -> None:
        """Refuse one release more than the budget has room for.

        Raises:
            BudgetError: it does not fit.
        """
        privacy = self.privacy
        if privacy is not None and not self.left:
            counted = self.releases + self.passed_over
            after = self._budget(privacy).spent(self.rho + self.rho_each)
            do = "the task is over: use its newest model"
            if not counted:
                do = f"give the task more noise, or a budget of more than epsilon={after:.6g}"
            raise BudgetError(
                "expected room for a release in the task's privacy budget, "
                f"epsilon={privacy.epsilon:g} at delta={privacy.delta:g}; got "
                f"{self.epsilon:.6g} spent by {counted} releases, and {after:.6g} with one more; "
                f"{do}"
            )


def admit(database: Database, context: RoundContext) -> Account:
    """Within a transaction that records a new round: pin its task's privacy, and find it room.

    Returns:
        The account as it is once the round is the newest.

    Raises:
        ConfigurationError: the task began with another privacy, or with or without any.
        BudgetError: see `Account.require_room`.
    """
    task_id, privacy = context.id.task_id, context.plan.privacy
    pinned = database.rows(f"SELECT {_PRIVACY} FROM tasks WHERE task_id = ?", task_id)  # noqa: S608
    if not pinned:
        values = astuple(privacy) if privacy else (None,) * 6
        database.change(
            f"INSERT INTO tasks (task_id, {_PRIVACY}) VALUES (?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
            task_id,
            *values,
        )
    elif (known := _privacy(pinned[0])) != privacy:
        raise ConfigurationError(
            f"expected the privacy that the task began with, {_named(known)}; got "
            f"{_named(privacy)}; use that, or start another task"
        )
    found = _account(
        database, task_id, privacy, newest=context.id.round_number, rho=release_rho(context.plan)
    )
    found.require_room()
    return found


def account(database: Database, task_id: str) -> Account | None:
    """A task's account; None for a task that was never seen."""
    pinned = database.rows(f"SELECT {_PRIVACY} FROM tasks WHERE task_id = ?", task_id)  # noqa: S608
    if not pinned:
        return None
    ((newest, rho),) = database.rows(
        """SELECT round_number, rho FROM rounds WHERE task_id = ?
            ORDER BY round_number DESC, attempt DESC LIMIT 1""",
        task_id,
    )
    return _account(database, task_id, _privacy(pinned[0]), newest=newest, rho=rho)


def accounts(state_dir: Path) -> list[Account]:
    """Every task's account, in the order of their first rounds, by the ledger of a state directory.

    Raises:
        ConfigurationError: no ledger, or none of this version.
        StorageError: it cannot be read.
    """
    with closing(of_state(state_dir)) as database:
        names = [name for (name,) in database.rows("SELECT task_id FROM tasks ORDER BY rowid")]
        return [found for name in names if (found := account(database, name))]


def _account(
    database: Database, task_id: str, privacy: Privacy | None, *, newest: int, rho: float | None
) -> Account:
    released = database.rows(
        """SELECT round_number, rho FROM rounds WHERE task_id = ? AND state = 'RELEASED'
            ORDER BY round_number""",
        task_id,
    )
    count = len(released)
    if privacy is None or rho is None:
        return Account(task_id, privacy, count, 0, math.inf if count else 0.0, math.inf)
    passed_over = newest - 1 - sum(number < newest for number, _ in released)
    total, most = 0.0, rho
    # One after the other, as a server adds them up: `sum` rounds otherwise in later Pythons.
    for _, each in released:
        total += each
        most = max(most, each)
    return Account(task_id, privacy, count, passed_over, total + passed_over * most, rho)


def _privacy(row: tuple[object, ...]) -> Privacy | None:
    return None if row[0] is None else Privacy(*row)  # type: ignore[arg-type]


def _named(privacy: Privacy | None) -> str:
    return "none" if privacy is None else repr(privacy)
