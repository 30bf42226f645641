"""Amazon Reviews 2023: one JSON object a line, reviews in one file and products in another.

Read a line at a time, so that a file may be larger than memory; what is kept is two numbers and a
time a review. Hou et al., "Bridging Language and Items for Retrieval and Recommendation", 2024.
"""

from __future__ import annotations

import json
import math
import re
import time
from array import array
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeGuard

import numpy as np
import numpy.typing as npt

from secagg_recommender.attributes import ItemAttributes, attributes_of, price_band
from secagg_recommender.interactions import DataError, Interactions
from secagg_recommender.reading import Rows, Tally, interactions_of, is_broken, read_lines

__all__ = ["Products", "Reviews", "load_products", "load_reviews"]

# The shop opened in July 1995; a later bound is today's.
_FIRST_MS: Final = 804_556_800_000
_DAY_MS: Final = 24 * 3600 * 1000
_PRICE: Final = re.compile(r"(from\s+)?\$?\s*(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?", re.IGNORECASE)
_NO_PRICE: Final = (None, "", "None", "none", "null", "—", "-")
_DEAREST: Final = 1e9
_BROKEN: Final = object()
_Places = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Reviews:
    """Interactions by user and ``parent_asin``, attributes if there is metadata, the reports."""

    interactions: Interactions
    attributes: ItemAttributes | None
    rows: tuple[Rows, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Products:
    """Metadata by ``parent_asin``: titles, prices (NaN where unknown), names of attributes."""

    titles: dict[str, str]
    prices: dict[str, float]
    attributes: dict[str, tuple[str, ...]]
    rows: Rows


@dataclass(slots=True)
class _Events:
    """Kept reviews in the order of the file: places of user and item, time and rating."""

    users: dict[str, int] = field(default_factory=dict)
    items: dict[str, int] = field(default_factory=dict)
    user: array[int] = field(default_factory=lambda: array("q"))
    item: array[int] = field(default_factory=lambda: array("q"))
    time: array[int] = field(default_factory=lambda: array("q"))
    rating: array[float] = field(default_factory=lambda: array("d"))

    def add(self, review: dict[str, Any]) -> None:
        """One more review, already checked."""
        self.user.append(self.users.setdefault(review["user_id"], len(self.users)))
        self.item.append(self.items.setdefault(review["parent_asin"], len(self.items)))
        self.time.append(int(review["timestamp"]))
        self.rating.append(float(review["rating"]))


def load_reviews(
    file: Path | str,
    meta: Path | str | None = None,
    *,
    min_rating: float = 1.0,
    core: int = 1,
    name: str = "amazon-reviews-2023",
) -> Reviews:
    """Load reviews, and the metadata of the products they are about.

    The item is ``parent_asin``: variants of one product count as one. Rows are dropped as
    ``blank``, ``encoding``, ``broken_json``, ``not_an_object``, ``bad_id`` (user or product
    missing, empty or no text), ``bad_rating`` (no number from 1 to 5), ``bad_timestamp`` (no whole
    number of milliseconds between 1995 and tomorrow), then ``duplicate`` (an older review of the
    same user and product), ``below_min_rating`` (the latest review gave less than ``min_rating``)
    and ``below_core``: until nothing changes, users and items with fewer than ``core`` reviews
    leave. Reviews of products without metadata are kept and noted as ``no_metadata``. Everything
    else in a review (text, images, votes) is ignored.

    Raises:
        DataError: a file is missing, empty, damaged or another kind, or no row can be used;
            ``core`` below 1 or ``min_rating`` above 5.
    """
    if core < 1 or not min_rating <= 5:
        raise DataError(
            f"expected core >= 1 and min_rating <= 5, got {core=} {min_rating=}; ask for less"
        )
    file = Path(file)
    tally = Tally(f"reviews in {file.name}")
    events = _read_reviews(file, tally)
    columns = [np.asarray(column) for column in _columns(events)]
    kept = _filtered(columns, min_rating, core, tally)
    users, items, times = (column[kept] for column in columns[:3])
    products = None
    if meta is not None and kept.size:
        labels = list(events.items)
        products = load_products(meta, {labels[item] for item in np.unique(items)})
        known = np.asarray([label in products.attributes for label in labels])
        tally.note("no_metadata", int(np.count_nonzero(~known[items])))
    rows = tally.rows()
    made = interactions_of(
        name,
        list(events.users),
        list(events.items),
        (users, items, times),
        products.titles if products else {},
    )
    if products is None:
        return Reviews(made, None, (rows,))
    attributes = attributes_of([products.attributes.get(label, ()) for label in made.item_labels])
    return Reviews(made, attributes, (rows, products.rows))


def load_products(file: Path | str, wanted: Container[str] | None = None) -> Products:
    """Load metadata, of the products in ``wanted`` or of all.

    Rows are dropped as ``blank``, ``encoding``, ``broken_json``, ``not_an_object``, ``bad_id``,
    ``not_reviewed`` (not wanted) and ``duplicate`` (the first stays). Noted, and left out of the
    attributes: ``no_title``, ``no_price``, ``bad_price``, ``no_brand``, ``no_category``. A price
    may be a number or text; ``"from 12.99"`` counts as 12.99 and is noted as ``price_from``.
    Attributes are ``main category``, ``category``, ``brand`` (the field ``store``, else the
    detail ``Brand``) and ``price`` (its band).

    Raises:
        DataError: the file is missing, empty, damaged or another kind, or no row can be used.
    """
    file = Path(file)
    tally = Tally(f"products in {file.name}")
    titles: dict[str, str] = {}
    prices: dict[str, float] = {}
    attributes: dict[str, tuple[str, ...]] = {}
    for row in _objects(file, tally):
        label = row.get("parent_asin")
        if not _is_id(label):
            tally.drop("bad_id")
        elif wanted is not None and label not in wanted:
            tally.drop("not_reviewed")
        elif label in attributes:
            tally.drop("duplicate")
        else:
            titles[label] = _text(row.get("title"))
            note, prices[label] = _price(row.get("price"))
            attributes[label] = tuple(_attributes(row, prices[label]))
            for reason in (note, *_missing(titles[label], attributes[label])):
                if reason is not None:
                    tally.note(reason)
    return Products(titles, prices, attributes, tally.rows())


def _objects(file: Path, tally: Tally) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, one a line; everything else is counted."""
    for line in read_lines(file, tally):
        tally.read()
        if not line.strip():
            tally.drop("blank")
        elif is_broken(line):
            tally.drop("encoding")
        else:
            row = _parsed(line)
            if isinstance(row, dict):
                yield row
            else:
                tally.drop("broken_json" if row is _BROKEN else "not_an_object")


def _parsed(line: str) -> object:
    """The JSON value of a line, or `_BROKEN`."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return _BROKEN


def _read_reviews(file: Path, tally: Tally) -> _Events:
    """All reviews that are sound in themselves."""
    events, last_ms = _Events(), int(time.time() * 1000) + _DAY_MS
    for row in _objects(file, tally):
        if not (_is_id(row.get("user_id")) and _is_id(row.get("parent_asin"))):
            tally.drop("bad_id")
        elif not _is_between(row.get("rating"), 1, 5):
            tally.drop("bad_rating")
        elif not (
            _is_between(row.get("timestamp"), _FIRST_MS, last_ms) and row["timestamp"] % 1 == 0
        ):
            tally.drop("bad_timestamp")
        else:
            events.add(row)
    return events


def _columns(events: _Events) -> tuple[array[int], array[int], array[int], array[float]]:
    return events.user, events.item, events.time, events.rating


def _filtered(
    columns: list[npt.NDArray[Any]], min_rating: float, core: int, tally: Tally
) -> _Places:
    """Places of the reviews that stay, ascending."""
    users, items, times, ratings = columns
    # The first row of a tie counts as the latest, as everywhere: see `from_events`.
    order = np.lexsort((-np.arange(times.size), times))[::-1]
    pairs = users[order] * (items.max(initial=0) + 1) + items[order]
    kept = np.sort(order[np.unique(pairs, return_index=True)[1]])
    tally.drop("duplicate", times.size - kept.size)
    good = kept[ratings[kept] >= min_rating]
    tally.drop("below_min_rating", kept.size - good.size)
    dense = _core(users[good], items[good], core)
    tally.drop("below_core", good.size - int(dense.sum()))
    return good[dense]


def _core(users: _Places, items: _Places, core: int) -> npt.NDArray[np.bool_]:
    """Which rows are in the k-core: every user and item left has ``core`` rows or more."""
    kept = np.ones(users.size, dtype=np.bool_)
    while True:
        enough = kept.copy()
        for ids in (users, items):
            enough &= np.bincount(ids, weights=kept)[ids] >= core
        if enough.sum() == kept.sum():
            return kept
        kept = enough


def _is_id(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value.strip()) and not is_broken(value)


def _is_between(value: object, low: float, high: float) -> TypeGuard[float]:
    """Whether a JSON value is a number in a range; NaN is in none, and true is no number."""
    return isinstance(value, int | float) and type(value) is not bool and low <= value <= high


def _text(value: object) -> str:
    """Text without surrounding blanks; empty if there is none that could be printed."""
    return value.strip() if isinstance(value, str) and not is_broken(value) else ""


def _price(value: object) -> tuple[str | None, float]:
    """What to note about a price, and the price: 0 or above, NaN if there is none."""
    if value in _NO_PRICE:
        return "no_price", math.nan
    note = None
    if isinstance(value, str):
        match = _PRICE.fullmatch(value.strip())
        if match is None:
            return "bad_price", math.nan
        note = "price_from" if match[1] else None
        value = float(match[2].replace(",", "") + (match[3] or ""))
    if not _is_between(value, 0, _DEAREST):
        return "bad_price", math.nan
    return note, float(value)


def _attributes(row: dict[str, Any], price: float) -> Iterator[str]:
    """Names of the attributes of one product."""
    if main := _text(row.get("main_category")):
        yield f"main category: {main}"
    categories = row.get("categories")
    for category in categories if isinstance(categories, list) else ():
        if name := _text(category):
            yield f"category: {name}"
    details = row.get("details")
    brand = _text(row.get("store")) or _text(details.get("Brand") if type(details) is dict else "")
    if brand:
        yield f"brand: {brand}"
    if not math.isnan(price):
        yield price_band(price)


def _missing(title: str, attributes: tuple[str, ...]) -> Iterator[str]:
    """What to note about a product besides its price."""
    if not title:
        yield "no_title"
    kinds = {name.split(":")[0] for name in attributes}
    yield from (f"no_{kind}" for kind in ("brand", "category") if kind not in kinds)
