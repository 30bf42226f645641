"""Implicit positives of a set of users, in time order, and their leave-one-out split.

Everything in this package works on :class:`Interactions`: contiguous integer ids and every user's
items in time order. Read ``movielens`` next, or any other loader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from secagg.errors import InputError

__all__ = [
    "NO_TEST_ITEM",
    "DataError",
    "Interactions",
    "Split",
    "from_events",
    "split_leave_one_out",
]

NO_TEST_ITEM: Final = -1
"""Value of :attr:`Split.test_item` for users without a test item."""

_IdArray = npt.NDArray[np.int32]


class DataError(InputError, ValueError):
    """Input data, or an argument describing it, is not what the recommender can work with.

    The message says what was expected, what came and what to do next.
    """

    reason = "INVALID_DATA"


@dataclass(frozen=True, slots=True, eq=False)
class Interactions:
    """Implicit positives of a set of users, grouped by user, in time order inside a user.

    *Shapes and units*: ``users`` and ``items`` are int32 arrays of the same length, contiguous
    ids in ``[0, n_users)`` and ``[0, n_items)``; ``users`` never decreases. ``user_labels`` and
    ``item_labels`` hold the original ids, ``item_titles`` one title an item. ``tie_rule`` says in
    words how equal timestamps were ordered, because that order picks the test items.

    Raises:
        DataError: the arrays break a promise above, hold no row, or repeat a (user, item) pair.
    """

    name: str
    users: _IdArray
    items: _IdArray
    user_labels: tuple[str, ...]
    item_labels: tuple[str, ...]
    item_titles: tuple[str, ...]
    tie_rule: str

    def __post_init__(self) -> None:
        """Check once, so that nothing downstream has to."""
        if self.users.size == 0:
            raise DataError(
                f"expected at least one interaction, got rows=0 in dataset={self.name!r}; "
                "check that the source is complete"
            )
        _check_ids("users", self.users, self.n_users)
        _check_ids("items", self.items, self.n_items)
        self._check_structure()

    @property
    def n_users(self) -> int:
        """Number of users, with or without interactions."""
        return len(self.user_labels)

    @property
    def n_items(self) -> int:
        """Number of items in the catalogue."""
        return len(self.item_labels)

    def _check_structure(self) -> None:
        """Lengths, grouping and uniqueness."""
        if self.users.shape != self.items.shape or len(self.item_titles) != self.n_items:
            raise DataError(
                "expected one item per user entry and one title per item, got "
                f"users={self.users.shape} items={self.items.shape} "
                f"titles={len(self.item_titles)} n_items={self.n_items}; build with from_events()"
            )
        if np.any(np.diff(self.users) < 0):
            raise DataError(
                "expected rows grouped by user in ascending order, got users out of order; "
                "build with from_events()"
            )
        pairs = self.users.astype(np.int64) * self.n_items + self.items
        if np.unique(pairs).size != pairs.size:
            raise DataError(
                "expected every (user, item) pair once, got "
                f"repeated={pairs.size - np.unique(pairs).size}; build with from_events(), which "
                "keeps the latest event of a pair"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Leave-one-out split: every user's latest item is the test item, all others are training.

    *Shapes*: ``train_users`` and ``train_items`` int32, same length, grouped by user in time
    order; ``test_item`` int32 of shape ``(n_users,)``, :data:`NO_TEST_ITEM` where a user has
    fewer than two interactions (the single one stays in training).
    """

    train_users: _IdArray
    train_items: _IdArray
    test_item: _IdArray
    n_users: int
    n_items: int

    def items_of(self, user: int) -> _IdArray:
        """Training items of one user in time order, int32."""
        start, stop = np.searchsorted(self.train_users, [user, user + 1])
        return self.train_items[start:stop]


def from_events(
    name: str,
    users: npt.ArrayLike,
    items: npt.ArrayLike,
    timestamps: npt.ArrayLike,
    *,
    titles: Mapping[int, str] | None = None,
    tie_rule: str = "equal timestamps: the earlier row counts as the later event",
) -> Interactions:
    """Build :class:`Interactions` from raw events with integer ids, one row an event.

    Ids become contiguous in ascending numeric order. Of equal timestamps **the row that comes
    first counts as the later event**: the published reference numbers for MovieLens use that
    order, and 415 of its 943 test items depend on it. A repeated (user, item) pair keeps its
    latest event only, so that a test item can never be a training item too.

    *Shapes and units*: three sequences of the same length; ids are integers; any time unit.

    Raises:
        DataError: there is no event, lengths differ, an id is no integer or a time not finite.
    """
    frame = pd.DataFrame(_checked_events(users, items, timestamps))
    # Reversed, then sorted stably: the first row of a tie ends up last.
    ordered = frame.iloc[::-1].sort_values(["user", "time"], kind="stable")
    ordered = ordered.drop_duplicates(["user", "item"], keep="last")
    user_ids, user_codes = np.unique(ordered["user"].to_numpy(), return_inverse=True)
    item_ids, item_codes = np.unique(ordered["item"].to_numpy(), return_inverse=True)
    known = titles or {}
    return Interactions(
        name=name,
        users=user_codes.astype(np.int32),
        items=item_codes.astype(np.int32),
        user_labels=tuple(str(label) for label in user_ids),
        item_labels=tuple(str(label) for label in item_ids),
        item_titles=tuple(known.get(int(label), f"Item {label}") for label in item_ids),
        tie_rule=tie_rule,
    )


def split_leave_one_out(interactions: Interactions) -> Split:
    """Hold out every user's latest item; users with one interaction keep it for training."""
    users, items = interactions.users, interactions.items
    counts = np.bincount(users, minlength=interactions.n_users)
    is_last = np.append(users[1:] != users[:-1], True)
    held_out = is_last & (counts[users] >= 2)
    test_item = np.full(interactions.n_users, NO_TEST_ITEM, dtype=np.int32)
    test_item[users[held_out]] = items[held_out]
    return Split(
        train_users=users[~held_out],
        train_items=items[~held_out],
        test_item=test_item,
        n_users=interactions.n_users,
        n_items=interactions.n_items,
    )


def _checked_events(
    users: npt.ArrayLike, items: npt.ArrayLike, timestamps: npt.ArrayLike
) -> dict[str, npt.NDArray[np.generic]]:
    """Columns of equal length and the right kind."""
    columns = {"user": np.asarray(users), "item": np.asarray(items), "time": np.asarray(timestamps)}
    shapes = {column: values.shape for column, values in columns.items()}
    if len(set(shapes.values())) != 1 or columns["user"].ndim != 1:
        raise DataError(
            f"expected three sequences of one length, got shapes={shapes}; pass one row an event"
        )
    if columns["user"].size == 0:
        raise DataError(
            "expected at least one event, got rows=0; check that the source is complete"
        )
    kinds = "".join(columns[column].dtype.kind for column in ("user", "item"))
    if not set(kinds) <= set("iu"):
        raise DataError(f"expected integer user and item ids, got dtype kinds={kinds!r}; cast them")
    if columns["time"].dtype.kind not in "iuf" or not np.isfinite(columns["time"]).all():
        raise DataError(
            f"expected finite numeric timestamps, got dtype={columns['time'].dtype}; repair them"
        )
    return columns


def _check_ids(field: str, ids: _IdArray, bound: int) -> None:
    """Refuse ids of another type or outside ``[0, bound)``."""
    if ids.dtype != np.int32 or ids.ndim != 1:
        raise DataError(
            f"expected {field} as one-dimensional int32, got dtype={ids.dtype} "
            f"ndim={ids.ndim}; build with from_events()"
        )
    if ids.size and (ids.min() < 0 or ids.max() >= bound):
        raise DataError(
            f"expected {field} in [0, {bound}), got min={ids.min()} max={ids.max()}; "
            "give every id a label"
        )
