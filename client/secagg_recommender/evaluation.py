"""Ranking metrics on a leave-one-out split, in numpy.

Two protocols side by side: the test item among 99 sampled negatives (the customary one, which
flatters) and among all items the user has not trained on (the honest one). Nothing here may touch
training, and no score may depend on which items were sampled. Read ``recommend`` next.

Formulas, for a test item of rank r = 0, 1, …: HR@10 = [r < 10], NDCG@10 = [r < 10] / log2(r + 2)
(one relevant item, so the ideal DCG is 1), averaged over the users that have a test item.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from secagg_recommender.interactions import NO_TEST_ITEM, DataError, Split

__all__ = ["CUTOFF", "Evaluator", "Metrics", "ScoresFn", "evaluate", "factor_scores"]

CUTOFF: Final = 10
"""Length of the list that HR and NDCG look at."""
_NEGATIVES: Final = 99
_DRAWS: Final = 3
_USERS_PER_CHUNK: Final = 1024

ScoresFn = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.floating]]
"""User ids, shape ``(m,)``, to finite scores of all items, shape ``(m, n_items)``."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """Means over all users with a test item, each in [0, 1].

    ``hr10`` and ``ndcg10`` rank against 99 sampled negatives (mean over three draws),
    ``full_hr10`` and ``full_ndcg10`` against every item outside the user's training items.
    """

    hr10: float
    ndcg10: float
    full_hr10: float
    full_ndcg10: float


class Evaluator:
    """Draws the negatives of a split once and measures any number of models on them.

    Sampled negatives are 99 distinct items, uniform among all items minus the user's training
    items and test item; three independent draws. A user with fewer candidates gets all of them.

    Ties are pessimistic: an item with the same score as the test item ranks ahead of it. A
    constant model therefore scores 0 where an optimistic rule would give it 1.

    Raises:
        DataError: no user has a test item.
    """

    def __init__(self, split: Split, seed: int) -> None:
        """Draw the negatives; the same ``seed`` and split give the same ones."""
        self._split = split
        self._users = np.flatnonzero(split.test_item != NO_TEST_ITEM).astype(np.int64)
        if self._users.size == 0:
            raise DataError(
                "expected at least one user with two interactions, got test_users=0; "
                "there is nothing to evaluate on this split"
            )
        rng = np.random.default_rng(seed)
        self._chunks = [
            _draw_chunk(split, self._users[start : start + _USERS_PER_CHUNK], rng)
            for start in range(0, self._users.size, _USERS_PER_CHUNK)
        ]

    def evaluate(self, scores: ScoresFn) -> Metrics:
        """Metrics of a model given as a function from users to scores.

        Raises:
            DataError: scores have another shape than ``(users, n_items)`` or are not finite.
        """
        sampled_ranks, full_ranks = self.ranks(scores)
        return Metrics(
            hr10=_hit_rate(sampled_ranks),
            ndcg10=_ndcg(sampled_ranks),
            full_hr10=_hit_rate(full_ranks),
            full_ndcg10=_ndcg(full_ranks),
        )

    @property
    def users(self) -> npt.NDArray[np.int64]:
        """Users with a test item, ascending, ``(m,)``, a copy."""
        return self._users.copy()

    def ranks(self, scores: ScoresFn) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Rank of each test item, from 0, in the order of :attr:`users`.

        Returns:
            ``(3, m)`` among the negatives of each draw, and ``(m,)`` among all items.

        Raises:
            DataError: see :meth:`evaluate`.
        """
        sampled, full = [], []
        for chunk in self._chunks:
            values = self._checked(scores(chunk.users), chunk.users.size)
            sampled.append(chunk.sampled_ranks(values))
            full.append(chunk.full_ranks(values))
        return np.concatenate(sampled, axis=1), np.concatenate(full)

    def _checked(self, values: npt.NDArray[np.floating], n_users: int) -> npt.NDArray[np.floating]:
        """Refuse scores that would rank silently wrong."""
        if values.shape != (n_users, self._split.n_items):
            raise DataError(
                f"expected scores of shape ({n_users}, {self._split.n_items}), got "
                f"shape={values.shape}; score every item for every user asked for"
            )
        if not np.isfinite(values).all():
            raise DataError(
                f"expected finite scores, got non_finite={int((~np.isfinite(values)).sum())}; "
                "the model diverged: lower the learning rate"
            )
        return values


def evaluate(scores: ScoresFn, split: Split, seed: int) -> Metrics:
    """Metrics of one model; use :class:`Evaluator` to measure several on the same negatives.

    Raises:
        DataError: see :class:`Evaluator` and :meth:`Evaluator.evaluate`.
    """
    return Evaluator(split, seed).evaluate(scores)


def factor_scores(
    user_vectors: npt.NDArray[np.float32], shared: Mapping[str, npt.NDArray[np.float32]]
) -> ScoresFn:
    """Scores ⟨p_u, q_i⟩ + b_i of a factor model.

    *Shapes*: ``user_vectors`` float32 ``(n_users, d)``; ``shared`` holds ``item_factors``
    ``(n_items, d)`` and ``item_bias`` ``(n_items,)``.
    """
    item_factors, item_bias = shared["item_factors"], shared["item_bias"]

    def scores(users: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
        return np.asarray(user_vectors[users] @ item_factors.T + item_bias)

    return scores


@dataclass(frozen=True, slots=True, eq=False)
class _Chunk:
    """A batch of test users: test items ``(m,)``, negatives ``(draws, m, k)`` padded with −1."""

    users: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64]
    negatives: npt.NDArray[np.int64]
    train_rows: npt.NDArray[np.int64]
    train_items: npt.NDArray[np.int64]

    def sampled_ranks(self, scores: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
        """Rank of each test item in each draw: ``(draws, m)``."""
        own = self._own_scores(scores)
        rows = np.arange(self.users.size)[:, None]
        ahead = scores[rows, self.negatives] >= own[:, None]
        ranks = np.count_nonzero(ahead & (self.negatives >= 0), axis=2)
        return np.asarray(ranks, dtype=np.int64)

    def full_ranks(self, scores: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
        """Rank of each test item among all items outside training: ``(m,)``."""
        own = self._own_scores(scores)
        ahead = np.count_nonzero(scores >= own[:, None], axis=1)
        trained = scores[self.train_rows, self.train_items] >= own[self.train_rows]
        trained_ahead = np.bincount(self.train_rows[trained], minlength=self.users.size)
        return np.asarray(ahead - trained_ahead - 1, dtype=np.int64)  # 1: the test item itself

    def _own_scores(self, scores: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        """Scores of the test items, ``(m,)``."""
        return np.asarray(scores[np.arange(self.users.size), self.test])


def _draw_chunk(split: Split, users: npt.NDArray[np.int64], rng: np.random.Generator) -> _Chunk:
    """Sample the negatives of a batch of users: the smallest of uniform random keys."""
    row_of = np.full(split.n_users, -1, dtype=np.int64)
    row_of[users] = np.arange(users.size)
    rows = row_of[split.train_users]
    train_rows, train_items = rows[rows >= 0], split.train_items[rows >= 0].astype(np.int64)
    test = split.test_item[users].astype(np.int64)
    count = min(_NEGATIVES, split.n_items)
    draws = [
        _draw_once(train_rows, train_items, test, split.n_items, count, rng) for _ in range(_DRAWS)
    ]
    return _Chunk(users, test, np.stack(draws), train_rows, train_items)


def _draw_once(
    train_rows: npt.NDArray[np.int64],
    train_items: npt.NDArray[np.int64],
    test: npt.NDArray[np.int64],
    n_items: int,
    count: int,
    rng: np.random.Generator,
) -> npt.NDArray[np.int64]:
    """One draw of ``count`` negatives a user, ``(m, count)``, −1 where candidates ran out."""
    keys = rng.random((test.size, n_items))
    keys[train_rows, train_items] = np.inf
    keys[np.arange(test.size), test] = np.inf
    chosen = np.argpartition(keys, count - 1, axis=1)[:, :count]
    valid = np.isfinite(np.take_along_axis(keys, chosen, axis=1))
    return np.asarray(np.where(valid, chosen, -1), dtype=np.int64)


def _hit_rate(ranks: npt.NDArray[np.int64]) -> float:
    """Share of ranks inside the list."""
    return float(np.mean(ranks < CUTOFF))


def _ndcg(ranks: npt.NDArray[np.int64]) -> float:
    """Mean discounted gain of one relevant item."""
    return float(np.mean(np.where(ranks < CUTOFF, 1.0 / np.log2(ranks + 2.0), 0.0)))
