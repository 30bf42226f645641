"""What noise costs: exact discrete Gaussians, here and by OpenDP, and a rounded normal beside them.

Samples a second on one core, at several scales, in interleaved repetitions; medians. OpenDP samples
exactly too, by rational arithmetic (Canonne, Kamath, Steinke 2020), and shows what exactness
commonly costs; it takes and gives Python lists, of which those it takes are made outside the clock.
numpy's normal, rounded, is *not* a discrete Gaussian, and its generator not a cryptographic one: it
is there as the least that any noise costs. The target is printed as met or not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from secagg.discrete_gaussian import discrete_gaussian
from secagg.sampling import Stream
from secagg_bench.one_core import in_child, machine, pin, timed

__all__ = ["app"]

_SCALES = (1, 17, 600, 10**5, 2**20, 2**33, 2**40)
_LEAST_RATE = 5e6
_OPENDP_PART = 100  # OpenDP draws this many times fewer

app = typer.Typer(help=__doc__)


@dataclass(frozen=True, slots=True)
class Row:
    """Samples a second of one core at one scale.

    Attributes:
        std: the parameter of the discrete Gaussian.
        ours: `secagg.discrete_gaussian`.
        opendp: OpenDP's `make_gaussian` over a vector of integers.
        rounded_normal: numpy's `normal` and `rint`, to int64: no privacy proof holds for it.
        ratio: ours over OpenDP's.
        small_ms: milliseconds of our call for one sample: that of one batch.
        met: whether ours reaches the target.
    """

    std: int
    ours: float
    opendp: float
    rounded_normal: float
    ratio: float
    small_ms: float
    met: bool


def _opendp(std: int, count: int) -> Callable[[], object]:
    import opendp.prelude as dp

    dp.enable_features("contrib")
    domain = dp.vector_domain(dp.atom_domain(T="i64"))
    noise = dp.m.make_gaussian(domain, dp.l2_distance(T=float), float(std))
    zeros = [0] * count
    return lambda: noise(zeros)


def _row(std: int, count: int, repetitions: int) -> Row:
    random = np.random.default_rng(1)
    few = max(1, count // _OPENDP_PART)
    stream = Stream.from_os()
    actions: tuple[tuple[int, Callable[[], object]], ...] = (
        (count, lambda: discrete_gaussian(stream, std, count)),
        (few, _opendp(std, few)),
        (count, lambda: np.rint(random.normal(0.0, std, count)).astype(np.int64)),
        (1, lambda: discrete_gaussian(stream, std, 1)),
    )
    for _, action in actions:
        action()  # warms caches, and loads what is loaded late
    seconds = [[timed(action) for _, action in actions] for _ in range(repetitions)]
    times = [median(column) for column in zip(*seconds, strict=True)]
    ours, opendp, normal, _ = (size / time for (size, _), time in zip(actions, times, strict=True))
    ratio = median((count / a) / (few / b) for a, b, *_ in seconds)
    return Row(std, ours, opendp, normal, ratio, 1000 * times[-1], ours >= _LEAST_RATE)


@app.command("rates", hidden=True)
def _rates_command(count: int, repetitions: int) -> None:
    pin()
    rows = [asdict(_row(std, count, repetitions)) for std in _SCALES]
    sys.stdout.write(json.dumps(rows))


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    count: Annotated[int, typer.Option(min=1, help="samples a repetition")] = 2_000_000,
    repetitions: Annotated[int, typer.Option(min=1, help="interleaved repetitions")] = 9,
    output: Annotated[Path | None, typer.Option(help="write the figures here as JSON")] = None,
) -> None:
    """Measure samples a second against OpenDP, and against a rounded normal."""
    if context.invoked_subcommand is not None:
        return
    found = in_child("secagg_bench.noise_cost", "rates", count, repetitions)
    rows = [Row(**row) for row in found]
    if output is not None:
        results = {
            "count": count,
            "opendp_count": max(1, count // _OPENDP_PART),
            "repetitions": repetitions,
            "least_rate": _LEAST_RATE,
            "machine": machine() | {"opendp": version("opendp")},
            "rows": [asdict(row) for row in rows],
        }
        output.write_text(json.dumps(results, indent=2) + "\n")
    _show(rows, repetitions)


def _show(rows: list[Row], repetitions: int) -> None:
    title = f"million samples a second, one core, median of {repetitions}"
    columns = ("std", "secagg", "OpenDP", "ratio", "rounded normal", "one sample", "target", "met")
    table = Table(*columns, title=title)
    for row in rows:
        rates = [f"{rate / 1e6:.3g}" for rate in (row.ours, row.opendp, row.rounded_normal)]
        met = "[green]met[/]" if row.met else "[red]not met[/]"
        target = f">= {_LEAST_RATE / 1e6:g}"
        small = f"{row.small_ms:.2f} ms"
        table.add_row(
            f"{row.std:.4g}", rates[0], rates[1], f"{row.ratio:.0f}x", rates[2], small, target, met
        )
    Console().print(table)


if __name__ == "__main__":
    app()
