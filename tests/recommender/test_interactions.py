"""Loading, checking, splitting and dealing out interactions."""

import hashlib
import os
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secagg_recommender import movielens_wheel
from secagg_recommender.datasets import load_dataset
from secagg_recommender.interactions import (
    NO_TEST_ITEM,
    DataError,
    Interactions,
    from_events,
    split_leave_one_out,
)
from secagg_recommender.movielens import load_movielens
from secagg_recommender.movielens_wheel import fetch_movielens
from secagg_recommender.partition import partition_users

REAL_DATA = os.environ.get("SECAGG_DATA_DIR", "")
HAS_MOVIELENS = bool(REAL_DATA) and Path(REAL_DATA, "ml-100k", "ratings.csv").is_file()

CSV = "7,30,5,100\n7,10,1,300\n7,20,3,300\n9,10,4,50\n"
INTER = (
    "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    "7\t30\t5\t100\n7\t20\t3\t300\n7\t10\t1\t300\n9\t10\t4\t50\n"
)
ITEMS = (
    "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    '10\tA "quoted film\t1995\tDrama\n20\tUndated\t\tDrama\n'
)


def write_csv(folder: Path, text: str = CSV) -> Path:
    file = folder / "ratings.csv"
    file.write_text(text, encoding="utf-8")
    return file


def make_wheel(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"recbole/dataset_example/ml-100k/{name}", content)


def fake_pip(monkeypatch: pytest.MonkeyPatch, members: dict[str, bytes]) -> list[list[str]]:
    """Replace the subprocess by one that writes a wheel; return the commands it saw."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:  # noqa: ANN401
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        make_wheel(folder / "recbole-1.2.1-py3-none-any.whl", members)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


# --- from_events and Interactions ---------------------------------------------------------------


def test_ids_become_contiguous_in_numeric_order() -> None:
    made = from_events("x", [100, 9, 100], [5, 30, 30], [1, 1, 2])
    assert made.user_labels == ("9", "100")
    assert made.item_labels == ("5", "30")
    assert made.users.tolist() == [0, 1, 1]
    assert made.items.tolist() == [1, 0, 1]
    assert made.users.dtype == made.items.dtype == np.int32


def test_of_equal_timestamps_the_first_row_counts_as_later() -> None:
    made = from_events("x", [1, 1, 1], [10, 20, 30], [5, 5, 5])
    assert [made.item_labels[item] for item in made.items] == ["30", "20", "10"]


def test_repeated_pair_keeps_its_latest_event_only() -> None:
    made = from_events("x", [1, 1, 1], [10, 20, 10], [1, 2, 3])
    assert [made.item_labels[item] for item in made.items] == ["20", "10"]


def test_items_without_title_are_named_by_their_id() -> None:
    made = from_events("x", [1, 1], [10, 20], [1, 2], titles={10: "Lamp"})
    assert made.item_titles == ("Lamp", "Item 20")


@pytest.mark.parametrize(
    ("users", "items", "times", "message"),
    [
        ([], [], [], "at least one event"),
        ([1, 2], [1], [1], "one length"),
        ([[1]], [[1]], [[1]], "one length"),
        ([1.5], [1], [1], "integer user and item ids"),
        ([1], ["a"], [1], "integer user and item ids"),
        ([1], [1], [np.nan], "finite numeric timestamps"),
        ([1], [1], ["noon"], "finite numeric timestamps"),
    ],
)
def test_unusable_events_are_refused(users: Any, items: Any, times: Any, message: str) -> None:  # noqa: ANN401
    with pytest.raises(DataError, match=message):
        from_events("x", users, items, times)


@pytest.mark.parametrize(
    ("users", "items", "message"),
    [
        (np.array([], np.int32), np.array([], np.int32), "at least one interaction"),
        (np.array([0], np.int64), np.array([0], np.int32), "users as one-dimensional int32"),
        (np.array([0], np.int32), np.array([0.0]), "items as one-dimensional int32"),
        (np.array([2], np.int32), np.array([0], np.int32), r"users in \[0, 2\)"),
        (np.array([0], np.int32), np.array([-1], np.int32), r"items in \[0, 2\)"),
        (np.array([0, 1], np.int32), np.array([0], np.int32), "one item per user"),
        (np.array([1, 0], np.int32), np.array([0, 0], np.int32), "grouped by user"),
        (np.array([0, 0], np.int32), np.array([1, 1], np.int32), "pair once"),
    ],
)
def test_inconsistent_interactions_are_refused(users: Any, items: Any, message: str) -> None:  # noqa: ANN401
    with pytest.raises(DataError, match=message):
        Interactions("x", users, items, ("a", "b"), ("c", "d"), ("C", "D"), "none")


def test_titles_must_match_the_catalogue() -> None:
    one = np.zeros(1, np.int32)
    with pytest.raises(DataError, match="one title per item"):
        Interactions("x", one, one, ("a",), ("c", "d"), ("C",), "none")


# --- split --------------------------------------------------------------------------------------


def test_latest_item_is_the_test_item_and_left_out_of_training() -> None:
    split = split_leave_one_out(from_events("x", [1, 1, 1], [10, 20, 30], [3, 1, 2]))
    assert split.test_item.tolist() == [0]
    assert split.train_items.tolist() == [1, 2]
    assert split.test_item.dtype == np.int32


def test_user_with_one_interaction_has_no_test_item_but_trains() -> None:
    split = split_leave_one_out(from_events("x", [1, 2, 2], [10, 10, 20], [1, 1, 2]))
    assert split.test_item.tolist() == [NO_TEST_ITEM, 1]
    assert split.items_of(0).tolist() == [0]
    assert split.items_of(1).tolist() == [0]


@given(
    st.lists(
        st.tuples(st.integers(0, 6), st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=60
    )
)
def test_split_loses_nothing_and_leaks_nothing(events: list[tuple[int, int, int]]) -> None:
    users, items, times = zip(*events, strict=True)
    made = from_events("x", users, items, times)
    split = split_leave_one_out(made)
    for user in range(made.n_users):
        everything = made.items[made.users == user].tolist()
        train = split.items_of(user).tolist()
        if len(everything) < 2:
            assert (train, split.test_item[user]) == (everything, NO_TEST_ITEM)
        else:
            assert [*train, split.test_item[user]] == everything
            assert split.test_item[user] not in train


# --- partition ----------------------------------------------------------------------------------


@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 2**32))
def test_partition_covers_every_user_once_in_equal_parts(n: int, silos: int, seed: int) -> None:
    if silos > n:
        with pytest.raises(DataError, match="n_silos"):
            partition_users(n, silos, seed)
        return
    parts = partition_users(n, silos, seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_partition_depends_on_the_seed_alone() -> None:
    first, again, other = (np.concatenate(partition_users(50, 4, seed)) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("n_silos", [0, -1, 11])
def test_impossible_partition_is_refused(n_silos: int) -> None:
    with pytest.raises(DataError, match="n_silos"):
        partition_users(10, n_silos, 0)


# --- MovieLens files ----------------------------------------------------------------------------


def test_csv_and_its_folder_load_the_same(tmp_path: Path) -> None:
    file = write_csv(tmp_path)
    for path in (file, tmp_path, str(tmp_path)):
        loaded = load_movielens(path)
        assert loaded.name == "ml-100k"
        assert loaded.user_labels == ("7", "9")
        # 10 stands before 20 in the file, so it counts as the later of the two events at 300.
        assert [loaded.item_labels[i] for i in loaded.items] == ["30", "20", "10", "10"]
        assert "ratings.csv" in loaded.tie_rule


def test_every_rating_counts_as_a_positive(tmp_path: Path) -> None:
    assert load_movielens(write_csv(tmp_path)).users.size == CSV.count("\n")


def test_inter_file_breaks_ties_by_its_own_order_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "ml-100k.inter").write_text(INTER, encoding="utf-8")
    (tmp_path / "ml-100k.item").write_text(ITEMS, encoding="utf-8")
    loaded = load_movielens(tmp_path)
    assert [loaded.item_labels[i] for i in loaded.items] == ["30", "10", "20", "10"]
    assert "ml-100k.inter" in loaded.tie_rule
    assert loaded.item_titles == ('A "quoted film (1995)', "Undated", "Item 30")


def test_csv_takes_titles_from_the_table_beside_it(tmp_path: Path) -> None:
    write_csv(tmp_path)
    (tmp_path / "recbole_ml-100k.item.tsv").write_text(ITEMS, encoding="utf-8")
    assert load_movielens(tmp_path).item_titles[0] == 'A "quoted film (1995)'


def test_csv_wins_where_a_folder_has_both(tmp_path: Path) -> None:
    write_csv(tmp_path)
    (tmp_path / "ml-100k.inter").write_text(INTER, encoding="utf-8")
    assert "ratings.csv" in load_movielens(tmp_path).tie_rule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty file"),
        ("1,2,3\n", "missing=.*timestamp"),
        ("1,2,3,4,5\n", "expected columns"),
        ("1,2,3,4\n1,2,3,4,5\n", "same number of columns"),
        ("userId,movieId,rating,timestamp\n1,2,3,4\n", "'userId' in line=1 .*no header"),
        ("1,2,3,4\n1,x,3,5\n", "integer as item_id, got 'x' in line=2"),
        ("1,2,3,4\n1.5,2,3,5\n", "integer as user_id, got '1.5' in line=2"),
        ("1,2,3,4\n1,2,3,\n", "a number as timestamp, got '' in line=2"),
        ("1,2,3,soon\n", "a number as timestamp, got 'soon'"),
        ("1,2,3,inf\n", "a number as timestamp, got 'inf'"),
        ("1,2,3,nan\n", "a number as timestamp, got 'nan'"),
        ("1,2,good,4\n", "a number as rating, got 'good'"),
        ("99999999999999999999,2,3,4\n", "integer as user_id"),
        ("1,2,3,4\n\n1,3,3,4\n", "line=2"),
    ],
)
def test_broken_csv_is_refused_with_the_place(tmp_path: Path, text: str, message: str) -> None:
    file = write_csv(tmp_path, text)
    with pytest.raises(DataError, match=message) as caught:
        load_movielens(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user_id:token\titem_id:token\trating:float\ttimestamp:float\n", "rows=0"),
        ("user_id:token\titem_id:token\trating:float\n1\t2\t3\n", "missing=timestamp"),
        ("uid\tiid\tr\tt\n1\t2\t3\t4\n", "missing=user_id, item_id"),
        (INTER.replace("9\t10", "9\tten"), "got 'ten' in line=5"),
        (INTER.replace("\t", ","), "missing="),
    ],
)
def test_broken_inter_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "ml-100k.inter"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_movielens(file)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_load_or_raise_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    file = tmp_path_factory.mktemp("fuzz") / "ratings.csv"
    file.write_bytes(content)
    try:
        loaded = load_movielens(file)
    except DataError:
        return
    assert loaded.users.size > 0


def test_title_table_without_titles_is_refused(tmp_path: Path) -> None:
    write_csv(tmp_path)
    (tmp_path / "recbole_ml-100k.item.tsv").write_text("id\tname\n1\tx\n", encoding="utf-8")
    with pytest.raises(DataError, match="movie_title"):
        load_movielens(tmp_path)


@pytest.mark.parametrize("name", ["absent", "absent.csv"])
def test_missing_path_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_movielens(tmp_path / name)


def test_folder_without_ratings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got neither"):
        load_movielens(tmp_path)


def test_other_file_types_are_refused(tmp_path: Path) -> None:
    (tmp_path / "u.data").write_text("1\t2\t3\t4\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"\.csv or \.inter"):
        load_movielens(tmp_path / "u.data")


# --- load_dataset -------------------------------------------------------------------------------


def test_dataset_is_found_in_a_nested_folder(tmp_path: Path) -> None:
    (tmp_path / "ml-100k").mkdir()
    write_csv(tmp_path / "ml-100k")
    assert load_dataset("ml-100k", tmp_path).n_users == 2
    assert load_dataset("ml-100k", tmp_path / "ml-100k").n_users == 2


def test_marketplace_needs_no_folder() -> None:
    assert load_dataset("marketplace").name == "marketplace"


def test_unknown_dataset_is_refused() -> None:
    with pytest.raises(DataError, match="source='netflix'"):
        load_dataset("netflix")


def test_movielens_without_folder_says_how_to_get_it() -> None:
    with pytest.raises(DataError, match="fetch_movielens"):
        load_dataset("ml-100k")


# --- fetch_movielens ----------------------------------------------------------------------------


def pin(monkeypatch: pytest.MonkeyPatch, members: dict[str, bytes]) -> None:
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in members.items()}
    monkeypatch.setattr(movielens_wheel, "_WHEEL_FILES", digests)


def test_fetch_unpacks_pinned_files_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    members = {"ml-100k.inter": INTER.encode(), "ml-100k.item": ITEMS.encode()}
    pin(monkeypatch, members)
    commands = fake_pip(monkeypatch, members)
    folder = fetch_movielens(tmp_path / "cache")
    assert load_movielens(folder).n_users == 2
    assert fetch_movielens(tmp_path / "cache") == folder
    assert len(commands) == 1
    assert "--no-deps" in commands[0]
    assert sorted(file.name for file in folder.iterdir()) == sorted(members)


def test_fetch_replaces_a_damaged_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    members = {"ml-100k.inter": INTER.encode(), "ml-100k.item": ITEMS.encode()}
    pin(monkeypatch, members)
    commands = fake_pip(monkeypatch, members)
    folder = fetch_movielens(tmp_path)
    (folder / "ml-100k.inter").write_bytes(b"cut off")
    fetch_movielens(tmp_path)
    assert (folder / "ml-100k.inter").read_bytes() == INTER.encode()
    assert len(commands) == 2


def test_fetch_refuses_other_bytes_than_pinned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_pip(monkeypatch, {"ml-100k.inter": INTER.encode(), "ml-100k.item": b"evil"})
    with pytest.raises(DataError, match="SHA-256"):
        fetch_movielens(tmp_path)
    assert not list((tmp_path / "ml-100k").iterdir())


def test_fetch_refuses_a_wheel_without_the_data(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_pip(monkeypatch, {})
    with pytest.raises(DataError, match=r"expected ml-100k\.inter"):
        fetch_movielens(tmp_path)


def test_fetch_reports_what_pip_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:  # noqa: ANN401
        return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: no index\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(DataError, match=r"exit=1: ERROR: no index; check the network"):
        fetch_movielens(tmp_path)


def test_fetch_gives_up_after_its_timeout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:  # noqa: ANN401
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(DataError, match=r"timeout_s=2\.5"):
        fetch_movielens(tmp_path, timeout_s=2.5)


# --- real data ----------------------------------------------------------------------------------


@pytest.mark.realdata
@pytest.mark.skipif(not HAS_MOVIELENS, reason="SECAGG_DATA_DIR has no ml-100k/ratings.csv")
def test_movielens_has_its_published_size_and_titles() -> None:
    loaded = load_dataset("ml-100k", REAL_DATA)
    assert (loaded.n_users, loaded.n_items, loaded.users.size) == (943, 1682, 100_000)
    assert loaded.item_titles[0] == "Toy Story (1995)"
    split = split_leave_one_out(loaded)
    assert split.train_users.size == 100_000 - 943
    assert (split.test_item >= 0).all()
