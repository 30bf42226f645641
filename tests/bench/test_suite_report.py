"""What tables make of rows: pairs by seed, medians, and powers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secagg_bench.suite.report import exponents, growth_table, ratio, table
from secagg_bench.suite.rows import UNITS, Metric, Row


def row(system: str, metric: Metric, value: float, seed: int = 1, **changes: Any) -> Row:  # noqa: ANN401
    values = {
        "scenario": "sizes",
        "system": system,
        "version": f"{system} 1",
        "parameters": 10,
        "clients": 3,
        "metric": metric,
        "value": value,
        "unit": UNITS[metric],
        "seed": seed,
        "machine": "here",
    }
    return Row.model_validate(values | changes)


def test_ratios_are_of_pairs_and_not_of_medians() -> None:
    """The machine was ten times as slow in one repetition: both were."""
    ours = [
        row("secagg", Metric.CLIENT, value, seed) for seed, value in enumerate((1.0, 10.0, 2.0))
    ]
    theirs = [
        row("other", Metric.CLIENT, value, seed) for seed, value in enumerate((3.0, 30.0, 5.0))
    ]
    assert ratio([*ours, *theirs], Metric.CLIENT, "other", "secagg") == 3.0
    assert ratio([*ours, *theirs[:1]], Metric.CLIENT, "other", "secagg") == 3.0


@pytest.mark.parametrize("seed", [2, None])
def test_systems_without_a_repetition_in_common_have_no_ratio(seed: int | None) -> None:
    rows = [row("secagg", Metric.CLIENT, 1.0, 1)]
    rows += [] if seed is None else [row("other", Metric.CLIENT, 1.0, seed)]
    with pytest.raises(ValueError, match="none"):
        ratio(rows, Metric.CLIENT, "other", "secagg")


@given(st.floats(-1, 3), st.floats(1e-6, 1e3))
def test_the_power_of_a_power_is_found(power: float, factor: float) -> None:
    rows = [
        row("secagg", Metric.CLIENT, factor * size**power, parameters=size)
        for size in (10, 100, 1000)
    ]
    assert exponents(rows, Metric.CLIENT)["secagg"] == pytest.approx(power, abs=1e-6)
    assert exponents(rows[:1], Metric.CLIENT) == {}, "one size says nothing"


def everything(system: str, factor: float, size: int, seed: int) -> list[Row]:
    return [row(system, metric, factor * size, seed, parameters=size) for metric in Metric]


def test_a_table_has_a_line_for_each_system_of_each_size_in_order() -> None:
    rows = [
        each
        for size in (200, 100)
        for seed in (1, 2)
        for system, factor in (("secagg", 1.0), ("other", 4.0))
        for each in everything(system, factor, size, seed)
    ]
    text = table(rows)
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert [line.split(" | ")[:3] for line in lines] == [
        ["| 100", "3", "secagg"],
        ["| 100", "3", "other"],
        ["| 200", "3", "secagg"],
        ["| 200", "3", "other"],
    ]
    assert lines[1].count("(× 4)") == 5, "bytes and four times"
    assert "(×" not in lines[0]
    assert "medians of 2 interleaved repetitions" in text
    assert "secagg 1; other 1" in text
    assert growth_table(rows).count("| 1.00 |") >= 2


def test_what_is_nothing_for_one_has_no_ratio() -> None:
    rows = everything("secagg", 1.0, 10, 1) + everything("other", 0.0, 10, 1)
    assert "(×" not in table(rows)
    assert "| other | – |" in growth_table(rows)
