"""The best items of a very large catalogue, nearly always: by a graph of neighbours.

Looks at some hundred items instead of all, scores the best of them exactly, and misses a few:
measure with :func:`recall`. Needs the extra ``index``, and minutes to build for a million items.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from secagg.errors import ConfigurationError
from secagg_recommender.index import (
    MOST_BLOCK_ITEMS,
    ExactIndex,
    Hits,
    ItemIndex,
    best_of,
    check_request,
    exact_scores,
    lengths_of,
)
from secagg_recommender.interactions import DataError

__all__ = ["GraphIndex", "new_graph", "recall"]

_Floats = npt.NDArray[np.float32]
_Ids = npt.NDArray[np.int64]

# Items that a search of the graph looks at: more finds more, and takes longer.
_EXPANSION: Final = 256
# Candidates beyond what is needed, so that equal scores come in order of id.
_SPARE: Final = 16
# Of the graph: neighbours of an item, and items looked at to find them.
_CONNECTIVITY: Final = 16
_EXPANSION_ADD: Final = 64


class GraphIndex:
    """Nearest neighbours by HNSW, in a space where the nearest item is the one that scores best.

    To (vector, bias) a coordinate is added that brings all items to one length, the ``reach``, and
    to the query a one and a zero: then the largest cosine is the largest score (Bachrach et al.
    2014, "Speeding Up the Xbox Recommender System Using a Euclidean Transformation for
    Inner-Product Spaces"). Without it, items that are near nobody are never found. The graph is
    that of Malkov and Yashunin 2018, "Efficient and robust approximate nearest neighbor search
    using hierarchical navigable small world graphs". What it finds is scored exactly, so scores and
    order are those of :class:`ExactIndex`; an item may be missing. New items that are longer than
    the reach stay out of the graph, and are scored in every search.

    Args:
        exact: the items, with what they are scored by.
        expansion: items that a search looks at, at least.
        graph: a graph that holds these items already, and its reach; built if None, which takes
            minutes for a million items on one core.

    Raises:
        ConfigurationError: usearch is not installed.
        DataError: the graph holds other items.
    """

    def __init__(
        self,
        exact: ExactIndex,
        *,
        expansion: int = _EXPANSION,
        graph: tuple[Any, float] | None = None,
    ) -> None:
        """Build the graph, or take one."""
        self.exact = exact
        self._expansion = expansion
        lengths = exact.lengths()
        # A little more than the longest, so that it is not left out by a rounding.
        longest = float(lengths.max()) * (1.0 + 1e-9)
        self.graph, self.reach = graph or (new_graph(exact.dimensions), longest)
        self._beyond = np.flatnonzero(lengths > self.reach)
        if graph is None:
            first = 0
            for rows, bias in exact.parts:
                self._insert(np.arange(first, first + len(bias)), rows, bias)
                first += len(bias)
        expected = (exact.n_items - self._beyond.size, exact.dimensions + 2)
        if (len(self.graph), self.graph.ndim) != expected:
            raise DataError(
                f"expected a graph of {expected[0]} items, {expected[1]} values each; got "
                f"{len(self.graph)} of {self.graph.ndim}; build the index again"
            )

    @property
    def n_items(self) -> int:
        """Items in the index."""
        return self.exact.n_items

    @property
    def digest(self) -> str:
        """See :attr:`ExactIndex.digest`."""
        return self.exact.digest

    def add(self, vectors: _Floats, bias: _Floats) -> _Ids:
        """Append items to the graph as it is; returns their ids.

        Raises:
            DataError: see :meth:`ExactIndex.add`; nothing was added.
        """
        ids = self.exact.add(vectors, bias)
        self._insert(ids, vectors, bias)
        longer = lengths_of(vectors, bias) > self.reach
        self._beyond = np.concatenate([self._beyond, ids[longer]])
        return ids

    def search(
        self, query: npt.NDArray[np.floating], k: int, own: Sequence[int] | _Ids = ()
    ) -> Hits:
        """The ``k`` best items that were found outside ``own``.

        Where the candidates for that would be a quarter of all items, every item is scored instead.

        Raises:
            DataError: see :meth:`ExactIndex.search`.
        """
        vector, mine = check_request(query, k, own, self.n_items, self.exact.dimensions)
        # Own items are found too, and of equal scores those of the smallest ids shall be there.
        wanted = 2 * (k + mine.size) + _SPARE
        if 4 * wanted >= self.n_items:
            return self.exact.search(vector, k, mine)
        self.graph.expansion_search = max(self._expansion, wanted)
        direction = np.concatenate([vector, np.array([1.0, 0.0], np.float32)])
        found = self.graph.search(direction, wanted, threads=1).keys.astype(np.int64)
        items = np.setdiff1d(np.union1d(found, self._beyond), mine)
        scores = exact_scores(*self.exact.vectors_of(items), vector)
        best = best_of(scores, k)
        return Hits(items[best], scores[best])

    def _insert(self, ids: _Ids, vectors: _Floats, bias: _Floats) -> None:
        for start in range(0, len(bias), MOST_BLOCK_ITEMS):
            part = slice(start, start + MOST_BLOCK_ITEMS)
            lengths = lengths_of(vectors[part], bias[part])
            inside = lengths <= self.reach
            missing = np.sqrt(np.maximum(self.reach**2 - lengths**2, 0.0)).astype(np.float32)
            rows = np.column_stack([vectors[part], bias[part], missing])[inside]
            if len(rows):
                self.graph.add(ids[part][inside].astype(np.uint64), rows, threads=1)


def new_graph(dimensions: int) -> Any:  # noqa: ANN401 - of a library that is loaded late
    """An empty graph of vectors with a bias each.

    Raises:
        ConfigurationError: usearch is not installed.
    """
    try:
        usearch = importlib.import_module("usearch.index")
    except ImportError:
        raise ConfigurationError(
            "expected usearch for this index, got no such package; install the extra: "
            "pip install 'secagg[index]', or use the exact index"
        ) from None
    return usearch.Index(
        ndim=dimensions + 2,
        metric="cos",
        dtype="f32",
        connectivity=_CONNECTIVITY,
        expansion_add=_EXPANSION_ADD,
    )


def recall(index: ItemIndex, exact: ItemIndex, queries: npt.NDArray[np.floating], k: int) -> float:
    """Share of the true ``k`` best items that an index finds, averaged over ``queries`` ``(m, d)``.

    Raises:
        DataError: no query, or see :meth:`ExactIndex.search`.
    """
    if len(queries) == 0:
        raise DataError("expected at least one query, got queries=0; pass some user vectors")
    shares = []
    for query in queries:
        truth = exact.search(query, k, ()).items
        shares.append(np.isin(truth, index.search(query, k, ()).items).mean())
    return float(np.mean(shares))
