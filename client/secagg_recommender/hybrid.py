"""A list made on the device, put in order with the help of a table that everybody can fetch.

The device makes its candidates alone. To refine them by what a server knows, such as what is
trending, it takes a table of scores for the **whole** catalogue and looks up its candidates there:
asking for those alone would tell the history that they come from. A table may have a row for each
of a few public buckets, a weekday or a region; all rows are fetched, and the device picks one.

The server learns that this client fetched this table, and when: the same for every client that
does. It does not learn the history, the candidates, the bucket, the list, or whether the table was
used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from secagg_recommender.index import Hits, best_of
from secagg_recommender.interactions import DataError

__all__ = ["ServerScores", "refine"]

_NAMES: Final = ("item_scores", "item_bias")
"""Tensors that are read as scores, in this order: a table by intent, and any model's popularity."""


@dataclass(frozen=True, slots=True, eq=False)
class ServerScores:
    """A table for the whole catalogue: float64 ``(buckets, n_items)``; one bucket is no bucket.

    Raises:
        DataError: another shape, or values that are not finite.
    """

    table: npt.NDArray[np.float64] = field(repr=False)

    def __post_init__(self) -> None:
        """Check once."""
        if self.table.ndim != 2 or self.table.size == 0 or not np.isfinite(self.table).all():
            raise DataError(
                "expected finite server scores (buckets, n_items), got "
                f"shape={self.table.shape}; fetch the table of another task"
            )

    @classmethod
    def from_model(cls, tensors: Mapping[str, npt.NDArray[Any]]) -> ServerScores:
        """From a task's model: its ``item_scores``, ``(n_items,)`` or by bucket, or its biases.

        Raises:
            DataError: it has neither; or see the class.
        """
        name = next((name for name in _NAMES if name in tensors), None)
        if name is None:
            raise DataError(
                f"expected a model with one of {_NAMES}, got {sorted(tensors)}; name a task whose "
                "model scores items"
            )
        return cls(np.atleast_2d(np.asarray(tensors[name], dtype=np.float64)))

    def of(self, bucket: int, n_items: int) -> npt.NDArray[np.float64]:
        """One bucket's scores, ``(n_items,)``.

        Raises:
            DataError: no such bucket, or a table of another catalogue.
        """
        if not 0 <= bucket < len(self.table) or self.table.shape[1] != n_items:
            raise DataError(
                f"expected a bucket below {len(self.table)} and a catalogue of "
                f"{self.table.shape[1]} items, got bucket={bucket} n_items={n_items}; use the "
                "table of the same catalogue"
            )
        return np.asarray(self.table[bucket])


def refine(candidates: Hits, server: npt.NDArray[np.floating], k: int, weight: float = 0.3) -> Hits:
    """The ``k`` best candidates by local and server scores together.

    Both are brought to mean 0 and standard deviation 1 over the candidates, because their units
    have nothing to do with one another; then (1 − weight) · local + weight · server.

    Args:
        candidates: what the device has found; more than ``k`` leave something to refine.
        server: scores of the whole catalogue.
        k: length of the list.
        weight: of the server, from 0 (the device's order) to 1.

    Raises:
        DataError: ``k`` below 1, a weight outside [0, 1], or candidates outside the catalogue.
    """
    if k < 1 or not 0.0 <= weight <= 1.0:
        raise DataError(f"expected k >= 1 and a weight in [0, 1], got k={k} weight={weight}")
    items = candidates.items
    if items.size and (items.min() < 0 or items.max() >= server.size):
        raise DataError(
            f"expected candidates of a catalogue of {server.size} items, got max={items.max()}; "
            "use the table of the same catalogue"
        )
    blend = (1.0 - weight) * _standard(candidates.scores) + weight * _standard(server[items])
    # Ties in order of item id, as everywhere.
    by_id = np.argsort(items)
    best = by_id[best_of(blend[by_id], k)]
    return Hits(items[best], blend[best].astype(np.float32))


def _standard(scores: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """With mean 0 and standard deviation 1; zeros where all are equal."""
    wide = scores.astype(np.float64)
    if wide.size == 0:
        return wide
    centred = wide - wide.mean()
    spread = float(centred.std())
    return centred / spread if spread > 1e-12 * max(1.0, float(np.abs(wide).max())) else 0.0 * wide
