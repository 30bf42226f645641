"""What people choose after what: a recommender of exact counts, in one round and without training.

For each two items, how often one came before the other in somebody's history, counted the more the
closer they were. A history's items vote for what followed them, the later the item the louder. The
counts are sums of integers over users, so that one encrypted round gives exactly the model of all
data in one place; `pair_tables` keeps that round small, since almost all pairs never occur.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from secagg.parameters import IntegerSegment, Segment
from secagg_recommender.histories import checked_items, histories_of
from secagg_recommender.interactions import DataError, Split
from secagg_recommender.learner import Assignment, Work
from secagg_recommender.pair_tables import WORD_BITS, PairCounts, PairTable

__all__ = [
    "COUNTS",
    "DISTANCE_WEIGHTS",
    "POPULARITY",
    "WORDS",
    "Transitions",
    "TransitionsLearner",
    "pairs_from_sums",
    "popularity",
    "transition_counts",
    "transition_segments",
    "transition_segments_for",
]

COUNTS: Final = "pairs.counts"
WORDS: Final = "pairs.words"
POPULARITY: Final = "popularity"
"""Names of the segments of integers."""

DISTANCE_WEIGHTS: Final = tuple(round(8 * 0.8**distance) for distance in range(13))
"""What a pair counts whose items are neighbours, one apart, and so on: 8 x 0.8^d, rounded."""

_RECENCY: Final = 0.8
# Far below any vote, so that it only orders what has the same votes, or none.
_TIE_BREAK: Final = 1e-10
_ARRAYS: Final = ("starts", "followers", "strengths", "popularity")

_Ints = npt.NDArray[np.int64]


def transition_counts(
    histories: Iterable[npt.ArrayLike],
    n_items: int,
    weights: Sequence[int] | None = DISTANCE_WEIGHTS,
) -> PairCounts:
    """How often each item came before each other one, by distance, in the histories of a client.

    Args:
        histories: the items of each user, in time order; empty ones add nothing.
        n_items: items of the catalogue.
        weights: what a pair counts at a distance of 1, 2, …; beyond the last, nothing. None counts
            1 at any distance.

    Raises:
        DataError: items that are no integers in ``[0, n_items)``; weights below 0.
    """
    if weights is not None and (min(weights, default=0) < 0 or not any(weights)):
        raise DataError(
            f"expected weights of 0 or more, one of them positive, got weights={list(weights)}"
        )
    rows = [checked_items(history, n_items, may_be_empty=True) for history in histories]
    lengths = [row.size for row in rows]
    items = np.concatenate([*rows, np.zeros(0, dtype=np.int64)])
    owners = np.repeat(np.arange(len(rows)), lengths)
    farthest = max(lengths, default=1) - 1
    keys, counts = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for distance in range(1, 1 + (farthest if weights is None else min(farthest, len(weights)))):
        together = owners[:-distance] == owners[distance:]
        pairs = (items[:-distance] * n_items + items[distance:])[together]
        keys.append(pairs)
        counts.append(np.full(pairs.size, 1 if weights is None else weights[distance - 1]))
    return PairCounts.of(n_items, np.concatenate(keys), np.concatenate(counts))


def popularity(histories: Iterable[npt.ArrayLike], n_items: int) -> _Ints:
    """How many users have each item, int64 ``(n_items,)``.

    Raises:
        DataError: items that are no integers in ``[0, n_items)``.
    """
    users = np.zeros(n_items, dtype=np.int64)
    for history in histories:
        users[np.unique(checked_items(history, n_items, may_be_empty=True))] += 1
    return users


def transition_segments(
    n_items: int, *, pairs: int, most: int, total: int, users: int
) -> tuple[IntegerSegment, ...]:
    """What a task of transitions sums.

    A norm check holds the table to what so many counts can have at the most; the popularity, which
    only orders what has equal votes, it does not look at.

    Args:
        pairs: distinct pairs that all clients together may have; see `PairTable`.
        most: largest count that a client may have in one cell of the table: 20 to 35 for a silo of
            220 shoppers.
        total: largest sum of a client's counts.
        users: most users of one client, who each count once in the popularity of an item.
    """
    table = PairTable.for_pairs(n_items, pairs)
    # Of numbers from 0 to m with the sum s, squares add up to m s at the most.
    norm = max(min(sqrt(most * table.parts * total), most * sqrt(table.size)), 1.0)
    return (
        IntegerSegment(COUNTS, table.size, most, norm),
        IntegerSegment(WORDS, table.size, most << WORD_BITS, norm * (1 << WORD_BITS)),
        IntegerSegment(POPULARITY, n_items, users),
    )


def transition_segments_for(
    split: Split, parts: Sequence[npt.NDArray[np.integer]]
) -> tuple[IntegerSegment, ...]:
    """The same for clients whose data is at hand, in a demo or a measurement.

    Args:
        parts: the users of each client.
    """
    counts = [transition_counts(histories_of(split, part), split.n_items) for part in parts]
    pairs = sum(each.keys.size for each in counts)
    table = PairTable.for_pairs(split.n_items, pairs)
    return transition_segments(
        split.n_items,
        pairs=pairs,
        most=max(1, *(int(table.encode(each)[0].max()) for each in counts)),
        total=max(1, *(int(each.counts.sum()) for each in counts)),
        users=max(part.size for part in parts),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Transitions:
    """The model: for each item, what follows it and how strongly, as a sparse matrix by rows.

    *Shapes*: ``starts`` int64 ``(n_items + 1,)``; ``followers`` int64 and ``strengths`` float64
    ``(pairs,)``, those of item i from ``starts[i]`` to ``starts[i + 1]``, each follower once;
    ``popularity`` int64 ``(n_items,)``.

    Raises:
        DataError: arrays that do not fit together.
    """

    starts: _Ints = field(repr=False)
    followers: _Ints = field(repr=False)
    strengths: npt.NDArray[np.float64] = field(repr=False)
    popularity: _Ints = field(repr=False)

    def __post_init__(self) -> None:
        fits = (
            self.starts.shape == (self.n_items + 1,)
            and self.followers.shape == self.strengths.shape == (self.starts[-1],)
            and self.starts[0] == 0
            and not np.any(np.diff(self.starts) < 0)
            and np.all((self.followers >= 0) & (self.followers < self.n_items))
            and np.isfinite(self.strengths).all()
        )
        if not fits:
            raise DataError(
                "expected rows of followers inside the catalogue with finite strengths; make the "
                "model again from the released sums"
            )

    @classmethod
    def of(
        cls,
        pairs: PairCounts,
        popularity: npt.NDArray[np.integer],
        *,
        backward: float = 0.25,
        damping: float = 0.5,
    ) -> Transitions:
        """The model of exact counts.

        Args:
            pairs: how often each item came before each other one.
            popularity: integers ``(n_items,)``: users that have each item.
            backward: what a pair counts in the other direction, in [0, 1]; 1 for what is
                chosen together, whatever comes first.
            damping: strengths are divided by the row's sum to this power, in [0, 1]: at 1, each
                item of a history has one vote to give; at 0, popular ones have more.

        Raises:
            DataError: counts of different catalogues, or numbers outside [0, 1].
        """
        if popularity.shape != (pairs.n_items,) or popularity.dtype.kind not in "iu":
            raise DataError(
                f"expected a whole number of users for each of {pairs.n_items} items, got "
                f"shape={popularity.shape}, dtype={popularity.dtype}; use the sums of one round"
            )
        if not (0.0 <= backward <= 1.0 and 0.0 <= damping <= 1.0):
            raise DataError(
                f"expected backward and damping in [0, 1], got backward={backward} "
                f"damping={damping}"
            )
        first, second, strengths = _both_ways(pairs, backward)
        sums = np.bincount(first, weights=strengths, minlength=pairs.n_items)
        starts = np.zeros(pairs.n_items + 1, dtype=np.int64)
        np.cumsum(np.bincount(first, minlength=pairs.n_items), out=starts[1:])
        strengths = strengths / sums[first] ** damping
        return cls(starts, second, strengths, popularity.astype(np.int64))

    @classmethod
    def from_sums(cls, sums: Mapping[str, npt.NDArray[np.integer]]) -> Transitions:
        """The model of the sums that a task of `transition_segments` has released.

        Raises:
            DataError: see :func:`pairs_from_sums`.
        """
        return cls.of(pairs_from_sums(sums), sums[POPULARITY])

    @staticmethod
    def names() -> set[str]:
        """Of its tensors."""
        return {f"transitions_{name}" for name in _ARRAYS}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, npt.NDArray[Any]]) -> Transitions:
        """The opposite of :meth:`tensors`."""
        return cls(*(tensors[f"transitions_{name}"] for name in _ARRAYS))

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """For an archive."""
        return {f"transitions_{name}": getattr(self, name) for name in _ARRAYS}

    @property
    def n_items(self) -> int:
        """Items of the catalogue."""
        return int(self.popularity.size)

    def score(self, history: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
        """Votes for each item: sum over k of 0.8^k times the strengths of the k-th latest item.

        Popularity orders items with the same votes.

        Raises:
            DataError: an empty history, or items outside the catalogue.
        """
        votes: npt.NDArray[np.float64] = self.popularity * np.float64(_TIE_BREAK)
        loudness = 1.0
        for item in checked_items(history, self.n_items)[::-1].tolist():
            row = slice(self.starts[item], self.starts[item + 1])
            votes[self.followers[row]] += loudness * self.strengths[row]
            loudness *= _RECENCY
        return votes

    def terms(self, history: npt.NDArray[np.integer], item: int) -> npt.NDArray[np.float64]:
        """What each item of a history adds to the votes for one item, without its popularity.

        Raises:
            DataError: see :meth:`score`.
        """
        items = checked_items(history, self.n_items)
        (target,) = checked_items([item], self.n_items)
        rows = [slice(self.starts[each], self.starts[each + 1]) for each in items]
        strengths = [self.strengths[row][self.followers[row] == target].sum() for row in rows]
        loudness = np.power(_RECENCY, np.arange(items.size)[::-1])
        return np.asarray(np.asarray(strengths) * loudness, dtype=np.float64)


def pairs_from_sums(sums: Mapping[str, npt.NDArray[np.integer]]) -> PairCounts:
    """The exact counts that a task of `transition_segments` has released.

    Raises:
        DataError: other segments; see also `PairTable.decode`.
    """
    if not sums.keys() >= {COUNTS, WORDS, POPULARITY}:
        raise DataError(
            f"expected sums of the segments {COUNTS!r}, {WORDS!r} and {POPULARITY!r}, got "
            f"{sorted(sums)}"
        )
    table = _table(sums[POPULARITY].size, sums[COUNTS].size)
    return table.decode(sums[COUNTS], sums[WORDS])


def _both_ways(pairs: PairCounts, backward: float) -> tuple[_Ints, _Ints, npt.NDArray[np.float64]]:
    """Counts plus a share of their transposed, by first item, then second."""
    first, second = np.divmod(pairs.keys, pairs.n_items)
    keys = np.concatenate([pairs.keys, second * pairs.n_items + first])
    keys, place = np.unique(keys, return_inverse=True)
    weights = np.concatenate([pairs.counts, backward * pairs.counts])
    strengths = np.bincount(place, weights=weights).astype(np.float64)
    kept = strengths > 0
    first, second = np.divmod(keys[kept], pairs.n_items)
    return first, second, strengths[kept]


def _table(n_items: int, size: int) -> PairTable:
    if size % 3:
        raise DataError(
            f"expected a table of three equal parts, got size={size}; prepare the task with "
            "transition_segments()"
        )
    return PairTable(n_items, size // 3)


class TransitionsLearner:
    """A client's part: the counts of its own users, in a round that has no model yet."""

    def __init__(self, split: Split, users: npt.NDArray[np.int64]) -> None:
        self._histories = histories_of(split, users.tolist())
        self._n_items = split.n_items

    @property
    def items(self) -> npt.NDArray[np.int64]:
        """Items that somebody of the client has."""
        return np.flatnonzero(popularity(self._histories, self._n_items))

    def work(self, assignment: Assignment) -> Work:
        """The table of counts, and the popularity of items.

        Raises:
            DataError: the task is for another catalogue, or for smaller counts.
        """
        segments = assignment.segments
        if not segments.keys() >= {COUNTS, WORDS, POPULARITY} or (
            segments[POPULARITY].values != self._n_items
        ):
            sizes = {name: segment.values for name, segment in segments.items()}
            raise DataError(
                f"expected a task with {COUNTS!r}, {WORDS!r} and {POPULARITY!r} of "
                f"{self._n_items} items, got segments={sizes}; prepare the task from the same "
                "data set"
            )
        table = _table(self._n_items, segments[COUNTS].values)
        counts, words = table.encode(transition_counts(self._histories, self._n_items))
        _check_room(segments[COUNTS], counts)
        users = popularity(self._histories, self._n_items)
        return Work({COUNTS: counts, WORDS: words, POPULARITY: users})

    def state(self) -> bytes:
        """Nothing is kept."""
        return b""

    def restore(self, state: bytes) -> None:
        """Nothing was kept."""


def _check_room(segment: Segment, counts: _Ints) -> None:
    if counts.max(initial=0) > segment.max_abs:
        raise DataError(
            f"expected counts of at most {segment.max_abs} in a cell of the table; this client "
            "has more; prepare the task for larger counts, or deal its users out to more clients"
        )
