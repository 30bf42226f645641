"""The list a person sees: best items for one user vector, own items left out, in numpy.

Runs on the device, where the user vector is. It must never need torch, so that a shop's page can
import it cheaply. `index` finds the items, `explain` says why, `hybrid` refines their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from secagg_recommender.index import BUDGET_BYTES, ExactIndex, Hits, best_of, check_own
from secagg_recommender.interactions import DataError

__all__ = ["Recommendation", "best_items", "recommend", "titled"]


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
    *,
    budget_bytes: int = BUDGET_BYTES,
) -> list[Recommendation]:
    """The ``k`` best items that the user does not own; equal scores in order of item id.

    *Shapes*: ``user_vector`` ``(d,)``; ``shared`` holds ``item_factors`` ``(n_items, d)`` and
    ``item_bias`` ``(n_items,)``; one title an item. Shorter than ``k`` if items run out.

    Raises:
        DataError: ``k`` below 1, tensors missing, shapes that do not fit, own items outside the
            catalogue, scores that are not finite, or a table beyond the memory allowed.
    """
    if not {"item_factors", "item_bias"} <= set(shared):
        raise DataError(
            "expected shared tensors item_bias and item_factors, got "
            f"names={', '.join(sorted(shared)) or 'none'}; pass the model of a round"
        )
    index = ExactIndex(shared["item_factors"], shared["item_bias"], budget_bytes=budget_bytes)
    return titled(index.search(user_vector, k, np.asarray(own_items)), titles, index.n_items)


def best_items(
    scores: npt.NDArray[np.floating], own_items: npt.NDArray[np.integer] | Sequence[int], k: int
) -> Hits:
    """The ``k`` best items by scores of the whole catalogue, own items left out.

    *Shapes*: ``scores`` ``(n_items,)``, as a model of histories or a cohort's start gives them.

    Raises:
        DataError: ``k`` below 1, own items outside the catalogue, or scores that are not finite.
    """
    if k < 1:
        raise DataError(f"expected k >= 1, got k={k}; ask for at least one item")
    if scores.ndim != 1 or not np.isfinite(scores).all():
        raise DataError(
            f"expected finite scores (n_items,), got shape={scores.shape} "
            f"non_finite={int((~np.isfinite(scores)).sum())}; ask for an earlier model"
        )
    allowed = np.setdiff1d(
        np.arange(scores.size), check_own(own_items, scores.size), assume_unique=True
    )
    items = allowed[best_of(scores[allowed], k)]
    return Hits(items, scores[items].astype(np.float32))


def titled(found: Hits, titles: Sequence[str], n_items: int) -> list[Recommendation]:
    """Found items as lines of a list.

    Raises:
        DataError: not one title for each of ``n_items``.
    """
    if len(titles) != n_items:
        raise DataError(
            f"expected one title per item, got titles={len(titles)} n_items={n_items}; "
            "pass item_titles of the same dataset"
        )
    rows = zip(found.items.tolist(), found.scores.tolist(), strict=True)
    return [
        Recommendation(rank, item, titles[item], score)
        for rank, (item, score) in enumerate(rows, start=1)
    ]
