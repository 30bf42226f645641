"""Product catalogues with their dirt: both headers."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg_recommender.catalogue import Catalogue, load_catalogue
from secagg_recommender.interactions import DataError

LIST = (
    "name", "main_category", "sub_category", "image", "link", "ratings", "no_of_ratings",
    "discount_price", "actual_price",
)  # fmt: skip
SALES = (
    "product_id", "product_name", "category", "discounted_price", "actual_price",
    "discount_percentage", "rating", "rating_count", "about_product",
)  # fmt: skip
LINKED = "https://shop.example/Lamp/dp/{}/ref=sr_1?s=electronics"
ASIN = "B09Y64H8VS"


def listed(asin: str = ASIN, **fields: str) -> dict[str, str]:
    row = {
        "name": 'Lamp, 12" (black)',
        "main_category": "tv, audio & cameras",
        "sub_category": "Lamps",
        "image": "https://images.example/1.jpg",
        "link": LINKED.format(asin),
        "ratings": "4.2",
        "no_of_ratings": "1,13,956",
        "discount_price": "₹1,999",
        "actual_price": "₹3,998",
    }
    return row | fields


def sold(asin: str = ASIN, **fields: str) -> dict[str, str]:
    row = {
        "product_id": asin,
        "product_name": "Cable",
        "category": "Computers&Accessories|Cables|USBCables",
        "discounted_price": "₹399",
        "actual_price": "₹1,099.00",
        "discount_percentage": "64%",
        "rating": "4.2",
        "rating_count": "24,269",
        "about_product": "Fast,\n2 m",
    }
    return row | fields


def text_of(header: Sequence[str], rows: Sequence[dict[str, str]]) -> str:
    lines = io.StringIO()
    writer = csv.DictWriter(lines, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return lines.getvalue()


def load(folder: Path, content: str | bytes) -> Catalogue:
    file = folder / "x.csv"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return load_catalogue(file)


def load_one(folder: Path, row: dict[str, str]) -> dict[str, Any]:
    """The only product, and its notes as ``notes``."""
    catalogue = load(folder, text_of(LIST if "link" in row else SALES, [row]))
    (product,) = catalogue.frame.to_dict("records")
    return {**{str(key): value for key, value in product.items()}, "notes": catalogue.rows[0].noted}


def test_a_row_of_a_product_list(tmp_path: Path) -> None:
    assert load_one(tmp_path, listed()) == {
        "id": ASIN,
        "title": 'Lamp, 12" (black)',
        "category": "tv, audio & cameras > Lamps",
        "rating": 4.2,
        "rating_count": 113_956.0,
        "price": 1999.0,
        "list_price": 3998.0,
        "discount": 0.5,
        "currency": "INR",
        "notes": {},
    }


def test_a_row_of_the_sales_data_set(tmp_path: Path) -> None:
    product = load_one(tmp_path, sold())
    assert product["category"] == "Computers&Accessories > Cables > USBCables"
    assert (product["price"], product["list_price"]) == (399.0, 1099.0)
    assert product["discount"] == pytest.approx(1 - 399 / 1099)
    assert (product["rating_count"], product["notes"]) == (24_269.0, {})


@pytest.mark.parametrize(
    ("cell", "value", "note"),
    [
        ("5", 5.0, None),
        ("3.75", 3.75, None),
        ("", None, "no_rating"),
        ("Get", None, "bad_rating"),
        ("FREE", None, "bad_rating"),
        ("|", None, "bad_rating"),
        ("0.0", None, "bad_rating"),
        ("5.1", None, "bad_rating"),
        ("42", None, "bad_rating"),
        ("-4.2", None, "bad_rating"),
        ("4,2", None, "bad_rating"),
        ("nan", None, "bad_rating"),
        ("4.2 out of 5", None, "bad_rating"),
        ("٤", None, "bad_rating"),
    ],
)
def test_ratings(tmp_path: Path, cell: str, value: float | None, note: str | None) -> None:
    product = load_one(tmp_path, listed(ratings=cell))
    assert product["rating"] == pytest.approx(math.nan if value is None else value, nan_ok=True)
    assert product["notes"] == ({note: 1} if note else {})


@pytest.mark.parametrize(
    ("cell", "value", "note"),
    [
        ("0", 0.0, None),
        ("965", 965.0, None),
        ("426,973", 426_973.0, None),
        ("", None, "no_rating_count"),
        ("Only 1 left in stock.", None, "bad_rating_count"),
        ("FREE Delivery by Amazon", None, "bad_rating_count"),
        ("-5", None, "bad_rating_count"),
        ("12.5", None, "bad_rating_count"),
        ("1e6", None, "bad_rating_count"),
        ("1,2", None, "bad_rating_count"),
        ("9" * 400, None, "bad_rating_count"),
        ("1" + ",000" * 200, None, "bad_rating_count"),
    ],
)
def test_rating_counts(tmp_path: Path, cell: str, value: float | None, note: str | None) -> None:
    product = load_one(tmp_path, listed(no_of_ratings=cell))
    found = product["rating_count"]
    assert found == pytest.approx(math.nan if value is None else value, nan_ok=True)
    assert product["notes"] == ({note: 1} if note else {})


@pytest.mark.parametrize(
    ("price", "list_price", "expected", "notes"),
    [
        ("₹500", "₹1,000", (500, 1000, "INR"), {}),
        ("500", "1000", (500, 1000, ""), {}),
        ("500", "₹1,000", (500, 1000, "INR"), {}),
        ("$ 499.99", "$999.98", (499.99, 999.98, "USD"), {}),
        ("€500", "€ 1000", (500, 1000, "EUR"), {}),
        ("£500", "£1000", (500, 1000, "GBP"), {}),
        ("Rs. 500", "Rs 1,000", (500, 1000, "INR"), {}),
        ("â‚¹500", "₹1,000", (500, 1000, "INR"), {}),
        ("₹12,34,567", "₹1,234,567.50", (1_234_567, 1_234_567.5, "INR"), {}),
        ("₹500", "₹500", (500, 500, "INR"), {}),
        ("", "₹1,000", (1000, 1000, "INR"), {"no_discount_price": 1}),
        ("₹500", "", (500, None, "INR"), {"no_list_price": 1}),
        ("", "", (None, None, ""), {"no_list_price": 1, "no_price": 1}),
        ("", "₹0", (None, None, ""), {"bad_list_price": 1, "no_price": 1}),
        ("₹0", "₹1,000", (None, 1000, "INR"), {"bad_price": 1}),
        ("₹-5", "₹1,000", (None, 1000, "INR"), {"bad_price": 1}),
        ("-₹5", "₹1,000", (None, 1000, "INR"), {"bad_price": 1}),
        ("1.999,00 ₹", "₹1,000", (None, 1000, "INR"), {"bad_price": 1}),
        ("₹1,99", "₹1,000", (None, 1000, "INR"), {"bad_price": 1}),
        ("₹", "₹1,000", (None, 1000, "INR"), {"bad_price": 1}),
        ("?500", "₹1,000", (None, 1000, "INR"), {"bad_price": 1}),
        ("₹500 - ₹900", "₹1,000", (None, 1000, "INR"), {"bad_price": 1}),
        ("nan", "inf", (None, None, ""), {"bad_price": 1, "bad_list_price": 1}),
        ("₹" + "9" * 400, "₹1,000", (None, 1000, "INR"), {"bad_price": 1}),
        ("₹0." + "0" * 400 + "1", "₹1,000", (None, 1000, "INR"), {"bad_price": 1}),
        ("₹500", "₹499", (500, None, "INR"), {"price_above_list": 1}),
        ("$500", "₹1,000", (500, None, "USD"), {"other_currency": 1}),
    ],
)
def test_prices(
    tmp_path: Path,
    price: str,
    list_price: str,
    expected: tuple[float | None, float | None, str],
    notes: dict[str, int],
) -> None:
    product = load_one(tmp_path, listed(discount_price=price, actual_price=list_price))
    amounts = [math.nan if amount is None else float(amount) for amount in expected[:2]]
    assert [product["price"], product["list_price"]] == pytest.approx(amounts, nan_ok=True)
    assert (product["currency"], product["notes"]) == (expected[2], notes)
    discount = 1 - amounts[0] / amounts[1]
    assert product["discount"] == pytest.approx(discount, nan_ok=True)


@pytest.mark.parametrize(
    ("cell", "notes"),
    [
        ("63%", {}),
        ("", {}),
        ("60%", {"discount_mismatch": 1}),
        ("7.0000000000000007E-2", {"bad_percentage": 1}),
        ("64", {"bad_percentage": 1}),
        ("-64%", {"bad_percentage": 1}),
    ],
)
def test_the_discount_is_that_of_the_prices(
    tmp_path: Path, cell: str, notes: dict[str, int]
) -> None:
    product = load_one(tmp_path, sold(discount_percentage=cell))
    assert product["discount"] == pytest.approx(1 - 399 / 1099)
    assert product["notes"] == notes


# --- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (listed("B1"), "no_id"),
        (listed(link="https://shop.example/"), "no_id"),
        (listed(link=""), "no_id"),
        (listed(link=LINKED.format("B09Y64H8VSX")), "no_id"),
        (listed("B000000009", name="  "), "no_title"),
        (listed(), "duplicate"),
        (dict.fromkeys(LIST, ""), "blank"),
    ],
)
def test_an_unusable_row_is_dropped(tmp_path: Path, row: dict[str, str], reason: str) -> None:
    rows = [listed(name="First"), row, listed("B000000001")]
    catalogue = load(tmp_path, text_of(LIST, rows))
    assert dict(catalogue.rows[0].dropped) == {reason: 1}
    assert (catalogue.rows[0].read, catalogue.rows[0].kept) == (3, 2)
    assert catalogue.frame["id"].tolist() == [ASIN, "B000000001"]
    assert catalogue.frame["title"].tolist()[0] == "First"


@pytest.mark.parametrize("asin", ["", "b09y64h8vs", "B09Y64H8V", "B09Y64H8VS1", "B09Y64 8VS"])
def test_a_product_id_of_another_form_is_dropped(tmp_path: Path, asin: str) -> None:
    catalogue = load(tmp_path, text_of(SALES, [sold(asin), sold("B000000001")]))
    assert dict(catalogue.rows[0].dropped) == {"no_id": 1}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"\n", "blank"),
        (b",,,,,,,,\n", "blank"),
        (b"a,b,c\n", "bad_columns"),
        (b"a,b,c,d,e,f,g,h,i,j\n", "bad_columns"),
        (b"Lamp \x81,b,c,d,e,f,g,h,i\n", "encoding"),
        (b'"Lamp\n\x81",b,c,d,e,f,g,h,i\n', "encoding"),
        (b"a\rb,b,c,d,e,f,g,h,i\n", "broken_csv"),
        (b"x" * 200_000 + b",b,c,d,e,f,g,h,i\n", "broken_csv"),
    ],
)
def test_a_broken_row_is_dropped(tmp_path: Path, line: bytes, reason: str) -> None:
    good = text_of(LIST, [listed()]).encode()
    more = text_of(LIST, [listed("B000000001")]).encode().partition(b"\n")[2]
    catalogue = load(tmp_path, good + line + more)
    assert dict(catalogue.rows[0].dropped) == {reason: 1}
    assert (catalogue.rows[0].read, catalogue.rows[0].kept) == (3, 2)


def test_a_quote_without_end_swallows_what_follows_as_one_row(tmp_path: Path) -> None:
    rows = text_of(LIST, [listed(), listed("B000000001")])
    catalogue = load(tmp_path, rows + '"Lamp without end,b\n' + "more,b,c,d,e,f,g,h,i\n" * 3)
    assert (catalogue.rows[0].kept, dict(catalogue.rows[0].dropped)) == (2, {"bad_columns": 1})


def test_line_breaks_inside_a_cell_are_no_rows(tmp_path: Path) -> None:
    product = load_one(tmp_path, listed(name="Lamp\r\n  with\nbreaks", image='"quoted",\n'))
    assert product["title"] == "Lamp with breaks"


@pytest.mark.parametrize("change", ["\ufeff{}", "{}\n\n"])
def test_byte_order_mark_and_blank_ends_do_not_matter(tmp_path: Path, change: str) -> None:
    catalogue = load(tmp_path, change.format(text_of(LIST, [listed()])))
    assert catalogue.rows[0].kept == 1


def test_line_ends_of_windows_do_not_matter(tmp_path: Path) -> None:
    catalogue = load(tmp_path, text_of(LIST, [listed()]).replace("\n", "\r\n"))
    assert (catalogue.rows[0].kept, catalogue.frame["price"][0]) == (1, 1999.0)


def test_further_columns_and_another_order_do_not_matter(tmp_path: Path) -> None:
    header = ("extra", *reversed(LIST))
    catalogue = load(tmp_path, text_of(header, [listed() | {"extra": "7"}]))
    assert catalogue.frame["rating_count"].tolist() == [113_956.0]


def test_an_old_encoding_is_noted(tmp_path: Path) -> None:
    row = listed(name="Zoë", discount_price="1,999", actual_price="3,998")
    catalogue = load(tmp_path, text_of(LIST, [row]).encode("cp1252"))
    assert dict(catalogue.rows[0].noted) == {"cp1252": 1}
    assert catalogue.frame["title"].tolist() == ["Zoë"]


def test_of_a_product_in_two_files_the_first_stays(tmp_path: Path) -> None:
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    first.write_text(text_of(SALES, [sold()]), encoding="utf-8")
    second.write_text(text_of(LIST, [listed(), listed("B000000001")]), encoding="utf-8")
    catalogue = load_catalogue(first, second)
    assert catalogue.frame["title"].tolist() == ["Cable", 'Lamp, 12" (black)']
    assert [(rows.read, rows.kept) for rows in catalogue.rows] == [(1, 1), (2, 1)]
    with pytest.raises(DataError, match=r"a\.csv.*duplicate=1"):
        load_catalogue(first, first)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty file"),
        ("\n\n", "columns=none"),
        (text_of(LIST, []), "read=0"),
        ("name,link\nLamp,x\n", "columns=name, link"),
        (text_of(LIST, [listed()]).replace(",", ";"), "expected columns link, name"),
        ('{"product_id": 1}\n', "check the format"),
        (b"\x89\x81\x00\xff", "check the format"),
        (b"PK\x03\x04", "ZIP archive"),
        ("x" * 200_000, "columns=none"),
    ],
)
def test_a_file_of_another_kind_is_refused(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load(tmp_path, content)


def test_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got none"):
        load_catalogue()
    with pytest.raises(DataError, match="expected a file"):
        load_catalogue(tmp_path / "none.csv")


def test_attributes_are_categories_and_bands(tmp_path: Path) -> None:
    bare = listed(
        "B000000001", main_category="", sub_category="", ratings="", discount_price="",
        actual_price="",
    )  # fmt: skip
    attributes = load(tmp_path, text_of(LIST, [listed(), bare])).attributes()
    assert attributes.labels == (
        "category: Lamps", "category: tv, audio & cameras", "price: 1000-2000", "rating: 4.0-4.5",
    )  # fmt: skip
    assert attributes.of(0).tolist() == [0, 1, 2, 3]
    assert attributes.n_without == 1


# --- properties and real data -------------------------------------------------------------------

CELLS = st.one_of(
    st.sampled_from(["4.2", "₹1,999", "Get", "", "₹0", "64%", "1e400", "-₹5", LINKED.format(ASIN)]),
    st.text(max_size=6).map(lambda cell: cell.replace("\x00", "")),
)
LINES = st.lists(
    st.lists(CELLS, min_size=8, max_size=10).map(lambda cells: (",".join(cells)).encode("utf-8"))
    | st.binary(max_size=20)
    | st.builds(
        listed, st.sampled_from([ASIN, "B000000001"]), ratings=CELLS, actual_price=CELLS
    ).map(lambda row: text_of(LIST, [row]).partition("\n")[2].encode()),
    max_size=8,
)


@settings(max_examples=50)
@given(LINES)
def test_every_row_is_kept_or_dropped_with_a_reason(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    content = text_of(LIST, [listed("B00000000X")]).encode() + b"\n".join(lines)
    catalogue = load(tmp_path_factory.getbasetemp(), content)
    rows, frame = catalogue.rows[0], catalogue.frame
    assert rows.read == rows.kept + sum(rows.dropped.values())
    assert rows.kept == len(frame) == frame["id"].nunique()
    for name, low, high in (("rating", 1, 5), ("price", 0, 1e13), ("discount", 0, 1)):
        assert frame[name].dropna().between(low, high).all()
    assert not (frame["price"] > frame["list_price"]).any()
    assert catalogue.attributes().n_items == len(frame)


REAL = {
    "All_Electronics.csv": (
        9600,
        {"duplicate": 88},
        {
            "no_discount_price": 410, "no_rating": 94, "no_rating_count": 94, "no_list_price": 70,
            "no_price": 70, "bad_rating": 24, "bad_rating_count": 24,
        },
    ),
    "Camera_Accessories.csv": (
        9600,
        {"duplicate": 36},
        {
            "no_rating": 1447, "no_rating_count": 1447, "no_discount_price": 348,
            "bad_rating": 142, "bad_rating_count": 142, "no_list_price": 130, "no_price": 130,
        },
    ),
    "Headphones.csv": (
        9600,
        {"duplicate": 35},
        {
            "no_rating": 2543, "no_rating_count": 2543, "no_list_price": 327, "no_price": 327,
            "no_discount_price": 260, "bad_rating": 158, "bad_rating_count": 158,
        },
    ),
    "Speakers.csv": (
        9600,
        {"duplicate": 12},
        {
            "no_rating": 5603, "no_rating_count": 5603, "no_price": 303, "no_list_price": 302,
            "no_discount_price": 245, "bad_rating": 133, "bad_rating_count": 133,
            "bad_list_price": 1,
        },
    ),
    "kaggle_amazon_sales.csv": (
        1465,
        {"duplicate": 114},
        {"no_rating_count": 2, "bad_percentage": 2, "bad_rating": 1},
    ),
}  # fmt: skip


@pytest.mark.realdata
@pytest.mark.parametrize("name", REAL)
def test_real_files(data_dir: Path, name: str) -> None:
    read, dropped, noted = REAL[name]
    catalogue = load_catalogue(data_dir / "amazon-products-2023" / name)
    (rows,) = catalogue.rows
    assert (rows.read, dict(rows.dropped), dict(rows.noted)) == (read, dropped, noted)
    assert rows.kept == len(catalogue.frame) == read - sum(dropped.values())
    assert set(catalogue.frame["currency"]) <= {"INR", ""}
