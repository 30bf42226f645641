"""Why an item is in the list: what each item of a person's own history adds to its score.

Computed on the device, from what is there anyway; nothing is asked of anybody. A model that is
linear in the history has exact terms that add up to the score. A fitted user vector is not: there,
the effect of an item is how far the score would move if the vector were fitted without it, by one
step of Newton's method. Hu, Koren and Volinsky 2008, "Collaborative Filtering for Implicit Feedback
Datasets", section 5, explain implicit least squares through the same matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from secagg_recommender.histories import HistoryModel
from secagg_recommender.index import check_own, check_table
from secagg_recommender.interactions import DataError

__all__ = ["Reason", "fit_effects", "history_effects", "reasons"]

_Floats = npt.NDArray[np.float64]
_SMALLEST_L2: Final = 1e-4  # as in fit_user()


@dataclass(frozen=True, slots=True)
class Reason:
    """An item of the history, and what it adds to the score that is explained."""

    item: int
    effect: float


def reasons(
    history: npt.NDArray[np.integer], effects: npt.NDArray[np.floating], most: int = 2
) -> list[Reason]:
    """The items that add most to a score, largest first, and only what adds at all.

    *Shapes*: ``effects`` ``(len(history),)``, one for each item of the history. Equal effects come
    in order of item id.

    Raises:
        DataError: other shapes, effects that are not finite, or ``most`` below 1.
    """
    if history.ndim != 1 or effects.shape != history.shape or most < 1:
        raise DataError(
            f"expected one effect for each item and most >= 1, got history={history.shape} "
            f"effects={effects.shape} most={most}; pass the effects on one score"
        )
    if not np.isfinite(effects).all():
        raise DataError("expected finite effects, got NaN or infinity; fit the user vector again")
    order = np.lexsort((history, -effects))[:most]
    return [Reason(int(history[i]), float(effects[i])) for i in order if effects[i] > 0.0]


def fit_effects(
    vector: npt.NDArray[np.floating],
    shared: Mapping[str, npt.NDArray[np.float32]],
    own: npt.NDArray[np.integer],
    items: npt.NDArray[np.integer],
    *,
    l2: float,
    negatives: int,
) -> _Floats:
    """What each own item adds to the scores of ``items`` through a user vector.

    The vector minimises ``fit_user``'s objective, of the mean over own items and the mean over all
    others. Without own item i, which joins the others, one Newton step from the vector leads close
    to that problem's solution; the step of the whole problem is subtracted, so that a vector that
    was trained instead of fitted is explained too.

    Args:
        vector: ``(d,)``.
        shared: ``item_factors`` ``(n_items, d)`` and ``item_bias`` ``(n_items,)``.
        own: the history, distinct.
        items: whose scores are explained.
        l2, negatives: as in the `TrainConfig` of the fit.

    Returns:
        float64 ``(len(own), len(items))``.

    Raises:
        DataError: ids outside the catalogue or twice, nothing but own items, or other shapes.
    """
    factors, bias = shared["item_factors"], shared["item_bias"]
    check_table(factors, bias, vector.size)
    mine = check_own(own, len(bias))
    check_own(items, len(bias))
    if not 0 < mine.size < len(bias) or mine.size != own.size or not np.isfinite(vector).all():
        raise DataError(
            f"expected between 1 and {len(bias) - 1} distinct own items and a finite vector, got "
            f"own={own.size} distinct={mine.size}; explain the vector of this history"
        )
    problem = _Problem.at(vector.astype(np.float64), factors, bias, own, l2, negatives)
    whole = problem.step(problem.positive, problem.negative, own.size)
    moved = np.stack([problem.step_without(i) for i in range(own.size)])
    return np.asarray((whole - moved) @ factors[items].astype(np.float64).T)


@dataclass(frozen=True, slots=True, eq=False)
class _Slopes:
    """Gradient ``(d,)`` and curvature ``(d, d)`` of a sum of losses."""

    gradient: _Floats
    curvature: _Floats

    def plus(self, other: _Slopes, sign: float) -> _Slopes:
        return _Slopes(
            self.gradient + sign * other.gradient, self.curvature + sign * other.curvature
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Problem:
    """The logistic fit of one user, at one vector: sums over own items, and over all others."""

    vector: _Floats
    rows: _Floats  # of the own items
    probability: _Floats  # of the own items
    positive: _Slopes
    negative: _Slopes
    others: int
    l2: float
    negatives: int

    @classmethod
    def at(
        cls,
        vector: _Floats,
        factors: npt.NDArray[np.float32],
        bias: npt.NDArray[np.float32],
        own: npt.NDArray[np.integer],
        l2: float,
        negatives: int,
    ) -> _Problem:
        wide = factors.astype(np.float64)
        probability = 0.5 * (1.0 + np.tanh(0.5 * (wide @ vector + bias)))
        is_other = np.ones(len(bias), dtype=bool)
        is_other[own] = False
        return cls(
            vector,
            wide[own],
            probability[own],
            _slopes(wide[own], probability[own], 1.0),
            _slopes(wide[is_other], probability[is_other], 0.0),
            len(bias) - own.size,
            max(l2, _SMALLEST_L2),
            negatives,
        )

    def step(self, positive: _Slopes, negative: _Slopes, owned: int) -> _Floats:
        """Newton's step of the problem with these sums and so many own items."""
        others = self.others + len(self.rows) - owned
        if owned == 0:
            return -self.vector  # without a history there is no vector
        each = 1.0 / owned / (1.0 + self.negatives)
        other = self.negatives / others / (1.0 + self.negatives)
        gradient = each * positive.gradient + other * negative.gradient + self.l2 * self.vector
        curvature = each * positive.curvature + other * negative.curvature
        curvature += self.l2 * np.eye(self.vector.size)
        return np.asarray(-np.linalg.solve(curvature, gradient))

    def step_without(self, place: int) -> _Floats:
        """Newton's step where one own item is one of the others."""
        row, probability = self.rows[place : place + 1], self.probability[place : place + 1]
        positive = self.positive.plus(_slopes(row, probability, 1.0), -1.0)
        negative = self.negative.plus(_slopes(row, probability, 0.0), 1.0)
        return self.step(positive, negative, len(self.rows) - 1)


def _slopes(rows: _Floats, probability: _Floats, target: float) -> _Slopes:
    """Of Σ BCE(⟨p, q⟩ + b, y) over some items, with respect to p."""
    weighted = rows * (probability * (1.0 - probability))[:, None]
    return _Slopes((probability - target) @ rows, weighted.T @ rows)


def history_effects(
    model: HistoryModel, history: npt.NDArray[np.integer], items: npt.NDArray[np.integer]
) -> _Floats:
    """What each item of a history adds to the scores of ``items`` in a model of histories.

    Returns:
        float64 ``(len(history), len(items))``: of a linear model, exact terms that add up to the
        scores, but for what it adds itself, such as popularity to part ties.

    Raises:
        DataError: an empty history, or ids outside the catalogue.
    """
    check_own(items, model.n_items)
    return np.column_stack([model.terms(history, int(item)) for item in items])
