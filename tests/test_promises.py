"""The table of what carries each promise holds: for the code, for the tests, for the pages."""

from __future__ import annotations

import ast
import datetime
import json
import re
from functools import cache
from pathlib import Path

import pytest
from promises import PAGES, RESULTS, ROOT, Taken, load, rendered, tree

TAKEN = load()
PROMISED = re.compile(r"^\| (\d+) \| ", re.MULTILINE)
# Of the cheapest quarter, every day some others; `python tests/support/promises.py run` tries all.
A_DAY = 5


@cache
def _names_in(file: str) -> frozenset[str]:
    """Names of the tests in a file."""
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    return frozenset(
        each.name for each in body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
    )


def test_every_promise_has_something_that_can_be_taken_out() -> None:
    page = (ROOT / "docs" / "threat_model.md").read_text(encoding="utf-8")
    start = page.index("## What is promised")
    promised = {
        int(number) for number in PROMISED.findall(page[start : page.index("## What each")])
    }
    assert promised == set(range(1, max(promised) + 1))
    assert {each.promise for each in TAKEN} == promised


def test_what_is_taken_out_is_in_the_code_once() -> None:
    gone = [
        f"{each.promise}: {each.what}"
        for each in TAKEN
        if (ROOT / each.file).read_text(encoding="utf-8").count(each.old) != 1
        or each.old == each.new
    ]
    assert not gone, "follow the code in tests/promises.toml, and see the tests fail again"


def test_no_mechanism_is_named_twice() -> None:
    assert len({each.what for each in TAKEN}) == len(TAKEN)
    assert len({(each.file, each.old, each.new) for each in TAKEN}) == len(TAKEN)


def test_every_test_that_is_named_exists() -> None:
    named = {tuple(test.partition("[")[0].split("::")) for each in TAKEN for test in each.tests}
    assert all(each.tests for each in TAKEN)
    assert not [name for name in named if name[1] not in _names_in(name[0])]


def test_the_results_are_of_this_table() -> None:
    """What was not noticed is not in them."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    assert [row["digest"] for row in rows] == [each.digest for each in TAKEN], (
        "run `python tests/support/promises.py run`"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_pages_say_what_the_table_says(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in PAGES[page]:
        assert f"<!-- {name} -->\n" in text
    assert rendered(text) == text, "run `python tests/support/promises.py write`"


def _today() -> list[Taken]:
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    seconds = {row["digest"]: row["seconds"] for row in rows}
    cheapest = sorted((e for e in TAKEN if e.digest in seconds), key=lambda e: seconds[e.digest])
    choice = cheapest[: len(cheapest) // 4]
    first = datetime.datetime.now(datetime.UTC).toordinal() * A_DAY
    return [choice[(first + number) % len(choice)] for number in range(A_DAY)]


@pytest.mark.slow
def test_what_is_taken_out_today_is_noticed() -> None:
    today = _today()
    with tree() as copy:
        assert not copy.failing({test for each in today for test in each.tests})
        for each in today:
            with copy.without(each):
                assert copy.failing(each.tests) == set(each.tests), each.what


def test_what_was_taken_out_is_put_back() -> None:
    """And a text that is not there once is refused, so that nothing passes for taken out."""
    with tree() as copy:
        file = copy.root / TAKEN[0].file
        before = file.read_bytes()
        with copy.without(TAKEN[0]):
            assert file.read_bytes() != before
        assert file.read_bytes() == before
        never = Taken(1, "nothing", TAKEN[0].file, "no such text", "", ())
        with pytest.raises(ValueError, match=r"expected once"), copy.without(never):
            pass
