"""What a key holder agrees to release, whatever the server asks: its `[release]` settings."""

from __future__ import annotations

from dataclasses import dataclass

from secagg.accounting import Budget
from secagg.errors import ConfigurationError
from secagg.parameters import MIN_COHORT, FloatSegment, Plan, RowThreshold

__all__ = ["DEFAULT_ATTEMPTS", "Policy"]

DEFAULT_ATTEMPTS = 10


@dataclass(frozen=True, slots=True)
class Policy:
    """A plan that breaks it is never opened. It cannot see what it does not decide: whether clients
    add the noise that a plan has them add, or which segments are item tables.

    Attributes:
        min_clients: the smallest cohort that is ever opened.
        attempts_per_model: attempts at rounds that start from the same model; a server that never
            moves on could otherwise collect the same updates again and again.
        require_privacy: whether plans without privacy are refused.
        max_budget: the largest epsilon, and the largest delta, of a plan's budget; then, too, plans
            without privacy are refused, which have no bound. None for any budget.
        min_row_contributors: plans with a float segment must withhold rows with fewer positive
            contributors than this; None for any plan. That is the one table that stays apart by
            rows: whether another segment has rows of the same items is for the clients to see.
    """

    min_clients: int = MIN_COHORT
    attempts_per_model: int = DEFAULT_ATTEMPTS
    require_privacy: bool = False
    max_budget: Budget | None = None
    min_row_contributors: int | None = None

    def check(self, plan: Plan) -> None:
        """Refuse a plan that breaks it.

        Raises:
            ConfigurationError: says which number would work.
        """
        if plan.min_clients < self.min_clients:
            raise ConfigurationError(
                f"expected a plan of at least min_clients={self.min_clients}, this key "
                f"holder's floor; got min_clients={plan.min_clients}; use {self.min_clients}"
            )
        if self.require_privacy or self.max_budget:
            self._check_privacy(plan)
        if any(isinstance(segment, FloatSegment) for segment in plan.segments):
            self._check_rows(plan.threshold)

    def _check_privacy(self, plan: Plan) -> None:
        most, privacy = self.max_budget, plan.privacy
        allowed = f"epsilon={most.epsilon:g} and delta={most.delta:g} at the most" if most else ""
        if privacy is None:
            raise ConfigurationError(
                "expected a plan with privacy, which this key holder requires; got one without; "
                f"give the task a privacy budget{f', {allowed}' if allowed else ''}"
            )
        if most and (privacy.epsilon > most.epsilon or privacy.delta > most.delta):
            raise ConfigurationError(
                f"expected a privacy budget of {allowed}, this key holder's limit; got "
                f"epsilon={privacy.epsilon:g}, delta={privacy.delta:g}; use "
                f"epsilon={min(privacy.epsilon, most.epsilon):g}, "
                f"delta={min(privacy.delta, most.delta):g}"
            )

    def _check_rows(self, threshold: RowThreshold | None) -> None:
        floor, least = self.min_row_contributors, threshold.least if threshold else 0
        if floor is not None and least < floor:
            raise ConfigurationError(
                f"expected a threshold that withholds rows of fewer than least={floor} "
                f"contributors, this key holder's floor; got {f'{least=}' if least else 'none'}; "
                f"use least={floor}"
            )
