"""How `settings` were chosen: a grid, on each user's last training item, with seeds of its own.

``python -m secagg_bench.privacy.tuning --epsilon 8`` prints the best of the grid. Test items play
no part in it. Nothing of this is accounted for in epsilon: see `settings`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from secagg.commands import exits_cleanly, print_table
from secagg_bench.privacy.cooccurrence import Cooccurrence
from secagg_bench.privacy.federated import Federated
from secagg_bench.privacy.mechanism import Budget, Channel
from secagg_bench.privacy.methods import METHODS, Trial
from secagg_bench.privacy.population import Clients, load_split, validation_split
from secagg_bench.privacy.ranking import METRICS, UserEvaluator
from secagg_bench.privacy.settings import Tuned, delta_of

__all__ = ["candidates", "tune"]

_FIRST_SEED = 100

app = typer.Typer(help=__doc__)


def candidates(dataset: str) -> Iterator[tuple[str, Tuned]]:
    """Methods with hyperparameters that are tried on a dataset."""
    sparse = dataset == "amazon-beauty"
    shared = Federated(l2=0.03, sample=1000) if sparse else Federated()
    rates = (50.0, 100.0, 300.0, 400.0) if sparse else (30.0, 60.0, 100.0, 200.0)
    for d, rounds, rate, share in itertools.product((4, 8, 16), (4, 8, 15), rates, (0.15, 0.3)):
        chosen = replace(shared, dimensions=d, rounds=rounds, rate=rate, popularity_share=share)
        yield "dp_federated", Tuned(federated=chosen)
    threshold, weight = (2.5, 0.03) if sparse else (0.0, 0.01)
    for items, ridge in itertools.product((500, 800, 1200, 2000), (10.0, 100.0)):
        if not (sparse and ridge > 10.0):
            paired = Cooccurrence(items, 0.3 if sparse else 0.15, threshold, ridge, weight)
            yield "dp_cooccurrence", Tuned(cooccurrence=paired)


def tune(
    dataset: str, epsilon: float, data_dir: Path | None, seeds: int
) -> list[tuple[list[float], str, Tuned]]:
    """Mean metrics of every candidate, best HR@10 and whole-catalogue NDCG@10 first."""
    split = validation_split(load_split(dataset, data_dir))
    users, evaluator = Clients.of(split), UserEvaluator(split, _FIRST_SEED)
    found = []
    for method, settings in candidates(dataset):
        values = []
        for seed in range(_FIRST_SEED, _FIRST_SEED + seeds):
            channel = Channel(Budget(epsilon, delta_of(len(users))), np.random.default_rng([seed]))
            trial = Trial(users, users, settings, channel, np.random.default_rng([seed, 1]))
            values.append(evaluator.by_user(METHODS[method](trial)).mean(axis=1))
        found.append((np.mean(values, axis=0).tolist(), method, settings))
    best = [max(each[place] for each, _, _ in found) for place in (0, 3)]
    return sorted(found, key=lambda each: -each[0][0] / best[0] - each[0][3] / best[1])


@app.command()
@exits_cleanly
def main(
    dataset: Annotated[str, typer.Option(help="ml-100k, amazon-beauty or toy")] = "ml-100k",
    epsilon: Annotated[float, typer.Option(help="budget; inf for no noise")] = 8.0,
    seeds: Annotated[int, typer.Option(help="of noise, a candidate")] = 2,
    data_dir: Annotated[Path | None, typer.Option(envvar="SECAGG_DATA_DIR")] = None,
) -> None:
    """Try the grid, and print the ten best."""
    ranked = tune(dataset, epsilon, data_dir, seeds)
    rows = [
        (
            method,
            *(f"{value:.4f}" for value in metrics),
            settings.federated if method == "dp_federated" else settings.cooccurrence,
        )
        for metrics, method, settings in ranked[:10]
    ]
    print_table(("method", *METRICS, "settings"), rows)


if __name__ == "__main__":
    sys.exit(app())
