"""``python -m secagg_bench.recommender.sessions``: the session model against counts and SASRec.

What was measured, and the tables made of it, go into one file; a section that is in it already is
kept unless it is asked for.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any, Final

import typer

from secagg.commands import exits_cleanly, out

# Before numpy is imported: one thread is enough for small matrices, and leaves room for others.
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

from secagg_bench.recommender.resuming import resumed
from secagg_bench.recommender.session_runs import (
    Recipe,
    SessionData,
    cold_run,
    session_run,
    stacks,
)

__all__ = ["SECTIONS", "app", "measure", "tables"]

Results = Mapping[str, Any]

SECTIONS: Final[dict[str, Recipe]] = {
    "encrypted": Recipe("encrypted"),
    "whole": Recipe("clear", whole=True),
    "float": Recipe("float"),
    "centralised": Recipe("float", silos=88, cohort=1, rounds=1056, learning_rate=0.006),
    "new items": Recipe("float"),
    "float, seed 1": Recipe("float", seed=1),
    "float, seed 2": Recipe("float", seed=2),
}
"""What is measured. The centralised run takes 88 batches an epoch from all data in one place."""

_METRICS: Final = ("hr10", "ndcg10", "full_hr10", "full_ndcg10")
_QUALITY: Final = ("HR@10", "NDCG@10", "HR@10, all items", "NDCG@10, all items")
_PUBLISHED: Final = (
    ["transition counts, the floor to beat", "held back", "", "0.441", "0.294", "0.0706", "0.0418"],
    ["SASRec, as published by S3-Rec", "held back", "", "0.4696", "0.3156", "0.0605", "0.0318"],
    ["GRU4Rec, as published by S3-Rec", "held back", "", "0.4106", "0.2584", "", ""],
)

app = typer.Typer(help=__doc__)


@app.command()
@exits_cleanly
def main(
    output: Annotated[Path, typer.Option(help="where the results go")] = Path(
        "bench/results/sessions.json"
    ),
    data_dir: Annotated[
        Path | None, typer.Option(envvar="SECAGG_DATA_DIR", help="folder of the data sets")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="sections to measure anew")] = None,
) -> None:
    """Train, encrypt, compare and score."""
    folder, found, missing = resumed(output, data_dir, only, SECTIONS)
    data = SessionData(folder)
    for name in missing:
        found[name] = measure(name, SECTIONS[name], data)
        _save(output, found)
    _save(output, found)
    out.print(f"wrote {output}", highlight=False)


def measure(name: str, recipe: Recipe, data: SessionData) -> dict[str, Any]:
    """One section."""
    if name == "new items":
        return cold_run(recipe, data, _say)
    shared, run = session_run(recipe, data, _say)
    stacked = recipe.seed == 0 and name in ("encrypted", "whole")
    return {"run": run} | ({"stacks": stacks(shared, recipe, data)} if stacked else {})


def _say(name: str, done: int, total: int) -> None:
    if done % 10 == 0 or done == total:
        out.print(f"{name}: round {done} of {total}", highlight=False)


def _save(output: Path, found: dict[str, Any]) -> None:
    from secagg_bench.one_core import machine

    measured = {name: found[name] for name in SECTIONS if name in found}
    text = json.dumps(
        measured | {"machine": machine(), "tables": tables(measured)}, indent=1, sort_keys=True
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text + "\n", encoding="utf-8")


def tables(found: Results) -> list[dict[str, Any]]:
    """What was measured, for a page: dicts of title, columns, rows and note."""
    made = [_quality_table(found)]
    if "encrypted" in found:
        made.append(_cost_table(found["encrypted"]["run"]))
    if "new items" in found:
        made.append(_new_items_table(found["new items"]))
    return made


def _quality_table(found: Results) -> dict[str, Any]:
    rows: list[list[str]] = []
    for name, title in (
        ("centralised", "session model, centralised"),
        ("float", "session model, federated, floats"),
        ("encrypted", "**session model, federated, encrypted**"),
        ("whole", "session model, federated, quantised"),
    ):
        if name in found:
            rows.append(_row(title, found[name]["run"]))
        for each in found.get(name, {}).get("stacks", ()):
            floats = found[name]["run"]["floats"]
            held = _trained_on(whole=each["whole"])
            alone = f"counts alone: {each['counts']}"
            rows.append([alone, held, f"{each['pairs']:,}", *_numbers(each["alone"])])
            both = f"**session model on {each['counts']}**"
            numbers = f"{floats:,} + {each['pairs']:,}"
            rows.append([both, held, numbers, *_numbers(each["test"])])
    return {
        "title": "Next item on Amazon Beauty: session model, counts, and both",
        "columns": ["model", "validation item", "shared numbers", *_QUALITY],
        "rows": [*_PUBLISHED, *rows],
        "note": "Leave-one-out: the last item is the test item; the history that is scored from "
        "includes the one before, the validation item. 99 uniform negatives, mean of three draws, "
        "and all items outside the history. Held back: nothing was trained on or counted from "
        "validation items, as in the published figures; trained on: whole histories were. "
        "448 silos of 50 users, 112 of them in a round, 30 passes over the data; 8 bits a number; "
        "centralised: 12 passes in batches of 254 users, not tuned further. Weight and gain of the "
        "counts were chosen with validation items; where these are trained on, they are 8 and "
        "10. Standard error of a figure over 22,363 users: "
        "0.003 (99 negatives), 0.002 (all items). " + _seeds(found),
    }


def _seeds(found: Results) -> str:
    """What other seeds reach: of partition, start and sampling."""
    runs = [found[name]["run"]["test"] for name in found if name.startswith("float")]
    if len(runs) < 2:
        return "One seed."
    parts = [
        f"{title} {mean(values):.4f} ± {stdev(values):.4f}"
        for title, metric in zip(_QUALITY, _METRICS, strict=True)
        for values in [[run[metric] for run in runs]]
    ]
    return f"Federated in floats, mean and deviation of {len(runs)} seeds: {'; '.join(parts)}."


def _row(title: str, run: Results) -> list[str]:
    held = _trained_on(whole=run["recipe"]["whole"])
    return [title, held, f"{run['floats']:,}", *_numbers(run["test"])]


def _trained_on(*, whole: bool) -> str:
    return "trained on" if whole else "held back"


def _numbers(metrics: Results) -> list[str]:
    return [f"{metrics[name]:.4f}" for name in _METRICS]


def _cost_table(run: Results) -> dict[str, Any]:
    recipe = run["recipe"]
    return {
        "title": "What the encrypted session model takes",
        "columns": [
            *("rounds", "clients a round", "identical rounds", "KB a client"),
            *("train ms", "quantise and encrypt ms", "add ms", "open ms"),
        ],
        "rows": [
            [
                recipe["rounds"],
                recipe["cohort"],
                run["identical_rounds"],
                f"{run['upload_bytes'] / 1e3:.0f}",
                *(f"{1e3 * run[f'{step}_s']:.1f}" for step in ("train", "encrypt", "add", "open")),
            ]
        ],
        "note": "Identical: the SHA-256 of the opened sum is that of the same integers added in "
        "the clear. Medians over clients and rounds on a shared machine; training in seconds of "
        "the processor, the rest of the clock.",
    }


def _new_items_table(run: Results) -> dict[str, Any]:
    return {
        "title": "New items: never seen in training, the next item of those who take them",
        "columns": ["vector", *_QUALITY],
        "rows": [[row["vector"], *_numbers(row["test"])] for row in run["rows"]],
        "note": f"{run['items']:,} items were taken out of all training histories; "
        f"{run['users']:,} users have one as test item. Their bias is the median one. Neither "
        "counts nor a table with a row an item have anything to rank them by; a hit by chance has "
        "a probability of 0.1 among 99 negatives, 0.0008 among all items.",
    }


if __name__ == "__main__":
    sys.exit(app())
