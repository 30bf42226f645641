"""Item vectors made of what items are: of their attributes, and of two hashed codes.

A table of a vector an item grows with the catalogue, and has nothing for an item that nobody has
had yet. A vector here is the weighted sum of its attributes' vectors, which all items with them
share, plus two code vectors that tell apart items of equal attributes. Which codes an item has is
a public hash of its label, so that only attributes and codes are learned, shared and encrypted.
Hashed, and not the item's number: numbers are often dealt out in the order in which shoppers first
bought things, and neighbouring numbers would then tell who bought what next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from secagg_recommender.attributes import ItemAttributes
from secagg_recommender.interactions import DataError

__all__ = ["BUCKETS", "CODES", "ItemContent", "hashed_codes", "item_content"]

CODES: Final = 2
"""Codes of an item, each from buckets of its own: the sum of two tells apart buckets² items."""

BUCKETS: Final = 224
"""Of each code, unless told otherwise."""


@dataclass(frozen=True, slots=True, eq=False)
class ItemContent:
    """What is public of each item, ready to be multiplied with what is learned.

    *Shapes*: ``indptr`` int64 ``(n_items + 1,)``; ``indices`` int64 and ``weights`` float32
    ``(nnz,)``: item i has attributes ``indices[indptr[i]:indptr[i + 1]]``, whose weights have a
    norm of 1 (0 where they tell nothing). ``codes`` int64 ``(n_items, CODES)``, rows of one table
    of ``CODES * buckets``. ``importance`` float32 ``(n_attributes,)``.
    """

    indptr: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]
    codes: npt.NDArray[np.int64]
    importance: npt.NDArray[np.float32]
    buckets: int

    @property
    def n_items(self) -> int:
        """Items of the catalogue."""
        return int(self.indptr.size) - 1

    @property
    def n_attributes(self) -> int:
        """Different attributes."""
        return int(self.importance.size)

    def vectors(
        self, attributes: npt.NDArray[np.float32], codes: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """Vectors of all items, float32 ``(n_items, d)``, of learned tables.

        *Shapes*: ``attributes`` float32 ``(n_attributes, d)``, ``codes`` ``(CODES * buckets, d)``.

        Raises:
            DataError: tables of other shapes.
        """
        self._check(attributes, codes)
        owner = np.repeat(np.arange(self.n_items), np.diff(self.indptr))
        found = codes[self.codes].sum(axis=1)
        np.add.at(found, owner, self.weights[:, None] * attributes[self.indices])
        return np.asarray(found, dtype=np.float32)

    def new_vector(
        self, attributes: npt.NDArray[np.float32], of_item: Iterable[int]
    ) -> npt.NDArray[np.float32]:
        """Vector ``(d,)`` of an item that is not in the catalogue: of its attributes alone.

        It has no codes: what these have learned is about other items.

        Args:
            attributes: the learned table, float32 ``(n_attributes, d)``.
            of_item: the item's attributes, by number.

        Raises:
            DataError: no attribute, an unknown one, or a table of another shape.
        """
        own = np.unique(np.asarray([*of_item], dtype=np.int64))
        if own.size == 0 or own[0] < 0 or own[-1] >= self.n_attributes:
            raise DataError(
                f"expected one or more attributes in [0, {self.n_attributes}), got "
                f"{own[:5].tolist()}; leave out attributes that the model has not learned"
            )
        if attributes.shape[:1] != (self.n_attributes,) or attributes.ndim != 2:
            raise DataError(
                f"expected a table of {self.n_attributes} attributes, got "
                f"shape={attributes.shape}; use tensors of the same model"
            )
        weights = self.importance[own]
        return np.asarray(weights @ attributes[own] / _length(weights), dtype=np.float32)

    def _check(self, *tables: npt.NDArray[np.float32]) -> None:
        rows = (self.n_attributes, CODES * self.buckets)
        shapes = [table.shape for table in tables]
        width = shapes[0][-1] if shapes[0] else 0
        if shapes != [(number, width) for number in rows]:
            raise DataError(
                f"expected tables of {rows[0]} attributes and {rows[1]} codes of one width, got "
                f"shapes={shapes}; use tensors of the same catalogue and configuration"
            )


def item_content(
    attributes: ItemAttributes | None, labels: Sequence[str], *, buckets: int = BUCKETS
) -> ItemContent:
    """Weights and codes of a catalogue.

    An attribute that f of n items have weighs the root of ln((n + 1) / (f + 1)): a brand tells
    more than "beauty". An item's weights are then scaled to a norm of 1.

    Args:
        attributes: of each item; an item may have none, a data set may not.
        labels: of each item, what it is called outside of this data set.
        buckets: of each of the two codes.

    Raises:
        DataError: no attributes, another number of labels than items, or less than one bucket.
    """
    if attributes is None:
        raise DataError(
            "expected a data set with attributes of its items, got none; a session model builds "
            "its item vectors from them: train a factorisation instead"
        )
    n_items = attributes.n_items
    if len(labels) != n_items or buckets < 1:
        raise DataError(
            f"expected a label for each of {n_items} items and at least one bucket, got "
            f"labels={len(labels)} buckets={buckets}; pass the labels of the same data set"
        )
    frequency = np.bincount(attributes.indices, minlength=attributes.n_attributes)
    importance = np.sqrt(np.log((n_items + 1) / (frequency + 1)))
    owner = np.repeat(np.arange(n_items), np.diff(attributes.indptr))
    raw = importance[attributes.indices]
    lengths = np.sqrt(np.bincount(owner, weights=raw**2, minlength=n_items))
    return ItemContent(
        indptr=attributes.indptr,
        indices=attributes.indices.astype(np.int64),
        weights=(raw / np.maximum(lengths[owner], 1e-12)).astype(np.float32),
        codes=hashed_codes(labels, buckets),
        importance=importance.astype(np.float32),
        buckets=buckets,
    )


def hashed_codes(labels: Sequence[str], buckets: int) -> npt.NDArray[np.int64]:
    """Codes of items by their labels, int64 ``(len(labels), CODES)``: the same on every device."""
    digests = [hashlib.sha256(label.encode()).digest() for label in labels]
    hashed = np.frombuffer(b"".join(digests), dtype="<u8").reshape(len(labels), 4)[:, :CODES]
    own = (hashed % np.uint64(buckets)).astype(np.int64)
    return np.asarray(own + buckets * np.arange(CODES), dtype=np.int64)


def _length(weights: npt.NDArray[np.float32]) -> float:
    return max(float(np.linalg.norm(weights)), 1e-12)
