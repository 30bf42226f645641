"""What a task's releases have cost of its privacy budget, and whether there is room for another.

The key holder keeps an account of its own, and has the last word. This one is the operator's: it
ends a task where its budget does, and says so. Needs the extra ``privacy`` for tasks with a budget,
and for no others.
"""

from __future__ import annotations

from dataclasses import dataclass

from secagg.accounting import Budget
from secagg.errors import BudgetError
from secagg.parameters import Plan
from secagg.privacy import release_rho
from secagg_server.schema import TaskRow
from secagg_server.tasks import TaskSpec

__all__ = ["Standing", "loss", "part_left", "require_room", "spent_in_full", "standing"]


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a task stands with its budget.

    Attributes:
        epsilon_spent: by all releases so far, at the budget's delta.
        releases_left: for which there is room, whatever the number of rounds.
    """

    epsilon_spent: float
    releases_left: int


def loss(plan: Plan) -> float:
    """zCDP of one release; 0 without privacy, which nobody accounts for."""
    return 0.0 if plan.privacy is None else release_rho(plan)


def standing(spec: TaskSpec, row: TaskRow) -> Standing | None:
    """Where a task stands; None without privacy.

    Raises:
        ConfigurationError: the extra ``privacy`` is not installed.
    """
    privacy = spec.plan.privacy
    if privacy is None:
        return None
    budget = Budget(privacy.epsilon, privacy.delta)
    left = budget.left(row.rho_spent, loss(spec.plan_at(row.clip)))
    return Standing(budget.spent(row.rho_spent), left)


def part_left(spec: TaskSpec, row: TaskRow) -> float:
    """The part of a task's epsilon that is left, from 0 to 1; 1 without privacy.

    Raises:
        ConfigurationError: the extra ``privacy`` is not installed.
    """
    privacy = spec.plan.privacy
    if privacy is None:
        return 1.0
    spent = Budget(privacy.epsilon, privacy.delta).spent(row.rho_spent)
    return max(0.0, 1.0 - spent / privacy.epsilon)


def require_room(spec: TaskSpec, row: TaskRow) -> None:
    """Refuse a round that the budget has no room for.

    Raises:
        BudgetError: it has none.
        ConfigurationError: the extra ``privacy`` is not installed.
    """
    found = standing(spec, row)
    if found is not None and not found.releases_left:
        raise BudgetError(
            "expected room for another release in the task's privacy budget; got none; what has "
            "been released stands; create another task for more"
        )


def spent_in_full(spec: TaskSpec, row: TaskRow) -> str:
    """How a task that its budget has ended came out, for its record.

    Where the key holder has counted more than this server, there may be some epsilon left.
    """
    found, privacy = standing(spec, row), spec.plan.privacy
    released = f"{BudgetError.reason}: {row.rounds_done} of {spec.rounds} rounds released"
    if found is None or privacy is None:
        return released
    more = "; the key holder has counted more" if found.releases_left else ""
    return f"{released}, epsilon {found.epsilon_spent:.4g} of {privacy.epsilon:g} spent{more}"
