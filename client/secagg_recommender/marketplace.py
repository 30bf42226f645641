"""A small made-up electronics marketplace, so that a first run needs no files and no licence.

Shoppers have latent tastes (kinds of product, brands, price tier); products have a kind, a brand,
a tier and a popularity. All names are invented. Generated data shows that the machinery works; it
must never be quoted as recommendation quality. Read ``data`` next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from secagg_recommender.interactions import DataError, Interactions, from_events

__all__ = ["generate_marketplace"]

_BRANDS: Final = (
    "Aurelio", "Boreas", "Cinder", "Dovetail", "Everline", "Fennec",
    "Gale & Sons", "Halcyon", "Isobar", "Juniper", "Kestrel", "Lumen",
)  # fmt: skip
_TIERS: Final = ("Essential", "Plus", "Studio", "Reference")
# Kind of product and what its variants differ in; kinds next to each other attract one crowd.
_KINDS: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("Noise-cancelling headphones", ("30 h", "40 h", "60 h")),
    ("True wireless earbuds", ("6 h", "8 h", "with charging case")),
    ("Bookshelf speakers", ("4-inch", "5-inch", "6.5-inch")),
    ("Turntable", ("belt drive", "direct drive", "with preamp")),
    ("Portable Bluetooth speaker", ("10 W", "20 W", "waterproof")),
    ("Mirrorless camera", ("24 MP", "33 MP", "45 MP")),
    ("Prime lens", ("35 mm f/1.8", "50 mm f/1.4", "85 mm f/1.8")),
    ("Carbon tripod", ("1.4 m", "1.6 m", "with ball head")),
    ("Memory card", ("64 GB", "128 GB", "256 GB")),
    ("Action camera", ("4K", "5K", "with dive housing")),
    ("Mechanical keyboard", ("linear", "tactile", "60 percent")),
    ("Gaming mouse", ("wired", "wireless", "59 g")),
    ("Curved monitor", ("27-inch", "32-inch", "34-inch")),
    ("Graphics tablet", ("small", "medium", "with screen")),
    ("Gaming headset", ("wired", "wireless", "7.1 surround")),
    ("Smart bulb set", ("2 pieces", "4 pieces", "6 pieces")),
    ("Video doorbell", ("wired", "battery", "with chime")),
    ("Robot vacuum", ("2 500 Pa", "4 000 Pa", "with mop")),
    ("Mesh Wi-Fi router", ("1 node", "2 nodes", "3 nodes")),
    ("Air-quality monitor", ("CO2", "CO2 and PM2.5", "outdoor")),
)
_KINDS_PER_CROWD: Final = 5
_N_CROWDS: Final = len(_KINDS) // _KINDS_PER_CROWD
_MIN_PURCHASES: Final = 8
_MAX_PURCHASES: Final = 45
_MEAN_EXTRA: Final = 12.0
# Log-odds of a shopper choosing a product; larger numbers make tastes easier to learn.
_CROWD_PULL: Final = 3.0
_KIND_PULL: Final = 1.2
_BRAND_PULL: Final = 0.8
_TIER_PULL: Final = 0.9
_POPULARITY_SPREAD: Final = 0.7
_SECOND_CROWD: Final = 0.6
_START_S: Final = 1_700_000_000
_YEAR_S: Final = 365 * 24 * 3600


@dataclass(frozen=True, slots=True, eq=False)
class _Catalogue:
    """Attributes of all products, int64 ``(n_products,)`` each, and log-popularity, float64."""

    kind: npt.NDArray[np.int64]
    brand: npt.NDArray[np.int64]
    tier: npt.NDArray[np.int64]
    popularity: npt.NDArray[np.float64]
    titles: dict[int, str]


def generate_marketplace(
    seed: int = 0, *, n_shoppers: int = 600, n_products: int = 300
) -> Interactions:
    """Generate purchases; the same arguments give the same data.

    A shopper belongs to one or two of four crowds (music, photography, gaming, home), has favourite
    brands and a price tier, and buys 8 to 45 different products over a year by those tastes and
    the products' popularity (a softmax, drawn without replacement). Users without purchases do
    not occur; a product nobody bought is not part of the catalogue that comes back.

    Raises:
        DataError: fewer than one shopper, or fewer products than a shopper can buy with choices
            left (90).
    """
    if n_shoppers < 1 or n_products < 2 * _MAX_PURCHASES:
        raise DataError(
            f"expected n_shoppers >= 1 and n_products >= {2 * _MAX_PURCHASES}, got "
            f"n_shoppers={n_shoppers} n_products={n_products}; ask for more"
        )
    rng = np.random.default_rng(seed)
    catalogue = _make_catalogue(n_products, rng)
    utilities = _tastes(catalogue, n_shoppers, rng)
    # Gumbel noise: the largest n sums are a draw of n without replacement from the softmax.
    noisy = utilities + rng.gumbel(size=utilities.shape)
    extra = rng.geometric(1.0 / _MEAN_EXTRA, n_shoppers) - 1
    counts = np.minimum(_MIN_PURCHASES + extra, _MAX_PURCHASES)
    baskets = np.argsort(-noisy, axis=1, kind="stable")
    items = np.concatenate(
        [rng.permutation(basket[:count]) for basket, count in zip(baskets, counts, strict=True)]
    )
    return from_events(
        "marketplace",
        np.repeat(np.arange(n_shoppers), counts),
        items,
        _START_S + rng.integers(0, _YEAR_S, items.size),
        titles=catalogue.titles,
    )


def _make_catalogue(n_products: int, rng: np.random.Generator) -> _Catalogue:
    """Distinct products, spread evenly over the kinds."""
    variants = len(_KINDS[0][1])
    per_kind = variants * len(_BRANDS) * len(_TIERS)
    if n_products > per_kind * len(_KINDS):
        raise DataError(
            f"expected n_products <= {per_kind * len(_KINDS)}, got n_products={n_products}; "
            "there are no more names"
        )
    kind = np.arange(n_products) % len(_KINDS)
    place = np.arange(n_products) // len(_KINDS)
    orders = np.stack([rng.permutation(per_kind) for _ in _KINDS])
    choice = orders[kind, place]
    brand, rest = np.divmod(choice, variants * len(_TIERS))
    tier, variant = np.divmod(rest, variants)
    titles = {
        item: f"{_BRANDS[brand[item]]} {_TIERS[tier[item]]} {_KINDS[kind[item]][0]}, "
        f"{_KINDS[kind[item]][1][variant[item]]}"
        for item in range(n_products)
    }
    popularity = rng.normal(0.0, _POPULARITY_SPREAD, n_products)
    return _Catalogue(kind, brand, tier, popularity, titles)


def _tastes(
    catalogue: _Catalogue, n_shoppers: int, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Log-odds of each shopper for each product, ``(n_shoppers, n_products)``."""
    crowd = np.zeros((n_shoppers, _N_CROWDS))
    rows = np.arange(n_shoppers)
    crowd[rows, rng.integers(0, _N_CROWDS, n_shoppers)] = _CROWD_PULL
    second = rng.integers(0, _N_CROWDS, n_shoppers)
    crowd[rows, second] = np.maximum(crowd[rows, second], _SECOND_CROWD * _CROWD_PULL)
    kind = rng.normal(0.0, _KIND_PULL, (n_shoppers, len(_KINDS)))
    brand = rng.normal(0.0, _BRAND_PULL, (n_shoppers, len(_BRANDS)))
    budget = rng.uniform(0, len(_TIERS) - 1, n_shoppers)
    distance = np.abs(budget[:, None] - catalogue.tier[None, :])
    return np.asarray(
        crowd[:, catalogue.kind // _KINDS_PER_CROWD]
        + kind[:, catalogue.kind]
        + brand[:, catalogue.brand]
        - _TIER_PULL * distance
        + catalogue.popularity
    )
