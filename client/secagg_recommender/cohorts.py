"""A start for somebody new: what people of the same cohort have, from one encrypted sum.

A person's device contributes a table of zeros with ones in the block of its own cohort, for itself
and for the items it has; encrypted, so that nobody sees which block that is. The table's rows are
single cells, and the key holder withholds those with fewer than k contributors. From what is
released, a cohort's rates are shrunk to everybody's by empirical Bayes, and their log-odds rank the
catalogue for a newcomer, alone or in place of a model's biases. Release no totals beside the table,
nor other cohorts of the same people: a difference would tell a withheld cell.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from secagg.parameters import (
    FloatSegment,
    IntegerSegment,
    NormCheck,
    Plan,
    Privacy,
    RowThreshold,
    TensorSpec,
)
from secagg.planner import make_plan
from secagg_recommender.interactions import DataError
from secagg_recommender.learner import Assignment, Work

__all__ = [
    "AGE_GENDER",
    "COHORT_COUNTS",
    "CohortLearner",
    "CohortTable",
    "age_gender",
    "cells_of",
    "cohort_plan",
]

COHORT_COUNTS: Final = "cohort_counts"
"""Name of the tensor: float32 ``(cohorts · (n_items + 1), 1)``. A cohort's block is one cell for
its members and one for each item."""
_UPDATE: Final = "update"
_CONTRIBUTORS: Final = "contributors"

_FROM_AGE: Final = (0, 25, 35, 50)
_AGES: Final = ("under 25", "25-34", "35-49", "50 and over")
_GENDERS: Final = ("F", "M")
AGE_GENDER: Final = tuple(f"{gender} {age}" for gender in _GENDERS for age in _AGES)
"""Names of the cohorts by age and gender, as MovieLens has them."""
_OLDEST: Final = 120

_Rates = npt.NDArray[np.float64]
# Below this many expected members, a cell says more of chance and of the threshold than of taste.
_EXPECTED: Final = 5.0
_STRENGTHS: Final = (1.0, 1e6)


def age_gender(age: int, gender: str) -> int:
    """Number of the cohort in :data:`AGE_GENDER`.

    Raises:
        DataError: an age that nobody has, or a gender that the data does not know.
    """
    if not 0 <= age <= _OLDEST or gender not in _GENDERS:
        raise DataError(
            f"expected an age from 0 to {_OLDEST} and a gender in {_GENDERS}, got another; leave "
            "the cohort out to start from what is popular"
        )
    band = sum(age >= first for first in _FROM_AGE) - 1
    return _GENDERS.index(gender) * len(_AGES) + band


def cohort_plan(
    n_cohorts: int,
    n_items: int,
    *,
    max_clients: int,
    least: int,
    most_items: int,
    min_clients: int = 3,
    norm_check: NormCheck | None = None,
    privacy: Privacy | None = None,
) -> Plan:
    """The plan of a round that counts, for each cohort, its members and who has which item.

    The clip norm is as many steps as a value can have, so that a step is exactly 1 and counting is
    exact: what is released of a cell is its count, or zero below ``least``.

    Args:
        n_cohorts, n_items: the table's sides.
        max_clients, min_clients, norm_check, privacy: see `secagg.planner.make_plan`.
        least: k, contributors that a cell must have; 2 or more.
        most_items: items that one person counts at the most.

    Raises:
        PlanError: no exact plan exists.
        DataError: a side below 1.
    """
    if min(n_cohorts, n_items, most_items) < 1:
        raise DataError(
            f"expected at least one cohort, item and counted item, got n_cohorts={n_cohorts} "
            f"n_items={n_items} most_items={most_items}; raise it"
        )
    cells, longest = n_cohorts * (n_items + 1), math.sqrt(min(most_items, n_items) + 1)
    bits = 1 + math.ceil(math.log2(longest + 1))
    table = FloatSegment(
        _UPDATE,
        (TensorSpec(COHORT_COUNTS, (cells, 1)),),
        float(2 ** (bits - 1) - 1),
        bits,
        rows=cells,
    )
    counted = IntegerSegment(_CONTRIBUTORS, cells, 1, longest)
    return make_plan(
        [table, counted],
        max_clients=max_clients,
        min_clients=min_clients,
        norm_check=norm_check,
        privacy=privacy,
        threshold=RowThreshold(_CONTRIBUTORS, least),
    )


def cells_of(
    cohort: int, items: npt.NDArray[np.integer], n_cohorts: int, n_items: int, most_items: int
) -> npt.NDArray[np.int64]:
    """Cells that one person counts in: the cohort's own, and those of its items, ascending.

    Of more than ``most_items``, a random part, drawn by the system's generator.

    Raises:
        DataError: a cohort or an item that does not exist.
    """
    distinct = np.unique(items)
    known = distinct.dtype.kind in "iu" or distinct.size == 0
    inside = not distinct.size or (distinct[0] >= 0 and distinct[-1] < n_items)
    if not (0 <= cohort < n_cohorts and known and inside):
        raise DataError(
            f"expected one of {n_cohorts} cohorts and items in [0, {n_items}), got others; use the "
            "catalogue and the cohorts of the task"
        )
    kept = distinct.tolist()
    if len(kept) > most_items:
        kept = sorted(random.SystemRandom().sample(kept, most_items))
    return cohort * (n_items + 1) + np.array([0, *(item + 1 for item in kept)], dtype=np.int64)


class CohortLearner:
    """A person's part in the round; holds nothing between rounds.

    Raises:
        DataError: see :func:`cells_of`.
    """

    def __init__(
        self,
        cohort: int,
        items: npt.NDArray[np.integer],
        *,
        n_cohorts: int,
        n_items: int,
        most_items: int,
    ) -> None:
        """Choose the cells."""
        self._cells = cells_of(cohort, items, n_cohorts, n_items, most_items)
        self._size = n_cohorts * (n_items + 1)

    @property
    def items(self) -> npt.NDArray[np.int64]:
        """The rows that this person contributes to, for the threshold: its cells."""
        return self._cells.copy()

    def work(self, assignment: Assignment) -> Work:
        """The table, and who contributes to which of its rows.

        Raises:
            DataError: the task is another one.
        """
        segment = assignment.segments.get(_UPDATE)
        if not isinstance(segment, FloatSegment) or segment.rows != self._size:
            raise DataError(
                f"expected a task with {self._size} rows in segment {_UPDATE!r}, got another; "
                "prepare it by cohort_plan() for the same cohorts and catalogue"
            )
        table = np.zeros((self._size, 1), dtype=np.float32)
        table[self._cells] = 1.0
        return Work({_UPDATE: {COHORT_COUNTS: table}})

    def counts(self) -> npt.NDArray[np.int64]:
        """One for each cell: what the segment of contributors wants."""
        counts = np.zeros(self._size, dtype=np.int64)
        counts[self._cells] = 1
        return counts

    def state(self) -> bytes:
        """Nothing is kept."""
        return b""

    def restore(self, state: bytes) -> None:
        """Nothing was kept."""


@dataclass(frozen=True, slots=True, eq=False)
class CohortTable:
    """What was released: zero means "fewer than ``least``", or nobody.

    *Shapes*: ``members`` float64 ``(cohorts,)``, ``counts`` float64 ``(cohorts, n_items)``.
    """

    members: _Rates = field(repr=False)
    counts: _Rates = field(repr=False)
    least: int

    @classmethod
    def released(
        cls, cells: npt.NDArray[np.number[Any]], n_cohorts: int, least: int
    ) -> CohortTable:
        """From the sum's cells, in their order; noise below zero counts as zero.

        Raises:
            DataError: another number of cells, values that are not finite, or nobody in any cohort.
        """
        flat = np.asarray(cells, dtype=np.float64).reshape(-1)
        if n_cohorts < 1 or least < 1 or flat.size % n_cohorts or flat.size < 2 * n_cohorts:
            raise DataError(
                f"expected a block of members and items for each of {n_cohorts} cohorts, got "
                f"cells={flat.size} least={least}; use the sums of the task that counted them"
            )
        if not np.isfinite(flat).all():
            raise DataError("expected finite counts, got NaN or infinity; fetch the table again")
        table = np.maximum(flat, 0.0).reshape(n_cohorts, -1)
        if not table[:, 0].any():
            raise DataError(
                "expected members in at least one cohort, got none; every cohort was below the "
                "threshold: use fewer cohorts or more people"
            )
        return cls(table[:, 0], table[:, 1:], least)

    @classmethod
    def from_model(
        cls, tensors: Mapping[str, npt.NDArray[Any]], n_cohorts: int, least: int, clients: int
    ) -> CohortTable:
        """From a task's model, which is the mean over ``clients`` contributors.

        Raises:
            DataError: see :meth:`released`; or a model of another task.
        """
        if COHORT_COUNTS not in tensors or clients < 1:
            raise DataError(
                f"expected a model with {COHORT_COUNTS} over 1 or more clients, got tensors="
                f"{', '.join(sorted(tensors)) or 'none'} clients={clients}; name the cohorts' task"
            )
        means = np.asarray(tensors[COHORT_COUNTS], dtype=np.float64)
        return cls.released(np.rint(means * clients), n_cohorts, least)

    @property
    def n_items(self) -> int:
        """Items of the catalogue."""
        return int(self.counts.shape[1])

    def popularity(self) -> _Rates:
        """Log-odds that somebody has an item, ``(n_items,)``: of what was released, all cohorts."""
        return _log_odds(self._overall())

    def start(self, cohort: int) -> _Rates:
        """Log-odds that a member of the cohort has an item, ``(n_items,)``; popularity if withheld.

        The posterior mean of a beta prior around everybody's rate p with strength s:
        (c + s p) / (m + s), of m members. A withheld cell counts as what p would have made it, but
        never ``least``.

        Raises:
            DataError: no such cohort.
        """
        if not 0 <= cohort < len(self.members):
            raise DataError(f"expected a cohort in [0, {len(self.members)}), got cohort={cohort}")
        overall, members = self._overall(), self.members[cohort]
        strength = self.strength()
        counts = self._counts(cohort, overall)
        return _log_odds((counts + strength * overall) / (members + strength))

    def strength(self) -> float:
        """s of the prior, in members, by the moments of all cells that expect enough.

        A count of m members has variance m p (1 − p) (1 + (m − 1) ρ), ρ = 1 / (s + 1) (Kleinman
        1973, "Proportions with Extraneous Variance").
        """
        overall = self._overall()
        excess = scale = 0.0
        for cohort, members in enumerate(self.members):
            used = members * overall >= max(_EXPECTED, 2.0 * self.least)
            rate, counts = overall[used], self._counts(cohort, overall)[used]
            variance = members * rate * (1.0 - rate)
            excess += float(((counts - members * rate) ** 2 - variance).sum())
            scale += float(((members - 1.0) * variance).sum())
        if excess <= 0.0 or scale <= 0.0:
            return _STRENGTHS[1]
        return float(np.clip(scale / excess - 1.0, *_STRENGTHS))

    def _overall(self) -> _Rates:
        """Everybody's rate of each item, inside (0, 1)."""
        people = self.members.sum()
        return np.asarray((np.minimum(self.counts.sum(axis=0), people) + 0.5) / (people + 1.0))

    def _counts(self, cohort: int, overall: _Rates) -> _Rates:
        """Counts of a cohort, with a guess for what was withheld."""
        members, counts = self.members[cohort], self.counts[cohort]
        guess = np.minimum(members * overall, self.least - 1.0)
        known = np.where(counts > 0, counts, guess)
        return np.asarray(np.minimum(known, members), dtype=np.float64)


def _log_odds(rate: _Rates) -> _Rates:
    return np.asarray(np.log(rate) - np.log1p(-rate), dtype=np.float64)
