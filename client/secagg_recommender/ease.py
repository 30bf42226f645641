"""EASE: an item-to-item model in closed form, from one exact sum and without any training.

Steck 2019, "Embarrassingly Shallow Autoencoders for Sparse Data" (arXiv 1905.03375). All that it
needs of the data is the Gram matrix XᵀX, which counts for each two items the users that have both.
That is a sum over users of integers: each client contributes the upper triangle of its own, the
encrypted sum is exact, and so is the model: bit for bit the one from all data in one place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isqrt, sqrt
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from secagg.parameters import IntegerSegment
from secagg_recommender.histories import checked_items, histories_of
from secagg_recommender.interactions import DataError, Split
from secagg_recommender.learner import Assignment, Work

__all__ = [
    "GRAM",
    "RIDGE",
    "Ease",
    "EaseLearner",
    "ease_segment",
    "ease_segment_for",
    "ease_weights",
    "gram_from_triangle",
    "gram_triangle",
    "triangle_size",
]

GRAM: Final = "gram"
"""Name of the segment of integers."""

RIDGE: Final = 300.0
"""λ, in users; suits MovieLens 100K."""

_WEIGHTS: Final = "ease_weights"
# Sums as int64, the matrix as float64, its inverse, and a copy that is inverted in place.
_BYTES_A_CELL: Final = 4 * 8
_MEMORY_BYTES: Final = 8 << 30


def triangle_size(n_items: int) -> int:
    """Integers in the upper triangle of a Gram matrix, its diagonal included: n(n + 1)/2."""
    return n_items * (n_items + 1) // 2


def ease_segment(n_items: int, *, users: int, interactions: int) -> IntegerSegment:
    """What a task of EASE sums.

    The bound of its norm holds for any client of so many users and interactions: a user of m items
    has a triangle of norm √(m(m + 1)/2), below (m + ½)/√2, and norms of sums are below their sum.

    Args:
        n_items: of the catalogue.
        users: that a client has at the most.
        interactions: that they have together at the most, each item of a user once.
    """
    size = triangle_size(n_items)
    norm = min((interactions + users / 2) / sqrt(2), users * sqrt(size))
    return IntegerSegment(GRAM, size, users, max(norm, 1.0))


def ease_segment_for(split: Split, parts: Sequence[npt.NDArray[np.integer]]) -> IntegerSegment:
    """The same for clients whose data is at hand, in a demo or a measurement.

    Args:
        parts: the users of each client.
    """
    counts = np.bincount(split.train_users, minlength=split.n_users)
    return ease_segment(
        split.n_items,
        users=max(part.size for part in parts),
        interactions=max(int(counts[part].sum()) for part in parts),
    )


def gram_triangle(histories: Iterable[npt.ArrayLike], n_items: int) -> npt.NDArray[np.int64]:
    """The upper triangle of XᵀX, row by row, for the users of one client.

    Args:
        histories: the items of each user; an item that comes twice counts once.
        n_items: n, items of the catalogue.

    Returns:
        int64 ``(n(n + 1)/2,)``: entry (i, j), i <= j, is how many users have both i and j.

    Raises:
        DataError: items that are no integers in ``[0, n_items)``, or a catalogue too large.
    """
    _check_memory(n_items)
    triangle = np.zeros(triangle_size(n_items), dtype=np.int64)
    for history in histories:
        own = np.unique(checked_items(history, n_items, may_be_empty=True))
        first, second = np.triu_indices(own.size)
        # No place comes twice for one user, so that plain indexing adds to each.
        triangle[_places(own[first], own[second], n_items)] += 1
    return triangle


def _places(
    rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64], n_items: int
) -> npt.NDArray[np.int64]:
    """Where entries with row <= column lie in the triangle."""
    return rows * (2 * n_items - rows - 1) // 2 + columns


def gram_from_triangle(triangle: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """The whole symmetric matrix of a (summed) triangle.

    Args:
        triangle: integers ``(n(n + 1)/2,)``, as from :func:`gram_triangle`.

    Returns:
        int64 ``(n, n)``.

    Raises:
        DataError: no vector of integers, a length that no triangle has, a catalogue too large, or
            integers that no sum of Gram matrices of zeros and ones holds.
    """
    n_items = (isqrt(8 * triangle.size + 1) - 1) // 2
    if triangle.ndim != 1 or not triangle.size or triangle_size(n_items) != triangle.size:
        raise DataError(
            "expected the n(n + 1)/2 integers of an upper triangle, got "
            f"shape={triangle.shape}; pass the released sum of the segment {GRAM!r}"
        )
    _check_integers(triangle)
    _check_memory(n_items)
    gram = np.empty((n_items, n_items), dtype=np.int64)
    start = 0
    for row in range(n_items):
        part = triangle[start : start + n_items - row]
        gram[row, row:] = gram[row:, row] = part
        start += part.size
    _check_counts(gram)
    return gram


def _check_integers(values: npt.NDArray[Any]) -> None:
    if values.dtype.kind not in "iu":
        raise DataError(
            f"expected integers, got dtype={values.dtype}; pass the released sums as they are"
        )


def _check_counts(gram: npt.NDArray[np.int64]) -> None:
    """Nobody has two items who has not each of them."""
    owners = gram.diagonal()
    wrong = sum(
        int(np.count_nonzero((row < 0) | (row > np.minimum(own, owners))))
        for row, own in zip(gram, owners, strict=True)
    )
    if wrong:
        raise DataError(
            "expected counts of users that have two items, each from 0 to those of either item; "
            f"got entries={wrong} that are not; a client did not follow the plan, or the sums "
            "hold noise"
        )


def _check_memory(n_items: int) -> None:
    needed = _BYTES_A_CELL * n_items**2
    if needed > _MEMORY_BYTES:
        raise DataError(
            f"expected a catalogue whose dense tables fit into {_MEMORY_BYTES} bytes, got "
            f"n_items={n_items}, which needs bytes={needed}; keep the most popular items, or use "
            "transitions, whose tables are sparse"
        )


def ease_weights(gram: npt.NDArray[np.integer], ridge: float) -> npt.NDArray[np.float32]:
    """Item-to-item weights B: with P = (XᵀX + λI)⁻¹, B_ij = -P_ij / P_jj and B_jj = 0.

    Equation 8 of Steck 2019.

    Args:
        gram: integers ``(n, n)``: XᵀX, symmetric.
        ridge: λ > 0; how many users' worth of evidence to hold back.

    Returns:
        float32 ``(n, n)``; scores of a history are the sums of its items' rows.

    Raises:
        DataError: another dtype or shape, λ that is not positive and finite, or a catalogue too
            large for a dense table.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not gram.size:
        raise DataError(
            f"expected a square matrix, got shape={gram.shape}; see gram_from_triangle()"
        )
    _check_integers(gram)
    if not 0.0 < ridge < np.inf:
        raise DataError(f"expected a finite ridge above 0, got ridge={ridge}; 300 is a good start")
    _check_memory(gram.shape[0])
    damped = gram.astype(np.float64)
    damped[np.diag_indices_from(damped)] += ridge
    inverse = np.linalg.inv(damped)
    inverse /= -inverse.diagonal()
    np.fill_diagonal(inverse, 0.0)
    return inverse.astype(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Ease:
    """The model: float32 ``(n, n)`` weights.

    Raises:
        DataError: weights that are not square, or not finite.
    """

    weights: npt.NDArray[np.float32] = field(repr=False)

    def __post_init__(self) -> None:
        shape = self.weights.shape
        if len(shape) != 2 or shape[0] != shape[1] or self.weights.dtype != np.float32:
            raise DataError(
                f"expected square float32 weights, got shape={shape}, dtype={self.weights.dtype}; "
                "make the model again from the released sums"
            )
        if not np.isfinite(self.weights).all():
            raise DataError("expected finite weights; make the model again with a larger ridge")

    @classmethod
    def from_sums(
        cls, sums: Mapping[str, npt.NDArray[np.integer]], *, ridge: float = RIDGE
    ) -> Ease:
        """The model of a released sum.

        Raises:
            DataError: see :func:`gram_from_triangle` and :func:`ease_weights`; or no such sum.
        """
        if GRAM not in sums:
            raise DataError(f"expected sums of a segment {GRAM!r}, got {sorted(sums)}")
        return cls(ease_weights(gram_from_triangle(sums[GRAM]), ridge))

    @staticmethod
    def names() -> set[str]:
        """Of its tensors."""
        return {_WEIGHTS}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, npt.NDArray[Any]]) -> Ease:
        """The opposite of :meth:`tensors`."""
        return cls(tensors[_WEIGHTS])

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """For an archive."""
        return {_WEIGHTS: self.weights}

    @property
    def n_items(self) -> int:
        """Items of the catalogue."""
        return int(self.weights.shape[0])

    def score(self, history: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """The sum of the weights of a history's items, ``(n,)``; their order does not matter.

        Raises:
            DataError: an empty history, or items outside the catalogue.
        """
        own = np.unique(checked_items(history, self.n_items))
        return np.asarray(self.weights[own].sum(axis=0), dtype=np.float32)

    def terms(self, history: npt.NDArray[np.integer], item: int) -> npt.NDArray[np.float64]:
        """What each item of a history adds to the score of one item; 0 where it comes again.

        Raises:
            DataError: see :meth:`score`.
        """
        items = checked_items(history, self.n_items)
        (target,) = checked_items([item], self.n_items)
        added = np.zeros(items.size)
        _, first = np.unique(items, return_index=True)
        added[first] = self.weights[items[first], target]
        return added


class EaseLearner:
    """A client's part: the triangle of its own users, in a round that has no model yet."""

    def __init__(self, split: Split, users: npt.NDArray[np.int64]) -> None:
        self._histories = histories_of(split, users.tolist())
        self._n_items = split.n_items

    @property
    def items(self) -> npt.NDArray[np.int64]:
        """Items that somebody of the client has."""
        return np.unique(np.concatenate([*self._histories, np.zeros(0, dtype=np.int64)]))

    def work(self, assignment: Assignment) -> Work:
        """The triangle.

        Raises:
            DataError: the task is for another catalogue.
        """
        segment = assignment.segments.get(GRAM)
        expected = triangle_size(self._n_items)
        if segment is None or segment.values != expected:
            raise DataError(
                f"expected a task with a segment {GRAM!r} of {expected} integers, got "
                f"segments={ {name: part.values for name, part in assignment.segments.items()} }; "
                "prepare the task from the same data set"
            )
        return Work({GRAM: gram_triangle(self._histories, self._n_items)})

    def state(self) -> bytes:
        """Nothing is kept."""
        return b""

    def restore(self, state: bytes) -> None:
        """Nothing was kept."""
