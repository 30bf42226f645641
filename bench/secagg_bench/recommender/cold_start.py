"""Newcomers on MovieLens 100K: a start from their cohort, against popularity, after 0 to 5 films.

Five folds of users: four fifths take part in the federation, the others are in nothing. Counts by
cohort are encrypted by one client each, summed, opened and thresholded by the real roles in this
process, and compared with the same counts in the clear. A newcomer has a cohort and its first
films; the test item is its latest, as in all our tables.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer

import secagg
from secagg.parameters import Plan
from secagg_bench.one_core import machine
from secagg_recommender.cohorts import (
    AGE_GENDER,
    COHORT_COUNTS,
    CohortLearner,
    CohortTable,
    age_gender,
    cohort_plan,
)
from secagg_recommender.datasets import dataset_folder, load_dataset
from secagg_recommender.evaluation import CUTOFF, Evaluator
from secagg_recommender.factorisation import (
    ITEM_BIAS,
    ITEM_FACTORS,
    SharedTensors,
    Silo,
    TrainConfig,
    fit_user,
    init_shared,
)
from secagg_recommender.interactions import DataError, Split, split_leave_one_out
from secagg_recommender.learner import Assignment
from secagg_recommender.movielens import load_movielens_users

__all__ = ["Counted", "app", "counted", "measure"]

_HISTORIES = (0, 1, 3, 5)
_FOLDS, _LEAST, _SILOS, _ROUNDS = 5, 5, 8, 15
_PERSONAL = (0.5, 1.0, 2.0)
_RESAMPLES = 2000
_POPULAR, _FIT, _COHORT = "most popular", "fit alone", "cohort start"
_COLUMNS = [
    "known items", "method", "HR@10", "HR@10, all items", "more than popularity", "interval",
    "all items: more", "all items: interval",
]  # fmt: skip
_NOTE = (
    "Five-fold: no newcomer is in the federation, nor in the counts. 99 sampled negatives, mean of "
    "three draws, and all items outside the newcomer's training items. 'Most popular': exact "
    "counts of all participants, nothing withheld. 'Fit alone': a user vector fitted to the known "
    "items over the federated item table. 'Cohort start': log-odds of the cohort, by age and "
    "gender, plus the fitted vector's part, weighted by the best of 0.5, 1, 2 on the other folds' "
    "newcomers. Intervals: 95 %, paired bootstrap over users, against most popular."
)

app = typer.Typer(help=__doc__)

_Ints = npt.NDArray[np.int64]
_Scores = npt.NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class Counted:
    """A released table, and whether it is the one from the clear counts, bit for bit."""

    table: CohortTable
    equal: bool
    withheld: float
    seconds: float


def counted(split: Split, users: _Ints, cohorts: _Ints, plan: Plan, n_cohorts: int) -> Counted:
    """Count the users' cohorts and items through the real roles, and once more in the clear."""
    threshold, segments = plan.threshold, {segment.name: segment for segment in plan.segments}
    if threshold is None:
        raise DataError("expected a plan with a threshold, got none; use cohort_plan()")
    started = time.perf_counter()
    holder = secagg.KeyHolder(plan)
    server, encryptor = secagg.Aggregator(holder.context), secagg.Encryptor
    clear = np.zeros(n_cohorts * (split.n_items + 1), dtype=np.int64)
    for user in users.tolist():
        learner = CohortLearner(
            int(cohorts[user]),
            split.items_of(user),
            n_cohorts=n_cohorts,
            n_items=split.n_items,
            most_items=split.n_items,
        )
        work = learner.work(Assignment(1, {}, segments))
        upload = {**work.arrays, threshold.counts: learner.counts()}
        server.add(encryptor(holder.context).encrypt_segments(upload))
        clear[learner.items] += 1
    release = holder.release(server.aggregate())
    cells = release.mean("update")[COHORT_COUNTS][:, 0] * release.contributors
    clear[clear < threshold.least] = 0
    table = CohortTable.released(np.rint(cells), n_cohorts, threshold.least)
    equal = bool(np.array_equal(np.rint(cells), clear))
    return Counted(table, equal, float(np.mean(table.counts == 0)), time.perf_counter() - started)


def trained(split: Split, users: _Ints, config: TrainConfig, rounds: int) -> SharedTensors:
    """The item table of a federation of silos that these users are dealt out to, in the clear."""
    parts = np.array_split(np.random.default_rng(config.seed).permutation(users), _SILOS)
    silos = [Silo(number, split, part, config) for number, part in enumerate(parts) if part.size]
    shared = init_shared(split.n_items, config.dimensions, config.seed)
    samples = sum(silo.samples for silo in silos)
    for number in range(1, rounds + 1):
        updates = [silo.train(shared, number) for silo in silos]
        for name in shared:
            mean = sum(made.update[name] * np.float32(made.samples / samples) for made in updates)
            shared[name] = np.asarray(shared[name] + mean, dtype=np.float32)
    return shared


def newcomer(
    known: _Ints, shared: SharedTensors, table: CohortTable, cohort: int, config: TrainConfig
) -> dict[str, _Scores]:
    """Scores of the catalogue by method; those of the cohort once for each weight."""
    start = table.start(cohort)
    if known.size == 0:
        return {_COHORT: start}
    personal = shared[ITEM_FACTORS] @ fit_user(shared, known, config)
    blends = {f"{_COHORT} {weight}": start + weight * personal for weight in _PERSONAL}
    return {_FIT: personal + shared[ITEM_BIAS], **blends}


def measure(
    split: Split,
    cohorts: _Ints,
    n_cohorts: int,
    *,
    config: TrainConfig,
    least: int = _LEAST,
    rounds: int = _ROUNDS,
    histories: Sequence[int] = _HISTORIES,
) -> dict[str, Any]:
    """Both tables: quality by number of known items, and what the encrypted counts were."""
    fold = np.random.default_rng(config.seed).permutation(split.n_users) % _FOLDS
    plan = cohort_plan(
        n_cohorts, split.n_items, max_clients=split.n_users, least=least, most_items=split.n_items
    )
    counts, scores = [], _Board(split, config.seed)
    for number in range(_FOLDS):
        inside = np.flatnonzero(fold != number)
        counts.append(counted(split, inside, cohorts, plan, n_cohorts))
        shared = trained(split, inside, config, rounds)
        items = np.concatenate([split.items_of(user) for user in inside.tolist()])
        popular = np.bincount(items, minlength=split.n_items)
        for user in np.flatnonzero(fold == number).tolist():
            scores.put(0, _POPULAR, user, popular)
            for known in histories:
                first = split.items_of(user)[:known].astype(np.int64)
                made = newcomer(first, shared, counts[-1].table, int(cohorts[user]), config)
                for method, values in made.items():
                    scores.put(known, method, user, values)
        print(f"fold {number + 1}: counted in {counts[-1].seconds:.0f} s", flush=True)
    quality = {"title": "Newcomers", "columns": _COLUMNS, "rows": scores.rows(fold), "note": _NOTE}
    return {"tables": [quality, _counts_table(plan, counts, fold)], "machine": machine()}


class _Board:
    """Scores of every newcomer by number of known items and method, and what becomes of them."""

    def __init__(self, split: Split, seed: int) -> None:
        self._shape = (split.n_users, split.n_items)
        self._scores: dict[tuple[int, str], npt.NDArray[np.float32]] = {}
        self._evaluator = Evaluator(split, seed)

    def put(self, known: int, method: str, user: int, scores: _Scores | _Ints) -> None:
        """Keep one newcomer's scores."""
        table = self._scores.setdefault((known, method), np.zeros(self._shape, np.float32))
        table[user] = scores

    def rows(self, fold: _Ints) -> list[list[str | int | float]]:
        """The table's rows."""
        hits = {key: self._hits(table) for key, table in self._scores.items()}
        popular = hits[0, _POPULAR]
        folds, made = fold[self._evaluator.users], []
        for known in sorted({known for known, _ in hits}):
            made.append(_row(known, _POPULAR, popular, None))
            mine = {method: values for (count, method), values in hits.items() if count == known}
            if _FIT in mine:
                made.append(_row(known, _FIT, mine[_FIT], popular))
            made.append(_row(known, _COHORT, _chosen(mine, folds), popular))
        return made

    def _hits(self, table: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Share of draws, and all items or not, in which each user's item is in the list."""
        sampled, full = self._evaluator.ranks(lambda users: table[users])
        return np.stack([(sampled < CUTOFF).mean(axis=0), full < CUTOFF])


def _chosen(hits: Mapping[str, npt.NDArray[np.float64]], folds: _Ints) -> npt.NDArray[np.float64]:
    """For each fold the weight that is best for the newcomers of all others."""
    named = [values for method, values in hits.items() if method.startswith(_COHORT)]
    options = np.stack(named)  # (weights, 2, users)
    chosen = np.empty(options.shape[1:])
    for number in np.unique(folds):
        here = folds == number
        best = int(options[:, 0, ~here].mean(axis=1).argmax())
        chosen[:, here] = options[best][:, here]
    return chosen


def _row(
    known: int,
    method: str,
    hits: npt.NDArray[np.float64],
    popular: npt.NDArray[np.float64] | None,
) -> list[str | int | float]:
    sampled, full = hits.mean(axis=1)
    row: list[str | int | float] = [known, method, round(float(sampled), 4), round(float(full), 4)]
    if popular is None:
        return [*row, "", "", "", ""]
    return [*row, *_gain(hits[0] - popular[0]), *_gain(hits[1] - popular[1])]


def _gain(differences: npt.NDArray[np.float64]) -> list[str | float]:
    """Mean and 95 % interval of paired differences."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, differences.size, (_RESAMPLES, differences.size))
    low, high = np.percentile(differences[drawn].mean(axis=1), [2.5, 97.5])
    return [round(float(differences.mean()), 4), f"{low:+.3f} to {high:+.3f}"]


def _counts_table(plan: Plan, counts: Sequence[Counted], fold: _Ints) -> dict[str, Any]:
    columns = [
        "fold", "clients", "cohorts", "equal to the clear", "cells withheld", "prior's strength",
        "bytes a client", "seconds",
    ]  # fmt: skip
    rows = [
        [
            number + 1,
            int(np.count_nonzero(fold != number)),
            len(made.table.members),
            "yes" if made.equal else "NO",
            round(made.withheld, 3),
            round(made.table.strength(), 1),
            plan.payload_bytes,
            round(made.seconds, 1),
        ]
        for number, made in enumerate(counts)
    ]
    least = plan.threshold.least if plan.threshold else 0
    note = (
        f"Encrypted by one client a user, summed, opened, and cells of fewer than {least} people "
        "withheld by the key holder. Equal: every cell is what the counts in the clear are, those "
        "withheld as zero. Cells without anybody count as withheld. Seconds: wall time of one "
        "process that plays all roles, without a norm check, on a machine that was busy."
    )
    return {"title": "Cohort counts, encrypted", "columns": columns, "rows": rows, "note": note}


@app.command()
def run(
    data_dir: Annotated[Path, typer.Option(envvar="SECAGG_DATA_DIR", help="MovieLens 100K")],
    output: Annotated[Path, typer.Option(help="where the JSON goes")] = Path(
        "bench/results/cold_start.json"
    ),
) -> None:
    """Measure on MovieLens 100K: minutes."""
    interactions = load_dataset("ml-100k", data_dir)
    people = load_movielens_users(dataset_folder("ml-100k", data_dir))
    labels = [people[label] for label in interactions.user_labels]
    cohorts = np.array([age_gender(person.age, person.gender) for person in labels])
    split = split_leave_one_out(interactions)
    result = measure(split, cohorts, len(AGE_GENDER), config=TrainConfig())
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
