"""``python -m secagg_bench.recommender``: measure what is missing, and write the page."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secagg.commands import exits_cleanly, out
from secagg.errors import InputError

if TYPE_CHECKING:
    from secagg_bench.recommender.trials import Trial, World

# Before numpy is imported: one thread is enough for small matrices, and leaves room for others.
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

app = typer.Typer(help=__doc__)


@app.command()
@exits_cleanly
def main(
    output: Annotated[Path, typer.Option(help="where results go; those in it are kept")] = Path(
        "bench/results/recommender.json"
    ),
    page: Annotated[Path, typer.Option(help="where the tables go, and the figure beside")] = Path(
        "docs/recommender-results.md"
    ),
    data_dir: Annotated[
        Path | None, typer.Option(envvar="SECAGG_DATA_DIR", help="folder of the data sets")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="a toy run on generated data")] = False,
    draw: Annotated[bool, typer.Option("--draw", help="measure nothing")] = False,
) -> None:
    """Every optimiser, partition, compression and kind of device, with several seeds."""
    if data_dir is None and not quick and not draw:
        raise InputError(
            "expected the folder of the data sets; got none; set SECAGG_DATA_DIR, or try --quick, "
            "which needs no data"
        )
    found: dict[str, Any] = {"trials": {}, "encrypted": {}, "toy": quick}
    if output.is_file():
        found = json.loads(output.read_text(encoding="utf-8"))
    output.parent.mkdir(parents=True, exist_ok=True)
    if not draw:
        for _ in _measured(found, data_dir, toy=quick):
            # After each run, because all of them take long.
            text = json.dumps(found, indent=1, sort_keys=True)
            output.write_text(text + "\n", encoding="utf-8")
    from secagg_bench.recommender.report import save_figure, write_page

    write_page(found, output.parent, page)
    save_figure(found, page.with_name("recommender.svg"))
    out.print(f"wrote {output} and {page}", highlight=False)


def _measured(found: dict[str, Any], data_dir: Path | None, *, toy: bool) -> Iterator[None]:
    """Run what has no result yet; yields after each."""
    from secagg_bench.recommender import sections
    from secagg_bench.recommender.trials import World, run

    def small(trial: Trial) -> Trial:
        return sections.quick(trial) if toy else trial

    @lru_cache(maxsize=2)
    def world(dataset: str, validation: bool) -> World:
        return World(dataset, data_dir, validation=validation)

    def missing(trials: list[Trial]) -> Iterator[tuple[Trial, World]]:
        left = {trial.key: trial for trial in trials if trial.key not in found["trials"]}
        for count, trial in enumerate(left.values(), 1):
            out.print(f"{count}/{len(left)} {trial.key}", highlight=False, soft_wrap=True)
            yield trial, world(trial.dataset, trial.validation)

    tried = [small(sections.tuned(t)) for ts in sections.candidates().values() for t in ts]
    for trial, where in missing(tried[:2] if toy else tried):
        found["trials"][trial.key] = run(trial, where)
        yield
    for label, trial in sections.compared().items():
        if label not in found["encrypted"]:
            trial = small(trial)
            found["encrypted"][label] = _compared(trial, world(trial.dataset, False))
            yield
    rows = [t for s in sections.sections(found["trials"], toy=toy) for t in s.rows.values()]
    for trial, where in missing([replace(t, seed=seed) for seed in sections.SEEDS for t in rows]):
        found["trials"][trial.key] = run(trial, where)
        yield


def _compared(trial: Trial, world: World) -> dict[str, Any]:
    """A run under encryption, every sum of which is the one in the clear."""
    from secagg_bench.recommender.sums import Encrypting
    from secagg_bench.recommender.trials import run

    adder = Encrypting()
    result = run(trial, world, adder)
    took = {step: median(values) for step, values in adder.seconds.items()}
    return {**result, "rounds": adder.rounds, "took": took, "trial": trial.key}


if __name__ == "__main__":
    sys.exit(app())
