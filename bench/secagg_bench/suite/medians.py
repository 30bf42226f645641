"""What is taken from rows: medians, ratios of pairs, and powers by which costs grow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from statistics import median
from typing import Literal

import numpy as np

from secagg_bench.suite.rows import Metric, Row

__all__ = ["Axis", "exponents", "groups", "middle", "points", "ratio", "ratios", "systems_of"]

Axis = Literal["parameters", "clients"]
"""What costs may grow with."""


def systems_of(rows: Iterable[Row]) -> list[str]:
    """Names of systems, in the order of their first rows."""
    return list(dict.fromkeys(row.system for row in rows))


def groups(rows: Iterable[Row]) -> list[tuple[tuple[int, int], list[Row]]]:
    """Rows of one size and cohort together: parameters and clients, then the rows; ascending."""

    def size(row: Row) -> tuple[int, int]:
        return row.parameters, row.clients

    return [(key, list(group)) for key, group in groupby(sorted(rows, key=size), size)]


def middle(rows: Iterable[Row], metric: Metric, system: str) -> float:
    """Median over the repetitions; NaN where nothing was measured."""
    found = [row.value for row in rows if (row.metric, row.system) == (metric, system)]
    return median(found) if found else math.nan


def ratios(
    rows: Iterable[Row], metric: Metric, system: str, to: str, *, to_metric: Metric | None = None
) -> list[float]:
    """One system's figure divided by another's of the same seed, one a repetition.

    Args:
        rows: of one scenario, size and cohort.
        to: the other system; repetitions in which its figure is nothing are left out.
        to_metric: of the other system; the same when omitted.
    """
    rows = list(rows)
    below = {
        row.seed: row.value for row in rows if (row.system, row.metric) == (to, to_metric or metric)
    }
    return [
        row.value / below[row.seed]
        for row in rows
        if (row.system, row.metric) == (system, metric) and below.get(row.seed)
    ]


def ratio(rows: Iterable[Row], metric: Metric, system: str, to: str) -> float:
    """Median of `ratios`.

    Raises:
        ValueError: they have no repetition in common.
    """
    pairs = ratios(rows, metric, system, to)
    if not pairs:
        raise ValueError(f"expected {system} and {to} in one repetition; there is none")
    return median(pairs)


def points(
    rows: Iterable[Row], metric: Metric, system: str, by: Axis = "parameters"
) -> dict[int, float]:
    """Medians of a system by number of parameters or of clients, ascending."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if (row.system, row.metric) == (system, metric):
            found.setdefault(getattr(row, by), []).append(row.value)
    return {place: median(found[place]) for place in sorted(found)}


def exponents(rows: Sequence[Row], metric: Metric, by: Axis = "parameters") -> Mapping[str, float]:
    """By system, the power of the number of parameters, or of clients, by which a cost grows.

    The slope of a straight line through the medians on logarithmic axes; nothing for a system of
    one size, or one whose cost is nothing somewhere.

    Args:
        rows: alike in all but ``by`` and the system.
    """
    slopes = {}
    for system in systems_of(rows):
        seen = points(rows, metric, system, by)
        if len(seen) > 1 and all(seen.values()):
            places, costs = np.log(list(seen)), np.log(list(seen.values()))
            slopes[system] = float(np.polyfit(places, costs, 1)[0])
    return slopes
