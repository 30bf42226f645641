"""Draws the dashboards without Grafana: from their own files, and what a Prometheus answers.

Place, title, unit, colours, thresholds and legends are those of the files; the rest only resembles
what Grafana draws. It is for looking at a change before anybody has installed it.
"""

from __future__ import annotations

import argparse
import io
import math
import re
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from deploy.monitoring import FOLDER
from deploy.monitoring.asking import (
    Panel,
    Prometheus,
    PrometheusError,
    Series,
    filled,
    panels,
    read,
    values,
)

__all__ = ["draw", "main", "shown"]

_WIDTH, _LINE, _GAP, _TITLE, _ENTRY = 1440, 34, 8, 22, 14
_DPI = 100
_COLOURS = {
    "green": "#56a64b",
    "orange": "#ff780a",
    "red": "#e02f44",
    "blue": "#3274d9",
    "transparent": "#ffffff00",
}
# One colour after the other, for lines that have none of their own.
_PALETTE = (
    "#3274d9", "#e0b400", "#8f3bb8", "#56a64b", "#ff780a", "#1b9e9e", "#c4162a", "#7c6f64",
    "#5195ce", "#9e9d24", "#d683ce", "#447ebc", "#b7791f",
)  # fmt: skip
_INK, _FAINT, _BACK = "#24292e", "#8a929b", "#f4f5f7"
_STEPS = {
    "s": ((7 * 86400, "weeks"), (86400, "days"), (3600, "hours"), (60, "min"), (1, "s"),
          (1e-3, "ms"), (1e-6, "µs")),
    "bytes": ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "B")),
    "Bps": ((1e9, "GB/s"), (1e6, "MB/s"), (1e3, "kB/s"), (1, "B/s")),
}  # fmt: skip
# Seconds from one label of the time to the next.
_TICKS = (60, 120, 300, 600, 1800, 3600, 10800, 21600, 86400)
_AFTER = {"reqps": " req/s", "ops": " ops/s"}


def shown(value: float, unit: str, decimals: int | None = None) -> str:
    """A value with its unit, as short as Grafana has it."""
    if math.isnan(value):
        return "-"
    if unit == "percentunit":
        return f"{100 * value:.{decimals or 0}f} %"
    if unit.startswith("suffix:"):
        return f"{value:.3g}{unit.removeprefix('suffix:')}"
    if value and (steps := _STEPS.get(unit)):
        size, name = next((step for step in steps if abs(value) >= step[0]), steps[-1])
        return f"{value / size:.{3 if decimals is None else 2}g} {name}"
    if decimals is not None:
        return f"{value:,.{decimals}f}{_AFTER.get(unit, '')}"
    if abs(value) >= 1000:
        return f"{value / 1000:.3g}k{_AFTER.get(unit, '')}"
    return f"{value:.3g}{_AFTER.get(unit, '')}"


@dataclass(frozen=True)
class Span:
    """The time that is drawn, in seconds since 1970, and how often is scraped."""

    start: float
    end: float
    step: float
    scrape: float

    def widened(self, interval: str) -> Span:
        """With no less than a panel's own interval from point to point."""
        least = 60.0 * float(interval.removesuffix("m")) if interval else 0.0
        step = max(self.step, least)
        return Span(math.floor(self.start / step) * step, self.end, step, self.scrape)

    @property
    def variables(self) -> dict[str, str]:
        """What Grafana fills in."""
        rate = max(self.step + self.scrape, 4 * self.scrape)
        return {"__rate_interval": f"{rate:.0f}s", "__range": f"{self.end - self.start:.0f}s"}


class _Canvas:
    """A figure that is measured in pixels from its upper left corner."""

    def __init__(self, height: int) -> None:
        self.height = height
        size = (_WIDTH / _DPI, height / _DPI)
        self.figure = Figure(figsize=size, dpi=_DPI, facecolor=_BACK)
        self.whole = self.figure.add_axes((0, 0, 1, 1), frameon=False)
        self.whole.set(xlim=(0, _WIDTH), ylim=(height, 0), xticks=[], yticks=[])

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        return self.figure.add_axes(
            (
                x / _WIDTH,
                1 - (y + height) / self.height,
                width / _WIDTH,
                height / self.height,
            )
        )

    def box(self, x: float, y: float, width: float, height: float, colour: str = "white") -> None:
        style = "round,pad=0,rounding_size=3"
        self.whole.add_patch(
            FancyBboxPatch((x, y), width, height, style, fc=colour, ec="#dcdfe3", lw=0.8)
        )

    def text(self, x: float, y: float, text: str, size: float, **looks: Any) -> None:  # noqa: ANN401
        self.whole.text(x, y, text, fontsize=size, **({"color": _INK, "va": "center"} | looks))


def _colour(name: str) -> str:
    return _COLOURS.get(name, name)


def _named(legend: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"\{\{ *(\w+) *\}\}", lambda match: labels.get(match.group(1), ""), legend)


def _place(panel: Mapping[str, Any]) -> tuple[float, float, float, float]:
    grid = panel["gridPos"]
    cell = (_WIDTH - _GAP) / 24
    x, y = _GAP + grid["x"] * cell, _GAP + grid["y"] * _LINE
    return x, y, grid["w"] * cell - _GAP, grid["h"] * _LINE - _GAP


def _stat(canvas: _Canvas, panel: Panel, found: Sequence[tuple[str, Series]]) -> None:
    x, y, width, height = _place(panel.model)
    defaults = panel.model["fieldConfig"]["defaults"]
    named = panel.model["options"]["textMode"] == "name"
    series = [each for each in found if not math.isnan(each[1].points[-1][1])]
    if not series:
        text, colour = defaults["noValue"], "#c7cbd1"
    else:
        name, one = series[0]
        value = one.points[-1][1]
        text = shown(value, defaults["unit"], defaults.get("decimals"))
        steps = defaults["thresholds"]["steps"]
        reached = [step for step in steps if step["value"] is None or value >= step["value"]]
        colour = _colour(reached[-1]["color"])
        for mapping in defaults.get("mappings", []):
            word = mapping["options"].get(f"{value:g}")
            if word:
                text, colour = word["text"], _colour(word["color"])
        text = name if named else text
    canvas.box(x, y, width, height, colour)
    canvas.text(x + 8, y + 13, panel.title, 8.5, color="white", weight="bold")
    size = min(22.0, 1.05 * width / max(len(text), 4))
    middle = {"color": "white", "weight": "bold", "ha": "center"}
    canvas.text(x + width / 2, y + height / 2 + 8, text, size, **middle)


def _frame(canvas: _Canvas, panel: Panel) -> tuple[float, float, float, float]:
    x, y, width, height = _place(panel.model)
    canvas.box(x, y, width, height)
    canvas.text(x + 8, y + 13, panel.title, 9, weight="bold")
    return x, y, width, height


def _nothing(canvas: _Canvas, panel: Panel) -> None:
    x, y, width, height = _frame(canvas, panel)
    canvas.text(x + width / 2, y + height / 2, "No data", 10, color=_FAINT, ha="center")


def _lay_out(axes: Axes, unit: str, span: Span) -> None:
    axes.set_facecolor("none")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#dcdfe3")
    axes.grid(color="#eceef1", lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=7, labelcolor=_FAINT, pad=2)
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, unit)))
    axes.set_xlim(span.start, span.end)
    apart = next((each for each in _TICKS if (span.end - span.start) / each <= 6), _TICKS[-1])
    axes.set_xticks(np.arange(math.ceil(span.start / apart) * apart, span.end, apart))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda at, _: time.strftime("%H:%M", time.localtime(at)))
    )


def _grid(span: Span) -> NDArray[np.float64]:
    return np.arange(span.start, span.end + 1e-6, span.step)


def _on(times: NDArray[np.float64], series: Series) -> NDArray[np.float64]:
    """Values at these times; NaN where there is none."""
    known = {round(at, 3): value for at, value in series.points}
    return np.array([known.get(round(float(at), 3), math.nan) for at in times])


def _lines(canvas: _Canvas, panel: Panel, found: Sequence[tuple[str, Series]], span: Span) -> None:
    if not found:
        _nothing(canvas, panel)
        return
    x, y, width, height = _frame(canvas, panel)
    defaults = panel.model["fieldConfig"]["defaults"]
    looks, unit = defaults["custom"], defaults["unit"]
    bars = looks.get("drawStyle") == "bars"
    stacked = looks.get("stacking", {}).get("mode") == "normal"
    fixed = {
        each["matcher"]["options"]: _colour(each["properties"][0]["value"]["fixedColor"])
        for each in panel.model["fieldConfig"]["overrides"]
    }
    times = _grid(span)
    rows = [(name, _on(times, series)) for name, series in found]
    colours = [fixed.get(name, _PALETTE[n % len(_PALETTE)]) for n, (name, _) in enumerate(rows)]
    fit = min(len(rows), 5)
    below = _ENTRY * fit + 30
    axes = canvas.axes(x + 54, y + _TITLE + 6, width - 68, height - _TITLE - below - 8)
    _lay_out(axes, unit, span)
    floor = np.zeros(len(times))
    for (_, row), colour in zip(rows, colours, strict=True):
        there = np.nan_to_num(row)
        if bars:
            axes.bar(times, there, span.step * 0.8, floor, color=colour, align="center")
        elif stacked:
            axes.fill_between(times, floor, floor + there, color=colour, alpha=0.35, lw=0)
            axes.plot(times, floor + there, color=colour, lw=1)
        else:
            axes.plot(times, row, color=colour, lw=1.3)
            alone = ~np.isnan(row) & np.isnan(np.roll(row, 1)) & np.isnan(np.roll(row, -1))
            axes.plot(times[alone], row[alone], ".", color=colour, ms=4)
        floor = floor + there if bars or stacked else floor
    _, top = axes.get_ylim()
    for step in defaults.get("thresholds", {}).get("steps", [])[1:]:
        if looks.get("thresholdsStyle", {}).get("mode") == "dashed":
            axes.axhline(step["value"], color=_colour(step["color"]), lw=1, ls=(0, (4, 3)))
    most = defaults.get("max")
    axes.set_ylim(defaults.get("min", 0), 1.05 * most if most else (top if top > 0 else 1))
    calcs = panel.model["options"]["legend"]["calcs"]
    order = sorted(range(len(rows)), key=lambda number: -np.nan_to_num(rows[number][1]).max())
    rows, colours = [rows[each] for each in order], [colours[each] for each in order]
    _legend(canvas, rows, colours, unit, calcs, (x, y + height - _ENTRY * fit - 4, width), fit)


def _legend(
    canvas: _Canvas,
    rows: Sequence[tuple[str, NDArray[np.float64]]],
    colours: Sequence[str],
    unit: str,
    calcs: Sequence[str],
    place: tuple[float, float, float],
    fit: int,
) -> None:
    x, y, width = place
    heads = {"lastNotNull": "last", "max": "max", "sum": "total"}
    for column, calc in enumerate(reversed(calcs)):
        right = x + width - 10 - 70 * column
        canvas.text(right, y - 7, heads[calc], 7, color=_FAINT, ha="right")
    for number, ((name, row), colour) in enumerate(zip(rows, colours, strict=True)):
        line = y + _ENTRY * number + 6
        if number == fit - 1 and len(rows) > fit:
            canvas.text(x + 24, line, f"and {len(rows) - number} more", 7.5, color=_FAINT)
            return
        canvas.whole.add_patch(Rectangle((x + 10, line - 2), 9, 4, fc=colour, lw=0))
        canvas.text(x + 24, line, textwrap.shorten(name, 52) or name, 7.5)
        known = row[~np.isnan(row)]
        for column, calc in enumerate(reversed(calcs)):
            text = "-"
            if len(known):
                value = {"lastNotNull": known[-1], "max": known.max(), "sum": known.sum()}[calc]
                text = shown(float(value), unit, 0 if calc == "sum" else None)
            canvas.text(x + width - 10 - 70 * column, line, text, 7.5, ha="right")


def _clouds(canvas: _Canvas, panel: Panel, found: Sequence[tuple[str, Series]], span: Span) -> None:
    times = _grid(span)
    bounds = sorted((float(name), _on(times, series)) for name, series in found)
    if not bounds:
        _nothing(canvas, panel)
        return
    x, y, width, height = _frame(canvas, panel)
    axes = canvas.axes(x + 54, y + _TITLE + 6, width - 68, height - _TITLE - 34)
    unit = panel.model["options"]["yAxis"]["unit"]
    _lay_out(axes, unit, span)
    upto = np.nan_to_num(np.array([row for _, row in bounds]))
    cells = np.diff(upto, axis=0, prepend=0.0)
    edges = np.array([*times, times[-1] + span.step]) - span.step / 2
    blank = np.ma.masked_less(cells, 1e-9)
    axes.pcolormesh(edges, np.arange(len(bounds) + 1), blank, cmap="Blues", vmin=0)
    every = max(1, len(bounds) // 7)
    axes.set_yticks(np.arange(1, len(bounds) + 1)[::every])
    names = ["more" if math.isinf(bound) else shown(bound, unit) for bound, _ in bounds]
    axes.set_yticklabels(names[::every])


def draw(board: Mapping[str, Any], prometheus: Prometheus, span: Span) -> Image.Image:
    """A dashboard as a picture."""
    chosen = values(board, prometheus, span.start, span.end)
    lowest = max(each["gridPos"]["y"] + each["gridPos"]["h"] for each in board["panels"])
    canvas = _Canvas(lowest * _LINE + 2 * _GAP)
    for each in board["panels"]:
        if each["type"] == "row":
            x, y, _, height = _place(each)
            canvas.text(x + 2, y + height / 2 + 2, f"⌄  {each['title']}", 10.5, weight="bold")
    for panel in panels(board):
        own = span.widened(panel.model.get("interval", ""))
        variables = chosen | own.variables
        found: list[tuple[str, Series]] = []
        for expr, legend in panel.queries:
            query = filled(expr, variables)
            series = (
                prometheus.now(query, own.end)
                if panel.instant
                else prometheus.over(query, own.start, own.end, own.step)
            )
            found += [(_named(legend, each.labels), each) for each in series]
        if panel.kind == "stat":
            _stat(canvas, panel, found)
        elif panel.kind == "heatmap":
            _clouds(canvas, panel, found, own)
        else:
            _lines(canvas, panel, found, own)
    drawn = io.BytesIO()
    canvas.figure.savefig(drawn, format="png", dpi=_DPI)
    # Few colours are in it: a third of the bytes, and nothing to be seen of it.
    return Image.open(drawn).convert("RGB").quantize(96, dither=Image.Dither.NONE)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.monitoring.preview", description=__doc__
    )
    parser.add_argument("prometheus", help="its address, such as http://127.0.0.1:9090")
    parser.add_argument("output", type=Path, help="folder for dashboard-*.png")
    parser.add_argument("--minutes", type=float, default=180, help="how far back to draw")
    parser.add_argument("--until", type=float, default=0, help="seconds since 1970; else now")
    parser.add_argument("--step", type=float, default=30, help="seconds from point to point")
    parser.add_argument("--scrape", type=float, default=15, help="seconds from scrape to scrape")
    given = parser.parse_args(arguments)
    end = math.floor((given.until or time.time()) / given.step) * given.step
    mpl.rcParams["font.family"] = "DejaVu Sans"
    span = Span(end - 60 * given.minutes, end, given.step, given.scrape)
    try:
        prometheus = Prometheus(given.prometheus)
        for path in sorted((FOLDER / "grafana" / "dashboards").glob("*.json")):
            picture = given.output / f"dashboard-{path.stem}.png"
            draw(read(path), prometheus, span).save(picture, optimize=True)
            print(picture)
    except PrometheusError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
