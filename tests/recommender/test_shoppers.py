"""Shoppers generated for a catalogue."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg_recommender.catalogue import Catalogue
from secagg_recommender.interactions import DataError
from secagg_recommender.shoppers import KINDS, Shoppers, generate_shoppers


def make_catalogue(count: int = 300, seed: int = 0) -> Catalogue:
    rng = np.random.default_rng(seed)
    list_price = 10 ** rng.uniform(2, 5, count)
    discount = rng.uniform(0, 0.9, count)
    frame = pd.DataFrame(
        {
            "id": [f"B{place:09d}" for place in range(count)],
            "title": [f"Product {place}" for place in range(count)],
            "category": [f"Shop > Shelf {place % 7}" for place in range(count)],
            "rating": rng.uniform(1, 5, count).round(1),
            "rating_count": (10 ** rng.uniform(0, 5, count)).round(),
            "price": list_price * (1 - discount),
            "list_price": list_price,
            "discount": discount,
            "currency": "INR",
        }
    )
    return Catalogue(frame, ())


CATALOGUE = make_catalogue()
SHOPPERS = generate_shoppers(CATALOGUE, seed=1, n_shoppers=200)


def bought_by(shoppers: Shoppers, kind: str) -> pd.DataFrame:
    """Products bought by one kind, a row a purchase, with ``user``."""
    made = shoppers.interactions
    chosen = shoppers.kinds[made.users] == KINDS.index(kind)
    labels = [made.item_labels[item] for item in made.items[chosen]]
    frame = CATALOGUE.frame.set_index("id").loc[labels]
    return frame.assign(user=made.users[chosen])


def test_the_name_and_every_shopper_say_that_they_are_generated() -> None:
    made = SHOPPERS.interactions
    assert "generated" in made.name
    assert all("generated" in label for label in made.user_labels)


def test_same_seed_gives_the_same_data() -> None:
    again = generate_shoppers(CATALOGUE, seed=1, n_shoppers=200)
    assert np.array_equal(again.interactions.items, SHOPPERS.interactions.items)
    assert np.array_equal(again.kinds, SHOPPERS.kinds)


def test_another_seed_gives_other_data() -> None:
    other = generate_shoppers(CATALOGUE, seed=2, n_shoppers=200)
    assert not np.array_equal(other.kinds, SHOPPERS.kinds)
    assert not np.array_equal(other.interactions.items[:99], SHOPPERS.interactions.items[:99])


def test_kinds_are_equally_frequent_and_one_a_shopper() -> None:
    assert SHOPPERS.kinds.dtype == np.int64
    assert np.bincount(SHOPPERS.kinds).tolist() == [50, 50, 50, 50]
    assert SHOPPERS.kinds.size == SHOPPERS.interactions.n_users


@pytest.mark.parametrize(
    ("kind", "figure"),
    [("rating", "rating"), ("discount", "discount"), ("popularity", "rating_count")],
)
def test_each_kind_buys_what_drives_it(kind: str, figure: str) -> None:
    means = {name: np.log1p(bought_by(SHOPPERS, name)[figure]).mean() for name in KINDS}
    assert max(means, key=means.__getitem__) == kind
    others = [mean for name, mean in means.items() if name != kind]
    assert means[kind] > max(others) + 0.02


def test_price_shoppers_keep_to_their_own_budget() -> None:
    spread = {
        kind: np.log(bought.price).groupby(bought.user).std().mean()
        for kind in KINDS
        for bought in [bought_by(SHOPPERS, kind)]
    }
    assert spread["price"] < 0.7 * min(spread[kind] for kind in KINDS if kind != "price")
    bought = bought_by(SHOPPERS, "price")
    budgets = np.log(bought.price).groupby(bought.user).mean()
    assert budgets.std() > 0.5 * np.log(CATALOGUE.frame.price).std()


def test_attributes_belong_to_the_items_of_the_interactions() -> None:
    made, attributes = SHOPPERS.interactions, SHOPPERS.attributes
    assert attributes.n_items == made.n_items
    frame = CATALOGUE.frame.set_index("id")
    for item in (0, made.n_items - 1):
        names = [attributes.labels[one] for one in attributes.of(item)]
        shelf = frame.loc[made.item_labels[item], "category"].split(" > ")[1]
        assert f"category: {shelf}" in names
        assert made.item_titles[item] == frame.loc[made.item_labels[item], "title"]


def test_what_has_no_figures_or_another_currency_is_never_bought() -> None:
    frame = CATALOGUE.frame.copy()
    frame.loc[0, "price"] = np.nan
    frame.loc[1, "rating"] = np.nan
    frame.loc[2, "rating_count"] = np.nan
    frame.loc[3, ["list_price", "discount"]] = np.nan
    frame.loc[4, "currency"] = "USD"
    made = generate_shoppers(replace(CATALOGUE, frame=frame), n_shoppers=300).interactions
    assert not set(made.item_labels) & set(frame["id"][:5])


def test_the_shop_carries_the_most_rated_products() -> None:
    made = generate_shoppers(CATALOGUE, n_shoppers=300, n_products=100).interactions
    ranked = CATALOGUE.frame.sort_values("rating_count", ascending=False)["id"]
    assert set(made.item_labels) <= set(ranked[:100])


def test_products_that_are_all_alike_are_bought_at_random() -> None:
    frame = CATALOGUE.frame.assign(
        rating=4.0, rating_count=10.0, price=5.0, list_price=10.0, discount=0.5, category=""
    )
    made = generate_shoppers(replace(CATALOGUE, frame=frame), n_shoppers=50)
    assert np.isfinite(made.interactions.items).all()
    assert made.interactions.n_items > 250


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(90, 200))
def test_every_size_gives_bounded_baskets(seed: int, shoppers: int, products: int) -> None:
    made = generate_shoppers(CATALOGUE, seed, n_shoppers=shoppers, n_products=products)
    counts = np.bincount(made.interactions.users)
    assert (made.interactions.n_users, made.kinds.size) == (shoppers, shoppers)
    assert made.interactions.n_items <= products
    assert (counts.min() >= 8, counts.max() <= 45) == (True, True)


@pytest.mark.parametrize(
    ("catalogue", "shoppers", "products"),
    [
        (CATALOGUE, 0, 300),
        (CATALOGUE, -1, 300),
        (CATALOGUE, 10, 89),
        (CATALOGUE, 10, 0),
        (make_catalogue(89), 10, 300),
        (Catalogue(CATALOGUE.frame.iloc[:0], ()), 10, 300),
        (Catalogue(CATALOGUE.frame.assign(rating=np.nan), ()), 10, 300),
    ],
)
def test_impossible_sizes_are_refused(catalogue: Catalogue, shoppers: int, products: int) -> None:
    with pytest.raises(DataError, match=r"n_(shoppers|products)="):
        generate_shoppers(catalogue, n_shoppers=shoppers, n_products=products)
