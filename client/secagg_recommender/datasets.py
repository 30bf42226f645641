"""The data sets by name, for settings and command lines.

Each is a folder under the data folder, of the same name, that holds its publisher's files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from secagg_recommender.attributes import ItemAttributes
from secagg_recommender.catalogue import load_catalogue
from secagg_recommender.interactions import DataError, Interactions
from secagg_recommender.marketplace import generate_marketplace
from secagg_recommender.movielens import read_movielens
from secagg_recommender.reading import Rows
from secagg_recommender.reviews import load_reviews
from secagg_recommender.sequences import load_sequences
from secagg_recommender.shoppers import GENERATED, KINDS, generate_shoppers

__all__ = [
    "Dataset",
    "DatasetName",
    "catalogue_files",
    "dataset_folder",
    "load_dataset",
    "read_dataset",
]

DatasetName = Literal[
    "ml-100k", "marketplace", "amazon-beauty", "amazon-reviews-2023", "amazon-products-2023"
]

_SEQUENCES: Final = "s3rec_Beauty.txt"
_SEQUENCE_ATTRIBUTES: Final = "s3rec_Beauty_item2attributes.json"
# The finest categories first, because the first row of a product is the one that stays.
_PRODUCTS: Final = (
    "kaggle_amazon_sales.csv",
    "Headphones.csv",
    "Speakers.csv",
    "Camera_Accessories.csv",
    "All_Electronics.csv",
)
_FETCH: Final = "fetch_movielens(cache_dir)"


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Interactions and all that is known about them.

    ``rows`` reports each file that was read. ``attributes`` are those of the items, if there are
    any. ``kinds`` int64 ``(n_users,)`` says which of ``kind_names`` drives each user, where that is
    known. ``generated`` says in words what was made up, None where nothing was.
    """

    interactions: Interactions
    rows: tuple[Rows, ...] = ()
    attributes: ItemAttributes | None = None
    kinds: npt.NDArray[np.int64] | None = None
    kind_names: tuple[str, ...] = ()
    generated: str | None = None


def load_dataset(source: str, data_dir: Path | str | None = None) -> Interactions:
    """The interactions alone: see :func:`read_dataset`."""
    return read_dataset(source, data_dir).interactions


def read_dataset(source: str, data_dir: Path | str | None = None) -> Dataset:
    """Load a data set by its name, one of ``DatasetName``.

    ``"marketplace"`` is generated and needs no files; the shoppers of ``"amazon-products-2023"``
    are generated too, for a real catalogue. All others are read from ``data_dir``: the data set's
    own folder, or a folder that holds it under its name. Nothing is downloaded: for MovieLens see
    :func:`~secagg_recommender.movielens_wheel.fetch_movielens`. Of several pairs of reviews and
    metadata the one with the largest reviews is read.

    Raises:
        DataError: unknown name, no folder given where one is needed, or unusable files.
    """
    if source not in get_args(DatasetName):
        names = ", ".join(repr(name) for name in get_args(DatasetName))
        raise DataError(f"expected source to be one of {names}, got {source=}; pick one of them")
    if source == "marketplace":
        return Dataset(generate_marketplace(), generated="products, shoppers and purchases")
    folder = dataset_folder(source, data_dir)
    if source == "ml-100k":
        films = read_movielens(folder)
        return Dataset(films.interactions, films.rows, films.attributes)
    if source == "amazon-beauty":
        return _beauty(folder)
    if source == "amazon-reviews-2023":
        return _reviews(folder)
    return _products(folder)


def dataset_folder(source: str, data_dir: Path | str | None) -> Path:
    """The folder of a data set: ``data_dir`` itself, or the one of that name inside it.

    Raises:
        DataError: no folder given.
    """
    if data_dir is None:
        advice = f", or call {_FETCH} and pass what it returns" if source == "ml-100k" else ""
        raise DataError(f"expected a folder with {source}, got data_dir=None; pass one{advice}")
    nested = Path(data_dir) / source
    return nested if nested.is_dir() else Path(data_dir)


def catalogue_files(folder: Path) -> list[Path]:
    """The known product CSVs in a folder, those with the finest categories first.

    Raises:
        DataError: there is none.
    """
    files = [folder / name for name in _PRODUCTS if (folder / name).is_file()]
    if not files:
        raise DataError(
            f"expected one or more of {', '.join(_PRODUCTS)}, got none in path={folder}; pass the "
            "folder that holds them"
        )
    return files


def _beauty(folder: Path) -> Dataset:
    """Amazon Beauty, with attributes if their file is there."""
    attributes = folder / _SEQUENCE_ATTRIBUTES
    found = load_sequences(
        folder / _SEQUENCES, attributes if attributes.is_file() else None, name="amazon-beauty"
    )
    return Dataset(found.interactions, found.rows, found.attributes)


def _reviews(folder: Path) -> Dataset:
    """The largest reviews file of the folder with its metadata."""
    files = [*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")]
    pairs = [(file, _metadata_of(file)) for file in files]
    whole = [(file, meta) for file, meta in pairs if meta is not None and meta.is_file()]
    if not whole:
        raise DataError(
            "expected reviews and metadata, such as All_Beauty.jsonl and meta_All_Beauty.jsonl, or "
            f"x_reviews.jsonl and x_meta.jsonl, got no pair in path={folder}; check the folder"
        )
    file, meta = max(whole, key=lambda pair: (pair[0].stat().st_size, pair[0].name))
    found = load_reviews(file, meta)
    return Dataset(found.interactions, found.rows, found.attributes)


def _metadata_of(reviews: Path) -> Path | None:
    """Where the metadata of a file of reviews would be; None if it is no such file."""
    name = reviews.name
    if "reviews" in name:
        return reviews.with_name(name.replace("reviews", "meta"))
    return None if name.startswith("meta_") else reviews.with_name(f"meta_{name}")


def _products(folder: Path) -> Dataset:
    """Shoppers for the product catalogue."""
    catalogue = load_catalogue(*catalogue_files(folder))
    made = generate_shoppers(catalogue)
    return Dataset(made.interactions, catalogue.rows, made.attributes, made.kinds, KINDS, GENERATED)
