"""The generated marketplace."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg_recommender.evaluation import evaluate
from secagg_recommender.interactions import DataError, split_leave_one_out
from secagg_recommender.marketplace import generate_marketplace


def test_default_size_is_about_600_shoppers_and_300_products() -> None:
    made = generate_marketplace()
    assert made.n_users == 600
    assert 290 <= made.n_items <= 300
    assert made.users.size > 8 * 600


def test_same_seed_gives_the_same_data() -> None:
    first, again = generate_marketplace(5), generate_marketplace(5)
    assert np.array_equal(first.users, again.users)
    assert np.array_equal(first.items, again.items)
    assert first.item_titles == again.item_titles


def test_another_seed_gives_other_data() -> None:
    first, other = generate_marketplace(5), generate_marketplace(6)
    assert first.item_titles != other.item_titles
    assert not np.array_equal(first.items[:100], other.items[:100])


def test_global_random_state_plays_no_part() -> None:
    np.random.seed(1)  # noqa: NPY002 - the point of the test
    first = generate_marketplace(5)
    np.random.seed(2)  # noqa: NPY002
    assert np.array_equal(first.items, generate_marketplace(5).items)


def test_titles_are_distinct_and_read_like_products() -> None:
    titles = generate_marketplace().item_titles
    assert len(set(titles)) == len(titles)
    assert any("Noise-cancelling headphones, 40 h" in title for title in titles)
    assert all(title.isascii() and 10 < len(title) < 80 for title in titles)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(90, 400))
def test_every_size_gives_bounded_baskets(seed: int, shoppers: int, products: int) -> None:
    made = generate_marketplace(seed, n_shoppers=shoppers, n_products=products)
    counts = np.bincount(made.users)
    assert made.n_users == shoppers
    assert made.n_items <= products
    assert counts.min() >= 8
    assert counts.max() <= 45


@pytest.mark.parametrize(
    ("shoppers", "products"), [(0, 300), (-1, 300), (10, 0), (10, 89), (10, 2881)]
)
def test_impossible_sizes_are_refused(shoppers: int, products: int) -> None:
    with pytest.raises(DataError, match="n_products"):
        generate_marketplace(0, n_shoppers=shoppers, n_products=products)


def test_popularity_alone_explains_little() -> None:
    split = split_leave_one_out(generate_marketplace())
    counts = np.bincount(split.train_items, minlength=split.n_items).astype(float)
    metrics = evaluate(lambda users: np.tile(counts, (users.size, 1)), split, seed=1)
    assert 0.1 < metrics.hr10 < 0.3
