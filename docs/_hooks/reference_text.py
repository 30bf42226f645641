"""Markdown as the generated pages of the reference need it."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

__all__ = ["anchored", "code", "plain", "table"]


def plain(text: str) -> str:
    """Text of the code, in which backticks and options are markup and no other sign is."""
    parts = re.split(r"(`[^`]+`|(?<!\S)--[a-z][a-z-]+)", " ".join(text.split()))
    return "".join(
        code(part.strip("`")) if number % 2 else _escaped(part) for number, part in enumerate(parts)
    )


def code(text: object) -> str:
    """Text as code; nothing for nothing."""
    if text in (None, ""):
        return ""
    return f"<code>{html.escape(str(text), quote=False).replace('|', '&#124;')}</code>"


def anchored(identifier: str, text: str) -> str:
    """Something that can be linked to."""
    return f'<span id="{identifier}" class="names">{text}</span>'


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, or nothing where there are no rows; cells are Markdown of one line."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if not lines:
        return ""
    head = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join([*head, *lines]) + "\n"


def _escaped(text: str) -> str:
    safe = html.escape(text, quote=False).replace("|", "&#124;")
    return re.sub(r"([*_\[\]])", r"\\\1", safe)
