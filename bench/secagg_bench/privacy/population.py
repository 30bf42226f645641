"""Who trains and who is evaluated: users as clients, kept apart from the split they came from.

A larger population is a bootstrap of the real one. Read `mechanism` next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from secagg_recommender.datasets import load_dataset
from secagg_recommender.interactions import NO_TEST_ITEM, DataError, Split, split_leave_one_out
from secagg_recommender.marketplace import generate_marketplace

__all__ = ["DATASETS", "Clients", "bootstrap", "load_split", "validation_split"]

DATASETS: Final = ("ml-100k", "amazon-beauty", "toy")
"""``"toy"`` is generated; the others need their files."""

_TOY: Final = {"n_shoppers": 120, "n_products": 100}


@dataclass(frozen=True, eq=False)
class Clients:
    """Clients that hold one user's training items each.

    Attributes:
        counts: how many items each client has, int64 of shape (clients,); 1 or more.
        items: their items one client after another, int64 of shape (positives,).
        n_items: size of the catalogue.
    """

    counts: NDArray[np.int64]
    items: NDArray[np.int64]
    n_items: int

    def __post_init__(self) -> None:
        if self.counts.size == 0 or self.counts.min() < 1 or self.counts.sum() != self.items.size:
            raise DataError(
                "expected clients with one item or more each, got "
                f"clients={self.counts.size} items={self.items.size}; leave empty clients out"
            )

    def __len__(self) -> int:
        return int(self.counts.size)

    @classmethod
    def of(cls, split: Split) -> Clients:
        """Every user of a split, in its order.

        Raises:
            DataError: a user has no training item.
        """
        counts = np.bincount(split.train_users, minlength=split.n_users).astype(np.int64)
        return cls(counts, split.train_items.astype(np.int64), split.n_items)

    @cached_property
    def first(self) -> NDArray[np.int64]:
        """Where each client's items begin, int64 of shape (clients,)."""
        return np.cumsum(self.counts) - self.counts

    @cached_property
    def owners(self) -> NDArray[np.int64]:
        """Whose each item is, int64 of shape (positives,)."""
        return np.repeat(np.arange(len(self)), self.counts)

    def chosen(self, rows: NDArray[np.int64]) -> Clients:
        """These clients, in this order; a row may come more than once."""
        counts = self.counts[rows]
        start = np.repeat(self.first[rows] - (np.cumsum(counts) - counts), counts)
        return Clients(counts, self.items[start + np.arange(counts.sum())], self.n_items)

    def dense(self) -> NDArray[np.float32]:
        """One where a client has an item: float32 of shape (clients, n_items)."""
        table = np.zeros((len(self), self.n_items), dtype=np.float32)
        table[self.owners, self.items] = 1.0
        return table

    def totals(self, values: NDArray[np.floating]) -> NDArray[np.float64]:
        """Sum of one value a positive over those of each item: float64 of shape (n_items,)."""
        summed = np.bincount(self.items, weights=values, minlength=self.n_items)
        return summed.astype(np.float64)

    def batches(self, entries: int, width: int = 0) -> Iterator[tuple[slice, slice, Clients]]:
        """Clients in batches, with their rows and the places of their items.

        Args:
            entries: that fit into a batch: of ``width`` a client, and one an item.
        """
        ends = np.cumsum(self.counts + width)
        start, total = 0, int(ends[-1])
        for end in range(entries, total + entries, entries):
            stop = int(np.searchsorted(ends, end, side="right"))
            if end >= total:
                stop = len(self)
            if stop > start:
                places = slice(
                    int(self.first[start]), int(self.first[start:stop][-1] + self.counts[stop - 1])
                )
                batch = Clients(self.counts[start:stop], self.items[places], self.n_items)
                yield slice(start, stop), places, batch
                start = stop


def bootstrap(clients: Clients, count: int, keep: float, rng: np.random.Generator) -> Clients:
    """A population of another size: clients drawn with replacement, each with some of its items.

    It holds no tastes that the real population does not: what grows is the number of clients, and
    with it the signal beside the noise.

    Args:
        keep: probability with which a drawn client keeps an item; one item always stays.
    """
    drawn = clients.chosen(rng.integers(len(clients), size=count))
    lots = rng.random(drawn.items.size)
    least = np.minimum.reduceat(lots, drawn.first)
    kept = (lots < keep) | (lots == least[drawn.owners])
    counts = np.bincount(drawn.owners[kept], minlength=count).astype(np.int64)
    return Clients(counts, drawn.items[kept], drawn.n_items)


def load_split(name: str, data_dir: Path | None) -> Split:
    """Leave-one-out split of a dataset.

    Args:
        name: one of `DATASETS`.
        data_dir: folder with ``ml-100k/`` and ``amazon-beauty/``; the toy needs none.

    Raises:
        DataError: unknown name, or unusable files.
    """
    if name == "toy":
        return split_leave_one_out(generate_marketplace(seed=0, **_TOY))
    return split_leave_one_out(load_dataset(name, data_dir))


def validation_split(split: Split) -> Split:
    """The last training item of each user held out in turn; the test item is in neither part."""
    users, items = split.train_users, split.train_items
    counts = np.bincount(users, minlength=split.n_users)
    held = np.append(users[1:] != users[:-1], True) & (counts[users] >= 2)
    test = np.full(split.n_users, NO_TEST_ITEM, dtype=np.int32)
    test[users[held]] = items[held]
    return Split(users[~held], items[~held], test, split.n_users, split.n_items)
