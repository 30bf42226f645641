"""The example app, before and after it was given encrypted aggregation.

`test_newcomer` runs both.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from superlinks import EXAMPLE

MOST_CHANGED_LINES = 8
HOW_TO = EXAMPLE.parents[1] / "how-to" / "flower.md"


def _files(app: str) -> dict[str, list[str]]:
    folder = EXAMPLE / app
    found = [path for path in folder.rglob("*") if path.suffix in {".py", ".toml"}]
    return {str(path.relative_to(folder)): path.read_text().splitlines() for path in found}


def _changed(before: list[str], after: list[str]) -> int:
    """Lines that were added, removed or changed; one that was changed counts once."""
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    return sum(
        max(old_end - old, new_end - new)
        for tag, old, old_end, new, new_end in matcher.get_opcodes()
        if tag != "equal"
    )


def test_the_conversion_changes_at_most_eight_lines() -> None:
    plain, secure = _files("plain"), _files("secure")
    assert plain.keys() == secure.keys()
    changed = {name: _changed(plain[name], secure[name]) for name in plain}
    assert 0 < sum(changed.values()) <= MOST_CHANGED_LINES, changed
    assert changed[str(Path("quickstart", "task.py"))] == 0, "the training knows nothing of it"


def test_the_page_shows_the_conversion_as_it_is() -> None:
    shown = re.search(r"```diff\n(.*?)```", HOW_TO.read_text(encoding="utf-8"), re.DOTALL)
    assert shown
    marked = [line for line in shown.group(1).splitlines() if re.match(r"[+-](?![+-]{2} )", line)]
    plain, secure = _files("plain"), _files("secure")
    wanted = [
        line
        for name in plain
        for line in difflib.unified_diff(plain[name], secure[name], lineterm="", n=0)
        if not re.match(r"@@|---|\+\+\+", line)
    ]
    assert sorted(marked) == sorted(wanted)
