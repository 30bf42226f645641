"""Recommending from one noisy co-occurrence table: two releases, no training.

Everybody contributes which items it has (as `federated` does), then which pairs of the most popular
ones, each as a vector of norm 1. What follows is post-processing, in one of two ways.

* **Few users with many items**: the table is of low rank. Eigenvalues below the edge of the noise's
  spectrum are dropped, the others shrunk (Gavish and Donoho 2017, "Optimal shrinkage of singular
  values"), and the item-item weights are EASE's (Steck 2019, "Embarrassingly Shallow Autoencoders
  for Sparse Data"): an item table of so few dimensions, from which users make their own vectors.
* **Many users with few items**: the table is sparse. Entries that noise explains are dropped, the
  others become cosines, as between neighbouring items.

Read `membership` next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from secagg_bench.privacy.federated import popularity
from secagg_bench.privacy.mechanism import Channel
from secagg_bench.privacy.population import Clients
from secagg_recommender.evaluation import ScoresFn

__all__ = ["Cooccurrence", "ItemWeights", "Pairs", "train"]

_CHUNK = 4096  # clients at a time
_LEAST_NOISE = 1e-6
_LEAST_LENGTH = 0.5  # what an item's diagonal is at the least, where noise made it less


@dataclass(frozen=True, slots=True)
class Cooccurrence:
    """Hyperparameters.

    Attributes:
        items: how many of the most popular items are paired.
        popularity_share: part of the budget for choosing them, and for ranking all others.
        threshold: in standard deviations of the noise, for tables that are sparse; 0 for tables
            of low rank.
        ridge: added to a table of low rank before it is inverted.
        popularity_weight: of log-popularity in scores.
    """

    items: int = 500
    popularity_share: float = 0.15
    threshold: float = 0.0
    ridge: float = 10.0
    popularity_weight: float = 0.01


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Which items a client has together: the upper triangle of a table, as a vector of norm 1."""

    clients: Clients
    chosen: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, ...]:
        size = self.chosen.size
        return (size * (size + 1) // 2,)

    def __len__(self) -> int:
        return len(self.clients)

    def _factors(self) -> Iterator[NDArray[np.float32]]:
        """Rows whose outer products with themselves the contributions are, some at a time."""
        place = np.full(self.clients.n_items, -1)
        place[self.chosen] = np.arange(self.chosen.size)
        for start in range(0, len(self), _CHUNK):
            batch = self.clients.chosen(np.arange(start, min(start + _CHUNK, len(self))))
            where = place[batch.items]
            owned = np.zeros((len(batch), self.chosen.size), dtype=np.float32)
            owned[batch.owners[where >= 0], where[where >= 0]] = 1.0
            count = owned.sum(axis=1, keepdims=True)
            # n (n + 1) / 2 ones in a triangle with its diagonal.
            yield owned / np.maximum(count * (count + 1) / 2, 1.0) ** 0.25

    def total(self) -> NDArray[np.float64]:
        size = self.chosen.size
        table = np.zeros((size, size))
        for rows in self._factors():
            table += rows.T @ rows
        return table[np.triu_indices(size)]

    def rows(self) -> Iterator[NDArray[np.float32]]:
        places = np.triu_indices(self.chosen.size)
        for rows in self._factors():
            for row in rows:
                yield np.outer(row, row)[places]

    def along(self, direction: NDArray[np.float64]) -> NDArray[np.float64]:
        table = np.zeros((self.chosen.size, self.chosen.size))
        table[np.triu_indices(self.chosen.size)] = direction
        return np.concatenate(
            [np.einsum("ui,ui->u", rows @ table, rows) for rows in self._factors()]
        )


def train(clients: Clients, settings: Cooccurrence, channel: Channel) -> ItemWeights:
    """Two releases, and what they make of any user's items."""
    counts = popularity(clients, channel, settings.popularity_share)
    chosen = np.argsort(-counts, kind="stable")[: settings.items].astype(np.int64)
    multiplier = channel.budget.multiplier(1 - settings.popularity_share)
    released = channel.release(Pairs(clients, chosen), multiplier)
    table = _symmetric(released.total, chosen.size)
    if settings.threshold > 0:
        weights = _cosines(table, settings.threshold * multiplier)
    else:
        weights = _low_rank(table, multiplier, settings.ridge)
    return ItemWeights(weights, chosen, settings.popularity_weight * np.log(counts))


@dataclass(frozen=True, slots=True, eq=False)
class ItemWeights:
    weights: NDArray[np.float32]
    chosen: NDArray[np.int64]
    base: NDArray[np.float64]

    def scores_of(self, clients: Clients) -> ScoresFn:
        """Scores of all items, for users with the items of the client of the same number."""

        def scores(users: NDArray[np.int64]) -> NDArray[np.floating]:
            owned = clients.chosen(users).dense()[:, self.chosen]
            result = np.tile(self.base, (users.size, 1))
            result[:, self.chosen] += owned @ self.weights
            return result

        return scores


def _symmetric(triangle: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    table = np.zeros((size, size))
    table[np.triu_indices(size)] = triangle
    return table + np.triu(table, 1).T


def _cosines(table: NDArray[np.float64], threshold: float) -> NDArray[np.float32]:
    """Cosines between items, of entries above the threshold, shrunk by half of it."""
    kept = np.where(table > threshold, table - threshold / 2, 0.0)
    lengths = np.sqrt(np.maximum(np.diag(table), _LEAST_LENGTH))
    kept /= lengths[:, None] * lengths[None, :]
    np.fill_diagonal(kept, 0.0)
    return kept.astype(np.float32)


def _low_rank(table: NDArray[np.float64], noise: float, ridge: float) -> NDArray[np.float32]:
    """Item-item weights of the table without its noise, of the given standard deviation."""
    values, vectors = np.linalg.eigh(table)
    edge = 2.0 * max(noise, _LEAST_NOISE) * np.sqrt(values.size)
    shrunk = np.sqrt(np.maximum(values**2 - edge**2, 0.0)) * (values > 0)
    # I - ridge (G + ridge)^-1, which needs no inverse.
    hat = (vectors * (shrunk / (shrunk + ridge))) @ vectors.T
    weights = hat / np.maximum(1.0 - np.diag(hat), 1e-6)
    np.fill_diagonal(weights, 0.0)
    return np.asarray(weights, dtype=np.float32)
