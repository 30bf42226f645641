"""What comes next in a session, from content-built item vectors: the model as it is served.

A session asks for a vector: the sum of its items' vectors, faded by age at three speeds, each
turned by a matrix of its own. Items are ranked by its product with their vectors, plus a bias. All
of it is linear in the session's items, so that every recommendation falls apart exactly into what
each of them contributed, and serving takes a matrix product and no network. Vectors come from
attributes and hashed codes (`content`): a catalogue of 12 000 takes 50 000 shared floats. Needs no
torch; read `session_silo` next, which trains it, and `stacked`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from secagg_recommender.content import ItemContent
from secagg_recommender.histories import checked_items
from secagg_recommender.interactions import DataError

__all__ = [
    "ATTRIBUTES",
    "CODE_VECTORS",
    "DECAYS",
    "ITEM_BIAS",
    "LONGEST",
    "MIX",
    "SESSION_TENSORS",
    "SessionModel",
]

ATTRIBUTES: Final = "attributes"
"""Name of the shared table of attributes, float32 ``(n_attributes, d)``."""
CODE_VECTORS: Final = "codes"
"""Name of the shared table of codes, float32 ``(CODES * buckets, d)``."""
ITEM_BIAS: Final = "session_bias"
"""Name of the shared biases, float32 ``(n_items,)``."""
MIX: Final = "mix"
"""Name of the matrices that turn what is remembered, float32 ``(len(DECAYS), d, d)``."""

SESSION_TENSORS: Final = frozenset({ATTRIBUTES, CODE_VECTORS, ITEM_BIAS, MIX})
"""Names of all that is shared."""

DECAYS: Final = (0.0, 0.3, 0.88)
"""How much of an item is left after another one: nothing, so that the latest counts alone; a third;
and most, for what the session is about as a whole."""

LONGEST: Final = 50
"""Items of a session that are looked at, the latest ones."""

_NAMES: Final = ("vectors", "bias", "mix")


@dataclass(frozen=True, slots=True, eq=False)
class SessionModel:
    """The trained model, ready to serve: a `HistoryModel` whose terms add up to its scores.

    *Shapes*, float32: ``vectors`` ``(n_items, d)``, ``bias`` ``(n_items,)``, ``mix``
    ``(len(DECAYS), d, d)``.

    Raises:
        DataError: arrays that do not fit together, or that are not finite.
    """

    vectors: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    mix: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        """Check once, so that nothing downstream has to."""
        d = self.vectors.shape[-1] if self.vectors.ndim == 2 else -1
        expected = ((len(self.bias), d), (len(self.bias),), (len(DECAYS), d, d))
        found = (self.vectors.shape, self.bias.shape, self.mix.shape)
        parts = (self.vectors, self.bias, self.mix)
        if found != expected or not all(np.isfinite(part).all() for part in parts):
            raise DataError(
                f"expected finite vectors, bias and mix of shapes {expected}, got {found}; make "
                "the model again from the shared tensors"
            )

    @classmethod
    def of(
        cls, shared: Mapping[str, npt.NDArray[np.float32]], content: ItemContent
    ) -> SessionModel:
        """The model of shared tensors for a catalogue.

        Raises:
            DataError: tensors that do not fit the catalogue.
        """
        if not shared.keys() >= SESSION_TENSORS:
            raise DataError(
                f"expected the tensors of a session model, got {sorted(shared)}; start from "
                "init_session()"
            )
        vectors = content.vectors(shared[ATTRIBUTES], shared[CODE_VECTORS])
        return cls(vectors, shared[ITEM_BIAS], shared[MIX])

    @staticmethod
    def names() -> set[str]:
        """Of its tensors."""
        return {f"session_model_{name}" for name in _NAMES}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, npt.NDArray[Any]]) -> SessionModel:
        """The opposite of :meth:`tensors`."""
        return cls(*(tensors[f"session_model_{name}"] for name in _NAMES))

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """For an archive."""
        return {f"session_model_{name}": getattr(self, name) for name in _NAMES}

    @property
    def n_items(self) -> int:
        """Items of the catalogue, new ones included."""
        return int(self.bias.size)

    def with_items(self, vectors: npt.NDArray[np.float32]) -> SessionModel:
        """The same with new items behind the known ones, by `ItemContent.new_vector`, ``(m, d)``.

        Their bias is the median one, as nobody can have had them yet.

        Raises:
            DataError: vectors of another length.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.vectors.shape[1]:
            raise DataError(
                f"expected vectors of {self.vectors.shape[1]} numbers, got shape={vectors.shape}; "
                "make them with new_vector() of the same model"
            )
        bias = np.full(len(vectors), np.median(self.bias), dtype=np.float32)
        return SessionModel(
            np.concatenate([self.vectors, vectors.astype(np.float32)]),
            np.concatenate([self.bias, bias]),
            self.mix,
        )

    def score(self, history: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """Scores ``(n_items,)`` for items in time order, the latest last.

        Raises:
            DataError: an empty history, or items outside the catalogue.
        """
        return np.asarray(self.vectors @ self._turned(history).sum(axis=0) + self.bias)

    def terms(self, history: npt.NDArray[np.integer], item: int) -> npt.NDArray[np.float64]:
        """What each item of a history adds to the score of one item; with its bias, the score.

        Raises:
            DataError: see :meth:`score`.
        """
        (target,) = checked_items([item], self.n_items)
        recent = self._turned(history) @ self.vectors[target]
        forgotten = len(history) - recent.size
        return np.concatenate([np.zeros(forgotten), recent.astype(np.float64)])

    def _turned(self, history: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """What each of the latest items asks for, faded by its age: ``(items, d)``."""
        own = self.vectors[checked_items(history, self.n_items)[-LONGEST:]]
        ages = np.arange(len(own))[::-1]
        faded = np.stack([(decay**ages)[:, None] * own for decay in DECAYS])
        return np.asarray((faded @ self.mix).sum(axis=0), dtype=np.float32)
