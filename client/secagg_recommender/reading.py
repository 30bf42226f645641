"""What every loader has in common: lines of text out of dirty files, and what became of each row.

Real files hold broken rows. A loader drops what cannot be used and counts it under a reason, so
that nothing is lost silently: rows read = rows kept + rows dropped, always. Read `sequences`,
`reviews` or `catalogue` next.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Final

import numpy as np
import numpy.typing as npt

from secagg_recommender.interactions import DataError, Interactions, from_events

__all__ = ["Rows", "Tally", "interactions_of", "is_broken", "read_lines"]

LONGEST_LINE: Final = 1 << 24
"""Bytes of the longest line that is taken for text."""
_MARKS: Final[Mapping[bytes, str]] = {
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"PK\x03\x04": "a ZIP archive (or a spreadsheet)",
    b"PAR1": "Parquet",
    b"%PDF": "PDF",
    b"SQLite format 3": "an SQLite database",
}
_GZIP: Final = b"\x1f\x8b"
_UTF8_MARK: Final = b"\xef\xbb\xbf"
_SURROGATE: Final = re.compile("[\ud800-\udfff]")

_Places = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Rows:
    """What became of the rows of one file.

    ``what`` names the rows, ``dropped`` and ``noted`` count them by a short stable reason. A
    noted row is kept although something in it is missing or was repaired; it may have several
    notes.

    Raises:
        DataError: ``read`` is not ``kept`` plus all that was dropped, or a count is negative.
    """

    what: str
    read: int
    kept: int
    dropped: Mapping[str, int]
    noted: Mapping[str, int]

    def __post_init__(self) -> None:
        lost = sum(self.dropped.values())
        if self.read != self.kept + lost or min(self.kept, *self.dropped.values(), 0) < 0:
            raise DataError(
                f"expected read = kept + dropped, got read={self.read} kept={self.kept} "
                f"dropped={lost} of {self.what}; count every row once"
            )

    def lines(self) -> list[tuple[str, str, int]]:
        """What became of how many rows, and why: ``("dropped", "duplicate", 3)``."""
        return [
            ("read", "", self.read),
            ("kept", "", self.kept),
            *(("dropped", reason, count) for reason, count in self.dropped.items()),
            *(("kept, noted", reason, count) for reason, count in self.noted.items()),
        ]

    def __str__(self) -> str:
        """A small table."""
        width = max(len(reason) for _, reason, _ in self.lines())
        cells = (f"  {what:<11}  {why:<{width}}  {count:>9}" for what, why, count in self.lines())
        return "\n".join((self.what, *cells))


class Tally:
    """Counts the rows of one file while they are read."""

    def __init__(self, what: str) -> None:
        """Start at nothing; ``what`` names the rows, such as ``"reviews in a.jsonl"``."""
        self._what, self._read = what, 0
        self._dropped: Counter[str] = Counter()
        self._noted: Counter[str] = Counter()

    def read(self, count: int = 1) -> None:
        """Rows that were there."""
        self._read += count

    def drop(self, reason: str, count: int = 1) -> None:
        """Rows that cannot be used."""
        self._dropped[reason] += count

    def note(self, reason: str, count: int = 1) -> None:
        """Rows that are used with something missing or repaired."""
        self._noted[reason] += count

    def rows(self) -> Rows:
        """The report; reasons that did not occur are left out, the most frequent comes first.

        Raises:
            DataError: no row was kept; says what became of them.
        """
        dropped = {reason: count for reason, count in self._dropped.most_common() if count}
        noted = {reason: count for reason, count in self._noted.most_common() if count}
        rows = Rows(self._what, self._read, self._read - sum(dropped.values()), dropped, noted)
        if rows.kept == 0:
            reasons = ", ".join(f"{reason}={count}" for reason, count in dropped.items())
            raise DataError(
                f"expected {self._what}, got none that can be used: read={rows.read} "
                f"{reasons}".rstrip()
                + "; check that this is the right file, and complete"
            )
        return rows


def read_lines(path: Path | str, tally: Tally) -> Iterator[str]:
    """The lines of a text file, ends of line included, one at a time.

    UTF-8, with or without a byte order mark; a line that is no UTF-8 is read as Windows-1252, the
    customary other encoding, and noted as ``cp1252``. Bytes that mean nothing there either become
    lone surrogates: see :func:`is_broken`. Lines end with LF or CRLF. A ``.gz`` is unpacked as it
    is read.

    Raises:
        DataError: no such file, an empty one, one that is no text, or a damaged archive.
    """
    path = Path(path)
    with _opened(path) as file:
        try:
            yield from _decoded(path, file, tally)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(
                f"expected a complete gzip archive, got file={path}: {error}; fetch it again"
            ) from error
        except OSError as error:
            raise DataError(
                f"expected a file that can be read, got file={path}: {error.strerror}; check it"
            ) from error


def is_broken(text: str) -> bool:
    """Whether text holds bytes that could not be decoded; such a row is dropped: ``encoding``."""
    return _SURROGATE.search(text) is not None


def interactions_of(
    name: str,
    users: Sequence[str],
    items: Sequence[str],
    events: tuple[_Places, _Places, _Places],
    titles: Mapping[str, str],
) -> Interactions:
    """Interactions of users and items whose ids are text.

    ``events`` holds places in ``users``, places in ``items``, and times, each int64 of one length.
    Users and items without an event are left out, the others are in the order of their ids.

    Raises:
        DataError: no event.
    """
    user_order, item_order = _order(users), _order(items)
    made = from_events(
        name, np.argsort(user_order)[events[0]], np.argsort(item_order)[events[1]], events[2]
    )
    item_labels = tuple(items[item_order[int(rank)]] for rank in made.item_labels)
    return replace(
        made,
        user_labels=tuple(users[user_order[int(rank)]] for rank in made.user_labels),
        item_labels=item_labels,
        item_titles=tuple(titles.get(label) or f"Item {label}" for label in item_labels),
    )


def _order(ids: Sequence[str]) -> _Places:
    """Places of the ids in ascending order."""
    return np.argsort(np.asarray(ids, dtype=object), kind="stable").astype(np.int64)


def _opened(path: Path) -> IO[bytes]:
    """The file, unpacked if it is a gzip archive."""
    try:
        if not path.is_file():
            raise DataError(f"expected a file, got path={path}, which is none; check the path")
        with path.open("rb") as file:
            head = file.read(16)
        if head.startswith(_GZIP):
            return gzip.open(path, "rb")  # type: ignore[return-value]
        return path.open("rb")
    except OSError as error:
        raise DataError(
            f"expected a file that can be read, got path={path}: {error.strerror}; check it"
        ) from error


def _decoded(path: Path, file: IO[bytes], tally: Tally) -> Iterator[str]:
    """Lines as text."""
    first = file.readline(LONGEST_LINE)
    for mark, kind in _MARKS.items():
        if first.startswith(mark):
            raise DataError(f"expected UTF-8 text, got {kind} in file={path}; convert it to text")
    line = first.removeprefix(_UTF8_MARK)
    if not line.strip() and not first.endswith(b"\n"):
        raise DataError(f"expected text, got an empty file={path}; restore the file")
    while line:
        try:
            yield line.decode()
        except UnicodeDecodeError:
            tally.note("cp1252")
            yield _windows(line)
        line = file.readline(LONGEST_LINE)


def _windows(line: bytes) -> str:
    """Windows-1252; each of the five bytes that mean nothing there becomes a lone surrogate."""
    return line.decode("cp1252", errors="surrogateescape")
