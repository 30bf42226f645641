"""The encrypted rounds of EASE and of transitions, each compared with the sum over all users.

EASE on MovieLens 100K, from the Gram matrices of 943 single users and of eight silos; transitions
on Amazon Beauty, from the counts of a hundred silos, as a table of pairs and as a dense one. A sum
counts as identical if its SHA-256 is that of all data in one place. Read `one_round` next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from secagg.parameters import IntegerSegment, NormCheck, Plan, Segment
from secagg.planner import make_plan
from secagg.release import Release, sums_sha256
from secagg_bench.recommender.encrypted_round import Contribution, encrypted_round
from secagg_recommender.datasets import load_dataset
from secagg_recommender.ease import GRAM, Ease, EaseLearner, ease_segment_for, gram_triangle
from secagg_recommender.evaluation import Evaluator, Metrics
from secagg_recommender.histories import HistoryModel, histories_of, scores_on
from secagg_recommender.interactions import Split, split_leave_one_out
from secagg_recommender.learner import Assignment, Learner
from secagg_recommender.pair_tables import PairCounts
from secagg_recommender.partition import Parts, partition_users
from secagg_recommender.transitions import (
    DISTANCE_WEIGHTS,
    POPULARITY,
    Transitions,
    TransitionsLearner,
    pairs_from_sums,
    popularity,
    transition_counts,
    transition_segments_for,
)

__all__ = [
    "SEED",
    "Progressed",
    "Sizes",
    "dense_runs",
    "ease_plan",
    "ease_runs",
    "held_back",
    "transition_runs",
]

Progressed = Callable[[str, int, int], None]
"""Told a name, and how many of how many clients are done."""

SEED: Final = 0
"""Of the partition and of the negatives."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured.

    Attributes:
        ease_clients: numbers of clients of EASE; as many as users makes each of them one.
        transition_clients: silos of the transitions.
        most: largest count of a silo in a cell of the dense table.
        dense_blocks: rounds that a dense table takes, each for a share of its rows.
        dense_measured: how many of these are run.
    """

    ease_clients: tuple[int, ...] = (8, 943)
    transition_clients: int = 100
    most: int = 63
    dense_blocks: int = 16
    dense_measured: int = 2


def held_back(split: Split) -> Split:
    """Without the latest training item of each user, which others keep to tune with.

    Published figures are of models that have not seen it.
    """
    last = np.append(split.train_users[1:] != split.train_users[:-1], True)
    counts = np.bincount(split.train_users, minlength=split.n_users)
    kept = ~last | (counts[split.train_users] < 2)
    return replace(split, train_users=split.train_users[kept], train_items=split.train_items[kept])


def _contributions(learners: list[Learner], plan: Plan) -> Iterator[Callable[[], Contribution]]:
    assignment = Assignment(1, {}, {segment.name: segment for segment in plan.segments})
    for learner in learners:
        yield partial(_arrays, learner, assignment)


def _arrays(learner: Learner, assignment: Assignment) -> dict[str, npt.NDArray[Any]]:
    work = learner.work(assignment)
    return {} if work is None else {name: np.asarray(a) for name, a in work.arrays.items()}


def _sums(release: Release) -> dict[str, npt.NDArray[np.int64]]:
    return {segment.name: release.total(segment.name) for segment in release.plan.segments}


def _unchecked(segment: Segment) -> Segment:
    return replace(segment, max_norm=None) if isinstance(segment, IntegerSegment) else segment


def _plan(segments: tuple[Segment, ...], clients: int, *, checked: bool) -> Plan:
    if not checked:
        return make_plan([_unchecked(segment) for segment in segments], max_clients=clients)
    return make_plan(segments, max_clients=clients, norm_check=NormCheck())


# --- EASE -----------------------------------------------------------------------------------------


def ease_runs(data_dir: Path, sizes: Sizes, on_progress: Progressed) -> dict[str, Any]:
    """EASE, encrypted, for each number of clients, with and without what is usually held back."""
    split = split_leave_one_out(load_dataset("ml-100k", data_dir))
    evaluator = Evaluator(split, SEED)
    runs = []
    for clients in sizes.ease_clients:
        for training, checked in (("all", False), ("all", True), ("held back", False)):
            data = split if training == "all" else held_back(split)
            run = _ease_run(data, clients, evaluator, checked=checked, on_progress=on_progress)
            runs.append({"training": training} | run)
    return {"runs": runs}


def ease_plan(split: Split, parts: Parts, *, checked: bool) -> Plan:
    """For clients of these users, with a norm check or without."""
    return _plan((ease_segment_for(split, parts),), len(parts), checked=checked)


def _ease_run(
    split: Split,
    clients: int,
    evaluator: Evaluator,
    *,
    checked: bool,
    on_progress: Progressed,
) -> dict[str, Any]:
    parts = partition_users(split.n_users, clients, SEED)
    plan = ease_plan(split, parts, checked=checked)
    learners: list[Learner] = [EaseLearner(split, part) for part in parts]
    name = f"EASE, {clients} clients"
    release, costs = encrypted_round(
        plan, _contributions(learners, plan), lambda done: on_progress(name, done, clients)
    )
    central = gram_triangle(histories_of(split, range(split.n_users)), split.n_items)
    total = release.total(GRAM)
    return {
        "checked": checked,
        "norm": plan.segments[0].norm_bound,
        "sha256": sums_sha256((total,)),
        "identical": sums_sha256((total,)) == sums_sha256((central,)),
        "costs": costs.summary(),
        "metrics": _metrics(Ease.from_sums({GRAM: total}), split, evaluator),
    }


def _metrics(model: HistoryModel, split: Split, evaluator: Evaluator) -> dict[str, float]:
    found: Metrics = evaluator.evaluate(scores_on(model, split))
    return asdict(found)


# --- transitions ----------------------------------------------------------------------------------


def transition_runs(data_dir: Path, sizes: Sizes, on_progress: Progressed) -> dict[str, Any]:
    """Transitions, encrypted as a table of pairs, with and without a norm check."""
    split = split_leave_one_out(load_dataset("amazon-beauty", data_dir))
    evaluator = Evaluator(split, SEED)
    runs = [
        _transition_run(split, sizes, evaluator, checked=checked, on_progress=on_progress)
        for checked in (False, True)
    ]
    return {"runs": runs, "floors": _floors(split, evaluator)}


def _transition_run(
    split: Split,
    sizes: Sizes,
    evaluator: Evaluator,
    *,
    checked: bool,
    on_progress: Progressed,
) -> dict[str, Any]:
    clients = sizes.transition_clients
    parts = partition_users(split.n_users, clients, SEED)
    segments = transition_segments_for(split, parts)
    plan = _plan(segments, clients, checked=checked)
    learners: list[Learner] = [TransitionsLearner(split, part) for part in parts]
    release, costs = encrypted_round(
        plan,
        _contributions(learners, plan),
        lambda done: on_progress(f"transitions, {clients} clients", done, clients),
    )
    sums = _sums(release)
    histories = histories_of(split, range(split.n_users))
    central = transition_counts(histories, split.n_items)
    found = pairs_from_sums(sums)
    return {
        "checked": checked,
        "values": sum(segment.values for segment in segments),
        "pairs": int(central.keys.size),
        "sha256": _pairs_sha256(found),
        "identical": _pairs_sha256(found) == _pairs_sha256(central)
        and bool((sums[POPULARITY] == popularity(histories, split.n_items)).all()),
        "costs": costs.summary(),
        "metrics": _metrics(Transitions.from_sums(sums), split, evaluator),
    }


def _pairs_sha256(pairs: PairCounts) -> str:
    running = hashlib.sha256(pairs.n_items.to_bytes(8, "little"))
    for part in (pairs.keys, pairs.counts):
        running.update(np.ascontiguousarray(part, dtype="<i8").tobytes())
    return running.hexdigest()


_VARIANTS: Final[tuple[tuple[str, bool, float, float], ...]] = (
    ("what came later, at any distance", False, 0.0, 0.0),
    ("by distance, both ways, rows as shares", True, 1.0, 1.0),
    ("by distance", True, 0.0, 0.5),
    ("**by distance, a quarter backwards**", True, 0.25, 0.5),
)
"""Of the scoring: its name, weighted by distance or not, backward, damping."""


def _floors(split: Split, evaluator: Evaluator) -> list[dict[str, Any]]:
    """What counts alone reach, by what is counted and how votes are weighed."""
    rows = []
    for data in (held_back(split), split):
        histories = histories_of(data, range(split.n_users))
        users = popularity(histories, split.n_items)
        for name, weighted, backward, damping in _VARIANTS:
            weights = DISTANCE_WEIGHTS if weighted else None
            pairs = transition_counts(histories, split.n_items, weights)
            model = Transitions.of(pairs, users, backward=backward, damping=damping)
            metrics = _metrics(model, split, evaluator)
            rows.append({"name": name, "all": data is split, "metrics": metrics})
    return rows


def dense_runs(data_dir: Path, sizes: Sizes, on_progress: Progressed) -> dict[str, Any]:
    """The same counts as a dense table, some of whose rows are summed in each of several rounds."""
    split = split_leave_one_out(load_dataset("amazon-beauty", data_dir))
    parts = partition_users(split.n_users, sizes.transition_clients, SEED)
    counts = [transition_counts(histories_of(split, part), split.n_items) for part in parts]
    central = transition_counts(histories_of(split, range(split.n_users)), split.n_items)
    edges = np.linspace(0, split.n_items, sizes.dense_blocks + 1).astype(int).tolist()
    runs = []
    for block, rows in enumerate(list(pairwise(edges))[: sizes.dense_measured]):
        name = f"dense table, {block + 1} of {sizes.dense_blocks}"
        runs.append(_dense_run(counts, central, rows, sizes.most, partial(on_progress, name)))
    return {"blocks": sizes.dense_blocks, "values": split.n_items**2, "runs": runs}


def _dense_run(
    counts: list[PairCounts],
    central: PairCounts,
    rows: tuple[int, int],
    most: int,
    on_progress: Callable[[int, int], None],
) -> dict[str, Any]:
    size = (rows[1] - rows[0]) * central.n_items
    plan = make_plan([IntegerSegment("table", size, most)], max_clients=len(counts))
    clients = ((lambda each=each: {"table": _dense(each, rows)}) for each in counts)
    release, costs = encrypted_round(plan, clients, lambda done: on_progress(done, len(counts)))
    identical = bool((release.total() == _dense(central, rows)).all())
    return {"identical": identical, "costs": costs.summary()}


def _dense(pairs: PairCounts, rows: tuple[int, int]) -> npt.NDArray[np.int64]:
    """Some rows of the table, flattened."""
    first, stop = (row * pairs.n_items for row in rows)
    inside = slice(*np.searchsorted(pairs.keys, [first, stop]))
    table = np.zeros(stop - first, dtype=np.int64)
    table[pairs.keys[inside] - first] = pairs.counts[inside]
    return table
