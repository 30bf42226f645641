"""``python -m secagg_bench.suite.figures``: draws what the suite has measured, into docs/.

A figure whose rows are missing is not drawn, and named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import matplotlib as mpl
import typer

mpl.use("svg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterMathtext, NullFormatter

from secagg.commands import exits_cleanly, out
from secagg_bench.axes import INK, tidy
from secagg_bench.load.figures import save
from secagg_bench.suite.medians import Axis, exponents, middle, points, systems_of
from secagg_bench.suite.report import LIMIT, OURS, power_text
from secagg_bench.suite.rows import Metric, Row, read

__all__ = ["FIGURES", "app", "bytes_figure", "growth_figure", "rounds_figure"]

app = typer.Typer(help=__doc__)

# Colours that all kinds of eyes tell apart (Okabe and Ito), and a mark each for those who print.
_LOOKS: Final = {
    OURS: ("#0072B2", "o"),
    "NVFlare HE": ("#D55E00", "s"),
    "TenSEAL CKKSVector": ("#E69F00", "^"),
    "FedML-HE": ("#CC79A7", "v"),
    "Flower SecAgg+": ("#009E73", "D"),
    "plaintext": ("#7f7f7f", "P"),
    LIMIT: ("#000000", "x"),
}
_OTHERS: Final = (("#56B4E9", "*"), ("#B8A800", "X"), ("#5a3e85", "h"), ("#8c564b", "<"))
_PANELS: Final = {
    Metric.CLIENT: "Client",
    Metric.ADD: "Server, for each client",
    Metric.OPEN: "Key holder, once",
}
_AXES: Final[Mapping[Axis, str]] = {"parameters": "parameters", "clients": "clients of a round"}
_WALL: Final = {
    Metric.FETCHING: ("fetch round and model", "#56B4E9"),
    Metric.ENCRYPTING: ("encrypt", "#0072B2"),
    Metric.UPLOADING: ("upload", "#E69F00"),
    Metric.CONCLUDING: ("from the last upload to the sums, shared by all clients", "#009E73"),
}
_SPENT: Final = {
    Metric.CLIENTS_CPU: ("the client", "#0072B2"),
    Metric.SERVER_CPU: ("server", "#E69F00"),
    Metric.KEY_HOLDER_CPU: ("key holder", "#CC79A7"),
}
_LABELS: Final = {OURS: f"{OURS}, 8 bits", LIMIT: f"{LIMIT}, 8 bits"}
_REST: Final = "#9aa5b1"
_SECAGGPLUS: Final = "Flower SecAgg+"
_MILLION: Final = 1_000_000


def growth_figure(rows: Sequence[Row], by: Axis = "parameters") -> Figure:
    """Processor time of each party against the size of model or cohort, with fitted powers.

    Args:
        rows: alike in all but ``by``, system and repetition.
    """
    figure, panels = plt.subplots(1, len(_PANELS), figsize=(11.4, 4.7), layout="constrained")
    looks = _looks(systems_of(rows))
    places = sorted({getattr(row, by) for row in rows})
    for axes, (metric, title) in zip(panels, _PANELS.items(), strict=True):
        tidy(axes, title, _AXES[by], "seconds of one core")
        powers = exponents(rows, metric, by)
        for system, (colour, mark) in looks.items():
            seen = points(rows, metric, system, by)
            if not seen:
                continue
            power = f": power {power_text(powers[system])}" if system in powers else ""
            axes.plot(
                list(seen),
                list(seen.values()),
                color=colour,
                marker=mark,
                markersize=5,
                linewidth=2.4 if system == OURS else 1.2,
                linestyle=":" if system == LIMIT else "-",
                zorder=3 if system == OURS else 2,
                label=f"{system}{power}",
            )
        _logarithmic(axes, places)
        _legend_below(axes)
    return figure


def bytes_figure(measured: Mapping[str, Sequence[Row]]) -> Figure:
    """What a client uploads, in bytes a parameter, by system.

    Args:
        measured: rows by scenario; of a million parameters, or else of the most there are. Kinds of
            ours that take what another of them takes are left out.
    """
    bars: dict[str, float] = {}
    for rows in measured.values():
        sizes = {row.parameters for row in rows}
        size = _MILLION if _MILLION in sizes else max(sizes)
        part = [row for row in rows if row.parameters == size]
        for system in systems_of(part):
            taken = middle(part, Metric.UPLOAD, system) / size
            same = system.startswith((OURS, _SECAGGPLUS)) and taken in bars.values()
            if not same and (system != OURS or size == _MILLION):
                name = _LABELS.get(system, system)
                bars[name if size == _MILLION else f"{name}, {size:,} parameters"] = taken
    ordered = sorted(bars, key=bars.__getitem__, reverse=True)
    figure, axes = plt.subplots(figsize=(9.4, 0.8 + 0.32 * len(ordered)), layout="constrained")
    tidy(axes, "Upload of one client, 1,000,000 parameters", "bytes a parameter", "")
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#e4e7eb", linewidth=0.7)
    colours = [_LOOKS[OURS][0] if name.startswith(OURS) else _REST for name in ordered]
    drawn = axes.barh(ordered, [bars[name] for name in ordered], color=colours, height=0.7)
    axes.bar_label(drawn, [f"{bars[name]:.3g}" for name in ordered], padding=4, color=INK)
    return figure


def rounds_figure(rows: Sequence[Row]) -> Figure:
    """Where the wall time of whole rounds goes, and whose processor time it is, by cohort.

    Everything is divided by the number of clients.

    Args:
        rows: of whole rounds, of one or more models and systems; the largest model is drawn, and
            the first system.
    """
    size, system = max(row.parameters for row in rows), systems_of(rows)[0]
    rows = [row for row in rows if (row.parameters, row.system) == (size, system)]
    figure, panels = plt.subplots(1, 2, figsize=(10.4, 4.2), layout="constrained")
    for axes, title, unit, parts in (
        (panels[0], "Wall time", "seconds by the clock", _WALL),
        (panels[1], "Processor time", "seconds of one core", _SPENT),
    ):
        tidy(axes, f"{title} for each client, {size:,} parameters", _AXES["clients"], unit)
        places = sorted({row.clients for row in rows})
        floors = [0.0] * len(places)
        for metric, (name, colour) in parts.items():
            seen = points(rows, metric, system, "clients")
            heights = [seen.get(place, 0.0) / place for place in places]
            axes.bar(range(len(places)), heights, 0.6, bottom=floors, color=colour, label=name)
            floors = [low + high for low, high in zip(floors, heights, strict=True)]
        axes.set_xticks(range(len(places)), list(map(_short, places)))
        _legend_below(axes)
    return figure


def _looks(systems: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and mark of each; those without one of their own get what is left, in order."""
    spare = iter(_OTHERS * len(systems))
    return {each: _LOOKS.get(each) or next(spare) for each in systems}


def _legend_below(axes: Any) -> None:  # noqa: ANN401
    axes.legend(
        frameon=False,
        fontsize=8,
        loc="upper left",
        bbox_to_anchor=(0, -0.2),
        borderaxespad=0,
    )


def _logarithmic(axes: Any, places: Sequence[int]) -> None:  # noqa: ANN401
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(places, list(map(_short, places)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(LogFormatterMathtext())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _short(place: int) -> str:
    for unit, factor in (("M", 1_000_000), ("k", 1_000)):
        if place >= factor:
            return f"{place / factor:g} {unit}"
    return str(place)


def _growth(measured: Mapping[str, Sequence[Row]]) -> Figure:
    return growth_figure([row for rows in measured.values() for row in rows])


def _clients(measured: Mapping[str, Sequence[Row]]) -> Figure:
    rows = measured["clients"]
    largest = max(row.parameters for row in rows)
    return growth_figure([row for row in rows if row.parameters == largest], "clients")


FIGURES: Final[
    Mapping[str, tuple[Callable[[Mapping[str, Sequence[Row]]], Figure], tuple[str, ...], str]]
] = {
    "benchmarks-growth": (
        _growth,
        ("sizes", "large"),
        "Processor time of client, server and key holder against the size of the model",
    ),
    "benchmarks-bytes": (
        bytes_figure,
        ("sizes", "bits", "masks", "paillier"),
        "Bytes a parameter that a client uploads, by system",
    ),
    "benchmarks-rounds": (
        lambda measured: rounds_figure(measured["rounds"]),
        ("rounds",),
        "Where the time of whole rounds goes, by the number of clients",
    ),
    "benchmarks-clients": (
        _clients,
        ("clients",),
        "Processor time of client, server and key holder against the number of clients",
    ),
}
"""By name: what draws it, the scenarios whose rows it takes (the first must be there), and what it
shows in words."""


@app.command()
@exits_cleanly
def draw(
    results: Annotated[Path, typer.Option(help="folder of the suite's results")] = Path(
        "bench/results/suite"
    ),
    folder: Annotated[Path, typer.Option(help="where the figures go")] = Path("docs"),
) -> None:
    """Draw what was measured."""
    for name, (make, scenarios, _) in FIGURES.items():
        files = {each: results / f"{each}.csv" for each in scenarios}
        measured = {each: read(file) for each, file in files.items() if file.is_file()}
        if not measured.get(scenarios[0]):
            out.print(f"{name}: not drawn; `secagg-bench run {scenarios[0]}` measures it")
            continue
        save(make(measured), folder / f"{name}.svg")
        out.print(f"wrote {folder / name}.svg", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
