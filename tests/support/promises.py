"""What the threat model promises, and what notices when a part of it is taken out.

`tests/promises.toml` lists the mechanisms that carry each promise: a line of the code, what it
becomes without the mechanism, and the tests that fail then. This applies them, one at a time, to a
copy of the tree::

    python tests/support/promises.py run [--promise N] [--again]
    python tests/support/promises.py write

``run`` adds what was noticed to ``bench/results/promises.json``, and tries what is there already
only if it has changed, or ``--again``; ``write`` puts the tables into the documentation.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from queue import Queue
from typing import Any, TypeVar

from secagg_bench.one_core import machine

__all__ = ["PAGES", "RESULTS", "ROOT", "Taken", "Tree", "load", "rendered"]

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "tests" / "promises.toml"
RESULTS = ROOT / "bench" / "results" / "promises.json"
PAGES = {
    ROOT / "docs" / "threat_model.md": ("promises",),
    ROOT / "docs" / "robustness.md": ("what was noticed", "taken out"),
}
"""Where the tables are, and how they are called there."""

_PACKAGES = ("", "client", "server", "bench")
_COPIED = ("secagg", "client", "server", "bench", "proto", "tests", "pyproject.toml", "README.md")
_ROW = re.compile(r"^\| (\d+) \| (.*) \|[^|]*\|$", re.MULTILINE)
_FAILED = re.compile(r"^FAILED ((\S+?::\w+)(?:\[.*?\])?)(?: - |$)", re.MULTILINE)
_TIMEOUT_S = 600
_SHOWN = 3

_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True, slots=True)
class Taken:
    """A mechanism, and how it is taken out.

    Attributes:
        promise: number in the threat model.
        what: the mechanism, as it should be.
        file: where it is, from the root of the tree.
        old: text that is there exactly once.
        new: what stands there without the mechanism.
        tests: those that fail then, each of them: ``file::name``, or ``file::name[case]``.
    """

    promise: int
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def digest(self) -> str:
        """What names it in the results: another one once anything of it has changed."""
        return sha256(repr(self).encode()).hexdigest()[:16]


def load(path: Path = TABLE) -> list[Taken]:
    """All mechanisms, by promise."""
    rows = tomllib.loads(path.read_text(encoding="utf-8"))["taken"]
    found = [Taken(**(row | {"tests": tuple(row["tests"])})) for row in rows]
    return sorted(found, key=lambda taken: taken.promise)


class Tree:
    """A copy of the tree, whose packages are imported in the place of those installed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in _COPIED:
            if (ROOT / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "results")
                shutil.copytree(ROOT / name, root / name, ignore=ignored)
            else:
                shutil.copy(ROOT / name, root / name)
        self._environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(str(root / each) for each in _PACKAGES),
            # A file that changes twice a second must not be read as it was compiled before.
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }

    @contextlib.contextmanager
    def without(self, taken: Taken) -> Iterator[None]:
        """Take a mechanism out, and put it back."""
        path = self.root / taken.file
        whole = path.read_text(encoding="utf-8")
        if whole.count(taken.old) != 1:
            raise ValueError(f"expected once in {taken.file}: {taken.old!r}")
        path.write_text(whole.replace(taken.old, taken.new), encoding="utf-8")
        try:
            yield
        finally:
            path.write_text(whole, encoding="utf-8")

    def failing(self, tests: Collection[str]) -> set[str]:
        """Those of the tests that fail here.

        Raises:
            RuntimeError: they cannot be run; an error before a test is no failure of it.
        """
        if not tests:
            return set()
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=no"]
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider", "-p", "no:randomly", "-rf", *tests],
            cwd=self.root,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            start_new_session=True,
            check=False,
        )
        if done.returncode not in (0, 1):
            raise RuntimeError(f"expected tests that run; got\n{done.stdout[-2000:]}")
        # By the test's own name, or by that of one of its cases.
        failed = {name for found in _FAILED.findall(done.stdout) for name in found}
        return failed & set(tests)

    def imported(self) -> list[str]:
        """Files of the packages that tests import here."""
        code = "import secagg, secagg_client, secagg_server, secagg_keyholder as k; print(*[" + (
            "m.__file__ for m in (secagg, secagg_client, secagg_server, k)], sep='\\n')"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=self.root,
            env=self._environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.split()


@contextlib.contextmanager
def tree() -> Iterator[Tree]:
    """A copy that goes when it was used.

    Raises:
        RuntimeError: tests there would import other packages than its own.
    """
    with tempfile.TemporaryDirectory(prefix="promises-") as folder:
        copy = Tree(Path(folder).resolve())
        if strangers := [f for f in copy.imported() if not Path(f).is_relative_to(copy.root)]:
            raise RuntimeError(f"expected the packages of the copy; got {strangers}")
        yield copy


def rendered(page: str) -> str:
    """The text of a page with its tables made anew."""
    taken = load()
    blocks: dict[str, Callable[[str], str]] = {
        "promises": lambda old: _ROW.sub(lambda row: _promise(row, taken), old),
        "taken out": lambda _: _rows(taken),
        "what was noticed": lambda _: _measured(),
    }
    for name, render in blocks.items():
        before, opening, rest = page.partition(f"<!-- {name} -->\n")
        if opening:
            old, closing, after = rest.partition(f"<!-- /{name} -->")
            page = before + opening + render(old) + closing + after
    return page


def _promise(row: re.Match[str], taken: Sequence[Taken]) -> str:
    """A row of the threat model with the tests that show it, attacks before all others."""
    number, promise = int(row[1]), row[2]
    tests = dict.fromkeys(t for each in taken if each.promise == number for t in each.tests)
    telling = sorted(tests, key=lambda test: not test.startswith("tests/attacks/"))[:_SHOWN]
    return f"| {number} | {promise} | {_links(telling)} |"


def _rows(taken: Sequence[Taken]) -> str:
    rows = [
        f"| {each.promise} | {each.what} | `{each.file}` | {_links(each.tests)} |" for each in taken
    ]
    return "\n".join(["| # | taken out | of | fails |", "|--:|---|---|---|", *rows, ""])


def _links(tests: Sequence[str]) -> str:
    return ", ".join(map(_linked, tests))


def _linked(test: str) -> str:
    file, _, name = test.partition("::")
    # Without its parameters: brackets would end the link.
    return f"[`{name.partition('[')[0]}`](../{file})"


def _measured() -> str:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    return (
        f"{results['noticed']} mechanisms were taken out, and each was noticed by every one of the "
        f"tests that it names, {results['tests']} in all.\n"
    )


def _run(table: Sequence[Taken], promise: int | None, jobs: int) -> int:
    """Try what the results do not have as it is now; what goes unnoticed is not kept."""
    rows = {digest: row for digest, row in _kept().items() if digest in {e.digest for e in table}}
    chosen = [e for e in table if promise in (None, e.promise) and e.digest not in rows]
    _say(f"{len(chosen)} mechanisms, {len(rows)} known")
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(jobs) as pool:
        copies: Queue[Tree] = Queue()
        for _ in range(jobs):
            copies.put(stack.enter_context(tree()))
        tried = {pool.submit(_in, copies, _tried, each): each for each in chosen}
        for number, done in enumerate(as_completed(tried), 1):
            each, (problems, seconds) = tried[done], done.result()
            _say(f"{number}/{len(chosen)} {seconds:5.1f} s  {each.promise}: {each.what}", *problems)
            if not problems:
                rows[each.digest] = _row(each, seconds)
                _write_results([rows[e.digest] for e in table if e.digest in rows])
    missing = [each.what for each in table if each.digest not in rows]
    _say(f"{len(rows)} of {len(table)} noticed; not:", *missing)
    return 1 if missing else 0


def _kept() -> dict[str, dict[str, Any]]:
    if not RESULTS.exists():
        return {}
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    return {row["digest"]: row for row in rows}


def _row(taken: Taken, seconds: float) -> dict[str, Any]:
    named = {"promise": taken.promise, "what": taken.what, "tests": list(taken.tests)}
    return named | {"seconds": seconds, "digest": taken.digest}


def _in(copies: Queue[Tree], work: Callable[[Tree, _T], _R], argument: _T) -> _R:
    """Do something in a copy that nobody else uses at the time."""
    copy = copies.get()
    try:
        return work(copy, argument)
    finally:
        copies.put(copy)


def _tried(copy: Tree, taken: Taken) -> tuple[list[str], float]:
    """What is wrong with a mechanism's tests, and the seconds that they took without it."""
    begun = time.monotonic()
    try:
        problems = [f"fails with nothing taken out: {t}" for t in sorted(copy.failing(taken.tests))]
        begun = time.monotonic()
        with copy.without(taken):
            unnoticed = set(taken.tests) - copy.failing(taken.tests)
        problems += [f"UNNOTICED by {test}" for test in sorted(unnoticed)]
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        problems = [f"could not be tried: {error}"]
    return problems, round(time.monotonic() - begun, 1)


def _say(line: str, *more: str) -> None:
    print(line, *more, sep="\n      ", flush=True)


def _write_results(rows: Sequence[dict[str, Any]]) -> None:
    results = {
        "version": version("secagg"),
        "machine": machine(),
        "noticed": len(rows),
        "tests": len({test for row in rows for test in row["tests"]}),
        "seconds": round(sum(row["seconds"] for row in rows)),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description="Take out what carries each promise.")
    parser.add_argument("what", choices=("run", "write"))
    parser.add_argument("--promise", type=int, help="one promise alone")
    parser.add_argument("--again", action="store_true", help="also what the results have already")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    chosen = parser.parse_args()
    if chosen.what == "run":
        if chosen.again:
            RESULTS.unlink(missing_ok=True)
        return _run(load(), chosen.promise, chosen.jobs)
    for page in PAGES:
        if page.exists():
            page.write_text(rendered(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
