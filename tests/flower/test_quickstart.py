"""The example app, before and after it was given encrypted aggregation."""

from __future__ import annotations

import difflib
import math
import re
from pathlib import Path

import pytest
import torch
from superlinks import EXAMPLE, example_task, flower

from secagg.parameters import FloatSegment, TensorSpec
from secagg.planner import make_plan

MOST_CHANGED_LINES = 8
NODES, ROUNDS = 5, 3
EXAMPLES = (320, 480, 640, 320, 480)  # 4 of 5 of 400, 600, 800, 400, 600
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


def _distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return math.hypot(*((one[name] - other[name]).norm().item() for name in one))


def _rounding_error(model: dict[str, torch.Tensor]) -> float:
    """How far rounding moves the mean of one round, in L2 norm, but for one run in 10**9.

    A rounding error has mean 0 and a variance of at most step^2 / 4, and the sum of V of them for
    each of n clients is a vector of norm sqrt(n V) step / 2. Its square is a sum of V independent
    terms; for V of 1000 and more it exceeds 1.44 times its mean at 7 standard deviations or more.
    """
    shapes = [TensorSpec(name, tuple(value.shape)) for name, value in sorted(model.items())]
    plan = make_plan(
        [FloatSegment("update", tuple(shapes), 1.0, 8, "samples", 1000)], max_clients=NODES
    )
    (segment,) = plan.segments
    assert isinstance(segment, FloatSegment)
    assert segment.values >= 1000
    weight = sum(EXAMPLES) / segment.weight_cap
    return 1.2 * math.sqrt(NODES * segment.values) / 2 * segment.step / weight


@pytest.mark.slow
def test_both_apps_run_by_the_commands_of_the_readme_and_end_with_one_model(tmp_path: Path) -> None:
    readme = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    *_, commands = re.findall(r"```console\n(.*?)```", readme, re.DOTALL)
    with flower(tmp_path, clients=0) as machine:
        log = machine.shell(re.sub(r"^\$ ", "", commands, flags=re.MULTILINE), EXAMPLE)
        plain, secure = (
            torch.load(tmp_path / "here" / f"{name}.pt") for name in ("plain", "secure")
        )

    said = re.findall(r"secagg: round (\d+): (\d+) contributors, (\d+) refused", log)
    assert said == [(str(number), str(NODES), "0") for number in range(1, ROUNDS + 1)]
    assert "in plaintext" not in log
    torch.manual_seed(0)
    moved = _distance(example_task().Net().state_dict(), plain)
    # What one round is off by moves the next ones along: training hardly brings two models that
    # are close apart. Three rounds, and as much again for that.
    bound = 2 * ROUNDS * _rounding_error(plain)
    assert _distance(plain, secure) <= bound <= moved / 4
