"""Tables of the suite's rows, in Markdown.

What was to be measured and was not stands in them as such: a system is never left out silently.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from secagg_bench.suite.medians import (
    Axis,
    exponents,
    groups,
    middle,
    ratios,
    systems_of,
)
from secagg_bench.suite.rows import Metric, Row

__all__ = [
    "LIMIT",
    "NOT_MEASURED",
    "OURS",
    "figures",
    "growth_table",
    "limit_table",
    "markdown",
    "megabytes",
    "power_text",
    "source",
    "summary_table",
    "table",
    "targets_table",
    "time",
]

OURS = "secagg"
"""The system that the others are compared with, by its name in results."""

LIMIT = "limit"
"""What does only that which any such encryption must do; no competitor."""

NOT_MEASURED = "not measured"
"""What stands in the place of a figure that was to be had."""

_NVFLARE, _TENSEAL, _PLAIN = "NVFlare HE", "TenSEAL CKKSVector", "plaintext"
_SECAGGPLUS = "Flower SecAgg+"
_MILLION = 1_000_000

_TIMES = {
    Metric.CLIENT: "client",
    Metric.ADD: "server, for each client",
    Metric.HAND_OVER: "server, once",
    Metric.OPEN: "key holder, once",
}
_UPLOAD = "upload, bytes a parameter"
_MEMORY = "memory"
_SUITE = "bench/results/suite"


def table(rows: Sequence[Row], to: str = OURS, systems: Iterable[str] = ()) -> str:
    """A line for each size, cohort and system: what it takes, and how many times what ``to`` takes.

    Args:
        rows: of one scenario; those of `LIMIT` are left to `limit_table`.
        to: a system among them.
        systems: those that were to be measured.
    """
    rows = [row for row in rows if row.system != LIMIT]
    wanted = [each for each in dict.fromkeys([*systems, *systems_of(rows)]) if each != LIMIT]
    memory = any(row.metric is Metric.MEMORY for row in rows)
    heads = ["parameters", "clients", "system", _UPLOAD, *_TIMES.values()]
    lines = []
    for (parameters, clients), group in groups(rows):
        for system in wanted:
            size = middle(group, Metric.UPLOAD, system) / parameters
            cells = [f"{parameters:,}", f"{clients:,}", system]
            if math.isnan(size):
                lines.append([*cells, NOT_MEASURED, *["–"] * (len(_TIMES) + memory + 1)])
                continue
            cells.append(f"{size:.3g}{_times(group, Metric.UPLOAD, system, to)}")
            for metric in _TIMES:
                took = time(middle(group, metric, system))
                cells.append(f"{took}{_times(group, metric, system, to)}")
            if memory:
                cells.append(megabytes(middle(group, Metric.MEMORY, system)))
            error = middle(group, Metric.ERROR, system)
            lines.append([*cells, "–" if math.isnan(error) else f"{error:.0e}"])
    heads += [_MEMORY] * memory + ["error"]
    return markdown(heads, lines, _note(rows, to), texts=(2,))


def limit_table(rows: Sequence[Row]) -> str:
    """How many times the least that any such encryption must do is what ours does, by size.

    Args:
        rows: of one or more scenarios; those without rows of `LIMIT` are left out, if another has
            any.
    """
    with_limit = {row.scenario for row in rows if row.system == LIMIT} or {rows[0].scenario}
    rows = [row for row in rows if row.scenario in with_limit]
    asked = (
        ("client", Metric.CLIENT, Metric.CLIENT),
        ("server, for each client", Metric.ADD, Metric.ADD),
        ("the same, no receipt or digest", Metric.ADD_UNAUTHENTICATED, Metric.ADD),
        ("key holder, once", Metric.OPEN, Metric.OPEN),
        ("upload", Metric.UPLOAD, Metric.UPLOAD),
    )
    lines = []
    for (parameters, clients), group in groups(rows):
        cells = [f"{parameters:,}", f"{clients:,}"]
        for _, ours, least in asked:
            found = ratios(group, ours, OURS, LIMIT, to_metric=least)
            if not found:
                cells.append(NOT_MEASURED)
                continue
            values = (middle(group, ours, OURS), middle(group, least, LIMIT))
            shown = " / ".join(_shown(each, ours, parameters) for each in values)
            cells.append(f"**× {figures(median(found))}** ({shown})")
        lines.append(cells)
    versions = dict.fromkeys(f"{row.version}. " for row in rows if row.system == LIMIT)
    note = (
        f"How many times the limit {OURS} takes; in brackets its figure / the limit's, uploads in "
        f"bytes a parameter. The median of the repetitions' ratios. {''.join(versions)}"
    )
    heads = ["parameters", "clients", *(name for name, _, _ in asked)]
    return markdown(heads, lines, f"{note}{source(rows)}")


def growth_table(rows: Sequence[Row], by: Axis = "parameters") -> str:
    """`exponents` of what takes time, memory and bytes.

    Args:
        rows: of one or more scenarios that ask the same of the same systems.
        by: what they grow with.
    """
    other: Axis = "clients" if by == "parameters" else "parameters"
    metrics = {**_TIMES, Metric.UPLOAD: "bytes of an upload", Metric.MEMORY: _MEMORY}
    have = {row.metric for row in rows}
    shown = {metric: name for metric, name in metrics.items() if metric in have}
    lines, places = [], set()
    for fixed in sorted({getattr(row, other) for row in rows}):
        part = [row for row in rows if getattr(row, other) == fixed and row.system != LIMIT]
        if len(found := {getattr(row, by) for row in part}) < 2:
            continue
        places |= found
        grown = [exponents(part, metric, by) for metric in shown]
        for system in systems_of(part):
            cells = [power_text(each[system]) if system in each else "–" for each in grown]
            lines.append([f"{fixed:,}", system, *cells])
    listed = ", ".join(f"{place:,}" for place in sorted(places))
    note = f"Fitted to medians at {listed} {by}, of a system at those where it was measured."
    return markdown([other, "system", *shown.values()], lines, note, texts=(1,))


@dataclass(frozen=True)
class _Target:
    """A figure that is asked for first.

    Attributes:
        parameters: of the model; 0 for the only one there is.
        ours: system and metric that are ours in it.
    """

    what: str
    scenario: str
    metric: Metric
    to: str
    ours: tuple[str, Metric] | None = None
    parameters: int = _MILLION


_TARGETS = (
    _Target("upload", "sizes", Metric.UPLOAD, _NVFLARE),
    _Target("upload", "sizes", Metric.UPLOAD, _TENSEAL),
    _Target("upload: 8 bits, planned for 1,000 clients", "sizes", Metric.UPLOAD, _PLAIN),
    _Target(
        *("upload: 4 bits, planned for 100 clients", "bits", Metric.UPLOAD, _PLAIN),
        ours=("secagg, 4 bits", Metric.UPLOAD),
    ),
    _Target("upload: NCF of seven layers", "layers", Metric.UPLOAD, _NVFLARE, parameters=0),
    _Target("client", "sizes", Metric.CLIENT, _NVFLARE),
    _Target("client", "sizes", Metric.CLIENT, _TENSEAL),
    _Target("server, for each client", "sizes", Metric.ADD, _NVFLARE),
    _Target(
        *("the same, ours without receipt and digest", "sizes", Metric.ADD, _NVFLARE),
        ours=(OURS, Metric.ADD_UNAUTHENTICATED),
    ),
    _Target("key holder, once", "sizes", Metric.OPEN, _NVFLARE),
)
_SPEEDS = (
    ("ciphertext that the server takes", Metric.ADD),
    ("the same, without receipt and digest", Metric.ADD_UNAUTHENTICATED),
)


def targets_table(measured: Mapping[str, Sequence[Row]]) -> str:
    """What everybody asks for first: a line a question, with the range of the repetitions.

    Args:
        measured: rows of ``sizes``, ``bits`` and ``layers``, by scenario; what is missing stands in
            the table as not measured.
    """
    lines = [_target_line(each, measured.get(each.scenario, ())) for each in _TARGETS]
    million = [row for row in measured.get("sizes", ()) if row.parameters == _MILLION]
    for what, metric in _SPEEDS:
        # Bytes a nanosecond are gigabytes a second.
        pairs = ratios(million, Metric.UPLOAD, OURS, OURS, to_metric=metric)
        speeds = [each / 1e9 for each in pairs]
        found = f"{median(speeds):.2g} GB/s" if speeds else NOT_MEASURED
        lines.append([what, found, "–", "–", "–", _range(speeds)])
    note = (
        "How many times what secagg takes the other one takes: the median, the lowest and the "
        "highest of the repetitions' ratios; 1,000,000 parameters where nothing else is said, and "
        "8 bits. From "
    )
    files = ", ".join(
        f"[{name}.csv](../{_SUITE}/{name}.csv)"
        for name in dict.fromkeys(each.scenario for each in _TARGETS)
    )
    heads = ["", "secagg", "beside", "it takes", "times", "lowest to highest"]
    return markdown(heads, lines, f"{note}{files}.", texts=(0, 2))


def _target_line(target: _Target, rows: Sequence[Row]) -> list[str]:
    system, metric = target.ours or (OURS, target.metric)
    part = [row for row in rows if target.parameters in (0, row.parameters)]
    size = part[0].parameters if part else 1
    values = (middle(part, metric, system), middle(part, target.metric, target.to))
    shown = [
        NOT_MEASURED if math.isnan(each) else _shown(each, metric, size, " B a parameter")
        for each in values
    ]
    found = ratios(part, target.metric, target.to, system, to_metric=metric)
    digits = 3 if metric is Metric.UPLOAD else 2  # bytes do not vary
    times = f"**× {figures(median(found), digits)}**" if found else "–"
    return [target.what, shown[0], target.to, shown[1], times, _range(found, digits)]


def summary_table(sizes: Sequence[Row], masks: Sequence[Row]) -> str:
    """A million parameters in a few lines, for the README.

    Args:
        sizes: rows of the scenario of this name.
        masks: rows of the scenario of this name; its largest cohort is shown.
    """
    million = [row for row in sizes if row.parameters == _MILLION]
    largest = max((row.clients for row in masks), default=0)
    others = [row for row in masks if (row.parameters, row.clients) == (_MILLION, largest)]
    metrics = (Metric.UPLOAD, Metric.CLIENT, Metric.ADD, Metric.OPEN)
    lines = []
    for system, part in (
        *((each, million) for each in (OURS, _NVFLARE, _TENSEAL, _PLAIN)),
        (_SECAGGPLUS, others),
        (f"{_SECAGGPLUS}, 3 shares", others),
    ):
        cells = [f"**{system}**" if system == OURS else system]
        for metric in metrics:
            value = middle(part, metric, system)
            cells.append(
                NOT_MEASURED
                if math.isnan(value)
                else f"{_shown(value, metric, _MILLION)}{_times(part, metric, system, OURS)}"
            )
        lines.append(cells)
    cohorts = [str(part[0].clients) if part else NOT_MEASURED for part in (million, others)]
    note = (
        f"One core, {cohorts[0]} clients; medians of interleaved repetitions, and in brackets how "
        "many times what secagg takes: trust the ratios more than the milliseconds. Ours quantises "
        "to 8 bits, checks signatures and digests, and is planned for 1,000 clients; plaintext "
        f"protects nothing. SecAgg+ has no key holder: its clients, {cohorts[1]} in a run of its "
        "own, help its server to open the sum. From "
        f"[{_SUITE}]({_SUITE}), written by `make bench`; all of it: "
        "[against the alternatives](docs/benchmarks.md)."
    )
    heads = [
        f"{_MILLION:,} parameters",
        _UPLOAD,
        *(_TIMES[metric] for metric in metrics[1:]),
    ]
    return markdown(heads, lines, note)


def markdown(
    heads: Sequence[str],
    lines: Iterable[Sequence[str]],
    note: str,
    texts: Iterable[int] = (0,),
) -> str:
    """A table and its note, as a block of a page.

    Args:
        texts: columns that are read and not compared; the others are aligned on the right.
    """
    left = set(texts)
    aligned = "|".join("---" if place in left else "--:" for place in range(len(heads)))
    body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([f"| {' | '.join(heads)} |", f"|{aligned}|", *body, "", note, ""])


def time(seconds: float) -> str:
    """Milliseconds or seconds, two or three figures; a dash for what is not known."""
    if math.isnan(seconds):
        return "–"
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{figures(1000 * seconds)} ms"


def figures(value: float, digits: int = 2) -> str:
    """So many figures, in full."""
    rounded = f"{value:.{digits}g}"
    return f"{float(rounded):,.0f}" if float(rounded) >= 100 else rounded


def power_text(power: float) -> str:
    """Two decimals; never less than nothing by rounding alone."""
    return f"{round(power, 2) + 0.0:.2f}"


def _shown(value: float, metric: Metric, parameters: int, unit: str = "") -> str:
    return f"{value / parameters:.3g}{unit}" if metric is Metric.UPLOAD else time(value)


def megabytes(size: float) -> str:
    """Of a million bytes, without decimals; a dash for what is not known."""
    return "–" if math.isnan(size) else f"{size / 1e6:,.0f} MB"


def _range(found: Sequence[float], digits: int = 2) -> str:
    if not found:
        return "–"
    return f"{figures(min(found), digits)} to {figures(max(found), digits)}"


def _times(rows: Sequence[Row], metric: Metric, system: str, to: str) -> str:
    """How many times the other's figure, where that means anything."""
    pairs = ratios(rows, metric, system, to)
    if system == to or not pairs or not median(pairs):
        return ""
    return f" (× {figures(median(pairs))})"


def _note(rows: Sequence[Row], to: str) -> str:
    versions = dict.fromkeys(row.version for row in rows)
    repetitions = len({row.seed for row in rows})
    return (
        f"Seconds of processor time on one core, medians of {repetitions} interleaved "
        f"repetition{'s' if repetitions > 1 else ''}; in brackets the median of the repetitions' "
        f"ratios to {to}. {'; '.join(versions)}. {source(rows)}"
    )


def source(rows: Sequence[Row]) -> str:
    """Machines, and where the rows are; the first word of a sentence or two."""
    machines = ", ".join(dict.fromkeys(row.machine for row in rows))
    names = list(dict.fromkeys(row.scenario for row in rows))
    files = ", ".join(f"[{_SUITE}/{name}.csv](../{_SUITE}/{name}.csv)" for name in names)
    return f"{machines}. From {files}, written by `secagg-bench run {' '.join(names)}`."
