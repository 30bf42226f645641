"""The best items for one vector, exactly: every item is scored, block by block.

The score is ⟨query, vector⟩ + bias. Memory is bounded by a stated budget, and vectors may stay in a
file larger than memory. New items are added without building anything again. For a catalogue of
which even reading it takes too long, read `graph_index` next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from secagg_recommender.interactions import DataError

__all__ = [
    "BUDGET_BYTES",
    "MOST_BLOCK_ITEMS",
    "ExactIndex",
    "Hits",
    "ItemIndex",
    "best_of",
    "check_own",
    "check_request",
    "check_table",
    "exact_scores",
    "lengths_of",
]

BUDGET_BYTES: Final = 256 << 20
"""Memory that an exact index may take unless told otherwise: vectors held, and one block's work."""

_Floats = npt.NDArray[np.float32]
_Ids = npt.NDArray[np.int64]

# Longer blocks are no faster: one of these stays in a processor's cache.
MOST_BLOCK_ITEMS: Final = 1 << 16
"""Items that are worked on at a time, at the most."""
# Beside copies of its vector: score, its copy for the partition, masks and place.
_ITEM_WORK_BYTES: Final = 32
_LEAST_WORK_BYTES: Final = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class Hits:
    """The best items, best first, equal scores in order of id: int64 and float32, same length."""

    items: _Ids
    scores: _Floats


class ItemIndex(Protocol):
    """What every index can do."""

    @property
    def n_items(self) -> int:
        """Items in the index; their ids are ``0 … n_items − 1``."""
        ...

    def search(self, query: npt.NDArray[np.floating], k: int, own: Sequence[int] | _Ids) -> Hits:
        """The ``k`` best items outside ``own``."""
        ...


def best_of(scores: npt.NDArray[np.floating], k: int) -> _Ids:
    """Places of the ``k`` largest scores, best first, ties in order of place; all if fewer."""
    if k < scores.size:
        kth = np.partition(scores, scores.size - k)[scores.size - k]
        above = np.flatnonzero(scores > kth)
        tied = np.flatnonzero(scores == kth)[: k - above.size]
        places = np.concatenate([above, tied])
    else:
        places = np.arange(scores.size)
    order = np.lexsort((places, -scores[places]))
    return np.asarray(places[order], dtype=np.int64)


class ExactIndex:
    """Every item scored, in blocks; exact up to the rounding of float32 sums.

    Args:
        vectors: float32 ``(n, d)``, in memory or a read-only ``np.memmap``, which is read block by
            block and does not count as memory.
        bias: float32 ``(n,)``.
        budget_bytes: most memory for what is held and the work on one block.

    Raises:
        DataError: shapes or types that do not fit, values that are not finite (of a file, when
            they are read), or vectors in memory beyond the budget.
    """

    def __init__(
        self, vectors: _Floats, bias: _Floats, *, budget_bytes: int = BUDGET_BYTES
    ) -> None:
        """Check the tables; nothing is copied."""
        self._budget = budget_bytes
        self._parts: list[tuple[_Floats, _Floats]] = []
        self.add(vectors, bias)

    @property
    def n_items(self) -> int:
        """Items in the index."""
        return sum(len(bias) for _, bias in self._parts)

    @property
    def dimensions(self) -> int:
        """Length of a vector."""
        return int(self._parts[0][0].shape[1])

    @property
    def parts(self) -> tuple[tuple[_Floats, _Floats], ...]:
        """Vectors and biases, as they were added."""
        return tuple(self._parts)

    @property
    def digest(self) -> str:
        """SHA-256 over all rows in order: changes with any value, not with how they were added."""
        running = hashlib.sha256(b"secagg item table")
        for part, part_bias in self._parts:
            for _, rows, bias in _blocks(part, part_bias, self._free):
                running.update(np.column_stack([rows, bias]).astype("<f4", copy=False).tobytes())
        return running.hexdigest()

    def add(self, vectors: _Floats, bias: _Floats) -> _Ids:
        """Append items; returns their ids.

        Raises:
            DataError: see the class; nothing was added.
        """
        check_table(vectors, bias, self._parts[0][0].shape[1] if self._parts else None)
        first, free = self.n_items, self._left_for_work(vectors, bias)
        for start, rows, row_bias in _blocks(vectors, bias, free):
            if not (np.isfinite(rows).all() and np.isfinite(row_bias).all()):
                raise DataError(
                    "expected finite vectors and biases, got NaN or infinity in items "
                    f"{first + start} to {first + start + len(rows) - 1}; ask for an earlier model"
                )
        self._free = free
        self._parts.append((vectors, bias))
        return np.arange(first, self.n_items, dtype=np.int64)

    def search(
        self, query: npt.NDArray[np.floating], k: int, own: Sequence[int] | _Ids = ()
    ) -> Hits:
        """The ``k`` best items outside ``own``; fewer if items run out.

        Raises:
            DataError: ``k`` below 1, a query of another length or not finite, own items that are
                not in the index, or scores that overflow.
        """
        vector, mine = check_request(query, k, own, self.n_items, self.dimensions)
        found = Hits(np.empty(0, np.int64), np.empty(0, np.float32))
        first = 0
        for part, part_bias in self._parts:
            for start, rows, bias in _blocks(part, part_bias, self._free):
                low, high = np.searchsorted(mine, [first + start, first + start + len(rows)])
                scores = exact_scores(rows, bias, vector)
                found = _merged(found, scores, first + start, mine[low:high] - first - start, k)
            first += len(part_bias)
        return found

    def lengths(self) -> npt.NDArray[np.float64]:
        """Length of each item's vector with its bias, ``(n,)``."""
        blocks = [
            lengths_of(rows, bias)
            for part, part_bias in self._parts
            for _, rows, bias in _blocks(part, part_bias, self._free)
        ]
        return np.concatenate(blocks)

    def vectors_of(self, items: _Ids) -> tuple[_Floats, _Floats]:
        """Vectors and biases of some items: copies."""
        vectors = np.empty((items.size, self.dimensions), np.float32)
        bias = np.empty(items.size, np.float32)
        first = 0
        for rows, row_bias in self._parts:
            here = (items >= first) & (items < first + len(row_bias))
            vectors[here], bias[here] = rows[items[here] - first], row_bias[items[here] - first]
            first += len(row_bias)
        return vectors, bias

    def _left_for_work(self, vectors: _Floats, bias: _Floats) -> int:
        """What of the budget is left for a block's work once these are held too."""
        parts = [*self._parts, (vectors, bias)]
        in_memory = sum(rows.nbytes for rows, _ in parts if not isinstance(rows, np.memmap))
        held = in_memory + sum(row_bias.nbytes for _, row_bias in parts)
        if self._budget - held < _LEAST_WORK_BYTES + 2 * vectors.shape[1] * 4:
            raise DataError(
                f"expected an item table that leaves {_LEAST_WORK_BYTES} bytes of "
                f"budget_bytes={self._budget} to work with, got vectors={vectors.shape} and {held} "
                "bytes held; save_index() and open_index() leave vectors in their file and read "
                "it block by block, or allow more memory"
            )
        return self._budget - held


def _blocks(rows: _Floats, bias: _Floats, free: int) -> Iterator[tuple[int, _Floats, _Floats]]:
    """Start, vectors and biases of each block; a block's copies and scores fit into ``free``."""
    step = max(1, min(MOST_BLOCK_ITEMS, free // (2 * rows.shape[1] * 4 + _ITEM_WORK_BYTES)))
    for start in range(0, len(bias), step):
        yield start, np.asarray(rows[start : start + step]), bias[start : start + step]


def check_table(vectors: _Floats, bias: _Floats, dimensions: int | None) -> None:
    """Refuse another type or shape."""
    fits = vectors.ndim == 2 and bias.shape == vectors.shape[:1] and vectors.size > 0
    typed = vectors.dtype == bias.dtype == np.float32
    if not (fits and typed) or (dimensions is not None and vectors.shape[1] != dimensions):
        raise DataError(
            f"expected float32 vectors (n, {dimensions or 'd'}) and biases (n,), n >= 1, got "
            f"vectors={vectors.dtype}{vectors.shape} bias={bias.dtype}{bias.shape}; use the item "
            "table of one model"
        )


def check_request(
    query: npt.NDArray[np.floating],
    k: int,
    own: Sequence[int] | _Ids,
    n_items: int,
    dimensions: int,
) -> tuple[_Floats, _Ids]:
    """The query as float32 and the own items, distinct and ascending, if they can be served."""
    if k < 1:
        raise DataError(f"expected k >= 1, got k={k}; ask for at least one item")
    if query.shape != (dimensions,) or not np.isfinite(query).all():
        raise DataError(
            f"expected a finite vector ({dimensions},), got shape={query.shape} "
            f"non_finite={int((~np.isfinite(query)).sum())}; use vectors of the same model"
        )
    return query.astype(np.float32), check_own(own, n_items)


def check_own(own: Sequence[int] | npt.NDArray[np.integer], n_items: int) -> _Ids:
    """Own items, distinct and ascending, if they are in the catalogue."""
    items = np.unique(np.asarray(own, dtype=np.int64))
    if items.size and (items[0] < 0 or items[-1] >= n_items):
        raise DataError(
            f"expected own items in [0, {n_items}), got min={items[0]} max={items[-1]}; "
            "use ids of the same dataset"
        )
    return items


def lengths_of(vectors: _Floats, bias: _Floats) -> npt.NDArray[np.float64]:
    """Length of (vector, bias) of each row."""
    rows = vectors.astype(np.float64)
    return np.asarray(np.sqrt(np.einsum("ij,ij->i", rows, rows) + bias.astype(np.float64) ** 2))


def exact_scores(rows: _Floats, bias: _Floats, query: _Floats) -> _Floats:
    """Scores ``(n,)`` of some rows, if they are finite."""
    with np.errstate(over="ignore", invalid="ignore"):  # refused below
        scores = rows @ query + bias
    if not np.isfinite(scores).all():
        raise DataError(
            f"expected finite scores, got non_finite={int((~np.isfinite(scores)).sum())}; "
            "fit the user vector again or ask for an earlier model"
        )
    return np.asarray(scores)


def _merged(found: Hits, scores: _Floats, start: int, own: _Ids, k: int) -> Hits:
    """What was found so far and one block's best. Ids only rise, so that an equal score loses."""
    candidates = np.ones(scores.size, dtype=bool)
    candidates[own] = False
    if found.items.size == k:
        candidates &= scores > found.scores[-1]
    places = np.flatnonzero(candidates)
    best = places[best_of(scores[places], k)]
    items = np.concatenate([found.items, best + start])
    merged = np.concatenate([found.scores, scores[best]])
    order = best_of(merged, k)
    return Hits(items[order], merged[order])
