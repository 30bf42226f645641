"""The benchmark suite: rows that are checked, scenarios that are read, and toys of all of them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from secagg.errors import ConfigurationError, UnavailableError
from secagg_bench.peers.environments import FOLDER, interpreter
from secagg_bench.suite.cli import app
from secagg_bench.suite.rows import UNITS, Metric, Row, read, write
from secagg_bench.suite.scenarios import Contender, Scenario, scenarios
from secagg_bench.suite.steps import measured

ROOT = Path(__file__).parents[2]
GOOD: dict[str, Any] = {
    "scenario": "sizes",
    "system": "secagg",
    "version": "1.0",
    "parameters": 10,
    "clients": 3,
    "metric": "client",
    "value": 0.5,
    "unit": "s",
    "seed": 1,
    "machine": "here",
}


# --- rows ----------------------------------------------------------------------------------------


@given(
    st.lists(
        st.builds(
            lambda text, metric, value, count: Row.model_validate(
                GOOD | {"system": text, "metric": metric, "unit": UNITS[metric]}
                | {"value": value, "parameters": count}
            ),
            st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=40),
            st.sampled_from(Metric),
            st.floats(0, allow_infinity=False),
            st.integers(1, 2**60),
        ),
        max_size=5,
    )
)  # fmt: skip
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row]
) -> None:
    file = tmp_path_factory.mktemp("rows") / "rows.csv"
    write(file, rows)
    assert read(file) == rows
    assert [each.name for each in file.parent.iterdir()] == ["rows.csv"], "no draft is left"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("value", float("nan")),
        ("value", float("inf")),
        ("value", -1.0),
        ("unit", "ms"),
        ("metric", "speed"),
        ("parameters", 0),
        ("clients", -1),
        ("seed", -1),
        ("system", ""),
        ("machine", "a\nb"),
        ("version", "x" * 201),
    ],
)
def test_a_row_that_is_not_as_it_must_be_is_not_read(
    tmp_path: Path, field: str, value: object
) -> None:
    file = tmp_path / "rows.csv"
    write(file, [Row.model_validate(GOOD)])
    with file.open("a", encoding="utf-8", newline="") as out:
        csv.writer(out).writerow((GOOD | {field: value}).values())
    with pytest.raises(ConfigurationError, match=r"in line 3 of rows\.csv; .*measure again"):
        read(file)


@pytest.mark.parametrize(
    "data", [b"", b"scenario,system\nsizes,ours\n", b"\xff\xfe\n", b"value\n1\n"]
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(data)
    with pytest.raises(ConfigurationError, match=r"measure again|cannot be read"):
        read(file)


def test_a_file_that_is_not_there_says_what_writes_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="secagg-bench run"):
        read(tmp_path / "nothing.csv")


# --- scenarios -----------------------------------------------------------------------------------

ONE = """
[one]
question = "Why?"
parameters = [10]
clients = [3]
repetitions = 1
systems = [{ system = "plaintext" }]
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("parameters = [10]", ""),
        ("parameters = [10]", "parameters = [10]\nshapes = { w = [3] }"),
        ("parameters = [10]", "parameters = [0]"),
        ("parameters = [10]", "shapes = { w = [0] }"),
        ("clients = [3]", "clients = []"),
        ("repetitions = 1", "repetitions = 0"),
        ("repetitions = 1", "repetitons = 1"),
        ("repetitions = 1", "repetitions = 1\nsmoke = { parameter = [3] }"),
        ("repetitions = 1", "repetitions = 1\nsmoke = { parameters = [] }"),
        ('{ system = "plaintext" }', ""),
        ('{ system = "plaintext" }', '{ system = "plaintext" }, { system = "plaintext" }'),
        ('{ system = "plaintext" }', '{ system = "plaintext", options = { bits = [1] } }'),
        ('{ system = "plaintext" }', '{ named = "plaintext" }'),
    ],
)
def test_a_scenario_that_makes_no_sense_is_named(tmp_path: Path, old: str, new: str) -> None:
    file = tmp_path / "scenarios.toml"
    file.write_text(ONE, "utf-8")
    assert list(scenarios(file)) == ["one"]
    assert old in ONE
    file.write_text(ONE.replace(old, new), "utf-8")
    with pytest.raises(ConfigurationError, match=r"\[one\] of scenarios\.toml"):
        scenarios(file)


@pytest.mark.parametrize("text", ["[one", "one = 1"])
def test_what_is_no_table_of_scenarios_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "scenarios.toml"
    file.write_text(text, "utf-8")
    with pytest.raises(ConfigurationError, match=r"scenarios\.toml"):
        scenarios(file)


# --- measuring -----------------------------------------------------------------------------------


def toy(*systems: Contender, **changes: Any) -> Scenario:  # noqa: ANN401 - any field
    values = {
        "name": "toy",
        "question": "?",
        "systems": systems,
        "parameters": (50, 60),
        "clients": (3,),
        "repetitions": 2,
    }
    return Scenario.model_validate(values | changes)


STEPS = {
    *(Metric.CLIENT, Metric.ADD, Metric.HAND_OVER, Metric.OPEN),
    *(Metric.UPLOAD, Metric.HANDED_OVER, Metric.ERROR, Metric.MEMORY),
}


def test_every_system_has_every_figure_of_every_seed() -> None:
    said: list[str] = []
    both = toy(Contender(system="plaintext"), Contender(system="ours", named="secagg"))
    rows = list(measured(both, "here", said.append, first_seed=5))
    assert said == ["toy: 50 parameters, 3 clients", "toy: 60 parameters, 3 clients"]
    found = {(row.system, row.parameters, row.seed, row.metric) for row in rows}
    assert len(found) == len(rows), "no figure twice"
    for system, metrics in (("plaintext", STEPS), ("secagg", STEPS | {Metric.ADD_UNAUTHENTICATED})):
        for parameters in (50, 60):
            for seed in (5, 6):
                of_it = {each[3] for each in found if each[:3] == (system, parameters, seed)}
                assert of_it == metrics
    uploads = {row.value for row in rows if (row.system, row.metric) == ("plaintext", "upload")}
    assert uploads == {200.0, 240.0}
    assert all(row.value < 0.5 for row in rows if row.metric is Metric.ERROR)
    peaks = [row.value for row in rows if row.metric is Metric.MEMORY]
    assert all(10_000_000 < peak < 1_000_000_000 for peak in peaks), "that of a Python with numpy"


def test_clients_that_drop_out_are_not_in_the_sum() -> None:
    said: list[str] = []
    three = toy(
        Contender(system="ours"),
        Contender(system="ours", named="one gone", dropped=1),
        Contender(system="ours", named="all gone", dropped=5),
        parameters=(50,),
        clients=(5,),
    )
    rows = list(measured(three, "here", said.append))
    handed = {row.system: row.value for row in rows if row.metric is Metric.HANDED_OVER}
    assert handed.keys() == {"ours", "one gone"}
    assert 200 < handed["ours"] - handed["one gone"] < 2000, "an admission"
    assert all(row.value < 0.1 for row in rows if row.metric is Metric.ERROR)
    assert {row.clients for row in rows} == {5}, "the whole cohort"
    (missing,) = (line for line in said if "not measured" in line)
    assert "all gone" in missing
    assert "nothing was added" in missing


def test_a_system_that_fails_is_told_of_and_the_others_go_on() -> None:
    said: list[str] = []
    both = toy(
        Contender(system="plaintext"),
        Contender(system="plaintext", named="broken", options={"colour": "red"}),
    )
    rows = list(measured(both, "here", said.append))
    assert {row.system for row in rows} == {"plaintext"}
    missing = [line for line in said if "broken is not measured" in line]
    assert len(missing) == 2, "once for each size"
    assert "colour" in missing[0]


# --- the command ---------------------------------------------------------------------------------


def test_scenarios_are_listed_with_their_questions() -> None:
    done = CliRunner().invoke(app, ["list"])
    assert done.exit_code == 0
    for name, scenario in scenarios().items():
        assert f"{name}: {scenario.question}" in done.output


def test_a_scenario_that_there_is_not_is_named(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["run", "speed", "--output", str(tmp_path)])
    assert done.exit_code == ConfigurationError.exit_code
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_toys_of_all_scenarios_measure_every_system(tmp_path: Path) -> None:
    peers = ROOT / FOLDER
    try:
        for peer in ("nvflare_he", "paillier"):
            interpreter(peer, peers)
    except UnavailableError as error:
        pytest.skip(str(error))
    command = ["run", "--smoke", "--output", str(tmp_path / "rows")]
    done = CliRunner().invoke(app, [*command, "--environments", str(peers)])
    assert done.exit_code == 0, done.output
    assert "not measured" not in done.output
    for name, scenario in scenarios().items():
        rows = read(tmp_path / "rows" / f"{name}.csv")
        assert {row.system for row in rows} == {each.name for each in scenario.systems}
        assert {row.scenario for row in rows} == {name}
