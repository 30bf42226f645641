"""The list a person sees: best items for one user vector, own items left out, in numpy.

Runs on the device, where the user vector is. It must never need torch, so that a shop's page can
import it cheaply. This is the last module of the recommender.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from secagg_recommender.interactions import DataError

__all__ = ["Recommendation", "recommend"]


@dataclass(frozen=True, slots=True)
class Recommendation:
    """One line of the list; ``rank`` counts from 1, ``item`` is the contiguous id."""

    rank: int
    item: int
    title: str
    score: float


def recommend(
    user_vector: npt.NDArray[np.floating],
    shared: Mapping[str, npt.NDArray[np.float32]],
    own_items: npt.NDArray[np.integer] | Sequence[int],
    k: int,
    titles: Sequence[str],
) -> list[Recommendation]:
    """The ``k`` best items that the user does not own; equal scores in order of item id.

    *Shapes*: ``user_vector`` ``(d,)``; ``shared`` holds ``item_factors`` ``(n_items, d)`` and
    ``item_bias`` ``(n_items,)``; one title an item. Shorter than ``k`` if items run out.

    Raises:
        DataError: ``k`` below 1, tensors missing, shapes that do not fit, own items outside the
            catalogue, or scores that are not finite.
    """
    if not {"item_factors", "item_bias"} <= set(shared):
        raise DataError(
            "expected shared tensors item_bias and item_factors, got "
            f"names={', '.join(sorted(shared)) or 'none'}; pass the model of a round"
        )
    factors, bias = shared["item_factors"], shared["item_bias"]
    n_items = bias.size
    _check_request(user_vector, factors, n_items, k, titles)
    own = np.unique(np.asarray(own_items, dtype=np.int64))
    if own.size and (own[0] < 0 or own[-1] >= n_items):
        raise DataError(
            f"expected own items in [0, {n_items}), got min={own[0]} max={own[-1]}; "
            "use ids of the same dataset"
        )
    scores = factors @ user_vector + bias
    if not np.isfinite(scores).all():
        raise DataError(
            f"expected finite scores, got non_finite={int((~np.isfinite(scores)).sum())}; "
            "fit the user vector again or ask for an earlier model"
        )
    candidates = np.setdiff1d(np.arange(n_items), own, assume_unique=True)
    best = candidates[np.argsort(-scores[candidates], kind="stable")[:k]]
    return [
        Recommendation(rank=rank, item=int(item), title=titles[item], score=float(scores[item]))
        for rank, item in enumerate(best, start=1)
    ]


def _check_request(
    user_vector: npt.NDArray[np.floating],
    factors: npt.NDArray[np.float32],
    n_items: int,
    k: int,
    titles: Sequence[str],
) -> None:
    """Refuse what would broadcast or index into nonsense."""
    if k < 1:
        raise DataError(f"expected k >= 1, got k={k}; ask for at least one item")
    if factors.ndim != 2 or user_vector.shape != factors.shape[1:] or len(factors) != n_items:
        raise DataError(
            f"expected a vector (d,) and factors ({n_items}, d), got vector={user_vector.shape} "
            f"factors={factors.shape}; use vectors of the same model"
        )
    if len(titles) != n_items:
        raise DataError(
            f"expected one title per item, got titles={len(titles)} n_items={n_items}; "
            "pass item_titles of the same dataset"
        )
