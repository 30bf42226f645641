"""Pages that repeat what the code says must say the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import secagg_recommender.interactions  # noqa: F401 - adds its error to the tree
from secagg import errors
from secagg.settings import Settings, load
from secagg_bench.privacy.report import markdown
from secagg_client.config import ClientSettings
from secagg_keyholder.config import KeyHolderSettings
from secagg_server import states
from secagg_server.config import ServerSettings
from secagg_server.task_files import read_task

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "docs" / "samples"


def _classes(root: type[errors.SecaggError]) -> list[type[errors.SecaggError]]:
    return [root, *(c for child in root.__subclasses__() for c in _classes(child))]


def test_error_page_lists_the_whole_tree_and_nothing_else() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| (\w+) \| (\w+) \| (\d+) \|", page, re.MULTILINE)
    documented = {name: (reason, status, int(code)) for name, reason, status, code in rows}
    defined = {c.__name__: (c.reason, c.status, c.exit_code) for c in _classes(errors.SecaggError)}
    assert documented == defined


def test_sample_task_is_a_valid_task() -> None:
    spec = read_task(SAMPLES / "task.toml")
    assert spec.plan.max_clients == 100
    assert [segment.name for segment in spec.plan.segments] == ["update", "clicks-per-category"]


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        (ServerSettings, "server.toml"),
        (KeyHolderSettings, "keyholder.toml"),
        (ClientSettings, "client.toml"),
    ],
)
def test_samples_load_and_name_every_setting(kind: type[Settings], file: str) -> None:
    load(kind, SAMPLES / file, {})
    text = (SAMPLES / file).read_text(encoding="utf-8")
    unmentioned = {"ready_file", "repeatable_seed"}  # for programs that start programs
    for name in kind.model_fields.keys() - unmentioned:
        name = name.removeprefix("release_")  # in a table of that name
        assert re.search(rf"^(# )?{name} = ", text, re.MULTILINE), f"{file} does not show {name}"


def test_architecture_page_draws_the_states_of_the_code() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawing = re.search(r"```\n(CREATED.*?)```", page, re.DOTALL)
    assert drawing
    drawn = sorted(re.findall(r"[A-Z]{4,}", drawing.group(1)))
    assert drawn == sorted(state.value for state in states.RoundState)
    for state in states.RoundState:
        assert f"**{state}.**" in page or state is states.RoundState.ABORTED


def test_no_page_names_a_machine_path() -> None:
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("docs/**/*.toml")]:
        assert "/work/" not in page.read_text(encoding="utf-8")


def test_the_figures_of_the_privacy_page_are_those_of_the_results() -> None:
    """All tables are made from the results file; what the page quotes stands in them."""
    results = json.loads((ROOT / "bench" / "results" / "privacy.json").read_text(encoding="utf-8"))
    tables = (ROOT / "docs" / "privacy-results.md").read_text(encoding="utf-8")
    assert tables.endswith(markdown(results))
    page = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8")
    start = page.index("## What it costs")
    quoted = [
        figure
        for line in page[start : page.index("### Membership inference")].splitlines()
        if line.startswith("| ")
        for figure in re.findall(r"\b0\.\d{3}\b", line)
    ]
    assert len(quoted) > 40
    assert not [figure for figure in quoted if figure not in tables]
