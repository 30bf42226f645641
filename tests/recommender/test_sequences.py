"""Sequence files in S3-Rec's format, with attributes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg_recommender.interactions import DataError
from secagg_recommender.reading import Rows
from secagg_recommender.sequences import Sequences, load_sequences


def load(folder: Path, content: str | bytes, attributes: str | None = None) -> Sequences:
    file = folder / "x.txt"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    if attributes is None:
        return load_sequences(file)
    (folder / "x.json").write_text(attributes, encoding="utf-8")
    return load_sequences(file, folder / "x.json")


def histories(loaded: Sequences) -> dict[str, list[str]]:
    made = loaded.interactions
    return {
        label: [made.item_labels[item] for item in made.items[made.users == user]]
        for user, label in enumerate(made.user_labels)
    }


def dropped(loaded: Sequences, which: int = 0) -> dict[str, int]:
    return dict(loaded.rows[which].dropped)


def test_items_stay_in_the_order_of_the_file(tmp_path: Path) -> None:
    loaded = load(tmp_path, "2 30 4 100\n10 4 5\n")
    assert histories(loaded) == {"2": ["30", "4", "100"], "10": ["4", "5"]}
    assert loaded.interactions.item_labels == ("4", "5", "30", "100")
    assert loaded.interactions.item_titles[0] == "Item 4"
    assert loaded.attributes is None
    assert loaded.rows == (
        Rows("sequences in x.txt", 2, 2, {}, {}),
        Rows("items in x.txt", 5, 5, {}, {}),
    )


def test_the_latest_place_of_a_repeated_item_counts(tmp_path: Path) -> None:
    loaded = load(tmp_path, "1 7 9 7 20 9\n")
    assert histories(loaded) == {"1": ["7", "20", "9"]}
    assert dropped(loaded, 1) == {"repeated_item": 2}
    assert loaded.rows[1].read == 5


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", "blank"),
        (b" \t ", "blank"),
        (b"3", "no_items"),
        (b"3 ", "no_items"),
        (b"1 8 9", "repeated_user"),
        (b"01 8 9", "repeated_user"),
        (b"3 4.0 5", "bad_id"),
        (b"3 -4 5", "bad_id"),
        (b"3 0 5", "bad_id"),
        (b"0 4 5", "bad_id"),
        (b"A3 4 5", "bad_id"),
        (b"3,4,5", "bad_id"),
        (b"3 4 NaN", "bad_id"),
        (b"3 4 1e3", "bad_id"),
        (b"3 4 1_000", "bad_id"),
        (b"3 4 " + b"9" * 5000, "bad_id"),
        (b"3 4 5\r6 7 8", "bad_id"),
        ("3 ٤ 5".encode(), "bad_id"),
        ("3 4\u30005".encode(), "bad_id"),
        (b"3 4\x00 5", "bad_id"),
        (b"3 4 \xff", "bad_id"),
        (b"3 4 \x81", "encoding"),
    ],
)
def test_an_unusable_line_is_dropped_whole(tmp_path: Path, line: bytes, reason: str) -> None:
    loaded = load(tmp_path, b"1 4 5\n" + line + b"\n2 5 4\n")
    assert dropped(loaded) == {reason: 1}
    assert histories(loaded) == {"1": ["4", "5"], "2": ["5", "4"]}
    assert (loaded.rows[0].read, loaded.rows[1].read) == (3, 4)


@pytest.mark.parametrize(
    "content", ["1 4 5\r\n2 5 4\r\n", "\ufeff1 4 5\n2 5 4", "1\t4\t5 \n 2 5  4\n"]
)
def test_line_ends_byte_order_mark_and_gaps_do_not_matter(tmp_path: Path, content: str) -> None:
    assert histories(load(tmp_path, content)) == {"1": ["4", "5"], "2": ["5", "4"]}


@pytest.mark.parametrize("content", ["", "\n\n", "1\n2\n", "user item\n", '{"1": [2]}', "a,b\n1,2"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match=r"x\.txt"):
        load(tmp_path, content)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a file"):
        load_sequences(tmp_path / "none.txt")


# --- attributes ---------------------------------------------------------------------------------


def names(loaded: Sequences, label: str) -> list[str]:
    assert loaded.attributes
    item = loaded.interactions.item_labels.index(label)
    return [loaded.attributes.labels[one] for one in loaded.attributes.of(item)]


def test_attributes_belong_to_the_items_by_label(tmp_path: Path) -> None:
    loaded = load(tmp_path, "1 30 4\n2 5\n", '{"30": [2, 1, 2], "4": [1], "9": [3]}')
    assert names(loaded, "30") == ["attribute: 1", "attribute: 2"]
    assert names(loaded, "4") == ["attribute: 1"]
    assert names(loaded, "5") == []
    assert loaded.attributes
    assert loaded.attributes.n_without == 1
    assert loaded.attributes.n_items == loaded.interactions.n_items
    assert dropped(loaded, 2) == {"not_interacted": 1}


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ('"4x": [1]', "bad_id"),
        ('"": [1]', "bad_id"),
        ('"-4": [1]', "bad_id"),
        ('"4": null', "bad_attributes"),
        ('"4": 7', "bad_attributes"),
        ('"4": "17"', "bad_attributes"),
        ('"4": [1.5]', "bad_attributes"),
        ('"4": [true]', "bad_attributes"),
        ('"4": [-1]', "bad_attributes"),
        ('"4": [NaN]', "bad_attributes"),
        ('"4": [[1]]', "bad_attributes"),
        ('"4": {"1": 1}', "bad_attributes"),
        ('"4": {}', "bad_attributes"),
        ('"5": [2]', "repeated_item"),
        ('"05": [2]', "repeated_item"),
    ],
)
def test_an_unusable_entry_is_dropped(tmp_path: Path, entry: str, reason: str) -> None:
    loaded = load(tmp_path, "1 4 5\n", '{"5": [1], ' + entry + "}")
    assert dropped(loaded, 2) == {reason: 1}
    assert (names(loaded, "4"), names(loaded, "5")) == ([], ["attribute: 1"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1, 2]",
        "17",
        '{"4": [1',
        '{"4": [1]} {"5": [1]}',
        "[" * 100_000,
        '{"4": [' + "9" * 5000 + "]}",
        "{}",
        '{"77": [1]}',
        "not json",
    ],
)
def test_an_attribute_file_of_another_kind_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"x\.json"):
        load(tmp_path, "1 4 5\n", text)


# --- properties and real data -------------------------------------------------------------------

DIRTY = st.one_of(
    st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")),
    st.lists(st.integers(-1, 9).map(str), max_size=6).map(lambda cells: " ".join(cells).encode()),
)


@settings(max_examples=50)
@given(st.lists(DIRTY, max_size=12))
def test_every_line_is_kept_or_dropped_with_a_reason(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    try:
        loaded = load(tmp_path_factory.getbasetemp(), b"".join(line + b"\n" for line in lines))
    except DataError:
        return
    sequences, items = loaded.rows
    assert sequences.read == len(lines) == sequences.kept + sum(sequences.dropped.values())
    assert sequences.kept == loaded.interactions.n_users
    assert items.kept == loaded.interactions.users.size


@settings(max_examples=50)
@given(
    st.dictionaries(st.text("0123456789x", max_size=3), st.lists(st.integers(-1, 5)) | st.none())
)
def test_every_entry_is_kept_or_dropped_with_a_reason(
    tmp_path_factory: pytest.TempPathFactory, entries: dict[str, Any]
) -> None:
    text = json.dumps(entries)
    try:
        loaded = load(tmp_path_factory.getbasetemp(), "1 1 2 3 4 5 6 7 8 9 10\n", text)
    except DataError:
        return
    rows = loaded.rows[2]
    assert rows.read == len(entries) == rows.kept + sum(rows.dropped.values())


@pytest.mark.realdata
def test_beauty_has_its_published_size(data_dir: Path) -> None:
    folder = data_dir / "amazon-beauty"
    loaded = load_sequences(
        folder / "s3rec_Beauty.txt", folder / "s3rec_Beauty_item2attributes.json", name="beauty"
    )
    assert [(rows.read, rows.kept, dict(rows.dropped)) for rows in loaded.rows] == [
        (22_363, 22_363, {}),
        (198_502, 198_502, {}),
        (12_101, 12_101, {}),
    ]
    made, attributes = loaded.interactions, loaded.attributes
    assert (made.n_users, made.n_items, made.users.size) == (22_363, 12_101, 198_502)
    assert made.items[:5].tolist() == [0, 1, 2, 3, 4]
    assert np.bincount(made.users).min() == 5
    assert attributes
    assert (attributes.n_items, attributes.n_attributes, attributes.n_without) == (12_101, 637, 0)
