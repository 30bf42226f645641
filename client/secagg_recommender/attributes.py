"""What is known of items besides who had them: categories, brands, genres, bands of price.

Sparse: a row an item, in the order of the interactions' items. Content-built item tables read it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from secagg_recommender.interactions import DataError

__all__ = ["ItemAttributes", "attributes_of", "price_band", "rating_band"]


@dataclass(frozen=True, slots=True, eq=False)
class ItemAttributes:
    """Which attributes each item has.

    *Shapes*: ``indptr`` int64 ``(n_items + 1,)``, ``indices`` int32: item ``i`` has the attributes
    ``indices[indptr[i]:indptr[i + 1]]``, ascending, each once. ``labels`` names them, such as
    ``"brand: Lumen"``. Items without attributes are allowed.

    Raises:
        DataError: the arrays break a promise above.
    """

    indptr: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int32]
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check once, so that nothing downstream has to."""
        if self.indptr.dtype != np.int64 or self.indices.dtype != np.int32:
            raise DataError(
                "expected indptr as int64 and indices as int32, got "
                f"indptr={self.indptr.dtype} indices={self.indices.dtype}; use attributes_of()"
            )
        counts = np.diff(self.indptr)
        bounds = self.indptr.size > 0 and self.indptr[0] == 0
        if not bounds or (counts < 0).any() or self.indptr[-1] != self.indices.size:
            raise DataError(
                "expected indptr to rise from 0 to the number of indices, got "
                f"indptr={self.indptr.shape} indices={self.indices.shape}; use attributes_of()"
            )
        self._check_indices(counts)

    @property
    def n_items(self) -> int:
        """Number of items, with or without attributes."""
        return int(self.indptr.size) - 1

    @property
    def n_attributes(self) -> int:
        """Number of different attributes."""
        return len(self.labels)

    @property
    def n_without(self) -> int:
        """Number of items that have no attribute."""
        return int(np.count_nonzero(np.diff(self.indptr) == 0))

    def of(self, item: int) -> npt.NDArray[np.int32]:
        """Attributes of one item, ascending int32."""
        return self.indices[self.indptr[item] : self.indptr[item + 1]]

    def _check_indices(self, counts: npt.NDArray[np.int64]) -> None:
        """In range, ascending and unique inside each item."""
        keys = np.repeat(np.arange(counts.size), counts) * max(self.n_attributes, 1) + self.indices
        in_range = self.indices.size == 0 or (
            self.indices.min() >= 0 and self.indices.max() < self.n_attributes
        )
        if not in_range or (np.diff(keys) <= 0).any():
            raise DataError(
                f"expected attributes in [0, {self.n_attributes}), ascending and once an item; "
                "build with attributes_of()"
            )


def attributes_of(names: Sequence[Iterable[str]]) -> ItemAttributes:
    """Attributes by their names, one collection an item; labels come out in alphabetical order."""
    own = [set(of_item) for of_item in names]
    labels = sorted(set().union(*own))
    code = {label: place for place, label in enumerate(labels)}
    rows = [sorted(code[label] for label in of_item) for of_item in own]
    return ItemAttributes(
        indptr=np.cumsum([0, *map(len, rows)], dtype=np.int64),
        indices=np.asarray([attribute for row in rows for attribute in row], dtype=np.int32),
        labels=tuple(labels),
    )


def price_band(price: float) -> str:
    """Band of a price in any currency, steps of 1, 2, 5, 10, ...: ``"price: 20-50"``, or free."""
    if price <= 0:
        return "price: free"
    magnitude = 10.0 ** math.floor(math.log10(price))
    low, high = next(
        (low, high)
        for low, high in ((5, 10), (2, 5), (1, 2))
        if low * magnitude <= price or low == 1
    )
    return f"price: {low * magnitude:.12g}-{high * magnitude:.12g}"


def rating_band(rating: float) -> str:
    """Band of half a star, such as ``"rating: 4.0-4.5"``; 5 belongs to the last."""
    lower = min(math.floor(rating * 2) / 2, 4.5)
    return f"rating: {lower:.1f}-{lower + 0.5:.1f}"
