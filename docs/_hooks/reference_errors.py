"""The page of errors: the table of docs/errors.md, as one entry for each reason."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from reference_text import table

import secagg_recommender.interactions  # noqa: F401 - adds its error to the tree
from secagg.errors import SecaggError, by_reason

__all__ = ["errors_page", "rows"]

_ROW = re.compile(r"^\| (\w+) \| (\w+) \| (\w+) \| (\d+) \| (.+) \| (.+) \|$", re.MULTILINE)
_TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)


class Row(NamedTuple):
    """One row of the table, as it is written there."""

    name: str
    reason: str
    status: str
    exit_code: str
    meaning: str
    remedy: str


def rows(markdown: str) -> Iterator[Row]:
    """The table's rows."""
    return (Row(*match.groups()) for match in _ROW.finditer(markdown))


def errors_page(markdown: str) -> str:
    """The page with an entry, and an anchor, for each reason in the place of the wide table."""
    found = list(rows(markdown))
    return _TABLE.sub(lambda _: _entries(found), markdown, count=1)


def _entries(found: list[Row]) -> str:
    by_code: dict[str, list[str]] = defaultdict(list)
    for row in found:
        by_code[row.exit_code].append(f"[`{row.reason}`](#{row.reason})")
    codes = table(
        ("exit code", "reasons"),
        [(code, ", ".join(reasons)) for code, reasons in sorted(by_code.items())],
    )
    return f"## By exit code\n\n{codes}\n## By reason\n\n" + "\n".join(_entry(row) for row in found)


def _entry(row: Row) -> str:
    kind = by_reason(row.reason)
    parent = kind.__bases__[0]
    above = (
        f" · a kind of [`{parent.reason}`](#{parent.reason})"
        if issubclass(parent, SecaggError) and parent is not SecaggError
        else ""
    )
    return (
        f"### `{row.reason}` {{ #{row.reason} }}\n\n"
        f"[`{row.name}`][{kind.__module__}.{row.name}] · exit code {row.exit_code} · "
        f"gRPC `{row.status}`{above}\n\n"
        f"**Meaning.** {_sentence(row.meaning)}\n\n"
        f"**What to do.** {_sentence(row.remedy)}\n"
    )


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
