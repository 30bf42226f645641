"""Sequence files as S3-Rec publishes them: ``user item item ...`` a line, in time order.

Beside them lies a JSON object from item to attribute ids. Amazon Beauty comes this way.
Zhou et al., "S3-Rec: Self-Supervised Learning for Sequential Recommendation", CIKM 2020.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from secagg_recommender.attributes import ItemAttributes, attributes_of
from secagg_recommender.interactions import DataError, Interactions, from_events
from secagg_recommender.reading import Rows, Tally, is_broken, read_lines

__all__ = ["Sequences", "load_sequences"]

# S3-Rec pads with 0, so that no item and no user has this number; int32 holds all others.
_ID: Final = re.compile(r"0*[1-9][0-9]{0,8}")
_GAPS: Final = re.compile(r"[ \t]+")


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """Interactions, the attributes of their items if a file of them was given, and the reports.

    ``rows`` counts sequences (lines), then items in the kept ones, then items of the attribute
    file.
    """

    interactions: Interactions
    attributes: ItemAttributes | None
    rows: tuple[Rows, ...]


def load_sequences(
    file: Path | str, attributes: Path | str | None = None, *, name: str = "sequences"
) -> Sequences:
    """Load a sequence file and, if given, its ``..._item2attributes.json``.

    A line is dropped whole, so that no transition is made up, as ``blank``, ``encoding``,
    ``bad_id`` (something in it is no whole number from 1 to 999 999 999), ``no_items`` (a user
    alone) or ``repeated_user`` (a second line of one user; the first one stays). Of an item
    that repeats inside a sequence the latest place is kept, the others are ``repeated_item``.

    Attributes must be a JSON object from item ids to lists of whole numbers. Its entries are
    dropped as ``bad_id``, ``bad_attributes`` (no such list; the item has none then),
    ``repeated_item`` (the first stays) or ``not_interacted`` (an item of no sequence). Items of
    the sequences that the file does not name have no attributes: ``attributes.n_without`` of them.

    Raises:
        DataError: a file is missing, empty, damaged or another kind, or no row can be used.
    """
    file = Path(file)
    lines, events = Tally(f"sequences in {file.name}"), Tally(f"items in {file.name}")
    users, items = _events(file, lines, events)
    line_rows = lines.rows()
    made = from_events(
        name,
        users,
        items,
        np.arange(users.size),
        tie_rule="none: a sequence is in time order",
    )
    events.drop("repeated_item", users.size - made.users.size)
    rows = (line_rows, events.rows())
    if attributes is None:
        return Sequences(made, None, rows)
    found, attribute_rows = _load_attributes(Path(attributes), made)
    return Sequences(made, found, (*rows, attribute_rows))


def _events(
    file: Path, lines: Tally, events: Tally
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Users and items, one row an event, in time order."""
    sequences: dict[int, list[int]] = {}
    for line in read_lines(file, lines):
        lines.read()
        cells = _GAPS.split(line.strip(" \t\r\n"))
        reason = _fault(line, cells)
        if reason is None and int(cells[0]) in sequences:
            reason = "repeated_user"
        if reason is not None:
            lines.drop(reason)
            continue
        sequences[int(cells[0])] = [int(cell) for cell in cells[1:]]
        events.read(len(cells) - 1)
    counts = [len(sequence) for sequence in sequences.values()]
    return (
        np.repeat(np.asarray(list(sequences), dtype=np.int64), counts),
        np.asarray([item for own in sequences.values() for item in own], dtype=np.int64),
    )


def _fault(line: str, cells: list[str]) -> str | None:
    """Why a line cannot be used."""
    if cells == [""]:
        return "blank"
    if is_broken(line):
        return "encoding"
    if not all(_ID.fullmatch(cell) for cell in cells):
        return "bad_id"
    return "no_items" if len(cells) == 1 else None


def _load_attributes(file: Path, interactions: Interactions) -> tuple[ItemAttributes, Rows]:
    """Attributes of the items of ``interactions``."""
    tally = Tally(f"items with attributes in {file.name}")
    place = {label: item for item, label in enumerate(interactions.item_labels)}
    names: list[list[str]] = [[] for _ in place]
    seen: set[str] = set()
    for key, value in _pairs(file, tally):
        tally.read()
        label = str(int(key)) if _ID.fullmatch(key) else ""
        reason = _attribute_fault(label, value, place.keys(), seen)
        if reason is not None:
            tally.drop(reason)
            continue
        seen.add(label)
        names[place[label]] = [f"attribute: {one}" for one in value]
    return attributes_of(names), tally.rows()


def _attribute_fault(
    label: str, value: object, known: Collection[str], seen: Collection[str]
) -> str | None:
    """Why an entry of the attribute file cannot be used."""
    if not label:
        return "bad_id"
    if label not in known:
        return "not_interacted"
    if label in seen:
        return "repeated_item"
    if not isinstance(value, list) or not all(type(one) is int and one >= 0 for one in value):
        return "bad_attributes"
    return None


class _Pairs(tuple[tuple[str, Any], ...]):
    """A JSON object as it was written, repeated keys included."""


def _pairs(file: Path, tally: Tally) -> _Pairs:
    """The entries of a file that is one JSON object."""
    text = "".join(read_lines(file, tally))
    try:
        found = json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"expected one JSON object, got something else in file={file}: {error}; fetch it again"
        ) from error
    if not isinstance(found, _Pairs):
        raise DataError(
            f"expected a JSON object from items to attributes, got a {type(found).__name__} in "
            f"file={file}; check that this is the attribute file"
        )
    return found
