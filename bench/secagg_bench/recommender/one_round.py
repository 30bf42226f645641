"""``python -m secagg_bench.recommender.one_round``: models that need one exact encrypted round.

What was measured, and the tables made of it, go into one file; a section that is in it already is
kept unless it is asked for.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Final

import typer
from rich.progress import Progress, TaskID

from secagg.commands import exits_cleanly, out
from secagg_bench.one_core import machine
from secagg_bench.recommender import one_round_runs as runs
from secagg_bench.recommender.one_round_runs import Progressed, Sizes
from secagg_bench.recommender.one_round_services import service_run
from secagg_bench.recommender.resuming import resumed

__all__ = ["SECTIONS", "app", "tables"]

Results = Mapping[str, Any]

_QUALITY: Final = ("HR@10", "NDCG@10", "HR@10, all items", "NDCG@10, all items")
_COSTS: Final = ("MB a client", "client s", "server s a client", "key holder s")
_SILOS: Final = 8

SECTIONS: Final[dict[str, Callable[[Path, Sizes, Progressed], Any]]] = {
    "ease": runs.ease_runs,
    "services": lambda data_dir, _, progress: service_run("ml-100k", data_dir, _SILOS, progress),
    "transitions": runs.transition_runs,
    "dense": runs.dense_runs,
}

app = typer.Typer(help=__doc__)


@app.command()
@exits_cleanly
def main(
    output: Annotated[Path, typer.Option(help="where the results go")] = Path(
        "bench/results/one_round.json"
    ),
    data_dir: Annotated[
        Path | None, typer.Option(envvar="SECAGG_DATA_DIR", help="folder of the data sets")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="sections to measure anew")] = None,
) -> None:
    """Encrypt, sum, compare and score."""
    folder, found, missing = resumed(output, data_dir, only, SECTIONS)
    with Progress(console=out, disable=not out.is_terminal) as progress:
        for name in missing:
            measured = SECTIONS[name](folder, Sizes(), _Bars(progress))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            found[name] = measured | {"peak_bytes": peak}
            _save(output, found)
    _save(output, found)
    out.print(f"wrote {output}", highlight=False)


class _Bars:
    """A bar for each run; a line where nobody watches."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bars: dict[str, TaskID] = {}

    def __call__(self, name: str, done: int, total: int) -> None:
        if name not in self._bars:
            self._bars[name] = self._progress.add_task(name, total=total)
            if self._progress.disable:
                out.print(name, highlight=False)
        self._progress.update(self._bars[name], completed=done)


def _save(output: Path, found: dict[str, Any]) -> None:
    measured = {name: found[name] for name in SECTIONS if name in found}
    text = json.dumps(
        measured | {"machine": machine(), "tables": tables(measured)}, indent=1, sort_keys=True
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text + "\n", encoding="utf-8")


def tables(found: Results) -> list[dict[str, Any]]:
    """What was measured, for a page: dicts of title, columns, rows and note."""
    makers: dict[str, Callable[[Results], Iterable[dict[str, Any]]]] = {
        "ease": _ease_tables,
        "services": _service_tables,
        "transitions": partial(_transition_tables, dense=found.get("dense")),
    }
    return [table for name, make in makers.items() if name in found for table in make(found[name])]


def _ease_tables(ease: Results) -> Iterable[dict[str, Any]]:
    yield {
        "title": "EASE from one encrypted round, MovieLens 100K",
        "columns": ["clients", "counts", "norm check", "identical", *_QUALITY, *_COSTS],
        "rows": [
            [
                run["costs"]["clients"],
                run["training"],
                _yes(run["checked"]),
                _yes(run["identical"]),
                *_quality(run["metrics"]),
                *_costs(run["costs"]),
            ]
            for run in ease["runs"]
        ],
        "note": "Identical: the SHA-256 of the opened sum is that of the Gram matrix of all data "
        "in one place. Held back: without each user's latest training item, as in published "
        "figures. λ = 300. Server: add and, with a norm check, sketch; key holder: open, and "
        "judge every client. Seconds of the processor, medians over clients.",
    }


def _service_tables(run: Results) -> Iterable[dict[str, Any]]:
    costs = run["costs"]
    columns = ["clients", "identical", "MB a client", "compute s", "encrypt s", "upload s"]
    yield {
        "title": "The same through server, key holder and client processes",
        "columns": [*columns, "add s", "open s", "seconds in all"],
        "rows": [
            [
                run["contributors"],
                _yes(run["identical"]),
                _number(costs["upload_bytes"] / 1e6),
                *(
                    _number(costs[f"{step}_s"])
                    for step in ("compute", "encrypt", "upload", "aggregate", "open")
                ),
                _number(run["wall_s"]),
            ]
        ],
        "note": "gRPC over mutual TLS, with a norm check, all on one machine; seconds of the "
        "clock. In all: from the task's creation to its end, with the start of eight processes.",
    }


def _transition_tables(found: Results, dense: Results | None) -> Iterable[dict[str, Any]]:
    rows = [
        [
            "table of pairs",
            run["values"],
            _yes(run["checked"]),
            _yes(run["identical"]),
            *_costs(run["costs"]),
        ]
        for run in found["runs"]
    ]
    first = found["runs"][0]
    measured = f"{len(dense['runs'])} of {dense['blocks']}" if dense else "none"
    yield {
        "title": f"Transitions on Amazon Beauty, {first['costs']['clients']} silos: what travels",
        "columns": ["encoding", "integers", "norm check", "identical", *_COSTS],
        "rows": [*rows, _dense_row(dense)] if dense else rows,
        "note": f"{first['pairs']} distinct pairs. Both encodings are exact; the dense one takes "
        f"several rounds, of which {measured} were run; its costs are scaled to all of them.",
    }
    yield {
        "title": "Counts alone against published models, Amazon Beauty",
        "columns": ["scores", "counted", *_QUALITY],
        "rows": [*_floor_rows(found["floors"]), *_PUBLISHED],
        "note": "Leave-one-out; the history that is scored from includes the validation item; 99 "
        "uniform negatives, mean of three draws, and all items. All: whole histories are counted, "
        "the validation item too. Backward and damping were chosen with the validation item as the "
        "target. Published: S3-Rec, whose models are not trained on the validation item.",
    }


_PUBLISHED: Final = (
    ["SASRec, as published by S3-Rec", "held back", "0.4696", "0.3156", "0.0605", "0.0318"],
    ["GRU4Rec, as published by S3-Rec", "held back", "0.4106", "0.2584", "", ""],
)


def _floor_rows(floors: Iterable[Results]) -> list[list[str]]:
    return [
        [row["name"], "all" if row["all"] else "held back", *_quality(row["metrics"])]
        for row in floors
    ]


def _dense_row(dense: Results) -> list[str | int]:
    """All rounds of the dense table, from those that were run."""
    costs = [run["costs"] for run in dense["runs"]]
    blocks = dense["blocks"]
    total = {
        name: blocks * median(each[name] for each in costs) if name != "clients" else value
        for name, value in costs[0].items()
    }
    same = _yes(all(run["identical"] for run in dense["runs"]))
    if len(dense["runs"]) < blocks:
        same += f", {len(dense['runs'])} of {blocks}"
    return ["dense table", dense["values"], "no", same, *_costs(total)]


def _costs(costs: Results) -> list[str]:
    """Bytes, and seconds of client, server and key holder."""
    per_client = costs.get("judge_s", 0.0) * costs["clients"]
    return [
        _number(costs["upload_bytes"] / 1e6),
        _number(costs["compute_s"] + costs["encrypt_s"]),
        _number(costs["add_s"] + costs.get("sketch_s", 0.0)),
        _number(costs["open_s"] + per_client),
    ]


def _quality(metrics: Results) -> list[str]:
    names = ("hr10", "ndcg10", "full_hr10", "full_ndcg10")
    return [f"{metrics[name]:.4f}" for name in names]


def _number(value: float) -> str:
    return f"{value:.3g}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


if __name__ == "__main__":
    sys.exit(app())
