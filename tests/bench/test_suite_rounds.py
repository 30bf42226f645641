"""Whole rounds in the suite: what they are asked, how exact they must be, and their tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from secagg.errors import ConfigurationError, RoundError, SecaggError
from secagg_bench.load.uploaders import Rounders, Turn, all_turns
from secagg_bench.suite import rounds
from secagg_bench.suite.cli import app
from secagg_bench.suite.rounds_report import lines_table, rounds_table
from secagg_bench.suite.rows import UNITS, Metric, Row
from secagg_bench.suite.scenarios import Access, Rounds, scenarios

# --- scenarios -----------------------------------------------------------------------------------

ONE = """
[one]
kind = "rounds"
question = "Why?"
parameters = 10
clients = [4, 9]
processes = 1
repetitions = 1
smoke = { clients = [3] }
systems = [{ name = "a", up_to = 5, access = { megabits_s = 8 } }, { name = "b", access = {} }]
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('kind = "rounds"', 'kind = "round"'),
        ('kind = "rounds"\n', ""),
        ("parameters = 10", "parameters = [10]"),
        ("parameters = 10", "shapes = { w = [10] }"),
        ("clients = [4, 9]", "clients = [4, 1001]"),
        ("clients = [4, 9]", "clients = [6, 9]"),
        ("processes = 1", "processes = 0"),
        ("processes = 1", "processes = 2"),
        ("smoke = { clients = [3] }", "smoke = { clients = [6] }"),
        ('name = "b"', 'name = "a"'),
        (", access = {}", ""),
        ("access = {}", "options = { norm_check = true }"),
        ("megabits_s = 8", "megabits_s = 0"),
        ("megabits_s = 8", "megabits_s = inf"),
        ("megabits_s = 8", "round_trip_ms = -1"),
    ],
)
def test_rounds_that_make_no_sense_are_named(tmp_path: Path, old: str, new: str) -> None:
    file = tmp_path / "scenarios.toml"
    file.write_text(ONE, "utf-8")
    assert isinstance(scenarios(file)["one"], Rounds)
    assert old in ONE
    file.write_text(ONE.replace(old, new), "utf-8")
    with pytest.raises(ConfigurationError, match=r"\[one\] of scenarios\.toml"):
        scenarios(file)


def test_a_system_takes_part_up_to_its_largest_cohort(tmp_path: Path) -> None:
    file = tmp_path / "scenarios.toml"
    file.write_text(ONE, "utf-8")
    one = scenarios(file)["one"]
    assert isinstance(one, Rounds)
    assert [[each.name for each in one.takers(n)] for n in one.clients] == [["a", "b"], ["b"]]
    assert one.quick().clients == (3,)
    assert one.quick().systems == one.systems


# --- lines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("access", "least"),
    [
        (Access(), 0.0),
        (Access(megabits_s=8), 2.0),
        (Access(round_trip_ms=100), 0.3),
        (Access(megabits_s=16, round_trip_ms=10), 1.03),
    ],
)
def test_a_line_takes_no_less_than_its_bytes_and_its_round_trips(
    access: Access, least: float
) -> None:
    assert access.least_s(2_000_000, 3) == pytest.approx(least)


def test_a_wire_does_in_each_direction_half_of_a_round_trip() -> None:
    line = rounds.line_of(Access(megabits_s=20, round_trip_ms=40))
    assert (line.bytes_per_s, line.delay_s) == (2_500_000.0, 0.02)
    assert rounds.line_of(Access()).bytes_per_s is None


def test_lines_that_cannot_be_had_are_told_of_in_one_line_and_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(rounds, "unable", lambda: "hosts of their own need root")
    done = CliRunner().invoke(app, ["run", "lines", "--smoke", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert done.output == "lines is not measured: hosts of their own need root\n"
    assert list(tmp_path.iterdir()) == []


# --- exactness -----------------------------------------------------------------------------------


def test_a_sum_that_is_wrong_anywhere_is_refused() -> None:
    right = [np.arange(5), np.array([-7, 7])]
    rounds.check_exact(right, [part.copy() for part in right])
    for place in range(2):
        wrong = [part.copy() for part in right]
        wrong[place][1] += 1
        with pytest.raises(RoundError, match="1 of 7 differ"):
            rounds.check_exact(wrong, right)
    with pytest.raises(RoundError, match="5 of 7 differ"):
        rounds.check_exact(right, [np.array([0]), right[1]])
    with pytest.raises(ValueError, match="shorter"):
        rounds.check_exact(right, right[:1])


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_round_whose_sum_is_wrong_has_no_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    added, asked = Rounders.added, 0

    def off_by_one(self: Rounders) -> list[NDArray[np.int64]]:
        nonlocal asked
        asked += 1
        sums = added(self)
        sums[0][-1] += asked > 4  # those of two processes in two small first rounds before
        return sums

    monkeypatch.setattr(Rounders, "added", off_by_one)
    done = CliRunner().invoke(app, ["run", "rounds", "--smoke", "--output", str(tmp_path)])
    assert done.exit_code == RoundError.exit_code, done.output
    assert asked == 6
    assert "4 clients: 4 accepted" in done.output
    assert list(tmp_path.iterdir()) == []


# --- clients -------------------------------------------------------------------------------------


@dataclass
class FakeProcess:
    """Clients that take what they are told to."""

    found: list[Turn | Exception]

    @property
    def clients(self) -> list[int]:
        return list(range(len(self.found)))

    def send(self) -> None:
        """They begin by themselves."""

    def turns(self) -> Iterator[Turn]:
        for each in self.found:
            if isinstance(each, Exception):
                raise each
            yield each


def taken(*processes: FakeProcess) -> tuple[list[Turn], list[int]]:
    told: list[int] = []
    return list(all_turns(cast(list[Rounders], processes), told.append)), told


def test_turns_of_all_processes_come_as_they_are_done() -> None:
    found, told = taken(FakeProcess([Turn(1.0), Turn(2.0)]), FakeProcess([Turn(3.0)]))
    assert sorted(turn.fetch_s for turn in found) == [1.0, 2.0, 3.0]
    assert told == [1, 2, 3]


@pytest.mark.parametrize(
    ("last", "why"),
    [
        (Turn(refused="CLOSED"), "one was not: CLOSED"),
        (SecaggError("expected clients that go on"), "go on"),
    ],
)
def test_a_client_that_is_refused_or_gone_ends_the_round(last: Turn | Exception, why: str) -> None:
    with pytest.raises(SecaggError, match=why):
        taken(FakeProcess([Turn(), last]), FakeProcess([Turn()]))


# --- tables --------------------------------------------------------------------------------------


def rows_of(system: str, clients: int, seed: int = 1, **values: float) -> list[Row]:
    common: dict[str, Any] = {
        "scenario": "rounds",
        "system": system,
        "version": "secagg 1",
        "parameters": 1000,
        "clients": clients,
        "seed": seed,
        "machine": "here",
    }
    return [
        Row.model_validate(common | {"metric": metric, "unit": UNITS[metric], "value": value})
        for name, value in values.items()
        for metric in [Metric[name]]
    ]


EVERYTHING = {
    **dict.fromkeys(("ROUND", "CONCLUDING", "KEY_HOLDER_CPU"), 3.0),
    **{"FETCHING": 10.0, "ENCRYPTING": 20.0, "UPLOADING": 30.0},
    **{"CLIENTS_CPU": 40.0, "SERVER_CPU": 50.0, "UPLOAD": 3.5e6},
    **{"SERVER_MEMORY": 300e6, "KEY_HOLDER_MEMORY": 200e6},
}


def cells(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines[1:]]


def test_a_table_of_rounds_divides_by_clients_what_is_theirs() -> None:
    found = [
        *rows_of("secagg", 100, **EVERYTHING),
        *rows_of("secagg", 10, seed=1, **EVERYTHING),
        *rows_of("secagg", 10, seed=2, **EVERYTHING | {"ROUND": 5.0}),
        *rows_of("checked", 10, **EVERYTHING),
    ]
    lines = cells(rounds_table(found))
    assert [line[:4] for line in lines] == [
        ["1,000", "10", "secagg", "4 s"],
        ["1,000", "10", "checked", "3 s"],
        ["1,000", "100", "secagg", "3 s"],
    ]
    assert lines[0][4:] == [*("1 s", "2 s", "3 s", "4 s", "5 s"), "3 s", "3 s", "300 MB", "200 MB"]
    assert lines[2][4:9] == ["100 ms", "200 ms", "300 ms", "400 ms", "500 ms"]
    assert "An upload is of 3.5 MB." in rounds_table(found)


def test_a_table_of_lines_says_how_many_times_the_least_they_take() -> None:
    found = rows_of("no limit", 10, **EVERYTHING | {"LEAST": 0.0})
    found += rows_of("slow", 10, **EVERYTHING | {"LEAST": 25.0})
    lines = cells(lines_table(found))
    assert lines == [
        ["no limit", "1 s", "2 s", "3 s", "–", "–", "3 s", "3 s"],
        ["slow", "1 s", "2 s", "3 s", "2.5 s", "× 1.6", "3 s", "3 s"],
    ]
