"""How long a recommendation takes on the device: exact and by a graph, of up to a million items.

Vectors are generated: clusters in a space whose directions matter less and less, as those of
trained tables do; a query is the mean of some items' vectors. Times are of the processor, on one
thread, so that what else the machine does is left out. The user vector is ready: fitting one is
another matter.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer

from secagg_bench.one_core import in_child, machine, pin, timed
from secagg_recommender.graph_index import GraphIndex, recall
from secagg_recommender.index import ExactIndex, ItemIndex
from secagg_recommender.index_files import open_index, save_index

__all__ = ["app", "catalogue", "measure", "queries"]

_ITEMS, _DIMENSIONS = (12_000, 1_000_000), (16, 64)
_EXPANSIONS = (256, 1024, 4096)
_LIST, _OWN, _QUERIES, _WARM = 10, 100, 300, 20
_BUDGET = 1 << 30
_STREAM_BUDGET = 16 << 20
_COLUMNS = ["items", "d", "index", "p50 ms", "p99 ms", "recall@10", "build s", "MB on disk"]
_NOTE = (
    "Processor time of one search on one thread: the ten best items for a ready vector, 100 own "
    "items left out; 300 queries. Generated vectors. 'From a file' keeps them in their file, read "
    "block by block within 16 MB; they were in the system's cache. The graph looks at as many "
    "items as its row says, at least, and scores the best of them exactly; what it misses is what "
    "recall lacks. On disk: vectors, biases, and the graph."
)

app = typer.Typer(help=__doc__)


def catalogue(
    n_items: int, d: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Vectors ``(n_items, d)`` in clusters of about a hundred, and biases ``(n_items,)``."""
    spread = 1.0 / np.sqrt(np.arange(1, d + 1))
    clusters = max(n_items // 100, 1)
    centres = rng.normal(size=(clusters, d)) * spread
    vectors = (
        centres[rng.integers(0, clusters, n_items)] + 0.5 * rng.normal(size=(n_items, d)) * spread
    )
    return vectors.astype(np.float32), rng.normal(0.0, 0.5, n_items).astype(np.float32)


def queries(
    vectors: npt.NDArray[np.float32], count: int, rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    """User vectors ``(count, d)``: three times the mean of five items'."""
    liked = rng.integers(0, len(vectors), (count, 5))
    return np.asarray(3.0 * vectors[liked].mean(axis=1), dtype=np.float32)


def measure(n_items: int, d: int, count: int = _QUERIES) -> list[list[str | float | int]]:
    """Rows of the table for one catalogue."""
    rng = np.random.default_rng(0)
    vectors, bias = catalogue(n_items, d, rng)
    asked = queries(vectors, count + _WARM, rng)
    own = rng.choice(n_items, min(_OWN, n_items // 10), replace=False)
    exact = ExactIndex(vectors, bias, budget_bytes=_BUDGET)
    rows = [_row(exact, "exact", exact, asked, own, 0.0, vectors.nbytes + bias.nbytes)]
    with tempfile.TemporaryDirectory() as scratch:
        save_index(exact, Path(scratch) / "exact")
        streamed = open_index(Path(scratch) / "exact", budget_bytes=_STREAM_BUDGET)
        rows.append(_row(streamed, "exact, from a file", exact, asked, own, 0.0, _size(scratch)))
    made: list[GraphIndex] = []
    build_s = timed(lambda: made.append(GraphIndex(exact)))
    for expansion in _EXPANSIONS:
        graph = GraphIndex(exact, expansion=expansion, graph=(made[0].graph, made[0].reach))
        size = vectors.nbytes + bias.nbytes + int(graph.graph.serialized_length)
        name = f"graph, {expansion:,} looked at"
        rows.append(_row(graph, name, exact, asked, own, build_s, size))
    return rows


def _row(
    index: ItemIndex,
    name: str,
    exact: ExactIndex,
    asked: npt.NDArray[np.float32],
    own: npt.NDArray[np.int64],
    build_s: float,
    size: int,
) -> list[str | float | int]:
    times = [timed(lambda query=query: index.search(query, _LIST, own)) for query in asked][_WARM:]  # type: ignore[misc]
    found = recall(index, exact, asked[_WARM : _WARM + 200], _LIST)
    p50, p99 = (1000 * float(np.percentile(times, share)) for share in (50, 99))
    return [
        exact.n_items, exact.dimensions, name, round(p50, 3), round(p99, 3), round(found, 4),
        round(build_s, 1), round(size / 1e6, 1),
    ]  # fmt: skip


def _size(folder: str) -> int:
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


@app.command()
def run(
    output: Annotated[Path, typer.Option(help="where the JSON goes")] = Path(
        "bench/results/latency.json"
    ),
) -> None:
    """Measure every catalogue, each in a process of its own, and write the table."""
    rows: list[Any] = []
    for n_items in _ITEMS:
        for d in _DIMENSIONS:
            started = time.monotonic()
            rows += in_child("secagg_bench.recommender.latency", "one", n_items, d)
            print(f"{n_items:,} items, d = {d}: {time.monotonic() - started:.0f} s", flush=True)
            table = {"title": "Latency on the device", "columns": _COLUMNS, "rows": rows}
            result = table | {"note": _NOTE, "machine": machine()}
            output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


@app.command(hidden=True)
def one(n_items: int, d: int) -> None:
    """Measure one catalogue and print its rows."""
    pin()
    json.dump(measure(n_items, d), sys.stdout)


if __name__ == "__main__":
    app()
