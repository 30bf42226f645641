"""The norm check in task files: on unless it is turned off, and shown by the sample."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from secagg.errors import ConfigurationError, PlanError
from secagg.parameters import IntegerSegment, NormCheck
from secagg_server.task_files import _NormCheck, read_task
from secagg_server.tasks import TaskSpec

SAMPLE = Path(__file__).parents[2] / "docs" / "samples" / "task.toml"

TASK = """
task_id = "task"
max_clients = 6
[update]
clip = 1.0
[[update.tensors]]
name = "vector"
shape = [100, 100]
[[integers]]
name = "counts"
size = 16
max_abs = 100
{}
"""


def read(folder: Path, text: str, task: str = TASK) -> TaskSpec:
    file = folder / "task.toml"
    file.write_text(task.format(text), encoding="utf-8")
    return read_task(file)


@pytest.mark.parametrize(
    ("text", "check"),
    [
        ("", NormCheck()),
        ("[norm_check]", NormCheck()),
        ("[norm_check]\nenabled = true", NormCheck()),
        ("[norm_check]\nenabled = false", None),
        ("[norm_check]\nenabled = false\nmargin = 0.5", None),
        (
            "[norm_check]\nmargin = 0.5\nsketches = 8\ntolerated = 0\nmin_cosine = -0.1",
            NormCheck(0.5, 8, 0, -0.1),
        ),
    ],
)
def test_a_task_file_is_checked_unless_it_says_no(
    text: str, check: NormCheck | None, tmp_path: Path
) -> None:
    spec = read(tmp_path, text)
    assert spec.plan.norm_check == check
    assert TaskSpec.from_wire(spec.to_wire()) == spec


@pytest.mark.parametrize(("line", "norm"), [("", 0.0), ("max_norm = 150", 150.0)])
def test_integers_may_be_bounded_by_their_norm(line: str, norm: float, tmp_path: Path) -> None:
    segment = read(tmp_path, line).plan.segments[1]
    assert isinstance(segment, IntegerSegment)
    assert segment.norm_bound == norm


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[norm_check]\nmargin = 0.1", "margin from 0.15"),
        ("[norm_check]\nmargin = nan", "margin"),
        ("[norm_check]\nsketches = 7", "8 to 64 sketches"),
        ("[norm_check]\ntolerated = -1", "tolerated"),
        ("[norm_check]\nmin_cosine = 0.6", "min_cosine"),
        ("[norm_check]\nmax = 3", "max"),
        ("[norm_check]\nenabled = 3", "enabled"),
        ("max_norm = 500", "max_norm from 1 to max_abs"),
        ("max_norm = 0.5", "max_norm from 1"),
    ],
)
def test_a_check_that_cannot_be_is_refused_by_its_name(
    text: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        read(tmp_path, text)


def test_integers_too_large_for_the_check_are_refused_with_what_would_work(tmp_path: Path) -> None:
    task = 'task_id = "task"\nmax_clients = 100\n[[integers]]\nname = "sums"\nsize = 1000000\n'
    task += "max_abs = 20000000000\nmax_norm = {}"
    with pytest.raises(PlanError, match="max_norm, fewer tolerated clients, or no norm check"):
        read(tmp_path, "2e13", task)
    assert read(tmp_path, "2e13\n[norm_check]\nenabled = false", task).plan.norm_check is None
    assert read(tmp_path, "1e9", task).plan.norm_check == NormCheck()


COUNTS = """
task_id = "task"
max_clients = 6
[[integers]]
name = "counts"
size = 16
max_abs = 100
{}
"""


def test_where_no_norm_can_be_checked_none_is_unless_the_file_asks_for_it(tmp_path: Path) -> None:
    assert read(tmp_path, "", COUNTS).plan.norm_check is None
    assert read(tmp_path, "max_norm = 150", COUNTS).plan.norm_check == NormCheck()
    with pytest.raises(PlanError, match="integers need a max_norm"):
        read(tmp_path, "[norm_check]", COUNTS)


def test_the_sample_shows_every_key_of_the_check_with_its_default() -> None:
    text = SAMPLE.read_text(encoding="utf-8")
    shown = tomllib.loads(text)["norm_check"]
    defaults: dict[str, Any] = _NormCheck().model_dump(exclude_none=True)
    assert shown == defaults
    for name, field in _NormCheck.model_fields.items():
        assert re.search(rf"^(# )?{name} = ", text, re.MULTILINE), f"the sample lacks {name}"
        if field.default is not None:
            default = str(field.default).lower()
            assert re.search(rf"^{name} = .*# optional, default {default}\b", text, re.MULTILINE)
    assert read_task(SAMPLE).plan.norm_check == NormCheck()
