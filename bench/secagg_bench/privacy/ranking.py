"""How good recommendations are for each user, and how sure a mean over users and seeds is.

The client library's protocols (99 sampled negatives, and the whole catalogue), by user: intervals
and differences between methods need that. Read `federated` next.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from secagg_recommender.evaluation import CUTOFF, Evaluator, ScoresFn

__all__ = ["METRICS", "Interval", "UserEvaluator", "interval"]

METRICS: Final = ("hr10", "ndcg10", "full_hr10", "full_ndcg10")
"""Names of the rows of what `UserEvaluator.by_user` returns."""

_RESAMPLES = 1000
# 97.5 % quantiles of Student's distribution with 1, 2, … degrees of freedom.
_STUDENT: Final = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class UserEvaluator(Evaluator):
    """Metrics of every user that has a test item, instead of their means."""

    def by_user(self, scores: ScoresFn) -> NDArray[np.float64]:
        """Float64 of shape (metrics, users).

        Raises:
            DataError: scores have another shape than ``(users, n_items)`` or are not finite.
        """
        parts = []
        for chunk in self._chunks:
            values = self._checked(scores(chunk.users), chunk.users.size)
            sampled = chunk.sampled_ranks(values).reshape(chunk.users.size, -1)
            full = chunk.full_ranks(values)[:, None]
            parts.append([gain(ranks).mean(axis=1) for ranks in (sampled, full) for gain in _GAINS])
        return np.concatenate([np.asarray(part) for part in parts], axis=1)


def _hit(ranks: NDArray[np.int64]) -> NDArray[np.float64]:
    return (ranks < CUTOFF).astype(np.float64)


def _discounted(ranks: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.where(ranks < CUTOFF, 1.0 / np.log2(ranks + 2.0), 0.0)


_GAINS = (_hit, _discounted)


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with 95 % confidence.

    Attributes:
        low, high: percentiles of a bootstrap over users and seeds, both drawn anew (the pigeonhole
            bootstrap: Owen 2007, "The pigeonhole bootstrap").
        seed_half_width: of Student's interval over the seeds' means alone; nan for one seed.
    """

    mean: float
    low: float
    high: float
    seed_half_width: float


def interval(values: NDArray[np.float64], seed: int = 0) -> Interval:
    """Interval of the mean of values of shape (seeds, users)."""
    seeds, users = values.shape
    picks = np.random.default_rng(seed).multinomial(
        seeds, np.full(seeds, 1 / seeds), size=_RESAMPLES
    )
    means = np.einsum("bs,bs->b", picks / seeds, _weights(users, seed) @ values.T)
    low, high = np.percentile(means, [2.5, 97.5])
    half = float("nan")
    if seeds > 1:
        error = values.mean(axis=1).std(ddof=1) / np.sqrt(seeds)
        half = float(_STUDENT[min(seeds - 1, len(_STUDENT)) - 1] * error)
    return Interval(float(values.mean()), float(low), float(high), half)


@lru_cache(maxsize=2)
def _weights(users: int, seed: int) -> NDArray[np.float64]:
    """How often each resample has each user, over the sum: Poisson's, nearly a multinomial's."""
    rng = np.random.default_rng([seed, users])
    drawn = rng.poisson(1.0, size=(_RESAMPLES, users)).astype(np.float64)
    drawn[drawn.sum(axis=1) == 0] = 1.0
    return np.asarray(drawn / drawn.sum(axis=1, keepdims=True), dtype=np.float64)
