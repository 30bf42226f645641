"""The data sets by name: files found, reports, attributes, and the tables of MovieLens."""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from secagg_client.config import ClientSettings
from secagg_recommender.datasets import (
    DatasetName,
    catalogue_files,
    dataset_folder,
    read_dataset,
)
from secagg_recommender.evaluation import evaluate
from secagg_recommender.interactions import DataError, split_leave_one_out
from secagg_recommender.movielens import Demographics, load_movielens_users, read_movielens
from secagg_recommender.reading import Rows

RATINGS = "7,30,5,100\n7,10,1,300\n7,10,2,100\n9,10,4,50\n"
ITEMS = (
    "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    "10\tLamp\t1995\tDrama Children's\n20\tNever seen\t1931\tWar\n"
)
USERS = (
    "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
    "7\t24\tM\ttechnician\t85711\n9\t53\tF\tother\tT8H1N\n"
)
REVIEW = '{"rating": 5, "parent_asin": "%s", "user_id": "%s", "timestamp": 1616156351887}\n'
META = '{"parent_asin": "P1", "title": "Comb", "store": "Lumen", "categories": ["Hair"]}\n'
PRODUCTS = (
    "product_id,product_name,category,discounted_price,actual_price,discount_percentage,rating,"
    "rating_count\n"
)


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


# --- by name ------------------------------------------------------------------------------------


def test_the_setting_and_the_registry_know_the_same_names() -> None:
    setting = ClientSettings.model_fields["dataset"].annotation
    assert get_args(setting) == get_args(DatasetName)


@pytest.mark.parametrize("name", sorted(set(get_args(DatasetName)) - {"marketplace"}))
def test_data_sets_of_files_need_a_folder_with_them(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"folder with {name}.*data_dir=None"):
        read_dataset(name)
    with pytest.raises(DataError, match="expected"):
        read_dataset(name, tmp_path)
    with pytest.raises(DataError, match="expected"):
        read_dataset(name, tmp_path / "missing")


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(DataError, match=r"'amazon-beauty'.*source='netflix'"):
        read_dataset("netflix")


def test_a_folder_inside_the_data_folder_goes_first(tmp_path: Path) -> None:
    assert dataset_folder("ml-100k", tmp_path) == tmp_path
    (tmp_path / "ml-100k").mkdir()
    assert dataset_folder("ml-100k", tmp_path) == tmp_path / "ml-100k"


def test_the_marketplace_says_that_it_is_generated() -> None:
    made = read_dataset("marketplace")
    assert made.generated == "products, shoppers and purchases"
    assert (made.rows, made.attributes, made.kinds) == ((), None, None)


def test_beauty_goes_without_attributes_if_it_has_to(tmp_path: Path) -> None:
    write(tmp_path / "s3rec_Beauty.txt", "1 2 3\n")
    assert read_dataset("amazon-beauty", tmp_path).attributes is None
    write(tmp_path / "s3rec_Beauty_item2attributes.json", '{"2": [1]}')
    found = read_dataset("amazon-beauty", tmp_path)
    assert found.attributes
    assert (found.attributes.n_without, found.generated) == (1, None)
    assert len(found.rows) == 3


@pytest.mark.parametrize(
    ("reviews", "meta"),
    [
        ("All_Beauty.jsonl", "meta_All_Beauty.jsonl"),
        ("x_reviews.jsonl", "x_meta.jsonl"),
        ("reviews.jsonl", "meta.jsonl"),
    ],
)
def test_reviews_are_found_by_the_names_they_come_with(
    tmp_path: Path, reviews: str, meta: str
) -> None:
    write(tmp_path / reviews, REVIEW % ("P1", "U1") + REVIEW % ("P2", "U1"))
    with pytest.raises(DataError, match="no pair"):
        read_dataset("amazon-reviews-2023", tmp_path)
    write(tmp_path / meta, META)
    found = read_dataset("amazon-reviews-2023", tmp_path)
    assert found.interactions.item_titles == ("Comb", "Item P2")
    assert found.rows[0].what == f"reviews in {reviews}"
    assert dict(found.rows[0].noted) == {"no_metadata": 1}


def test_of_several_pairs_of_reviews_the_largest_is_read(tmp_path: Path) -> None:
    for name, count in (("a", 1), ("b", 3), ("c", 2)):
        lines = [REVIEW % ("P1", f"U{user}") for user in range(count)]
        write(tmp_path / f"{name}.jsonl", "".join(lines))
        write(tmp_path / f"meta_{name}.jsonl", META)
    write(tmp_path / "large.jsonl", REVIEW % ("P1", "U1") * 9)  # without metadata
    assert read_dataset("amazon-reviews-2023", tmp_path).interactions.n_users == 3


def test_shoppers_of_the_catalogue_are_generated_and_say_so(tmp_path: Path) -> None:
    rows = [
        f"B{place:09d},Cable {place},Shop|Shelf {place % 3},₹{place},₹{2 * place},50%,4.1,7\n"
        for place in range(1, 121)
    ]
    write(tmp_path / "kaggle_amazon_sales.csv", PRODUCTS + "".join(rows))
    found = read_dataset("amazon-products-2023", tmp_path)
    assert found.generated
    assert "generated" in found.generated
    assert "generated" in found.interactions.name
    assert found.kind_names == ("rating", "price", "discount", "popularity")
    assert found.kinds is not None
    assert found.kinds.shape == (found.interactions.n_users,)
    assert found.rows == (Rows("products in kaggle_amazon_sales.csv", 120, 120, {}, {}),)
    assert catalogue_files(tmp_path) == [tmp_path / "kaggle_amazon_sales.csv"]


# --- MovieLens ----------------------------------------------------------------------------------


def test_movielens_reports_its_rows_and_genres(tmp_path: Path) -> None:
    write(tmp_path / "ratings.csv", RATINGS)
    assert read_movielens(tmp_path).attributes is None
    write(tmp_path / "recbole_ml-100k.item.tsv", ITEMS)
    found = read_movielens(tmp_path)
    assert found.rows == (Rows("ratings in ratings.csv", 4, 3, {"duplicate": 1}, {}),)
    attributes = found.attributes
    assert attributes
    assert found.interactions.item_labels == ("10", "30")
    assert attributes.labels == ("decade: 1990s", "genre: Children's", "genre: Drama")
    assert (attributes.of(0).tolist(), attributes.n_without) == ([0, 1, 2], 1)


@pytest.mark.parametrize("name", ["recbole_ml-100k.user.tsv", "ml-100k.user"])
def test_movielens_users(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / name, USERS)
    users = load_movielens_users(tmp_path)
    assert users == load_movielens_users(file)
    assert users == {"7": Demographics(24, "M", "technician"), "9": Demographics(53, "F", "other")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty file"),
        ("user_id:token\tage:token\n7\t24\n", "missing=gender, occupation"),
        (USERS.replace("24", "old"), "integer as age, got 'old' in line=2"),
        (USERS.replace("24", "24.5"), "integer as age"),
        (USERS.replace("24", ""), "integer as age"),
        (USERS.replace("9\t", "x\t"), "integer as user_id, got 'x' in line=3"),
        (USERS.replace("\t", ","), "missing=age, gender"),
        (USERS + "10\t20\tM\tother\t1\tmore\tstill more\n", "same number of columns"),
    ],
)
def test_an_unusable_table_of_users_is_refused(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path / "ml-100k.user", text)
    with pytest.raises(DataError, match=message):
        load_movielens_users(tmp_path)


def test_a_missing_table_of_users_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "ml-100k.user"):
        with pytest.raises(
            DataError, match=r"expected recbole_ml-100k\.user\.tsv or ml-100k\.user"
        ):
            load_movielens_users(path)


# --- real data ----------------------------------------------------------------------------------


@pytest.mark.realdata
def test_movielens_is_whole(data_dir: Path) -> None:
    found = read_dataset("ml-100k", data_dir)
    assert found.rows == (Rows("ratings in ratings.csv", 100_000, 100_000, {}, {}),)
    assert found.attributes
    assert (found.attributes.n_items, found.attributes.n_without) == (1682, 0)
    genres = [label for label in found.attributes.labels if label.startswith("genre: ")]
    assert len(genres) == 19
    users = load_movielens_users(dataset_folder("ml-100k", data_dir))
    assert users.keys() == set(found.interactions.user_labels)
    assert users["1"] == Demographics(24, "M", "technician")
    assert len({user.occupation for user in users.values()}) == 21


@pytest.mark.realdata
def test_shoppers_of_the_real_catalogue_are_worth_learning_from(data_dir: Path) -> None:
    found = read_dataset("amazon-products-2023", data_dir)
    made = found.interactions
    assert (made.n_users, made.n_items, made.users.size) == (1000, 1918, 18_601)
    # Of a product in several files the first to have it keeps it.
    kept = {rows.what.removeprefix("products in "): rows.kept for rows in found.rows}
    assert kept == {
        "kaggle_amazon_sales.csv": 1351,
        "Headphones.csv": 9521,
        "Speakers.csv": 9578,
        "Camera_Accessories.csv": 9526,
        "All_Electronics.csv": 7531,
    }
    assert found.generated
    assert found.attributes
    assert (found.attributes.n_items, found.attributes.n_attributes) == (1918, 193)
    split = split_leave_one_out(made)
    counts = np.bincount(split.train_items, minlength=split.n_items).astype(float)
    popular = evaluate(lambda users: np.tile(counts, (users.size, 1)), split, seed=1)
    assert 0.3 < popular.hr10 < 0.6


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["amazon-beauty", "amazon-reviews-2023"])
def test_real_files_are_found_by_name(data_dir: Path, name: str) -> None:
    found = read_dataset(name, data_dir)
    assert found.interactions.name == name
    assert found.generated is None
    assert found.attributes
    assert found.attributes.n_items == found.interactions.n_items
