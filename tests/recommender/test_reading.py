"""Lines out of dirty files, counts of rows, and sparse attributes."""

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secagg_recommender import reading
from secagg_recommender.attributes import ItemAttributes, attributes_of, price_band, rating_band
from secagg_recommender.interactions import DataError
from secagg_recommender.reading import Rows, Tally, interactions_of, is_broken, read_lines


def lines_of(path: Path, content: bytes) -> tuple[list[str], Tally]:
    path.write_bytes(content)
    tally = Tally("lines")
    return list(read_lines(path, tally)), tally


def noted(tally: Tally) -> dict[str, int]:
    tally.read()  # A row must be kept for a report.
    return dict(tally.rows().noted)


# --- lines --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"a\nb\n", ["a\n", "b\n"]),
        (b"a\r\nb", ["a\r\n", "b"]),
        (b"\xef\xbb\xbfa\n", ["a\n"]),
        (b"\n\n", ["\n", "\n"]),
        ("₹1\n".encode(), ["₹1\n"]),
        (b"a\rb\n", ["a\rb\n"]),
        (b"a\x00b\n", ["a\x00b\n"]),
        ("a\u2028b\n".encode(), ["a\u2028b\n"]),
    ],
)
def test_lines_come_whole(tmp_path: Path, content: bytes, lines: list[str]) -> None:
    found, tally = lines_of(tmp_path / "x.txt", content)
    assert found == lines
    assert noted(tally) == {}


def test_a_line_that_is_no_utf8_is_read_as_windows_1252_and_noted(tmp_path: Path) -> None:
    content = "Zoë\n".encode() + "Zoë €\n".encode("cp1252") + b"plain\n"
    found, tally = lines_of(tmp_path / "x.txt", content)
    assert found == ["Zoë\n", "Zoë €\n", "plain\n"]
    assert noted(tally) == {"cp1252": 1}
    assert not any(is_broken(line) for line in found)


@pytest.mark.parametrize("byte", [b"\x81", b"\x8d", b"\x8f", b"\x90", b"\x9d"])
def test_bytes_that_mean_nothing_anywhere_are_marked(tmp_path: Path, byte: bytes) -> None:
    found, _ = lines_of(tmp_path / "x.txt", b"a" + byte + b"\nb\n")
    assert [is_broken(line) for line in found] == [True, False]


def test_a_surrogate_written_in_utf8_is_no_utf8(tmp_path: Path) -> None:
    found, tally = lines_of(tmp_path / "x.txt", b"\xed\xa0\x80\n")
    assert noted(tally) == {"cp1252": 1}
    assert not is_broken(found[0])


def test_a_gzip_archive_is_unpacked(tmp_path: Path) -> None:
    found, _ = lines_of(tmp_path / "x.jsonl.gz", gzip.compress(b"a\nb\n", mtime=0))
    assert found == ["a\n", "b\n"]


def test_a_line_longer_than_memory_allows_comes_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "LONGEST_LINE", 4)
    found, _ = lines_of(tmp_path / "x.txt", b"abcdefgh\nij\n")
    assert max(map(len, found)) <= 4
    assert "".join(found) == "abcdefgh\nij\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b"\xef\xbb\xbf", "empty file"),
        ("a\n".encode("utf-16"), "UTF-16"),
        (b"\xfe\xff\x00a\x00\n", "UTF-16"),
        (b"PK\x03\x04\x14\x00", "ZIP archive"),
        (b"PAR1\x15\x04", "Parquet"),
        (b"%PDF-1.7\n", "PDF"),
        (gzip.compress(b"a\n" * 500, mtime=0)[:-12], "complete gzip archive"),
        (gzip.compress(b"a\n" * 500, mtime=0)[:12] + b"\xff" * 30, "complete gzip archive"),
        (gzip.compress(b"a\n", mtime=0)[:-8] + b"\x00" * 8, "complete gzip archive"),
        (gzip.compress(b"", mtime=0), "empty file"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        lines_of(tmp_path / "x", content)


@pytest.mark.parametrize("name", ["missing.txt", "", "a" * 300, "nul\x00byte"])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="expected a file"):
        list(read_lines(f"{tmp_path}/{name}", Tally("lines")))


@given(st.binary(max_size=300))
def test_any_bytes_give_lines_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.txt"
    try:
        found, _ = lines_of(path, content)
    except DataError:
        return
    assert len(found) == content.count(b"\n") + (not content.endswith(b"\n"))
    assert all(line.endswith("\n") for line in found[:-1])


# --- counts -------------------------------------------------------------------------------------


def test_rows_must_add_up() -> None:
    assert Rows("x", 5, 2, {"a": 1, "b": 2}, {"c": 2}).kept == 2


@pytest.mark.parametrize(
    ("read", "kept", "dropped"),
    [(5, 2, {"a": 2}), (5, 6, {"a": -1}), (1, 2, {}), (0, -1, {"a": 1}), (3, 3, {"a": 1})],
)
def test_rows_that_do_not_add_up_are_refused(read: int, kept: int, dropped: dict[str, int]) -> None:
    with pytest.raises(DataError, match="read = kept"):
        Rows("x", read, kept, dropped, {})


def test_a_report_lists_what_happened_and_nothing_else() -> None:
    tally = Tally("rows of a test")
    tally.read(10)
    tally.drop("rare")
    tally.drop("frequent", 3)
    tally.drop("never", 0)
    tally.note("odd", 2)
    rows = tally.rows()
    assert rows == Rows("rows of a test", 10, 6, {"frequent": 3, "rare": 1}, {"odd": 2})
    assert list(rows.dropped) == ["frequent", "rare"]
    assert [line.split() for line in str(rows).splitlines()] == [
        ["rows", "of", "a", "test"],
        ["read", "10"],
        ["kept", "6"],
        ["dropped", "frequent", "3"],
        ["dropped", "rare", "1"],
        ["kept,", "noted", "odd", "2"],
    ]


def test_a_file_without_a_usable_row_is_refused_with_its_reasons() -> None:
    tally = Tally("rows of a test")
    tally.read(3)
    tally.drop("blank", 2)
    tally.drop("bad_id")
    with pytest.raises(DataError, match=r"rows of a test.*read=3 blank=2, bad_id=1; check"):
        tally.rows()


def test_a_file_without_rows_is_refused() -> None:
    with pytest.raises(DataError, match="read=0; check"):
        Tally("rows").rows()


# --- interactions by text ids -------------------------------------------------------------------


def test_text_ids_come_in_alphabetical_order_and_unused_ones_are_left_out() -> None:
    # Four in a ring, so that a permutation and its inverse differ.
    users, items = ["b", "nobody", "c", "d", "a"], ["y", "z", "w", "nothing", "x"]
    events = (np.array([0, 2, 3, 4, 4]), np.array([0, 1, 2, 4, 0]), np.array([5, 6, 7, 9, 8]))
    made = interactions_of("x", users, items, events, {"w": "Lamp", "z": ""})
    assert made.user_labels == ("a", "b", "c", "d")
    assert made.item_labels == ("w", "x", "y", "z")
    assert made.item_titles == ("Lamp", "Item x", "Item y", "Item z")
    pairs = zip(made.users, made.items, strict=True)
    bought = [(made.user_labels[u], made.item_labels[i]) for u, i in pairs]
    assert bought == [("a", "y"), ("a", "x"), ("b", "y"), ("c", "z"), ("d", "w")]


# --- attributes ---------------------------------------------------------------------------------


def test_attributes_are_sparse_sorted_and_unique() -> None:
    made = attributes_of([["b", "a", "b"], [], ["c"]])
    assert made.labels == ("a", "b", "c")
    assert [made.of(item).tolist() for item in range(3)] == [[0, 1], [], [2]]
    assert (made.n_items, made.n_attributes, made.n_without) == (3, 3, 1)


def test_no_item_has_an_attribute() -> None:
    made = attributes_of([[], []])
    assert (made.n_items, made.n_attributes, made.n_without) == (2, 0, 2)
    assert made.of(1).size == 0


@given(st.lists(st.lists(st.text(max_size=3), max_size=5), max_size=8))
def test_attributes_come_back_as_they_went_in(names: list[list[str]]) -> None:
    made = attributes_of(names)
    back = [{made.labels[one] for one in made.of(item)} for item in range(made.n_items)]
    assert back == [set(of_item) for of_item in names]


@pytest.mark.parametrize(
    ("indptr", "indices", "message"),
    [
        ([0, 1], np.array([0], np.int64), "int32"),
        ([0, 1], np.array([0], np.float32), "int32"),
        ([], [], "rise from 0"),
        ([1, 1], [0], "rise from 0"),
        ([0, 2, 1], [0], "rise from 0"),
        ([0, 1], [0, 1], "rise from 0"),
        ([0, 1], [2], "attributes in"),
        ([0, 1], [-1], "attributes in"),
        ([0, 2], [1, 0], "ascending"),
        ([0, 2], [1, 1], "ascending"),
    ],
)
def test_arrays_that_break_a_promise_are_refused(
    indptr: Sequence[int],
    indices: Any,  # noqa: ANN401
    message: str,
) -> None:
    if isinstance(indices, list):
        indices = np.array(indices, np.int32)
    with pytest.raises(DataError, match=message):
        ItemAttributes(np.array(indptr, np.int64), indices, ("a", "b"))


@pytest.mark.parametrize(
    ("price", "band"),
    [
        (0.0, "price: free"),
        (0.99, "price: 0.5-1"),
        (1.0, "price: 1-2"),
        (19.99, "price: 10-20"),
        (20.0, "price: 20-50"),
        (999.0, "price: 500-1000"),
        (1000.0, "price: 1000-2000"),
        (123_456.0, "price: 100000-200000"),
    ],
)
def test_price_bands(price: float, band: str) -> None:
    assert price_band(price) == band


@given(st.floats(0.01, 1e12))
def test_a_price_lies_in_its_band(price: float) -> None:
    low, high = map(float, price_band(price).removeprefix("price: ").split("-"))
    assert low * (1 - 1e-9) <= price < high * (1 + 1e-9)


@pytest.mark.parametrize(
    ("rating", "band"), [(1.0, "1.0-1.5"), (3.9, "3.5-4.0"), (4.0, "4.0-4.5"), (5.0, "4.5-5.0")]
)
def test_rating_bands(rating: float, band: str) -> None:
    assert rating_band(rating) == f"rating: {band}"
