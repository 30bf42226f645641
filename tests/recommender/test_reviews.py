"""Amazon Reviews 2023: reviews and products as JSON Lines."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg_recommender.interactions import DataError
from secagg_recommender.reviews import Products, Reviews, load_products, load_reviews

TIME = 1_616_156_351_887


def review(user: str = "U1", item: str = "P1", **fields: Any) -> str:  # noqa: ANN401
    """A line in the publisher's schema."""
    row = {
        "rating": 5.0,
        "title": "New favorite box",
        "text": 'With "quotes"\nand a line break',
        "images": [],
        "asin": "V1",
        "parent_asin": item,
        "user_id": user,
        "timestamp": TIME,
        "helpful_vote": 1,
        "verified_purchase": True,
    }
    return json.dumps(row | fields)


def product(item: str = "P1", **fields: Any) -> str:  # noqa: ANN401
    """A line in the publisher's schema."""
    row = {
        "main_category": "All Beauty",
        "title": " Comb ",
        "average_rating": 4.5,
        "rating_number": 12,
        "features": [],
        "description": [],
        "price": 12.5,
        "images": [],
        "videos": [],
        "store": "Lumen",
        "categories": ["Beauty", "Hair"],
        "details": {"Brand": "Other", "Color": "red"},
        "parent_asin": item,
        "bought_together": None,
    }
    return json.dumps(row | fields)


def write(file: Path, lines: Sequence[str | bytes]) -> Path:
    content = [line.encode() if isinstance(line, str) else line for line in lines]
    file.write_bytes(b"".join(line + b"\n" for line in content))
    return file


def load(
    folder: Path,
    lines: Sequence[str | bytes],
    products: Sequence[str | bytes] | None = None,
    **options: Any,  # noqa: ANN401
) -> Reviews:
    meta = None if products is None else write(folder / "meta_x.jsonl", products)
    return load_reviews(write(folder / "x.jsonl", lines), meta, **options)


def histories(loaded: Reviews) -> dict[str, list[str]]:
    made = loaded.interactions
    return {
        label: [made.item_labels[item] for item in made.items[made.users == user]]
        for user, label in enumerate(made.user_labels)
    }


# --- reviews ------------------------------------------------------------------------------------


def test_reviews_become_histories_in_time_order_of_parent_products(tmp_path: Path) -> None:
    lines = [
        review("U2", "P1"),
        review("U1", "P9", timestamp=TIME + 2),
        review("U1", "P3", timestamp=TIME + 1, asin=None, helpful_vote=None),
    ]
    loaded = load(tmp_path, lines)
    assert histories(loaded) == {"U1": ["P3", "P9"], "U2": ["P1"]}
    assert (loaded.rows[0].read, loaded.rows[0].kept, loaded.attributes) == (3, 3, None)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "blank"),
        (" \r", "blank"),
        (review()[:-20], "broken_json"),
        (review() + review(), "broken_json"),
        ("user_id,parent_asin", "broken_json"),
        ("[" * 100_000, "broken_json"),
        (review(rating=0).replace("0", "9" * 5000), "broken_json"),
        ("[1]", "not_an_object"),
        ("null", "not_an_object"),
        ('"text"', "not_an_object"),
        ("{}", "bad_id"),
        (review(user_id=None), "bad_id"),
        (review(user_id="  "), "bad_id"),
        (review(user_id=17), "bad_id"),
        (review(user_id="\ud83d"), "bad_id"),
        (review(parent_asin=None), "bad_id"),
        (review(parent_asin=["P1"]), "bad_id"),
        (review(parent_asin={"P1": 1}), "bad_id"),
        (review(rating=None), "bad_rating"),
        (review(rating="5.0"), "bad_rating"),
        (review(rating=True), "bad_rating"),
        (review(rating=0.0), "bad_rating"),
        (review(rating=5.5), "bad_rating"),
        (review(rating=-1), "bad_rating"),
        (review(rating=10**400), "bad_rating"),
        (review(rating=float("nan")), "bad_rating"),
        (review(rating=float("inf")), "bad_rating"),
        (review(rating=[5.0]), "bad_rating"),
        (review(timestamp=None), "bad_timestamp"),
        (review(timestamp="2021-03-19"), "bad_timestamp"),
        (review(timestamp=TIME // 1000), "bad_timestamp"),
        (review(timestamp=TIME * 1000), "bad_timestamp"),
        (review(timestamp=TIME + 0.5), "bad_timestamp"),
        (review(timestamp=0), "bad_timestamp"),
        (review(timestamp=-TIME), "bad_timestamp"),
        (review(timestamp=4_102_444_800_000), "bad_timestamp"),
        (review(timestamp=float("nan")), "bad_timestamp"),
        (review(timestamp=float("-inf")), "bad_timestamp"),
        (review(timestamp=True), "bad_timestamp"),
        (review().encode() + b"\x81", "encoding"),
    ],
)
def test_an_unusable_review_is_dropped(tmp_path: Path, line: str | bytes, reason: str) -> None:
    loaded = load(tmp_path, [review("A", "X"), line, review("B", "Y")])
    assert (loaded.rows[0].read, loaded.rows[0].kept) == (3, 2)
    assert dict(loaded.rows[0].dropped) == {reason: 1}
    assert histories(loaded) == {"A": ["X"], "B": ["Y"]}


def test_a_review_in_windows_1252_is_kept_and_noted(tmp_path: Path) -> None:
    line = review().replace("favorite", "café").encode("cp1252")
    loaded = load(tmp_path, [line])
    assert (loaded.rows[0].kept, dict(loaded.rows[0].noted)) == (1, {"cp1252": 1})


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lambda text: b"\xef\xbb\xbf" + text])
def test_archives_line_ends_and_byte_order_marks_do_not_matter(tmp_path: Path, pack: Any) -> None:  # noqa: ANN401
    file = tmp_path / "x.jsonl.gz"
    file.write_bytes(pack(review().encode() + b"\r\n" + review("U2").encode()))
    assert load_reviews(file).rows[0].kept == 2


def test_the_latest_review_of_a_pair_counts_and_of_equal_times_the_first_row(
    tmp_path: Path,
) -> None:
    lines = [
        review(rating=1.0, timestamp=TIME + 9),
        review(rating=5.0, timestamp=TIME + 1),
        review("U2", rating=5.0),
        review("U2", rating=1.0),
        review("U3", rating=2.0, timestamp=float(TIME)),
        review("U3", rating=5.0, timestamp=TIME + 1, asin="V2"),
    ]
    loaded = load(tmp_path, lines, min_rating=4)
    assert sorted(histories(loaded)) == ["U2", "U3"]
    assert dict(loaded.rows[0].dropped) == {"duplicate": 3, "below_min_rating": 1}


def test_the_core_is_found_again_until_nothing_leaves(tmp_path: Path) -> None:
    pairs = [("A", "X"), ("A", "Y"), ("B", "X"), ("B", "Y"), ("C", "Y"), ("C", "Z"), ("D", "Z")]
    lines = [review(user, item) for user, item in pairs]
    loaded = load(tmp_path, lines, core=2)
    # D has one review and leaves; then Z has one, then C.
    assert sorted(histories(loaded)) == ["A", "B"]
    assert loaded.interactions.item_labels == ("X", "Y")
    assert dict(loaded.rows[0].dropped) == {"below_core": 3}


@pytest.mark.parametrize("core", [1, 2, 3])
def test_everybody_in_a_core_has_enough(tmp_path: Path, core: int) -> None:
    rng = np.random.default_rng(core)
    lines = [review(f"U{user}", f"P{item}") for user, item in rng.integers(0, 12, (90, 2))]
    made = load(tmp_path, lines, core=core).interactions
    assert np.bincount(made.users).min() >= core
    assert np.bincount(made.items).min() >= core


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ([], {}, "empty file"),
        ([""], {}, "blank=1"),
        (["[", review() + ",", "]"], {}, "broken_json=3"),
        (["user,item,rating", "1,2,3"], {}, "broken_json=2"),
        ([review()], {"min_rating": 5.0, "core": 2}, "below_core=1"),
        ([review(rating=3)], {"min_rating": 4.0}, "below_min_rating=1"),
        ([review(parent_asin="")], {}, "bad_id=1"),
        ([review()], {"core": 0}, "core=0"),
        ([review()], {"min_rating": 5.5}, "min_rating=5.5"),
        ([review()], {"min_rating": float("nan")}, "min_rating=nan"),
    ],
)
def test_nothing_to_use_is_an_error_that_says_why(
    tmp_path: Path, lines: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load(tmp_path, lines, **options)


# --- products -----------------------------------------------------------------------------------


def only(folder: Path, **fields: Any) -> Products:  # noqa: ANN401
    return load_products(write(folder / "meta.jsonl", [product(**fields)]))


def test_products_give_titles_and_attributes_in_the_order_of_the_items(tmp_path: Path) -> None:
    products = [product("P2", store=None), product("P1"), product("P7")]
    loaded = load(tmp_path, [review("U", "P1"), review("U", "P2"), review("U", "P8")], products)
    made, attributes = loaded.interactions, loaded.attributes
    assert made.item_titles == ("Comb", "Comb", "Item P8")
    assert attributes
    assert [[attributes.labels[one] for one in attributes.of(item)] for item in range(3)] == [
        [
            "brand: Lumen", "category: Beauty", "category: Hair", "main category: All Beauty",
            "price: 10-20",
        ],
        [
            "brand: Other", "category: Beauty", "category: Hair", "main category: All Beauty",
            "price: 10-20",
        ],
        [],
    ]  # fmt: skip
    assert dict(loaded.rows[0].noted) == {"no_metadata": 1}
    assert dict(loaded.rows[1].dropped) == {"not_reviewed": 1}


@pytest.mark.parametrize(
    ("price", "amount", "note"),
    [
        (69.0, 69.0, None),
        (7, 7.0, None),
        (0.0, 0.0, None),
        ("12.99", 12.99, None),
        ("$1,234.50", 1234.5, None),
        ("from 12.99", 12.99, "price_from"),
        ("From $1,000", 1000.0, "price_from"),
        (None, None, "no_price"),
        ("None", None, "no_price"),
        ("", None, "no_price"),
        ("—", None, "no_price"),
        ("12.99 - 20.00", None, "bad_price"),
        ("1.234,50", None, "bad_price"),
        ("cheap", None, "bad_price"),
        (-3.0, None, "bad_price"),
        ("-3", None, "bad_price"),
        (float("nan"), None, "bad_price"),
        (float("inf"), None, "bad_price"),
        ("1e5", None, "bad_price"),
        ("9" * 400, None, "bad_price"),
        (10**30, None, "bad_price"),
        (True, None, "bad_price"),
        ([12.99], None, "bad_price"),
        ({"value": 12.99}, None, "bad_price"),
    ],
)
def test_prices_come_in_many_spellings(
    tmp_path: Path,
    price: Any,  # noqa: ANN401
    amount: float | None,
    note: str | None,
) -> None:
    found = only(tmp_path, price=price)
    assert found.prices["P1"] == pytest.approx(np.nan if amount is None else amount, nan_ok=True)
    assert dict(found.rows.noted) == ({note: 1} if note else {})
    has_band = any(name.startswith("price") for name in found.attributes["P1"])
    assert has_band == (amount is not None)


@pytest.mark.parametrize(
    ("fields", "notes"),
    [
        ({"title": None}, {"no_title": 1}),
        ({"title": 5}, {"no_title": 1}),
        ({"title": "\ud83d"}, {"no_title": 1}),
        ({"store": None, "details": {}}, {"no_brand": 1}),
        ({"store": 7, "details": None}, {"no_brand": 1}),
        ({"store": " ", "details": "Brand"}, {"no_brand": 1}),
        ({"store": None, "details": {"Brand": 7}}, {"no_brand": 1}),
        ({"categories": None}, {"no_category": 1}),
        ({"categories": "Beauty"}, {"no_category": 1}),
        ({"categories": [None, 5, ""]}, {"no_category": 1}),
        ({"main_category": None}, {}),
        ({"main_category": ["x"]}, {}),
    ],
)
def test_missing_and_odd_fields_leave_the_product_and_are_noted(
    tmp_path: Path, fields: dict[str, Any], notes: dict[str, int]
) -> None:
    found = only(tmp_path, **fields)
    assert (found.rows.kept, dict(found.rows.noted)) == (1, notes)


def test_the_first_of_two_products_with_one_id_stays(tmp_path: Path) -> None:
    lines = [product(title="First"), product(title="Second"), product(""), '{"title": "x"}', "5"]
    found = load_products(write(tmp_path / "meta.jsonl", lines))
    assert found.titles == {"P1": "First"}
    assert dict(found.rows.dropped) == {"bad_id": 2, "duplicate": 1, "not_an_object": 1}


def test_metadata_of_other_products_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"meta_x\.jsonl.*not_reviewed=1"):
        load(tmp_path, [review()], [product("P2")])


def test_reviews_in_place_of_metadata_are_refused_or_hold_nothing(tmp_path: Path) -> None:
    loaded = load(tmp_path, [review()], [review()])
    assert dict(loaded.rows[1].noted) == {"no_price": 1, "no_brand": 1, "no_category": 1}


# --- properties and real data -------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=3,
)
ROWS = st.fixed_dictionaries(
    {},
    optional={
        "user_id": st.sampled_from(["A", "B"]) | VALUES,
        "parent_asin": st.sampled_from(["X", "Y", "Z"]) | VALUES,
        "rating": st.sampled_from([1.0, 5.0]) | VALUES,
        "timestamp": st.sampled_from([TIME, TIME + 1]) | VALUES,
        "price": VALUES,
        "store": VALUES,
        "categories": VALUES,
        "details": VALUES,
    },
)
LINES = st.lists(
    ROWS.map(lambda row: json.dumps(row).encode())
    | st.binary(max_size=20).map(lambda line: line.replace(b"\n", b""))
    | st.builds(review, st.sampled_from("AB"), st.sampled_from("XYZ")).map(str.encode),
    max_size=8,
)


@settings(max_examples=50)
@given(LINES, LINES, st.integers(1, 2))
def test_every_line_is_kept_or_dropped_with_a_reason(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], products: list[bytes], core: int
) -> None:
    folder = tmp_path_factory.getbasetemp()
    try:
        loaded = load(folder, lines, products, core=core)
    except DataError:
        return
    for rows, content in zip(loaded.rows, (lines, products), strict=True):
        assert rows.read == len(content) == rows.kept + sum(rows.dropped.values())
    assert loaded.rows[0].kept == loaded.interactions.users.size


@pytest.mark.realdata
def test_the_converted_corpus(data_dir: Path) -> None:
    folder = data_dir / "amazon-reviews-2023"
    loaded = load_reviews(folder / "converted_reviews.jsonl", folder / "converted_meta.jsonl")
    reviews, products = loaded.rows
    assert (reviews.read, reviews.kept, dict(reviews.dropped)) == (3455, 3452, {"duplicate": 3})
    assert dict(reviews.noted) == {}
    assert (products.read, products.kept, dict(products.dropped)) == (3228, 3228, {})
    assert dict(products.noted) == {"no_brand": 3228, "no_price": 897, "no_title": 74}
    made, attributes = loaded.interactions, loaded.attributes
    assert (made.n_users, made.n_items) == (354, 3228)
    assert attributes
    assert (attributes.n_items, attributes.n_without) == (3228, 0)


@pytest.mark.realdata
def test_the_converted_corpus_filtered(data_dir: Path) -> None:
    file = data_dir / "amazon-reviews-2023" / "converted_reviews.jsonl"
    rows = load_reviews(file, core=2, min_rating=4).rows[0]
    assert (rows.read, rows.kept) == (3455, 180)
    assert dict(rows.dropped) == {"below_core": 2617, "below_min_rating": 655, "duplicate": 3}


@pytest.mark.realdata
def test_verbatim_lines_of_the_official_schema(data_dir: Path) -> None:
    folder = data_dir / "amazon-reviews-2023"
    loaded = load_reviews(folder / "genuine_schema_reviews.jsonl")
    assert (loaded.rows[0].read, loaded.rows[0].kept) == (3, 3)
    # Its products are others than those reviewed.
    found = load_products(folder / "genuine_schema_meta.jsonl")
    assert (found.rows.read, found.rows.kept) == (5, 5)
    assert dict(found.rows.noted) == {"no_price": 4, "no_category": 1}
    assert found.prices["B0751M85FV"] == 69.0
    assert "brand: Zoë Noelle Designs" in found.attributes["B01HYNE114"]
