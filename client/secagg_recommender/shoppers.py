"""Shoppers made up for a real catalogue, which holds none: four kinds, each with its own aim.

What they buy is generated and must never be quoted as recommendation quality; the name of the
interactions says so. It shows how training deals with clients that want different things.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from secagg_recommender.attributes import ItemAttributes
from secagg_recommender.catalogue import CATEGORY_SEPARATOR, Catalogue
from secagg_recommender.interactions import DataError, Interactions
from secagg_recommender.reading import interactions_of

__all__ = ["GENERATED", "KINDS", "Shoppers", "generate_shoppers"]

KINDS: Final = ("rating", "price", "discount", "popularity")
"""What drives a shopper, by the number that :attr:`Shoppers.kinds` holds."""
GENERATED: Final = "shoppers and their purchases are generated; only the products are real"

_MIN_PURCHASES: Final = 8
_MAX_PURCHASES: Final = 45
_MEAN_EXTRA: Final = 12.0
# Log-odds by one standard deviation; larger numbers make shoppers easier to tell apart.
_AIM_PULL: Final = 2.0
_CATEGORY_PULL: Final = 1.0
_POPULARITY_PULL: Final = 0.5
_START_S: Final = 1_700_000_000
_YEAR_S: Final = 365 * 24 * 3600


@dataclass(frozen=True, slots=True, eq=False)
class Shoppers:
    """Generated purchases; ``kinds`` int64 ``(n_users,)`` says what drives each shopper.

    ``attributes`` are those of the bought products, a row an item of ``interactions``.
    """

    interactions: Interactions
    kinds: npt.NDArray[np.int64]
    attributes: ItemAttributes


@dataclass(frozen=True, slots=True, eq=False)
class _Shop:
    """Products, their standardised figures by name, and the code of the finest category of each."""

    frame: pd.DataFrame
    figures: dict[str, npt.NDArray[np.float64]]
    category: npt.NDArray[np.intp]


def generate_shoppers(
    catalogue: Catalogue, seed: int = 0, *, n_shoppers: int = 1000, n_products: int = 2000
) -> Shoppers:
    """Generate purchases from a catalogue; the same arguments give the same data.

    The shop carries the ``n_products`` products that most people rated, of those with a rating, a
    count of ratings and a price, all in the commonest currency. Utility of product p for a shopper,
    with z(·) standardised over the shop, t the shopper's taste for the finest category of p, drawn
    from N(0, 1), and c = z(log(1 + rating count)):

    * rating:      2 z(rating) + t + c / 2
    * price:       −2 |z(log price) − b| + t + c / 2, b the shopper's budget, from N(0, 1)
    * discount:    2 z(discount) + t + c / 2
    * popularity:  2 c + t + c / 2

    A shopper buys 8 to 45 different products, at random times of one year, drawn without
    replacement from the softmax of the utilities. Kinds are equally frequent. A product nobody
    bought is not part of the interactions.

    Raises:
        DataError: no shopper asked for, or fewer than 90 products to choose from.
    """
    if n_shoppers < 1:
        raise DataError(f"expected n_shoppers >= 1, got {n_shoppers=}; ask for more")
    shop = _shop(catalogue, n_products)
    rng = np.random.default_rng(seed)
    kinds = rng.permutation(np.arange(n_shoppers) % len(KINDS)).astype(np.int64)
    counts = np.minimum(
        _MIN_PURCHASES + rng.geometric(1.0 / _MEAN_EXTRA, n_shoppers) - 1, _MAX_PURCHASES
    )
    baskets = [
        _basket(_utilities(shop, KINDS[kind], rng), count, rng)
        for kind, count in zip(kinds, counts, strict=True)
    ]
    bought = np.concatenate(baskets)
    times = _START_S + rng.integers(0, _YEAR_S, bought.size)
    labels = shop.frame["id"].tolist()
    made = interactions_of(
        "amazon-products-2023 (generated shoppers)",
        # Of one length, so that the order of the labels is that of the numbers.
        [f"generated-{shopper:09d}" for shopper in range(n_shoppers)],
        labels,
        (np.repeat(np.arange(n_shoppers), counts), bought, times),
        dict(zip(labels, shop.frame["title"], strict=True)),
    )
    products = shop.frame.set_index("id", drop=False).loc[list(made.item_labels)]
    return Shoppers(made, kinds, replace(catalogue, frame=products).attributes())


def _shop(catalogue: Catalogue, n_products: int) -> _Shop:
    """The most rated products of which all figures are known."""
    frame = catalogue.frame.dropna(subset=["rating", "rating_count", "price", "discount"])
    frame = frame[frame["currency"] == frame["currency"].mode().max()]
    frame = frame.sort_values("rating_count", ascending=False, kind="stable").head(n_products)
    if len(frame) < 2 * _MAX_PURCHASES:
        raise DataError(
            f"expected {2 * _MAX_PURCHASES} products or more with rating, rating count and price, "
            f"got {len(frame)} with {n_products=}; load more files or ask for more"
        )
    figures = {kind: _standardised(frame[kind]) for kind in ("rating", "discount")}
    figures["price"] = _standardised(np.log(frame["price"]))
    figures["popularity"] = _standardised(np.log1p(frame["rating_count"]))
    finest = frame["category"].str.split(CATEGORY_SEPARATOR, regex=False).str[-1]
    return _Shop(frame, figures, pd.factorize(finest)[0])


def _standardised(figures: pd.Series[float]) -> npt.NDArray[np.float64]:
    """Mean 0 and variance 1; all zero if all are equal."""
    values = figures.to_numpy(dtype=np.float64)
    return np.asarray((values - values.mean()) / (values.std() or 1.0))


def _utilities(shop: _Shop, kind: str, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Log-odds of one shopper for each product of the shop."""
    taste = rng.normal(0.0, _CATEGORY_PULL, int(shop.category.max()) + 1)
    budget = rng.normal()
    aim = shop.figures[kind]
    if kind == "price":
        aim = -np.abs(aim - budget)
    background = taste[shop.category] + _POPULARITY_PULL * shop.figures["popularity"]
    return np.asarray(_AIM_PULL * aim + background)


def _basket(
    utilities: npt.NDArray[np.float64], count: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """What one shopper buys, in random order."""
    # Gumbel noise: the largest n sums are a draw of n without replacement from the softmax.
    noisy = utilities + rng.gumbel(size=utilities.size)
    return rng.permutation(np.argsort(-noisy, kind="stable")[:count]).astype(np.int64)
