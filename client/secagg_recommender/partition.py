"""Dealing users out to silos, evenly or not, to see what uneven data does to training.

A real silo has the users it has; these are for simulations and demos. Every partition is a function
of its arguments and deals each user once, and no silo is left empty. Labels may be public or come
from `taste_labels`; they are never part of an update.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from secagg_recommender.attributes import ItemAttributes
from secagg_recommender.interactions import DataError, Split

__all__ = [
    "PartitionName",
    "Parts",
    "favourite_labels",
    "partition",
    "partition_by_label",
    "partition_by_quantity",
    "partition_by_taste",
    "partition_dirichlet",
    "partition_users",
    "popularity_skew",
    "taste_labels",
]

Parts = list[npt.NDArray[np.int64]]
"""Ascending user ids of each silo; together ``0 … n_users − 1`` once each."""

PartitionName = Literal["uniform", "dirichlet", "preference", "taste", "quantity"]

_LABELS: Final = 8
_DIMENSIONS: Final = 16


def partition(
    name: PartitionName,
    split: Split,
    n_silos: int,
    seed: int,
    *,
    labels: npt.NDArray[np.integer] | None = None,
    alpha: float = 0.5,
) -> Parts:
    """Deal the users of a split out by name, looking at training items only.

    Args:
        labels: a kind for each user, ``(n_users,)``, for ``"dirichlet"`` and ``"preference"``,
            such as `favourite_labels`; clusters of taste where none are given.
        alpha: concentration of ``"dirichlet"``; small is skewed.

    Raises:
        DataError: unknown name, unusable labels or alpha, or a silo would be empty.
    """
    if name == "uniform":
        return partition_users(split.n_users, n_silos, seed)
    if name == "quantity":
        return partition_by_quantity(split.n_users, n_silos, seed)
    if name == "taste":
        return partition_by_taste(split, n_silos, seed)
    if name not in ("dirichlet", "preference"):
        known = ", ".join(get_args(PartitionName))
        raise DataError(f"expected a partition among {known}; got {name!r}; pick one")
    kinds = taste_labels(split, _LABELS, seed) if labels is None else labels
    if np.shape(kinds) != (split.n_users,):
        raise DataError(
            f"expected one label a user, {split.n_users}; got shape {np.shape(kinds)}; label all"
        )
    if name == "dirichlet":
        return partition_dirichlet(kinds, n_silos, seed, alpha=alpha)
    return partition_by_label(kinds, n_silos, seed)


def partition_users(n_users: int, n_silos: int, seed: int) -> Parts:
    """Deal users out to silos at random; sizes differ by at most one.

    Returns ``n_silos`` ascending int64 arrays that together hold ``0 … n_users − 1`` once each.

    Raises:
        DataError: there is no silo, or a silo would be empty.
    """
    _check_counts(n_users, n_silos)
    order = np.random.default_rng(seed).permutation(n_users)
    return _ascending(np.array_split(order, n_silos))


def partition_dirichlet(
    labels: npt.NDArray[np.integer], n_silos: int, seed: int, *, alpha: float
) -> Parts:
    """Silos of equal size whose shares of the labels are drawn from a Dirichlet distribution.

    Hsu, Qi and Brown 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated
    Visual Classification", section 3: shares q ~ Dirichlet(alpha · p) for each silo, with p the
    labels' prior; here p is what the silos before have left, so that shares can be kept to to the
    end. A small alpha gives silos of few labels each, a large one equal shares.

    Raises:
        DataError: alpha is not positive and finite, or a silo would be empty.
    """
    _check_counts(len(labels), n_silos)
    if not 0 < alpha < np.inf:
        raise DataError(f"expected a finite alpha > 0, got alpha={alpha}; try 0.1 to 100")
    rng = np.random.default_rng(seed)
    _, codes = np.unique(labels, return_inverse=True)
    waiting = [rng.permutation(np.flatnonzero(codes == code)) for code in range(codes.max() + 1)]
    parts = []
    for places in np.array_split(codes, n_silos):
        waiting = [users for users in waiting if users.size]
        counts = _counts_by_shares([users.size for users in waiting], places.size, alpha, rng)
        parts.append(np.concatenate([u[:n] for u, n in zip(waiting, counts, strict=True)]))
        waiting = [u[n:] for u, n in zip(waiting, counts, strict=True)]
    return _ascending(parts)


def _counts_by_shares(
    left: Sequence[int], size: int, alpha: float, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """How many of each label a silo of ``size`` takes, by shares that it draws."""
    counts = np.zeros(len(left), dtype=np.int64)
    room = np.asarray(left, dtype=np.int64)
    shares = rng.dirichlet(alpha * room / room.sum())
    while counts.sum() < size:
        odds = shares * (room > counts)
        # Where the labels it has shares of have gone, it takes what is left, as it comes.
        odds = odds if odds.sum() > 0 else (room - counts).astype(np.float64)
        drawn = rng.multinomial(size - counts.sum(), odds / odds.sum())
        counts = np.minimum(counts + drawn, room)
    return counts


def partition_by_label(labels: npt.NDArray[np.integer], n_silos: int, seed: int) -> Parts:
    """Users of one label together, in silos of equal size: most silos know one kind of shopper.

    Raises:
        DataError: a silo would be empty.
    """
    _check_counts(len(labels), n_silos)
    rng = np.random.default_rng(seed)
    _, codes = np.unique(labels, return_inverse=True)
    turn = rng.permutation(codes.max() + 1)[codes]
    return _ascending(np.array_split(np.lexsort((rng.random(turn.size), turn)), n_silos))


def partition_by_taste(split: Split, n_silos: int, seed: int) -> Parts:
    """A silo for each cluster of users with similar items (see :func:`taste_labels`).

    Raises:
        DataError: a silo would be empty.
    """
    _check_counts(split.n_users, n_silos)
    labels = taste_labels(split, n_silos, seed)
    return _filled([np.flatnonzero(labels == silo) for silo in range(n_silos)])


def partition_by_quantity(n_users: int, n_silos: int, seed: int, *, exponent: float = 1.5) -> Parts:
    """Users at random into silos whose sizes follow a power law, rank^−exponent.

    Raises:
        DataError: exponent is negative or not finite, or a silo would be empty.
    """
    _check_counts(n_users, n_silos)
    if not 0 <= exponent < np.inf:
        raise DataError(f"expected a finite exponent >= 0, got {exponent}; 0 gives equal sizes")
    sizes = np.arange(1, n_silos + 1, dtype=np.float64) ** -exponent
    # One user each for certain, and all others by the law.
    bounds = np.round(np.cumsum(sizes / sizes.sum()) * (n_users - n_silos)).astype(np.int64)
    bounds += np.arange(1, n_silos + 1)
    order = np.random.default_rng(seed).permutation(n_users)
    return _ascending(np.split(order, bounds[:-1]))


def taste_labels(split: Split, n_labels: int, seed: int) -> npt.NDArray[np.int64]:
    """Clusters of users by what they have: k-means on a truncated SVD of users × items.

    Items weigh less the more users have them (inverse document frequency), and users have unit
    length, so that neither blockbusters nor heavy users make a cluster of their own.

    Returns int64 ``(n_users,)`` in ``[0, n_labels)``; a label may be rare or unused.

    Raises:
        DataError: fewer than one label, or more labels than users.
    """
    from scipy.cluster.vq import kmeans2
    from scipy.sparse import csr_array
    from scipy.sparse.linalg import svds

    _check_counts(split.n_users, n_labels)
    popularity = np.bincount(split.train_items, minlength=split.n_items)
    rarity = np.log((2 + split.n_users) / (1 + popularity))
    weights = rarity[split.train_items]
    norms = np.sqrt(np.bincount(split.train_users, weights**2, minlength=split.n_users))
    weights /= np.where(norms > 0, norms, 1.0)[split.train_users]
    shape = (split.n_users, split.n_items)
    table = csr_array((weights, (split.train_users, split.train_items)), shape=shape)
    dimensions = min(_DIMENSIONS, min(shape) - 1)
    if n_labels == 1 or dimensions < 1:
        return np.zeros(split.n_users, dtype=np.int64)
    # A start that does not depend on the seed: the same users lie in the same space every time.
    left, values, _ = svds(table, k=dimensions, v0=np.ones(min(shape)))
    places = left * values
    # Users alike cannot be told apart: no more clusters than different users.
    n_labels = min(n_labels, np.unique(places.round(9), axis=0).shape[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # A label may stay unused.
        _, labels = kmeans2(places, n_labels, minit="++", seed=np.random.default_rng(seed))
    return np.asarray(labels, dtype=np.int64)


def favourite_labels(
    split: Split, attributes: ItemAttributes, prefix: str = ""
) -> npt.NDArray[np.int64]:
    """The attribute that each user has more of than anybody would expect: a kind of shopper.

    By the largest (count − expected) / √(expected + 1), with what is expected of a user who buys as
    all do together; counts alone would give nearly everybody the most frequent attribute.

    Args:
        prefix: of the attributes to look at, such as ``"genre: "``; all by default.

    Returns int64 ``(n_users,)``, places in ``attributes.labels``.

    Raises:
        DataError: no attribute starts so, or attributes are of another catalogue.
    """
    from scipy.sparse import csr_array

    wanted = [place for place, label in enumerate(attributes.labels) if label.startswith(prefix)]
    if not wanted or attributes.n_items != split.n_items:
        raise DataError(
            f"expected attributes of n_items={split.n_items} that start with {prefix!r}, got "
            f"n_items={attributes.n_items} and {len(wanted)} attributes; pass those of this data"
        )
    shape = (attributes.n_items, attributes.n_attributes)
    ones = np.ones(attributes.indices.size)
    of_item = csr_array((ones, attributes.indices, attributes.indptr), shape=shape)[:, wanted]
    pairs = (np.ones(split.train_users.size), (split.train_users, split.train_items))
    counts = (csr_array(pairs, shape=(split.n_users, split.n_items)) @ of_item).toarray()
    totals = counts.sum(axis=1, keepdims=True)
    expected = totals * counts.sum(axis=0) / max(totals.sum(), 1)
    surprise = (counts - expected) / np.sqrt(expected + 1)
    favourites: npt.NDArray[np.int64] = np.argmax(surprise, axis=1)
    return np.asarray(wanted, dtype=np.int64)[favourites]


def popularity_skew(split: Split, parts: Sequence[npt.NDArray[np.int64]]) -> float:
    """How far silos' shares of the items are from everybody's: mean total-variation distance.

    In [0, 1]; a silo of few users is some way off by chance alone, so compare with uniform silos.
    """
    everybody = np.bincount(split.train_items, minlength=split.n_items) / split.train_items.size
    distances = []
    for part in parts:
        counts = np.bincount(
            split.train_items[np.isin(split.train_users, part)], minlength=split.n_items
        )
        distances.append(0.5 * np.abs(counts / max(counts.sum(), 1) - everybody).sum())
    return float(np.mean(distances))


def _check_counts(n_users: int, n_silos: int) -> None:
    """Refuse what would leave a silo empty."""
    if not 1 <= n_silos <= n_users:
        raise DataError(
            f"expected 1 <= n_silos <= n_users, got n_silos={n_silos} n_users={n_users}; "
            "ask for fewer silos or load more users"
        )


def _filled(parts: Parts) -> Parts:
    """Every empty silo takes a user from the largest."""
    for silo, part in enumerate(parts):
        if part.size == 0:
            largest = int(np.argmax([other.size for other in parts]))
            parts[silo], parts[largest] = parts[largest][:1], parts[largest][1:]
    return _ascending(parts)


def _ascending(parts: Sequence[Sequence[int] | npt.NDArray[np.integer]]) -> Parts:
    return [np.sort(np.asarray(part, dtype=np.int64)) for part in parts]
