"""Product catalogues as scraped from the shop: CSV files with currency signs and missing figures.

Two headers are known: the product lists of the "Amazon Product Review Dataset" and the Kaggle
"Amazon Sales Dataset". They hold no shoppers: see `shoppers`, which generates some.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pandas as pd

from secagg_recommender.attributes import (
    ItemAttributes,
    attributes_of,
    price_band,
    rating_band,
)
from secagg_recommender.interactions import DataError
from secagg_recommender.reading import Rows, Tally, is_broken, read_lines

__all__ = ["CATEGORY_SEPARATOR", "Catalogue", "load_catalogue"]

CATEGORY_SEPARATOR: Final = " > "
"""Between the levels of a category path, the widest first."""

_COLUMNS: Final = (
    "id", "title", "category", "rating", "rating_count", "price", "list_price", "discount",
    "currency",
)  # fmt: skip
# Columns of the two headers, in the order of `_Cells`; the lists keep the id inside the link.
_LIST: Final = (
    "link", "name", "main_category", "sub_category", "ratings", "no_of_ratings", "discount_price",
    "actual_price",
)  # fmt: skip
_SALES: Final = (
    "product_id", "product_name", "category", "rating", "rating_count", "discounted_price",
    "actual_price", "discount_percentage",
)  # fmt: skip
_ID: Final = re.compile(r"[A-Z0-9]{10}")
_LINKED_ID: Final = re.compile(r"/dp/([A-Z0-9]{10})(?![A-Za-z0-9])")
_RATING: Final = re.compile(r"[1-5](\.[0-9]+)?")
# Thousands in the western or the Indian manner: 1,234,567 or 12,34,567.
_WHOLE: Final = r"[0-9]{1,3}(?:,[0-9]{2,3}){0,2},[0-9]{3}|[0-9]{1,12}"
_COUNT: Final = re.compile(_WHOLE)
_PRICE: Final = re.compile(rf"([^0-9\s.,+-]*)\.?\s*((?:{_WHOLE})(?:\.[0-9]{{1,2}})?)")
_PERCENT: Final = re.compile(r"([0-9]{1,3}(?:\.[0-9]+)?)\s*%")
# The second spelling of a sign is what UTF-8 read as Windows-1252 looks like.
_CURRENCIES: Final[Mapping[str, str]] = {
    "₹": "INR", "â‚¹": "INR", "Rs": "INR", "INR": "INR", "$": "USD", "USD": "USD",
    "€": "EUR", "â‚¬": "EUR", "EUR": "EUR", "£": "GBP", "Â£": "GBP", "GBP": "GBP", "": "",
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Catalogue:
    """Products, each once, and what became of the rows of each file.

    Columns of ``frame``: ``id`` and ``title`` text; ``category`` a path with ``CATEGORY_SEPARATOR``
    or empty; ``rating`` 1 to 5 and ``rating_count``; ``price`` (what is asked) and ``list_price``,
    above 0 in ``currency`` (ISO 4217, empty where the file has no sign); ``discount`` = 1 − price /
    list price, in [0, 1). Figures are float64, NaN where they are missing.
    """

    frame: pd.DataFrame
    rows: tuple[Rows, ...]

    def attributes(self) -> ItemAttributes:
        """Every level of the category path, the band of price and the band of rating."""
        figures = self.frame[["category", "price", "rating"]].itertuples(index=False, name=None)
        return attributes_of([list(_attribute_names(*product)) for product in figures])


@dataclass(frozen=True, slots=True)
class _Cells:
    """The text cells of a row that matter, under one name for both headers."""

    id: str
    title: str
    category: str
    rating: str
    rating_count: str
    price: str
    list_price: str
    percent: str


def load_catalogue(*files: Path | str) -> Catalogue:
    """Load product CSVs of either header as one catalogue; of a product the first row stays.

    A row is dropped as ``blank``, ``encoding``, ``broken_csv`` (a cell without end),
    ``bad_columns`` (more or fewer cells than the header), ``no_id`` (no ASIN), ``no_title`` or
    ``duplicate`` (of the same id, in this file or an earlier one). A figure that is missing or
    makes no sense stays NaN, and the row is kept and noted: ``no_rating``, ``bad_rating`` (such as
    ``Get`` or 7), ``no_rating_count``, ``bad_rating_count`` (such as ``Only 1 left in stock.``),
    ``no_price``, ``bad_price`` (such as ₹0), ``no_list_price``, ``bad_list_price``. A product with
    a list price alone is asked that price: ``no_discount_price``. ``price_above_list``: then the
    list price is taken for wrong; likewise ``other_currency``. The discount is that of the
    prices, whatever the file says: ``bad_percentage`` (not such as ``64%``), ``discount_mismatch``
    (more than a point off).

    Raises:
        DataError: no file given; or a file is missing, empty, damaged, another kind, without one
            of the two headers, or holds no new product.
    """
    if not files:
        raise DataError("expected product CSVs, got none; pass at least one file")
    products: dict[str, tuple[object, ...]] = {}
    rows = tuple(_load_file(Path(file), products) for file in files)
    return Catalogue(pd.DataFrame(list(products.values()), columns=list(_COLUMNS)), rows)


def _load_file(file: Path, products: dict[str, tuple[object, ...]]) -> Rows:
    """Add the new products of one file."""
    tally = Tally(f"products in {file.name}")
    for cells in _cells(file, tally):
        if not cells.id:
            tally.drop("no_id")
        elif not cells.title:
            tally.drop("no_title")
        elif cells.id in products:
            tally.drop("duplicate")
        else:
            products[cells.id] = _product(cells, tally)
    return tally.rows()


def _cells(file: Path, tally: Tally) -> Iterator[_Cells]:
    """Rows that have the cells of the header."""
    records = _records(file, tally)
    header = [cell.strip() for cell in next(records, None) or ()]
    for columns in (_LIST, _SALES):
        if set(columns) <= set(header):
            places = [header.index(column) for column in columns]
            break
    else:
        raise DataError(
            f"expected columns {', '.join(_LIST)}; or {', '.join(_SALES)}; got "
            f"columns={', '.join(header)[:200] or 'none'} in file={file}; check the format"
        )
    for record in records:
        tally.read()
        reason = _fault(record, len(header))
        if record is None or reason is not None:
            tally.drop(reason or "broken_csv")
        else:
            cells = [record[place].strip() for place in places]
            yield _of_list(cells) if columns is _LIST else _of_sales(cells)


def _records(file: Path, tally: Tally) -> Iterator[list[str] | None]:
    """Records of a CSV file, those with line breaks inside a cell included; None if broken."""
    records = csv.reader(read_lines(file, tally))
    while True:
        try:
            yield next(records)
        except StopIteration:
            return
        except csv.Error:
            yield None


def _fault(record: list[str] | None, width: int) -> str | None:
    """Why a record cannot be used."""
    if record is None:
        return "broken_csv"
    if not any(cell.strip() for cell in record):
        return "blank"
    if is_broken("".join(record)):
        return "encoding"
    return None if len(record) == width else "bad_columns"


def _of_list(cells: list[str]) -> _Cells:
    link, title, main, sub, rating, count, price, list_price = cells
    found = _LINKED_ID.search(link)
    category = CATEGORY_SEPARATOR.join(level for level in (main, sub) if level)
    return _Cells(found[1] if found else "", title, category, rating, count, price, list_price, "")


def _of_sales(cells: list[str]) -> _Cells:
    label, title, category, rating, count, price, list_price, percent = cells
    levels = (level.strip() for level in category.split("|"))
    path = CATEGORY_SEPARATOR.join(level for level in levels if level)
    known = label if _ID.fullmatch(label) else ""
    return _Cells(known, title, path, rating, count, price, list_price, percent)


def _product(cells: _Cells, tally: Tally) -> tuple[object, ...]:
    """The figures of one product; what is missing or odd is noted."""
    rating = _figure(cells.rating, _RATING, "rating", tally)
    if rating > 5:
        tally.note("bad_rating")
        rating = math.nan
    count = _figure(cells.rating_count, _COUNT, "rating_count", tally)
    price, list_price, currency = _prices(cells, tally)
    discount = 1 - price / list_price
    percent = _PERCENT.fullmatch(cells.percent)
    if cells.percent and percent is None:
        tally.note("bad_percentage")
    if percent is not None and abs(float(percent[1]) - 100 * discount) > 1:
        tally.note("discount_mismatch")
    title = " ".join(cells.title.split())
    return (
        cells.id, title, cells.category, rating, count, price, list_price, discount, currency
    )  # fmt: skip


def _figure(cell: str, pattern: re.Pattern[str], name: str, tally: Tally) -> float:
    """A number, or NaN with a note."""
    if pattern.fullmatch(cell):
        return float(cell.replace(",", ""))
    tally.note(f"bad_{name}" if cell else f"no_{name}")
    return math.nan


def _prices(cells: _Cells, tally: Tally) -> tuple[float, float, str]:
    """Price, list price and currency; NaN where there is none."""
    price, currency = _money(cells.price, "price", tally)
    list_price, other = _money(cells.list_price, "list_price", tally)
    if not cells.price and not math.isnan(list_price):
        tally.note("no_discount_price")
        return list_price, list_price, other
    if not cells.price:
        tally.note("no_price")
    if currency and other and currency != other:
        tally.note("other_currency")
        list_price = math.nan
    if price > list_price:
        tally.note("price_above_list")
        list_price = math.nan
    return price, list_price, currency or other


def _money(cell: str, name: str, tally: Tally) -> tuple[float, str]:
    """An amount above 0 and its currency, or NaN with a note (a missing price is noted later)."""
    if not cell:
        if name != "price":
            tally.note(f"no_{name}")
        return math.nan, ""
    match = _PRICE.fullmatch(cell)
    amount = float(match[2].replace(",", "")) if match else 0.0
    if match is None or match[1] not in _CURRENCIES or amount <= 0:
        tally.note(f"bad_{name}")
        return math.nan, ""
    return amount, _CURRENCIES[match[1]]


def _attribute_names(category: str, price: float, rating: float) -> Iterator[str]:
    """Names of the attributes of one product."""
    yield from (f"category: {level}" for level in category.split(CATEGORY_SEPARATOR) if level)
    if not math.isnan(price):
        yield price_band(price)
    if not math.isnan(rating):
        yield rating_band(rating)
