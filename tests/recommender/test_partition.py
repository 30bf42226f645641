"""Dealing users out: everybody once, no silo empty, and partitions that differ as they should."""

from functools import lru_cache
from typing import get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg_recommender.attributes import attributes_of
from secagg_recommender.interactions import DataError, Split, split_leave_one_out
from secagg_recommender.marketplace import generate_marketplace
from secagg_recommender.partition import (
    PartitionName,
    Parts,
    favourite_labels,
    partition,
    partition_by_label,
    partition_by_quantity,
    partition_by_taste,
    partition_dirichlet,
    partition_users,
    popularity_skew,
    taste_labels,
)

NAMES = get_args(PartitionName)


@lru_cache
def shoppers(n: int = 240) -> Split:
    return split_leave_one_out(generate_marketplace(3, n_shoppers=n, n_products=120))


def same_items(n_users: int) -> Split:
    """Users who cannot be told apart."""
    users = np.repeat(np.arange(n_users, dtype=np.int32), 3)
    items = np.tile(np.arange(3, dtype=np.int32), n_users)
    return Split(users, items, np.full(n_users, 3, np.int32), n_users, 5)


def assert_deals_everybody_once(parts: Parts, n_users: int, n_silos: int) -> None:
    assert len(parts) == n_silos
    assert all(part.size and part.dtype == np.int64 for part in parts)
    assert all((np.diff(part) > 0).all() for part in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(n_users))


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(-3, 5), min_size=1, max_size=60),
    silos=st.integers(1, 60),
    seed=st.integers(0, 2**32 - 1),
    alpha=st.sampled_from([1e-300, 0.01, 1.0, 1e6]),
    exponent=st.sampled_from([0.0, 1.5, 40.0]),
)
def test_every_user_is_dealt_once_and_no_silo_is_empty(
    labels: list[int], silos: int, seed: int, alpha: float, exponent: float
) -> None:
    kinds, n_silos = np.array(labels), min(silos, len(labels))
    for parts in (
        partition_users(kinds.size, n_silos, seed),
        partition_by_quantity(kinds.size, n_silos, seed, exponent=exponent),
        partition_by_label(kinds, n_silos, seed),
        partition_dirichlet(kinds, n_silos, seed, alpha=alpha),
    ):
        assert_deals_everybody_once(parts, kinds.size, n_silos)


@pytest.mark.parametrize("n_silos", [1, 2, 9, 30])
@pytest.mark.parametrize("split", [shoppers(30), same_items(30)], ids=["shoppers", "same"])
def test_taste_deals_every_user_once(split: Split, n_silos: int) -> None:
    for seed in range(3):
        assert_deals_everybody_once(partition_by_taste(split, n_silos, seed), 30, n_silos)


@pytest.mark.parametrize("name", NAMES)
def test_partition_by_name_is_a_function_of_its_seed(name: PartitionName) -> None:
    first, again, other = (partition(name, shoppers(), 6, seed) for seed in (1, 1, 2))
    assert_deals_everybody_once(first, 240, 6)
    assert all(map(np.array_equal, first, again))
    assert not all(map(np.array_equal, first, other))


def test_equal_sizes_differ_by_at_most_one() -> None:
    labels = np.arange(103) % 5
    for parts in (
        partition_users(103, 8, 0),
        partition_by_label(labels, 8, 0),
        partition_dirichlet(labels, 8, 0, alpha=0.1),
    ):
        sizes = [part.size for part in parts]
        assert max(sizes) - min(sizes) <= 1


def test_quantity_follows_the_power_law() -> None:
    sizes = [part.size for part in partition_by_quantity(10_000, 4, 0, exponent=1.0)]
    law = np.array([1, 1 / 2, 1 / 3, 1 / 4])
    assert sizes == pytest.approx(list(10_000 * law / law.sum()), abs=4)


def test_users_of_one_label_stay_together() -> None:
    labels = np.repeat([7, 3, 9, 1], 25)
    parts = partition_by_label(labels, 4, 5)
    assert sorted(np.unique(labels[part]).tolist() for part in parts) == [[1], [3], [7], [9]]


def test_small_alpha_gives_few_labels_a_silo_and_a_large_one_equal_shares() -> None:
    labels = np.arange(800) % 8

    def largest_share(alpha: float) -> float:
        found = [
            np.bincount(labels[part], minlength=8).max() / part.size
            for seed in range(5)
            for part in partition_dirichlet(labels, 8, seed, alpha=alpha)
        ]
        return float(np.mean(found))

    skewed, middling, even = (largest_share(alpha) for alpha in (0.01, 2.0, 1e4))
    assert skewed > 0.75
    assert even < 0.25
    assert even < middling < skewed


def test_partitions_by_taste_and_kind_are_more_skewed_than_uniform_ones() -> None:
    def skew(name: PartitionName, alpha: float = 1.0) -> float:
        runs = [partition(name, shoppers(), 4, seed, alpha=alpha) for seed in range(3)]
        return float(np.mean([popularity_skew(shoppers(), parts) for parts in runs]))

    uniform = skew("uniform")
    assert skew("dirichlet", 1e5) == pytest.approx(uniform, abs=0.05)
    assert skew("dirichlet", 0.05) > uniform + 0.1
    assert skew("preference") > uniform + 0.1
    assert skew("taste") > skew("preference")


def test_skew_of_known_silos() -> None:
    users = np.arange(4, dtype=np.int32)
    split = Split(users, np.array([0, 0, 1, 1], np.int32), users, 4, 4)
    assert popularity_skew(split, [np.array([0, 1]), np.array([2, 3])]) == 0.5
    assert popularity_skew(split, [np.array([0, 2]), np.array([1, 3])]) == 0.0


def test_given_labels_decide_who_goes_where() -> None:
    labels = np.arange(240) // 60
    parts = partition("preference", shoppers(), 4, 0, labels=labels)
    assert {part[0] // 60 for part in parts} == {0, 1, 2, 3}
    assert all(np.ptp(part) == 59 for part in parts)


def test_taste_finds_crowds_that_share_no_item() -> None:
    users = np.repeat(np.arange(40, dtype=np.int32), 6)
    rng = np.random.default_rng(0)
    items = np.concatenate([rng.permutation(10)[:6] + 10 * (user % 2) for user in range(40)])
    split = Split(users, items.astype(np.int32), np.zeros(40, np.int32), 40, 20)
    labels = taste_labels(split, 2, 0)
    assert len(set(labels[::2])) == len(set(labels[1::2])) == 1
    assert labels[0] != labels[1]


def test_taste_looks_at_training_items_only() -> None:
    split = shoppers()
    hidden = Split(
        split.train_users, split.train_items, split.test_item[::-1].copy(), 240, split.n_items
    )
    assert np.array_equal(taste_labels(split, 5, 0), taste_labels(hidden, 5, 0))


def test_favourites_are_what_a_user_has_more_of_than_others() -> None:
    users = np.array([0, 0, 0, 1, 1, 1, 2, 2], dtype=np.int32)
    items = np.array([0, 1, 2, 0, 1, 3, 0, 1], dtype=np.int32)
    split = Split(users, items, np.zeros(3, np.int32), 3, 4)
    names = [["genre: Drama"], ["genre: Drama"], ["genre: Noir", "decade: 1950s"], ["genre: War"]]
    attributes = attributes_of(names)
    found = favourite_labels(split, attributes, "genre: ")
    assert [attributes.labels[label] for label in found] == [
        "genre: Noir",
        "genre: War",
        "genre: Drama",
    ]


def test_attributes_of_another_catalogue_or_kind_are_refused() -> None:
    with pytest.raises(DataError, match="n_items"):
        favourite_labels(shoppers(30), attributes_of([["genre: Noir"]] * 7), "genre: ")
    with pytest.raises(DataError, match="colour"):
        favourite_labels(same_items(4), attributes_of([["genre: Noir"]] * 5), "colour: ")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n_silos", [0, -1, 31])
def test_too_few_or_too_many_silos_are_refused(name: PartitionName, n_silos: int) -> None:
    with pytest.raises(DataError, match="n_silos"):
        partition(name, shoppers(30), n_silos, 0, labels=np.zeros(30, np.int64))


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_alpha_is_refused(alpha: float) -> None:
    with pytest.raises(DataError, match="alpha"):
        partition("dirichlet", shoppers(30), 3, 0, alpha=alpha)


@pytest.mark.parametrize("exponent", [-0.1, float("nan"), float("inf")])
def test_impossible_exponent_is_refused(exponent: float) -> None:
    with pytest.raises(DataError, match="exponent"):
        partition_by_quantity(30, 3, 0, exponent=exponent)


@pytest.mark.parametrize("shape", [(29,), (31,), (30, 1), ()])
def test_labels_for_other_users_are_refused(shape: tuple[int, ...]) -> None:
    labels: npt.NDArray[np.int64] = np.zeros(shape, np.int64)
    with pytest.raises(DataError, match="one label a user"):
        partition("preference", shoppers(30), 3, 0, labels=labels)


def test_unknown_partition_is_refused() -> None:
    with pytest.raises(DataError, match="uniform, dirichlet"):
        partition("alphabetical", shoppers(30), 3, 0)  # type: ignore[arg-type]
