"""Tables of a scenario's rows: medians, ratios of pairs, and how costs grow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from statistics import median

import numpy as np

from secagg_bench.suite.rows import Metric, Row

__all__ = ["OURS", "exponents", "growth_table", "ratio", "table"]

OURS = "secagg"
"""The system that the others are compared with, by its name in results."""

_TIMES = (Metric.CLIENT, Metric.ADD, Metric.HAND_OVER, Metric.OPEN)
_HEADS = {
    Metric.CLIENT: "client",
    Metric.ADD: "server, for each client",
    Metric.HAND_OVER: "server, once",
    Metric.OPEN: "key holder, once",
}


def ratio(rows: Iterable[Row], metric: Metric, system: str, to: str) -> float:
    """Median over the repetitions of one system's figure divided by another's of the same seed.

    Args:
        rows: of one scenario, size and cohort.

    Raises:
        ValueError: they have no repetition in common.
    """
    found = {(row.system, row.seed): row.value for row in rows if row.metric is metric}
    seeds = {seed for name, seed in found if name == system and (to, seed) in found}
    pairs = [found[system, seed] / found[to, seed] for seed in seeds if found[to, seed]]
    if not pairs:
        raise ValueError(f"expected {system} and {to} in one repetition; there is none")
    return median(pairs)


def table(rows: Sequence[Row], to: str = OURS) -> str:
    """A line for each size, cohort and system: what it takes, and how many times what ``to`` takes.

    Args:
        rows: of one scenario.
        to: a system among them.
    """
    head = ("parameters", "clients", "system", "upload, bytes a parameter")
    lines = [
        f"| {' | '.join((*head, *_HEADS.values(), 'error'))} |",
        f"|--:|--:|---|{'--:|' * (len(_HEADS) + 2)}",
    ]
    for (parameters, clients), group in _groups(rows):
        for system in dict.fromkeys(row.system for row in group):
            size = _middle(group, Metric.UPLOAD, system) / parameters
            cells = [f"{parameters:,}", f"{clients:,}", system]
            cells.append(f"{size:.3g}{_times(group, Metric.UPLOAD, system, to)}")
            for metric in _TIMES:
                took = _time(_middle(group, metric, system))
                cells.append(f"{took}{_times(group, metric, system, to)}")
            cells.append(f"{_middle(group, Metric.ERROR, system):.0e}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _note(rows, to), ""])


def exponents(rows: Sequence[Row], metric: Metric) -> Mapping[str, float]:
    """By system, the power of the number of parameters by which a cost grows.

    The slope of a straight line through the medians on logarithmic axes; nothing for a system of
    one size.
    """
    found = {}
    for system in dict.fromkeys(row.system for row in rows):
        points = {
            size: _middle(group, metric, system)
            for (size, _), group in _groups([row for row in rows if row.system == system])
        }
        if len(points) > 1 and all(points.values()):
            sizes, costs = np.log(list(points)), np.log(list(points.values()))
            found[system] = float(np.polyfit(sizes, costs, 1)[0])
    return found


def growth_table(rows: Sequence[Row]) -> str:
    """`exponents` of what takes time and of the bytes of an upload."""
    metrics = (Metric.CLIENT, Metric.ADD, Metric.OPEN, Metric.UPLOAD)
    grown = {metric: exponents(rows, metric) for metric in metrics}
    lines = [
        "| system | client | server, for each client | key holder | bytes of an upload |",
        "|---|--:|--:|--:|--:|",
    ]
    for system in dict.fromkeys(row.system for row in rows):
        cells = [f"{found[system]:.2f}" if system in found else "–" for found in grown.values()]
        lines.append(f"| {system} | {' | '.join(cells)} |")
    sizes = sorted({row.parameters for row in rows})
    note = f"Fitted to medians at {', '.join(f'{size:,}' for size in sizes)} parameters."
    return "\n".join([*lines, "", note, ""])


def _groups(rows: Sequence[Row]) -> Iterable[tuple[tuple[int, int], list[Row]]]:
    def size(row: Row) -> tuple[int, int]:
        return row.parameters, row.clients

    return [(key, list(group)) for key, group in groupby(sorted(rows, key=size), size)]


def _middle(rows: Sequence[Row], metric: Metric, system: str) -> float:
    return median(row.value for row in rows if (row.metric, row.system) == (metric, system))


def _times(rows: Sequence[Row], metric: Metric, system: str, to: str) -> str:
    """How many times the other's figure, where that means anything."""
    if system == to or not _middle(rows, metric, to):
        return ""
    times = ratio(rows, metric, system, to)
    return f" (× {_figures(times)})" if times and math.isfinite(times) else ""


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{_figures(1000 * seconds)} ms"


def _figures(value: float) -> str:
    """Two figures, in full."""
    if value >= 100:
        return f"{float(f'{value:.2g}'):,.0f}"
    return f"{value:.2g}"


def _note(rows: Sequence[Row], to: str) -> str:
    versions = dict.fromkeys(row.version for row in rows)
    repetitions = len({row.seed for row in rows})
    machines = ", ".join(dict.fromkeys(row.machine for row in rows))
    scenario = rows[0].scenario
    return (
        f"Seconds of processor time on one core, medians of {repetitions} interleaved "
        f"repetition{'s' if repetitions > 1 else ''}; in brackets the median of the repetitions' "
        f"ratios to {to}. {'; '.join(versions)}. {machines}. From "
        f"[bench/results/suite/{scenario}.csv](../bench/results/suite/{scenario}.csv), written by "
        f"`secagg-bench run {scenario}`."
    )
