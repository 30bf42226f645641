"""Models that score from a history of items alone, such as those of one exact round.

They know no user: who has a history, in time order, has scores, on whatever device. `ease`,
`transitions` and `session_model` are such; an archive of their tensors is what a device keeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from secagg_recommender.evaluation import ScoresFn
from secagg_recommender.interactions import DataError, Split

__all__ = ["HistoryModel", "checked_items", "histories_of", "history_model", "scores_on"]


class HistoryModel(Protocol):
    """Scores all items for somebody of whom nothing but a history is known."""

    @property
    def n_items(self) -> int:
        """Items of the catalogue."""
        ...

    def score(self, history: npt.NDArray[np.integer]) -> npt.NDArray[np.floating]:
        """Scores ``(n_items,)`` for items in time order, the latest last.

        Raises:
            DataError: an empty history, or items outside the catalogue.
        """
        ...

    def terms(self, history: npt.NDArray[np.integer], item: int) -> npt.NDArray[np.float64]:
        """What each item of a history, in its order, adds to the score of one item.

        Raises:
            DataError: see :meth:`score`.
        """
        ...

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """What to keep of it, by name, for an archive."""
        ...


def history_model(tensors: Mapping[str, npt.NDArray[Any]]) -> HistoryModel | None:
    """The model that an archive's tensors are, or None if they are of another kind.

    Raises:
        DataError: tensors that bear the names of such a model, and are none.
    """
    from secagg_recommender.ease import Ease
    from secagg_recommender.session_model import SessionModel
    from secagg_recommender.stacked import StackedModel
    from secagg_recommender.transitions import Transitions

    # First the one that is made of others.
    for kind in (StackedModel, Ease, Transitions, SessionModel):
        if tensors.keys() >= kind.names():
            return kind.from_tensors(tensors)
    return None


def checked_items(
    items: npt.ArrayLike, n_items: int, *, may_be_empty: bool = False
) -> npt.NDArray[np.int64]:
    """Item ids as int64.

    Raises:
        DataError: no integers, none at all unless that may be, or ids outside the catalogue.
    """
    given = np.asarray(items)
    if given.size == 0 and may_be_empty:
        return np.zeros(0, dtype=np.int64)
    if given.size == 0:
        raise DataError(
            "expected a history of one item or more, got an empty one; recommend what is popular "
            "until there is one"
        )
    if given.ndim != 1 or given.dtype.kind not in "iu":
        raise DataError(
            f"expected item ids as a vector of integers, got dtype={given.dtype}, "
            f"shape={given.shape}; use the data set's contiguous ids"
        )
    if given.min() < 0 or given.max() >= n_items:
        raise DataError(
            f"expected items in [0, {n_items}), got min={given.min()} max={given.max()}; use the "
            "ids of the data set that the model was made from"
        )
    return given.astype(np.int64)


def histories_of(split: Split, users: Iterable[int]) -> list[npt.NDArray[np.int64]]:
    """Training items of each user, in time order."""
    return [split.items_of(int(user)).astype(np.int64) for user in users]


def scores_on(model: HistoryModel, split: Split) -> ScoresFn:
    """Scores for the users of a split, each from its own training items, for an `Evaluator`.

    Raises:
        DataError: the model is of another catalogue.
    """
    if model.n_items != split.n_items:
        raise DataError(
            f"expected a model of the split's {split.n_items} items, got one of {model.n_items}; "
            "use the data set that it was made from"
        )

    def scores(users: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
        rows: Sequence[npt.NDArray[np.int64]] = histories_of(split, users.tolist())
        return np.stack([model.score(row) for row in rows])

    return scores
