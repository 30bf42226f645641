"""Tables of what very many clients would need: `scale` with what the suite has measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Final

from secagg_bench.suite.medians import middle, points
from secagg_bench.suite.report import NOT_MEASURED, OURS, figures, markdown, time
from secagg_bench.suite.rows import Metric, Row
from secagg_bench.suite.scale import Costs, Demand, demand, line, planned, room

__all__ = [
    "CHECKED",
    "costs_of",
    "costs_table",
    "demand_table",
    "room_table",
    "rounds_costs",
    "sums_table",
]

CHECKED = f"{OURS}, norm check"
"""Ours with the norm check, by its name in results."""

_PARAMETERS: Final = 1_000_000
_CLIENTS: Final = (1_000, 10_000, 100_000, 1_000_000)
_SUMS: Final = (1_000, 5_000, 100_000, 1_000_000)
_ROUND_S: Final = 3600.0
_CORES: Final = 16

Measured = Mapping[str, Sequence[Row]]
"""Rows by scenario."""


def costs_of(measured: Measured) -> Costs:
    """What the suite has measured of one client, and of a sum.

    Args:
        measured: rows of ``sizes``, ``checks`` and ``clients``; of what is missing, costs are NaN.
    """
    sizes, checks = (
        [row for row in measured.get(each, ()) if row.parameters == _PARAMETERS]
        for each in ("sizes", "checks")
    )
    opened = points(measured.get("clients", ()), Metric.OPEN, OURS, "clients")
    least = min((row.parameters for row in measured.get("checks", ())), default=0)
    small = [row for row in measured.get("checks", ()) if row.parameters == least]
    cohort = small[0].clients if small else 1
    return Costs(
        upload_bytes=middle(sizes, Metric.UPLOAD, OURS),
        take_s=middle(sizes, Metric.ADD, OURS),
        sketch_s=_more(checks, Metric.ADD),
        admit_s=line(opened)[0],
        judge_s=_more(small, Metric.OPEN) / cohort,
        open_s=middle(sizes, Metric.OPEN, OURS),
    )


def rounds_costs(measured: Measured) -> Costs:
    """The same of whole rounds, by gRPC and mutual TLS, with files, database and journal.

    Slopes by the number of clients. What the norm check adds is the difference of two slopes.

    Args:
        measured: rows of ``rounds``; of what is missing, costs are NaN.
    """
    rows = measured.get("rounds", ())
    size = max((row.parameters for row in rows), default=_PARAMETERS)

    def seen(metric: Metric, system: str) -> dict[int, float]:
        part = [row for row in rows if row.parameters == size]
        return points(part, metric, system, "clients")

    def added(metric: Metric) -> float:
        """By the norm check; between cohorts that were measured with and without it."""
        checked, without = seen(metric, CHECKED), seen(metric, OURS)
        both = checked.keys() & without.keys()
        slopes = [line({each: found[each] for each in both})[0] for found in (checked, without)]
        return slopes[0] - slopes[1]

    admit_s, open_s = line(seen(Metric.KEY_HOLDER_CPU, OURS))
    return Costs(
        upload_bytes=planned(size, _CLIENTS[0]).payload_bytes,
        take_s=line(seen(Metric.SERVER_CPU, OURS))[0],
        sketch_s=added(Metric.SERVER_CPU),
        admit_s=admit_s,
        judge_s=added(Metric.KEY_HOLDER_CPU),
        open_s=open_s,
    )


_COSTS: Final = {
    "upload_bytes": "upload of a client, planned for 1,000",
    "take_s": "server: receipt, digest, add; each client",
    "sketch_s": "server: sketch of the norm check; each client",
    "admit_s": "key holder: signature and seal; each client",
    "judge_s": "key holder: open a sketch and judge it; each client",
    "open_s": "key holder: open; each sum",
}


def costs_table(measured: Measured) -> str:
    """What everything is multiplied from."""
    alone, whole = costs_of(measured), rounds_costs(measured)
    lines = []
    for name, what in _COSTS.items():
        shown = _bytes if name == "upload_bytes" else time
        cells = [shown(getattr(each, name)) for each in (alone, whole)]
        lines.append([what, *(NOT_MEASURED if cell == "–" else cell for cell in cells)])
    small = min((row.parameters for row in measured.get("checks", ())), default=0)
    note = (
        f"{_PARAMETERS:,} parameters, 8 bits; seconds of one core, medians. The calculation is "
        "that of `sizes`; its sketches are the difference of two systems of `checks`, verdicts "
        f"too, at {small:,} parameters, because they hardly depend on the model; admissions the "
        "slope of `clients` by the number of clients. Whole rounds are the slopes and the "
        "intercept of `rounds`."
    )
    heads = ["", "the calculation alone", "whole rounds, over gRPC and TLS"]
    return markdown(heads, lines, note)


def demand_table(measured: Measured) -> str:
    """What a round of an hour needs, by the number of clients in one sum."""
    alone, whole = costs_of(measured), rounds_costs(measured)

    def needs(costs: Costs, *, checked: bool = True) -> list[Demand]:
        return [demand(costs, _PARAMETERS, each, _ROUND_S, checked=checked) for each in _CLIENTS]

    needed = needs(alone)
    lines = [
        ["upload of a client", *(_bytes(each.upload_bytes) for each in needed)],
        [
            "uploads; on the server's disk until the sum",
            *(_bytes(each.up_bytes) for each in needed),
        ],
        ["downloads of the model", *(_bytes(each.down_bytes) for each in needed)],
        ["server's line, in", *(_rate(each.up_bits_s) for each in needed)],
        ["server's line, out", *(_rate(each.down_bits_s) for each in needed)],
        ["sketches, server to key holder", *(_bytes(each.sketch_bytes) for each in needed)],
    ]
    for what, found in (
        ("the calculation alone", needed),
        ("the same, no norm check", needs(alone, checked=False)),
        ("whole rounds", needs(whole)),
        ("the same, no norm check", needs(whole, checked=False)),
    ):
        lines.append([f"server's cores: {what}", *(_cores(each.server_cores) for each in found)])
    known = whole if not math.isnan(whole.take_s + whole.sketch_s) else alone
    lines += [
        [f"server machines of {_CORES} cores", *(_machines(each) for each in needs(known))],
        ["key holder's cores", *(_cores(each.key_holder_cores) for each in needs(alone))],
        [
            "key holder's cores: whole rounds",
            *(_cores(each.key_holder_cores) for each in needs(whole)),
        ],
    ]
    heads = ["a round of an hour", *(f"{each:,} clients" for each in _CLIENTS)]
    source = "whole rounds" if known is whole else "the calculation alone"
    note = (
        f"{_PARAMETERS:,} parameters, 8 bits, norm check on where nothing else is said. Bytes of "
        "uploads and sketches are the planner's. A core is one that is busy for the whole hour; "
        f"machines by the cores of {source}."
    )
    return markdown(heads, lines, note)


def sums_table(measured: Measured) -> str:
    """The largest number of clients in one sum, or in several smaller ones."""
    costs, clients = costs_of(measured), _CLIENTS[-1]
    lines = []
    for cohort in _SUMS:
        need = demand(costs, _PARAMETERS, clients, _ROUND_S, cohort=cohort)
        per = need.upload_bytes / _PARAMETERS
        lines.append(
            [
                f"{need.sums:,} of {cohort:,}",
                f"{per:.3g}",
                _bytes(need.up_bytes),
                _cores(need.server_cores),
                _cores(need.key_holder_cores),
            ]
        )
    heads = [f"sums, {clients:,} clients", "bytes a parameter", "uploads"]
    note = f"{_PARAMETERS:,} parameters, 8 bits, norm check, an hour."
    return markdown([*heads, "server, cores", "key holder, cores"], lines, note)


def room_table(_measured: Measured) -> str:
    """How many clients a sum may have before each upload gets longer, from the planner."""
    lines = []
    for bits in (4, 8, 12, 16):
        for checked in (False, True):
            steps = [
                f"{size / _PARAMETERS:.3g} up to {clients:,}"
                for size, clients in room(_PARAMETERS, bits=bits, checked=checked)
            ]
            lines.append([str(bits), "yes" if checked else "no", "; ".join(steps)])
    *_, (_, most) = room(_PARAMETERS)
    note = (
        f"{_PARAMETERS:,} parameters; float32 takes 4 bytes. From the planner, which takes at most "
        f"{most:,} clients in a sum."
    )
    return markdown(["bits", "norm check", "bytes a parameter"], lines, note, texts=(1, 2))


def _more(rows: Sequence[Row], metric: Metric) -> float:
    """What the norm check adds to a cost: the median of the repetitions' differences."""
    without = {row.seed: row.value for row in rows if (row.system, row.metric) == (OURS, metric)}
    more = [
        row.value - without[row.seed]
        for row in rows
        if (row.system, row.metric) == (CHECKED, metric) and row.seed in without
    ]
    return median(more) if more else math.nan


def _bytes(size: float) -> str:
    for unit, factor in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return "–" if math.isnan(size) else f"{size / 1e3:.3g} kB"


def _rate(bits_s: float) -> str:
    unit, factor = ("Gbit/s", 1e9) if bits_s >= 1e9 else ("Mbit/s", 1e6)
    return f"{figures(bits_s / factor)} {unit}"


def _cores(cores: float) -> str:
    return NOT_MEASURED if math.isnan(cores) else figures(cores)


def _machines(need: Demand) -> str:
    return NOT_MEASURED if math.isnan(need.server_cores) else f"{need.machines(_CORES):,}"
