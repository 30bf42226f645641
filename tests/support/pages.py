"""The code on a page of the documentation, as somebody who follows it would run it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DOCS", "Block", "blocks", "commands", "pages", "printed", "script", "write_files"]

DOCS = Path(__file__).parents[2] / "docs"
_BLOCK = re.compile(
    r"^(?P<reason><!-- not executed: .+? -->\n+)?"
    r"(?P<indent> *)```(?P<kind>\w+)(?P<options>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
_TITLE = re.compile(r'title="([^"]+)"')


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        kind: what follows the backticks, such as ``python``.
        title: name of the file that it is the content of; empty for none.
        line: of the page, from 1, on which its text begins.
        skipped: whether the page says why it is not executed.
    """

    kind: str
    title: str
    text: str
    line: int
    skipped: bool


def pages() -> list[Path]:
    """Every page of the documentation."""
    return sorted(DOCS.glob("**/*.md"))


def blocks(page: Path, kind: str = "") -> Iterator[Block]:
    """A page's blocks of code, of one kind or of all."""
    text = page.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        if kind in ("", match["kind"]):
            title = _TITLE.search(match["options"])
            indent = re.compile(f"^{match['indent']}", re.MULTILINE)
            yield Block(
                match["kind"],
                title.group(1) if title else "",
                indent.sub("", match["text"]),
                text.count("\n", 0, match.start("text")) + 1,
                bool(match["reason"]),
            )


def write_files(page: Path, folder: Path) -> None:
    """The files that a page tells its reader to make."""
    for block in blocks(page):
        if block.title:
            path = folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")


def script(page: Path) -> str:
    """A page's Python in one piece, each line where it is on the page; empty without any."""
    lines: list[str] = []
    for block in blocks(page, "python"):
        if not block.title and not block.skipped:
            lines += [""] * (block.line - 1 - len(lines))
            lines += block.text.splitlines()
    return "\n".join(lines)


def printed(page: Path) -> list[str]:
    """What a page says that its Python prints: the lines of text that stands right below some."""
    found = list(blocks(page))
    return [
        line
        for block, below in itertools.pairwise(found)
        if block.kind == "python" and not block.title and not block.skipped
        if below.kind == "text" and below.line == block.line + block.text.count("\n") + 3
        for line in below.text.splitlines()
    ]


def commands(page: Path) -> list[str]:
    """What a page's reader types into the shell."""
    return [
        line[2:]
        for block in blocks(page, "console")
        if not block.skipped
        for line in block.text.replace("\\\n", " ").splitlines()
        if line.startswith("$ ")
    ]
