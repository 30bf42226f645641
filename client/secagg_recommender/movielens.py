"""MovieLens 100K: from ``ratings.csv``, from RecBole's files, or from a wheel of the package index.

This module must never reach the network by itself: only :func:`fetch_movielens` does, and only
when somebody calls it.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from secagg_recommender.interactions import DataError, Interactions, from_events

__all__ = ["fetch_movielens", "load_movielens"]

_CSV_NAME: Final = "ratings.csv"
_CSV_TITLES: Final = "recbole_ml-100k.item.tsv"
_INTER_NAME: Final = "ml-100k.inter"
_EVENT_COLUMNS: Final = ("user_id", "item_id", "rating", "timestamp")
_WHEEL: Final = "recbole==1.2.1"
_WHEEL_FOLDER: Final = "recbole/dataset_example/ml-100k"
# The wheel comes over the network, so what we unpack from it is pinned byte for byte.
_WHEEL_FILES: Final[Mapping[str, str]] = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
}
# Larger integers are not exact in the float64 that the parser goes through.
_MAX_ID: Final = 2**53


def load_movielens(path: Path | str) -> Interactions:
    """Load MovieLens 100K from a folder or one file; every rating counts as a positive.

    Formats: ``ratings.csv`` (``user,item,rating,timestamp``, no header, titles from
    ``recbole_ml-100k.item.tsv`` beside it) and RecBole's ``ml-100k.inter`` (tab separated, header
    such as ``user_id:token``, titles from the ``.item`` file beside it). A folder is searched in
    that order. Both hold the same rows in different orders, so tied timestamps resolve
    differently and so do the test items of hundreds of users: ``tie_rule`` of the result names
    the file that decided. Ratings are read as implicit feedback whatever their value, as the
    reference numbers do; missing titles become ``Item <id>``.

    Raises:
        DataError: no such file, unknown format, missing columns, no rows, or an id, rating or
            timestamp that is not a number.
    """
    file = _movielens_file(Path(path))
    if file.suffix == ".inter":
        events = _events_of(file, _read_table(file, sep="\t", header=0), first_line=2)
        title_file = file.with_suffix(".item")
    else:
        events = _events_of(file, _read_table(file, sep=",", header=None), first_line=1)
        title_file = file.with_name(_CSV_TITLES)
    return from_events(
        "ml-100k",
        events["user_id"],
        events["item_id"],
        events["timestamp"],
        titles=_titles_of(title_file) if title_file.is_file() else None,
        tie_rule=f"equal timestamps: the earlier row of {file.name} counts as the later event",
    )


def fetch_movielens(cache_dir: Path | str, *, timeout_s: float = 120.0) -> Path:
    """Download MovieLens 100K into ``cache_dir`` once; return a folder for load_movielens().

    The data comes out of the wheel ``recbole==1.2.1`` on the Python package index, fetched by the
    ordinary ``pip`` in a subprocess, without dependencies and without installing or running any
    of it; the files taken from it are pinned by SHA-256. GroupLens licenses the data for research
    and forbids redistribution: keep the cache out of anything you publish. Rows are in another
    order than in ``ratings.csv``: see :func:`load_movielens` on ties.

    Raises:
        DataError: pip failed or took longer than ``timeout_s``, or the wheel does not hold the
            expected bytes.
    """
    folder = Path(cache_dir) / "ml-100k"
    if all(_has_digest(folder / name, digest) for name, digest in _WHEEL_FILES.items()):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        wheel = _download_wheel(Path(scratch), timeout_s)
        contents = {name: _member(wheel, name) for name in _WHEEL_FILES}
    for name, content in contents.items():
        partial = folder / f"{name}.partial"
        partial.write_bytes(content)
        partial.replace(folder / name)
    return folder


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


def _events_of(file: Path, table: pd.DataFrame, *, first_line: int) -> pd.DataFrame:
    """Named numeric event columns of a text table."""
    if table.columns.dtype != np.int64:
        # RecBole writes the type behind the name: user_id:token.
        table = table.rename(columns=lambda column: str(column).split(":")[0])
    elif table.shape[1] == len(_EVENT_COLUMNS):
        table.columns = pd.Index(_EVENT_COLUMNS)
    missing = [column for column in _EVENT_COLUMNS if column not in table.columns]
    if missing:
        raise DataError(
            f"expected columns {', '.join(_EVENT_COLUMNS)}, got columns={table.shape[1]} in "
            f"file={file}, missing={', '.join(missing)}; check the separator and the format"
        )
    if table.empty:
        raise DataError(f"expected at least one row, got rows=0 in file={file}; restore the file")
    return pd.DataFrame(
        {column: _numbers(file, table[column], column, first_line) for column in _EVENT_COLUMNS}
    )


def _numbers(
    file: Path, cells: pd.Series[str], column: str, first_line: int
) -> npt.NDArray[np.float64] | npt.NDArray[np.int64]:
    """One column as numbers: int64 for ids, float64 otherwise; quotes the first bad cell."""
    values = pd.to_numeric(cells, errors="coerce").to_numpy(dtype=np.float64)
    is_id = column.endswith("_id")
    good = np.isfinite(values)
    if is_id:
        with np.errstate(invalid="ignore"):
            good &= (values == np.floor(values)) & (np.abs(values) < _MAX_ID)
    if not good.all():
        row = int(np.argmin(good))
        raise DataError(
            f"expected {'an integer' if is_id else 'a number'} as {column}, got "
            f"{str(cells.iloc[row])[:40]!r} in line={row + first_line} of file={file}; "
            "repair or remove that line (no header line in a .csv)"
        )
    return values.astype(np.int64) if is_id else values


def _titles_of(file: Path) -> dict[int, str]:
    """Item id → title with year, from RecBole's item table; rows without a title are left out."""
    table = _read_table(file, sep="\t", header=0)
    table = table.rename(columns=lambda column: str(column).split(":")[0])
    if not {"item_id", "movie_title"} <= set(table.columns):
        raise DataError(
            f"expected columns item_id and movie_title, got {', '.join(table.columns)} in "
            f"file={file}; repair the file, or remove it to go without titles"
        )
    ids = _numbers(file, table["item_id"], "item_id", 2)
    years: Sequence[str] = table.get("release_year", pd.Series([""] * len(table))).tolist()
    rows = zip(ids.tolist(), table["movie_title"].tolist(), years, strict=True)
    return {
        int(item): f"{title} ({year})" if year.strip() else title
        for item, title, year in rows
        if title.strip()
    }


def _has_digest(file: Path, digest: str) -> bool:
    """Whether the file exists and has this SHA-256."""
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == digest


def _download_wheel(folder: Path, timeout_s: float) -> Path:
    """Let pip put the wheel into ``folder``."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder), _WHEEL]
    advice = "check the network, or put ratings.csv or ml-100k.inter into a folder and pass that"
    try:
        done = subprocess.run(  # noqa: S603 - fixed arguments, no shell
            command, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(
            f"expected pip to fetch {_WHEEL}, got no answer in timeout_s={timeout_s}; {advice}"
        ) from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = done.stderr.strip().splitlines()
        raise DataError(
            f"expected pip to fetch {_WHEEL}, got exit={done.returncode}: "
            f"{lines[-1] if lines else 'no message'}; {advice}"
        )
    return wheels[0]


def _member(wheel: Path, name: str) -> bytes:
    """One pinned file out of the wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(f"{_WHEEL_FOLDER}/{name}")
    except (KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"expected {name} in {wheel.name}, got {error}; clear pip's cache and fetch again"
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != _WHEEL_FILES[name]:
        raise DataError(
            f"expected {name} with SHA-256 {_WHEEL_FILES[name]}, got sha256={digest}; do not use "
            "this file: clear pip's cache and fetch again from a trusted index"
        )
    return content
