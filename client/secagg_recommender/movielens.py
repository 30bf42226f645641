"""MovieLens 100K: from ``ratings.csv`` or from RecBole's files.

A curated data set: a row that is no rating is an error here, not dirt to be counted. Nothing is
downloaded: `movielens_wheel` does that, when somebody calls it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from secagg_recommender.attributes import ItemAttributes, attributes_of
from secagg_recommender.interactions import DataError, Interactions, from_events
from secagg_recommender.reading import Rows, Tally

__all__ = [
    "Demographics",
    "MovieLens",
    "load_movielens",
    "load_movielens_users",
    "read_movielens",
]

_CSV_NAME: Final = "ratings.csv"
_CSV_ITEMS: Final = "recbole_ml-100k.item.tsv"
_USER_FILES: Final = ("recbole_ml-100k.user.tsv", "ml-100k.user")
_INTER_NAME: Final = "ml-100k.inter"
_EVENT_COLUMNS: Final = ("user_id", "item_id", "rating", "timestamp")
# Larger integers are not exact in the float64 that the parser goes through.
_MAX_ID: Final = 2**53


@dataclass(frozen=True, slots=True)
class Demographics:
    """What a user said of themselves: age in years, ``"F"`` or ``"M"``, occupation."""

    age: int
    gender: str
    occupation: str


@dataclass(frozen=True, slots=True, eq=False)
class MovieLens:
    """Interactions, genre and decade of the films if their table is there, and the report."""

    interactions: Interactions
    attributes: ItemAttributes | None
    rows: tuple[Rows, ...]


def load_movielens(path: Path | str) -> Interactions:
    """The interactions alone: see :func:`read_movielens`."""
    return read_movielens(path).interactions


def read_movielens(path: Path | str) -> MovieLens:
    """Load MovieLens 100K from a folder or one file; every rating counts as a positive.

    Formats: ``ratings.csv`` (``user,item,rating,timestamp``, no header, titles and genres from
    ``recbole_ml-100k.item.tsv`` beside it) and RecBole's ``ml-100k.inter`` (tab separated, header
    such as ``user_id:token``, titles and genres from the ``.item`` file beside it). A folder is
    searched in that order. Both hold the same rows in different orders, so tied timestamps resolve
    differently and so do the test items of hundreds of users: ``tie_rule`` of the result names
    the file that decided. Ratings are read as implicit feedback whatever their value, as the
    reference numbers do; missing titles become ``Item <id>``. An older rating of the same user and
    item is dropped as ``duplicate``.

    Raises:
        DataError: no such file, unknown format, missing columns, no rows, or an id, rating or
            timestamp that is not a number.
    """
    file = _movielens_file(Path(path))
    if file.suffix == ".inter":
        events = _events_of(file, _read_table(file, sep="\t", header=0), first_line=2)
        item_file = file.with_suffix(".item")
    else:
        events = _events_of(file, _read_table(file, sep=",", header=None), first_line=1)
        item_file = file.with_name(_CSV_ITEMS)
    films = _named_table(item_file) if item_file.is_file() else None
    made = from_events(
        "ml-100k",
        events["user_id"],
        events["item_id"],
        events["timestamp"],
        titles=None if films is None else _titles_of(item_file, films),
        tie_rule=f"equal timestamps: the earlier row of {file.name} counts as the later event",
    )
    tally = Tally(f"ratings in {file.name}")
    tally.read(len(events))
    tally.drop("duplicate", len(events) - made.users.size)
    attributes = None if films is None else _attributes_of(films, made)
    return MovieLens(made, attributes, (tally.rows(),))


def load_movielens_users(path: Path | str) -> dict[str, Demographics]:
    """Age, gender and occupation by user label, from RecBole's user table.

    ``path`` is the table or the folder that holds it as ``recbole_ml-100k.user.tsv`` or
    ``ml-100k.user``.

    Raises:
        DataError: no table, missing columns, or an id or an age that is not a whole number.
    """
    path = Path(path)
    places = [path / name for name in _USER_FILES] if path.is_dir() else [path]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise DataError(
            f"expected {' or '.join(_USER_FILES)}, got none in path={path}; pass the folder that "
            "holds one"
        )
    table = _named_table(file)
    _require(file, table, ("user_id", "age", "gender", "occupation"))
    ids, ages = (_numbers(file, table[column], column, 2) for column in ("user_id", "age"))
    rows = zip(ids, ages, table["gender"], table["occupation"], strict=True)
    return {
        str(user): Demographics(int(age), gender.strip(), occupation.strip())
        for user, age, gender, occupation in rows
    }


def _movielens_file(path: Path) -> Path:
    """The ratings file that ``path`` means."""
    if path.is_dir():
        for name in (_CSV_NAME, _INTER_NAME):
            if (path / name).is_file():
                return path / name
        raise DataError(
            f"expected {_CSV_NAME} or {_INTER_NAME} in the folder, got neither in path={path}; "
            "pass the folder that holds one, or call fetch_movielens(cache_dir)"
        )
    if not path.is_file():
        raise DataError(
            f"expected a MovieLens folder or file, got path={path}, which does not exist; "
            "check the path, or call fetch_movielens(cache_dir)"
        )
    if path.suffix not in {".csv", ".inter"}:
        raise DataError(
            f"expected a .csv or .inter file, got path={path}; convert it to one of these formats"
        )
    return path


def _read_table(file: Path, *, sep: str, header: int | None) -> pd.DataFrame:
    """Read a file as text cells, unparsed, so that errors can quote what the file says."""
    try:
        return pd.read_csv(
            file,
            sep=sep,
            header=header,
            dtype=str,
            keep_default_na=False,
            quoting=3,  # csv.QUOTE_NONE: a stray quote in a title must not swallow rows.
            skip_blank_lines=False,
        )
    except pd.errors.EmptyDataError as error:
        raise DataError(
            f"expected at least one row, got an empty file={file}; restore the file"
        ) from error
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise DataError(
            f"expected a UTF-8 table with the same number of columns in every row, got "
            f"file={file}: {error}; repair or replace the file"
        ) from error


def _named_table(file: Path) -> pd.DataFrame:
    """A table of RecBole's, which writes the type behind a column's name: ``user_id:token``."""
    return _untyped(file, _read_table(file, sep="\t", header=0))


def _untyped(file: Path, table: pd.DataFrame) -> pd.DataFrame:
    """The table with the bare names of its columns, each of which must be there once."""
    table = table.rename(columns=lambda column: str(column).split(":")[0])
    if not table.columns.is_unique:
        raise DataError(
            f"expected every column once, got a repeated one in the header of file={file}; repair "
            "or replace the file"
        )
    return table


def _require(file: Path, table: pd.DataFrame, columns: Sequence[str]) -> None:
    """Refuse a table without the columns that are asked of it."""
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise DataError(
            f"expected columns {', '.join(columns)}, got columns={table.shape[1]} in "
            f"file={file}, missing={', '.join(missing)}; check the separator and the format"
        )


def _events_of(file: Path, table: pd.DataFrame, *, first_line: int) -> pd.DataFrame:
    """Named numeric event columns of a text table."""
    if table.columns.dtype != np.int64:
        table = _untyped(file, table)
    elif table.shape[1] == len(_EVENT_COLUMNS):
        table.columns = pd.Index(_EVENT_COLUMNS)
    _require(file, table, _EVENT_COLUMNS)
    if table.empty:
        raise DataError(f"expected at least one row, got rows=0 in file={file}; restore the file")
    return pd.DataFrame(
        {column: _numbers(file, table[column], column, first_line) for column in _EVENT_COLUMNS}
    )


def _numbers(
    file: Path, cells: pd.Series[str], column: str, first_line: int
) -> npt.NDArray[np.float64] | npt.NDArray[np.int64]:
    """One column as numbers: int64 for ids and ages, float64 otherwise; quotes a bad cell."""
    values = pd.to_numeric(cells, errors="coerce").to_numpy(dtype=np.float64)
    is_whole = column == "age" or column.endswith("_id")
    good = np.isfinite(values)
    if is_whole:
        with np.errstate(invalid="ignore"):
            good &= (values == np.floor(values)) & (np.abs(values) < _MAX_ID)
    if not good.all():
        row = int(np.argmin(good))
        raise DataError(
            f"expected {'an integer' if is_whole else 'a number'} as {column}, got "
            f"{str(cells.iloc[row])[:40]!r} in line={row + first_line} of file={file}; "
            "repair or remove that line (no header line in a .csv)"
        )
    return values.astype(np.int64) if is_whole else values


def _titles_of(file: Path, films: pd.DataFrame) -> dict[int, str]:
    """Item id → title with year, from RecBole's item table; rows without a title are left out."""
    if not {"item_id", "movie_title"} <= set(films.columns):
        raise DataError(
            f"expected columns item_id and movie_title, got {', '.join(films.columns)} in "
            f"file={file}; repair the file, or remove it to go without titles"
        )
    ids = _numbers(file, films["item_id"], "item_id", 2)
    columns = (ids.tolist(), films["movie_title"].tolist(), _cells(films, "release_year"))
    return {
        int(item): f"{title} ({year})" if year.strip() else title
        for item, title, year in zip(*columns, strict=True)
        if title.strip()
    }


def _cells(films: pd.DataFrame, column: str) -> list[str]:
    """A column that may be missing."""
    found: list[str] = films.get(column, pd.Series([""] * len(films))).tolist()
    return found


def _attributes_of(films: pd.DataFrame, interactions: Interactions) -> ItemAttributes:
    """Genres, separated by blanks in the table, and decade of release."""
    names: dict[str, list[str]] = {}
    columns = (films["item_id"], _cells(films, "class"), _cells(films, "release_year"))
    for item, genres, year in zip(*columns, strict=True):
        names[str(int(float(item)))] = [f"genre: {genre}" for genre in genres.split()]
        if re.fullmatch("[12][0-9]{3}", year.strip()):
            names[str(int(float(item)))].append(f"decade: {year.strip()[:3]}0s")
    return attributes_of([names.get(label, []) for label in interactions.item_labels])
