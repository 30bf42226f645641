"""A session model on top of exact counts: what is alike, and what has really followed what.

A small model knows kinds of items, and cannot remember single pairs; counts remember pairs, and
know nothing of what was never seen together. Scores add up: the session's + weight * ln(1 + gain *
votes). The votes are those of `transitions`, from counts that one encrypted round has released,
whole or only those of pairs that several have. A logarithm, as a session's score is one of a
probability.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from secagg_recommender.interactions import DataError
from secagg_recommender.pair_tables import PairCounts
from secagg_recommender.session_model import SessionModel
from secagg_recommender.transitions import Transitions

__all__ = ["StackedModel", "frequent_pairs"]

_MEASURES: Final = "stacked_weight_and_gain"


@dataclass(frozen=True, slots=True, eq=False)
class StackedModel:
    """Both models of one catalogue; a `HistoryModel`.

    Attributes:
        weight: of the counts, 0 or more.
        gain: above 0; the larger, the less it matters how many votes there are.

    Raises:
        DataError: models of different catalogues, or numbers out of range.
    """

    session: SessionModel
    pairs: Transitions
    weight: float = 8.0
    gain: float = 10.0

    def __post_init__(self) -> None:
        """Check once, so that nothing downstream has to."""
        if self.session.n_items != self.pairs.n_items:
            raise DataError(
                f"expected two models of one catalogue, got items={self.session.n_items} and "
                f"{self.pairs.n_items}; train and count on the same data set"
            )
        if not (0.0 <= self.weight < math.inf and 0.0 < self.gain < math.inf):
            raise DataError(
                f"expected weight >= 0 and gain > 0, got weight={self.weight} gain={self.gain}"
            )

    @staticmethod
    def names() -> set[str]:
        """Of its tensors."""
        return SessionModel.names() | Transitions.names() | {_MEASURES}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, npt.NDArray[Any]]) -> StackedModel:
        """The opposite of :meth:`tensors`."""
        weight, gain = (float(number) for number in tensors[_MEASURES])
        session, pairs = SessionModel.from_tensors(tensors), Transitions.from_tensors(tensors)
        return cls(session, pairs, weight, gain)

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """For an archive."""
        measures = {_MEASURES: np.array([self.weight, self.gain])}
        return self.session.tensors() | self.pairs.tensors() | measures

    @property
    def n_items(self) -> int:
        """Items of the catalogue."""
        return self.session.n_items

    def score(self, history: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
        """Scores ``(n_items,)`` for items in time order, the latest last.

        Raises:
            DataError: an empty history, or items outside the catalogue.
        """
        votes = self.pairs.score(history)
        return self.session.score(history) + self.weight * np.log1p(self.gain * votes)

    def terms(self, history: npt.NDArray[np.integer], item: int) -> npt.NDArray[np.float64]:
        """What each item of a history adds to the score of one item, without its bias.

        What the counts add is shared out in proportion to the votes.

        Raises:
            DataError: see :meth:`score`.
        """
        votes = self.pairs.terms(history, item)
        total = float(votes.sum())
        share = votes / total if total > 0 else votes
        counted = self.weight * math.log1p(self.gain * total) * share
        return self.session.terms(history, item) + counted


def frequent_pairs(pairs: PairCounts, users: PairCounts, least: int) -> PairCounts:
    """Only pairs that ``least`` users or more have.

    Args:
        pairs: what to keep a part of.
        users: how many users have each pair.

    Raises:
        DataError: ``least`` is below 1, or the two are of different catalogues.
    """
    if least < 1 or pairs.n_items != users.n_items:
        raise DataError(
            f"expected least >= 1 and pairs of one catalogue, got least={least}, "
            f"items={pairs.n_items} and {users.n_items}; 1 keeps all pairs"
        )
    kept = np.isin(pairs.keys, users.keys[users.counts >= least])
    return PairCounts(pairs.n_items, pairs.keys[kept], pairs.counts[kept])
