"""Systems to compare an encrypted run with, all in the clear and in one process.

Most popular items, every silo alone, all data in one place, and federated averaging of plain
floats: same data, same model, same number of epochs, same sampled negatives. These functions see
everybody's data at once, so nothing here may be used by a service. Read the scenarios next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from secagg_recommender.evaluation import Evaluator, Metrics, ScoresFn, factor_scores
from secagg_recommender.factorisation import (
    LocalUpdate,
    SharedTensors,
    Silo,
    TrainConfig,
    init_shared,
)
from secagg_recommender.interactions import DataError, Split
from secagg_recommender.partition import partition_users

__all__ = [
    "BaselineResult",
    "CurvePoint",
    "Factors",
    "Progress",
    "ProgressFn",
    "RunConfig",
    "build_silos",
    "centralised",
    "collect_user_vectors",
    "federated_average",
    "federated_float",
    "local_only",
    "popular",
    "silo_weight",
]


@dataclass(frozen=True, slots=True)
class RunConfig:
    """One comparison: the model and how its training is spread.

    ``weighting`` ``"samples"`` gives a silo min(samples, ``sample_cap``) / ``sample_cap``, a
    weight in (0, 1] that it can work out without knowing anybody else's count; ``"equal"`` gives
    everybody 1. Metrics are taken every ``evaluate_every`` rounds and after the last one, on
    negatives drawn with ``evaluation_seed``, which does not depend on the training seed.

    Raises:
        DataError: a count is below 1.
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    n_silos: int = 8
    rounds: int = 25
    evaluate_every: int = 5
    evaluation_seed: int = 1
    weighting: Literal["samples", "equal"] = "samples"
    sample_cap: int = 10_000

    def __post_init__(self) -> None:
        """Refuse runs that would do nothing."""
        for name in ("n_silos", "rounds", "evaluate_every", "sample_cap"):
            value = getattr(self, name)
            if value < 1:
                raise DataError(f"expected {name} >= 1, got {name}={value}; raise it")


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Metrics after ``round_number`` rounds (counted from 1)."""

    round_number: int
    metrics: Metrics


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """A trained model: user vectors float32 ``(n_users, d)`` and one shared table per group.

    ``tables`` holds one entry, or one a silo where silos never averaged; ``table_of_user`` int64
    ``(n_users,)`` says whose table scores a user.
    """

    user_vectors: npt.NDArray[np.float32]
    tables: tuple[SharedTensors, ...]
    table_of_user: npt.NDArray[np.int64]

    def scores(self, users: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
        """Scores of all items for ``users``: the function that evaluation asks for."""
        result = np.empty((users.size, self.tables[0]["item_bias"].size), dtype=np.float32)
        for index, table in enumerate(self.tables):
            rows = self.table_of_user[users] == index
            result[rows] = factor_scores(self.user_vectors, table)(users[rows])
        return result


@dataclass(frozen=True, slots=True, eq=False)
class BaselineResult:
    """What one system reached; ``curve`` is empty and ``factors`` None where nothing is trained.

    ``seconds`` is wall time, evaluation included.
    """

    name: str
    metrics: Metrics
    curve: tuple[CurvePoint, ...]
    factors: Factors | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Progress:
    """Sent after every round; ``metrics`` is None in rounds that were not evaluated."""

    system: str
    round_number: int
    rounds: int
    metrics: Metrics | None


ProgressFn = Callable[[Progress], None]


def popular(split: Split, config: RunConfig) -> BaselineResult:
    """Recommend to everybody what most people have, counted on training data only."""
    started = time.perf_counter()
    counts = np.bincount(split.train_items, minlength=split.n_items).astype(np.float64)

    def scores(users: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
        return np.broadcast_to(counts, (users.size, counts.size))

    metrics = Evaluator(split, config.evaluation_seed).evaluate(scores)
    return BaselineResult("popular", metrics, (), None, time.perf_counter() - started)


def local_only(
    split: Split, config: RunConfig, progress: ProgressFn | None = None
) -> BaselineResult:
    """Every silo trains alone, rounds × local epochs, and serves its users from its own table.

    Raises:
        DataError: the split has too few users for the silos, or no test items.
    """
    silos = build_silos(split, config)
    tables = [_initial(split, config) for _ in silos]

    def step(round_number: int) -> None:
        for index, silo in enumerate(silos):
            update = silo.train(tables[index], round_number)
            tables[index] = _plus(tables[index], update.update)

    table_of_user = np.zeros(split.n_users, dtype=np.int64)
    for index, silo in enumerate(silos):
        table_of_user[silo.users] = index
    return _run(
        "local_only",
        split,
        config,
        step,
        lambda: Factors(collect_user_vectors(silos), tuple(tables), table_of_user),
        progress,
    )


def centralised(
    split: Split, config: RunConfig, progress: ProgressFn | None = None
) -> BaselineResult:
    """The same model and number of epochs with all data in one place: the price of federating.

    Raises:
        DataError: the split has no test items.
    """
    silo = Silo(0, split, np.arange(split.n_users), config.train)
    tables = [_initial(split, config)]

    def step(round_number: int) -> None:
        tables[0] = _plus(tables[0], silo.train(tables[0], round_number).update)

    return _run("centralised", split, config, step, lambda: _one_table([silo], tables[0]), progress)


def federated_float(
    split: Split, config: RunConfig, progress: ProgressFn | None = None
) -> BaselineResult:
    """Federated averaging without clipping, quantising or encryption.

    The algorithm is FedAvg (McMahan et al. 2017, arXiv 1602.05629) with weights that no silo has
    to tell: see :class:`RunConfig`.

    Raises:
        DataError: the split has too few users for the silos, or no test items.
    """
    silos = build_silos(split, config)
    tables = [_initial(split, config)]

    def step(round_number: int) -> None:
        updates = [silo.train(tables[0], round_number) for silo in silos]
        weights = [silo_weight(update, config) for update in updates]
        mean = federated_average([update.update for update in updates], weights)
        tables[0] = _plus(tables[0], mean)

    return _run(
        "federated_float", split, config, step, lambda: _one_table(silos, tables[0]), progress
    )


def build_silos(split: Split, config: RunConfig) -> list[Silo]:
    """The silos of a run, users dealt out with the training seed.

    Raises:
        DataError: more silos than users, or a silo without training data.
    """
    parts = partition_users(split.n_users, config.n_silos, config.train.seed)
    return [Silo(index, split, users, config.train) for index, users in enumerate(parts)]


def collect_user_vectors(silos: Sequence[Silo]) -> npt.NDArray[np.float32]:
    """All private vectors by global user id, float32 ``(n_users, d)``: for measuring only.

    Raises:
        DataError: the silos do not hold users 0 … n − 1 once each.
    """
    users = np.concatenate([np.empty(0, dtype=np.int64), *(silo.users for silo in silos)])
    if users.size == 0 or not np.array_equal(np.sort(users), np.arange(users.size)):
        raise DataError(
            f"expected silos that hold all users once each, got users={users.size} with gaps, "
            "repeats or none; pass all silos of one run"
        )
    return np.concatenate([silo.user_vectors for silo in silos])[np.argsort(users)]


def silo_weight(update: LocalUpdate, config: RunConfig) -> float:
    """Weight of one silo's update, in (0, 1]."""
    if config.weighting == "equal":
        return 1.0
    return min(update.samples, config.sample_cap) / config.sample_cap


def federated_average(
    updates: Sequence[Mapping[str, npt.NDArray[np.float32]]], weights: Sequence[float]
) -> SharedTensors:
    """Σ w·update / Σ w of every tensor, added up in float64, returned as float32.

    Raises:
        DataError: no update, another number of weights, or a weight that is not positive.
    """
    if not updates or len(updates) != len(weights) or not all(weight > 0 for weight in weights):
        raise DataError(
            f"expected one positive weight per update, at least one, got updates={len(updates)} "
            f"weights={list(weights)[:8]}; leave out updates that do not count"
        )
    total = sum(weights)
    return {
        name: np.sum(
            [
                weight / total * update[name].astype(np.float64)
                for update, weight in zip(updates, weights, strict=True)
            ],
            axis=0,
        ).astype(np.float32)
        for name in updates[0]
    }


def _run(
    system: str,
    split: Split,
    config: RunConfig,
    step: Callable[[int], None],
    factors: Callable[[], Factors],
    progress: ProgressFn | None,
) -> BaselineResult:
    """Take the steps of a trained system, measuring on the way."""
    started = time.perf_counter()
    evaluator = Evaluator(split, config.evaluation_seed)
    curve: list[CurvePoint] = []
    for round_number in range(1, config.rounds + 1):
        step(round_number)
        metrics: Metrics | None = None
        if round_number % config.evaluate_every == 0 or round_number == config.rounds:
            scores: ScoresFn = factors().scores
            metrics = evaluator.evaluate(scores)
            curve.append(CurvePoint(round_number, metrics))
        if progress is not None:
            progress(Progress(system, round_number, config.rounds, metrics))
    seconds = time.perf_counter() - started
    return BaselineResult(system, curve[-1].metrics, tuple(curve), factors(), seconds)


def _initial(split: Split, config: RunConfig) -> SharedTensors:
    """The common starting point of all trained systems."""
    return init_shared(split.n_items, config.train.dimensions, config.train.seed)


def _one_table(silos: Sequence[Silo], table: SharedTensors) -> Factors:
    """Factors of a system whose silos share one table."""
    vectors = collect_user_vectors(silos)
    return Factors(vectors, (table,), np.zeros(len(vectors), dtype=np.int64))


def _plus(
    shared: Mapping[str, npt.NDArray[np.float32]], update: Mapping[str, npt.NDArray[np.float32]]
) -> SharedTensors:
    """Shared tensors after an update."""
    return {name: tensor + update[name] for name, tensor in shared.items()}
