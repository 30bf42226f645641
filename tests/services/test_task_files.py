"""The norm check in task files: on unless it is turned off, and shown by the sample."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from secagg.errors import ConfigurationError, PlanError
from secagg.optimisers import Optimiser
from secagg.parameters import (
    Compression,
    IntegerSegment,
    LowRank,
    NormCheck,
    RandomSubset,
)
from secagg_server.stopping import Stop
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


# --- optimisers, compression, stop criteria -----------------------------------------------------

MODEL = """
task_id = "task"
max_clients = 6
[update]
clip = 1.0
[[update.tensors]]
name = "table"
shape = [100, 16]
{}
"""

# A segment of integers, and what a section says of it.
INTEGERS = '[[integers]]\nname = "{}"\nsize = {}\nmax_abs = 9'


@pytest.mark.parametrize(
    ("text", "optimiser"),
    [
        ("", Optimiser()),
        ("[optimiser]", Optimiser()),
        ('[optimiser]\nname = "momentum"', Optimiser("momentum", 0.1)),
        ('[optimiser]\nname = "adam"', Optimiser("adam", 0.1)),
        (
            '[optimiser]\nname = "yogi"\nlearning_rate = 0.3\nbeta1 = 0\nbeta2 = 0.5\ntau = 1e-4',
            Optimiser("yogi", 0.3, 0.0, 0.5, 1e-4),
        ),
    ],
)
def test_a_task_file_names_the_optimiser_and_averages_otherwise(
    text: str, optimiser: Optimiser, tmp_path: Path
) -> None:
    spec = read(tmp_path, text, MODEL)
    assert spec.optimiser == optimiser
    assert TaskSpec.from_wire(spec.to_wire()) == spec
    assert spec.to_wire().HasField("optimiser") == (optimiser != Optimiser())


@pytest.mark.parametrize(
    ("text", "compression", "carried"),
    [
        ("", None, 1600),
        ("[update.compression]\nrank = 4", LowRank(4), 400),
        ("[update.compression]\nfraction = 0.1", RandomSubset(0.1), 160),
    ],
)
def test_a_task_file_says_how_an_update_travels(
    text: str, compression: Compression | None, carried: int, tmp_path: Path
) -> None:
    spec = read(tmp_path, text, MODEL)
    assert spec.model is not None
    assert (spec.model.compression, spec.model.carried) == (compression, carried)
    assert spec.model_bytes == 4 * 1600
    assert TaskSpec.from_wire(spec.to_wire()) == spec


@pytest.mark.parametrize(
    ("text", "stop", "names"),
    [
        ("", None, ["update"]),
        ("[stop]\npatience = 3\nleast_change = 0.01", Stop(3, 0.01), ["update"]),
        (
            "[stop]\npatience = 3\nmost_users = 100",
            Stop(3, figure="validation"),
            ["update", "validation"],
        ),
        (
            '[stop]\npatience = 3\nfigure = "hits"\nmost_users = 9\nleast_gain = 0.01',
            Stop(3, 0.0, "hits", 0.01),
            ["update", "hits"],
        ),
        (
            '[stop]\npatience = 3\nfigure = "n"\n' + INTEGERS.format("n", 2),
            Stop(3, figure="n"),
            ["update", "n"],
        ),
    ],
)
def test_a_task_file_says_when_to_stop_and_makes_what_it_takes(
    text: str, stop: Stop | None, names: list[str], tmp_path: Path
) -> None:
    spec = read(tmp_path, text, MODEL)
    assert spec.stop == stop
    assert [segment.name for segment in spec.plan.segments] == names
    assert TaskSpec.from_wire(spec.to_wire()) == spec


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[optimiser]\nname = "sgd"', "expected an optimiser in"),
        ("[optimiser]\nlearning_rate = 0", "learning_rate above 0"),
        ('[optimiser]\nname = "adam"\nbeta2 = 1', "beta1 and beta2"),
        ("[optimiser]\nrate = 1", "unknown key"),
        ("[update.compression]", "either a rank or a fraction"),
        ("[update.compression]\nrank = 1\nfraction = 0.5", "either a rank or a fraction"),
        ("[update.compression]\nrank = 0", "rank of 1"),
        ("[update.compression]\nfraction = 1.5", "between 0 and 1"),
        ('[update.compression]\nkind = "low-rank"', "unknown key"),
        ("[stop]", "patience"),
        ("[stop]\npatience = 2", "something to stop by"),
        ("[stop]\npatience = 0\nleast_change = 0.1", "patience of 1"),
        ('[stop]\npatience = 2\nfigure = "f"', "segment of two integers 'f'"),
        ('[stop]\npatience = 2\nfigure = "update"', "segment of two integers 'update'"),
        (
            '[stop]\npatience = 2\nfigure = "f"\n' + INTEGERS.format("f", 3),
            "segment of two integers",
        ),
        (
            "[stop]\npatience = 2\nmost_users = 5\n" + INTEGERS.format("validation", 2),
            "got both",
        ),
        ("[stop]\npatience = 2\nmost_users = 0", "size and max_abs of 1"),
    ],
)
def test_what_cannot_be_learned_by_is_refused_by_its_name(
    text: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        read(tmp_path, text, MODEL)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[optimiser]\nname = "adam"', "expected a model for the optimiser"),
        ("[stop]\npatience = 2\nleast_change = 0.1", "whose change least_change is about"),
    ],
)
def test_a_task_without_a_model_has_nothing_to_optimise(
    text: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        read(tmp_path, text, COUNTS)


def test_counts_that_are_withheld_are_no_figure(tmp_path: Path) -> None:
    text = """rows = 2
bits = 13
[[update.tensors]]
name = "vector"
shape = [2, 3]
[threshold]
least = 3
[stop]
patience = 2
figure = "contributors"
"""
    task = 'task_id = "task"\nmax_clients = 6\n[update]\nclip = 1.0\n{}'
    with pytest.raises(ConfigurationError, match="a figure that is released"):
        read(tmp_path, text, task)
