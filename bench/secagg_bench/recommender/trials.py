"""One run of federated training, described by plain values and repeatable from them alone.

Sums are of the very integers that clients would encrypt (see `sums`). Nothing here may be used by a
service: it sees everybody's data. Read `sections` next.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from secagg.compression import left_over
from secagg.context import rotation_string
from secagg.errors import SecaggError
from secagg.optimisers import Optimiser
from secagg.parameters import FloatSegment, LowRank, Plan, RandomSubset, TensorSpec
from secagg.planner import make_plan
from secagg.quantize import flatten, unflatten
from secagg_bench.baselines import Factors, collect_user_vectors, federated_average
from secagg_bench.privacy.population import validation_split
from secagg_bench.privacy.ranking import METRICS, UserEvaluator
from secagg_bench.recommender.sums import TASK, Adder, Sent, Update, add_in_the_clear
from secagg_recommender.datasets import read_dataset
from secagg_recommender.devices import Workload
from secagg_recommender.evaluation import ScoresFn
from secagg_recommender.factorisation import SharedTensors, Silo, TrainConfig, init_shared
from secagg_recommender.interactions import Split, split_leave_one_out
from secagg_recommender.marketplace import generate_marketplace
from secagg_recommender.partition import (
    PartitionName,
    favourite_labels,
    partition,
    popularity_skew,
)

__all__ = ["Trial", "World", "run"]

_EVALUATION_SEED: Final = 1
_LEAST: Final = 3


@dataclass(frozen=True, slots=True)
class Trial:
    """Everything that decides a run's result.

    Attributes:
        system: federated; every silo alone; all data in one place; or most popular items.
        validation: hold out each user's last but one item instead of the last, for tuning.
        optimiser, server_rate, tau: of the server (`Optimiser`).
        proximal: FedProx's mu.
        bits: of a quantised value; 0 for a mean of floats.
        clip: L2 norm to which updates are cut.
        weight_cap: samples beyond which a silo gains no more weight.
        rank, subset, feedback: compression; 0 and 1 for none.
        participation: part of the silos that is drawn in each round.
        weak: part of the silos that has weak devices, the last ones.
        progress, presence: part of its batches, and of the rounds, that a weak device manages.
        corrected: whether weak devices weigh more for what they left out.
    """

    system: Literal["federated", "local", "centralised", "popular"] = "federated"
    dataset: str = "ml-100k"
    validation: bool = False
    partition: PartitionName = "uniform"
    alpha: float = 0.5
    optimiser: str = "average"
    server_rate: float = 1.0
    tau: float = 1e-3
    proximal: float = 0.0
    bits: int = 8
    clip: float = 40.0
    weight_cap: int = 20_000
    rank: int = 0
    subset: float = 1.0
    feedback: bool = False
    participation: float = 1.0
    weak: float = 0.0
    progress: float = 1.0
    presence: float = 1.0
    corrected: bool = True
    silos: int = 8
    rounds: int = 25
    seed: int = 0

    @property
    def key(self) -> str:
        """Names the run in the results: every field that is not at its default."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return " ".join(f"{f.name}={own[f.name]}" for f in fields(self) if own[f.name] != f.default)

    def plan(self, n_items: int, dimensions: int) -> Plan:
        """The plan of every round."""
        tensors = (
            TensorSpec("item_factors", (n_items, dimensions)),
            TensorSpec("item_bias", (n_items,)),
        )
        compression = LowRank(self.rank) if self.rank else None
        if self.subset < 1:
            compression = RandomSubset(self.subset)  # type: ignore[assignment]
        update = FloatSegment(
            "update",
            tensors,
            self.clip,
            self.bits or 8,
            "samples",
            self.weight_cap,
            compression=compression,
        )
        return make_plan([update], max_clients=self.silos, min_clients=_LEAST)


class World:
    """A data set, its split, and how rankings on it are measured."""

    def __init__(self, dataset: str, data_dir: Path | None, *, validation: bool = False) -> None:
        self.labels: NDArray[np.int64] | None = None
        if dataset == "toy":
            made = generate_marketplace(0, n_shoppers=60, n_products=90)
            self.split: Split = split_leave_one_out(made)
        else:
            read = read_dataset(dataset, data_dir)
            self.split = split_leave_one_out(read.interactions)
            self.labels = read.kinds
            if self.labels is None and read.attributes is not None:
                self.labels = favourite_labels(self.split, read.attributes, "genre: ")
        if validation:
            self.split = validation_split(self.split)

    @cached_property
    def evaluator(self) -> UserEvaluator:
        return UserEvaluator(self.split, _EVALUATION_SEED)

    def parts(self, trial: Trial) -> list[NDArray[np.int64]]:
        """Whose users each silo has."""
        return partition(
            trial.partition,
            self.split,
            trial.silos,
            trial.seed,
            labels=self.labels,
            alpha=trial.alpha,
        )


class _Federation:
    """The silos of a run, and the model on its way through the rounds."""

    def __init__(self, trial: Trial, world: World, config: TrainConfig, add: Adder) -> None:
        self.trial, self._add = trial, add
        split = world.split
        self.parts = world.parts(trial)
        self.silos = [Silo(i, split, users, config) for i, users in enumerate(self.parts)]
        self.plan = trial.plan(split.n_items, config.dimensions)
        (segment,) = self.plan.segments
        assert isinstance(segment, FloatSegment)  # noqa: S101
        self._segment = segment
        self.parameters = segment.parameters
        self.shared = init_shared(split.n_items, config.dimensions, config.seed)
        self._optimiser = Optimiser(trial.optimiser, trial.server_rate, tau=trial.tau)
        self._state = self._optimiser.initial(segment.parameters)
        self._residual: dict[int, Update] = {}
        self.work = [self._workload(silo) for silo in self.silos]
        self.weak = np.concatenate([np.empty(0, np.int64), *self.parts[self._strong() :]])
        self.train_s: list[float] = []

    def round(self, number: int) -> None:
        """One round; without enough silos, as services would have it, the model stays."""
        cohort = [silo for silo in self._drawn(number) if self.work[silo].takes_part(number)]
        if len(cohort) < _LEAST:
            return
        sent = [self._contribution(silo, number) for silo in cohort]
        mean = self._mean(number, sent)
        model, self._state = self._optimiser.step(
            flatten(self._segment, self.shared), mean, self._state
        )
        tensors = unflatten(self._segment, model.astype(np.float64))
        self.shared = {name: value.astype(np.float32) for name, value in tensors.items()}

    def factors(self) -> Factors:
        vectors = collect_user_vectors(self.silos)
        return Factors(vectors, (self.shared,), np.zeros(len(vectors), dtype=np.int64))

    def _strong(self) -> int:
        return self.trial.silos - round(self.trial.weak * self.trial.silos)

    def _workload(self, silo: Silo) -> Workload:
        trial, full = self.trial, silo.full_steps
        weak = silo.index >= self._strong()
        steps = max(1, round(trial.progress * full)) if weak else full
        uploads = max(1, round(trial.presence * trial.rounds)) if weak else trial.rounds
        return Workload(steps, full, uploads, trial.rounds, trial.seed, silo.index)

    def _drawn(self, number: int) -> list[int]:
        count = max(_LEAST, round(self.trial.participation * self.trial.silos))
        rng = np.random.default_rng([self.trial.seed, number, 9])
        return sorted(rng.permutation(self.trial.silos)[:count].tolist())

    def _contribution(self, index: int, number: int) -> Sent:
        work = self.work[index]
        started = time.perf_counter()
        trained = self.silos[index].train(self.shared, number, steps=work.steps)
        self.train_s.append(time.perf_counter() - started)
        samples, update = trained.samples, trained.update
        if self.trial.corrected:
            samples = work.weight(samples, self.trial.weight_cap)
        if self.trial.feedback:
            kept = self._residual.get(index)
            update = {n: v + kept[n] for n, v in update.items()} if kept else update
            rotation = rotation_string(TASK, number, self.plan)
            self._residual[index] = left_over(self._segment, update, rotation)
        return Sent(index, update, samples)

    def _mean(self, number: int, sent: Sequence[Sent]) -> NDArray[np.float64]:
        if self.trial.bits:
            return self._add(self.plan, number, sent, self.trial.seed).flat_mean()
        mean = federated_average([s.update for s in sent], [s.samples for s in sent])
        return flatten(self._segment, mean).astype(np.float64)


class _Alone:
    """Every silo with a table of its own, trained for as long: what it reaches without others."""

    def __init__(self, trial: Trial, world: World, config: TrainConfig) -> None:
        parts = world.parts(trial) if trial.system == "local" else [np.arange(world.split.n_users)]
        self.silos = [Silo(i, world.split, users, config) for i, users in enumerate(parts)]
        start = init_shared(world.split.n_items, config.dimensions, config.seed)
        self._tables: list[SharedTensors] = [start] * len(parts)
        self._table_of_user = np.zeros(world.split.n_users, dtype=np.int64)
        for index, users in enumerate(parts):
            self._table_of_user[users] = index

    def round(self, number: int) -> None:
        for index, silo in enumerate(self.silos):
            update = silo.train(self._tables[index], number).update
            self._tables[index] = {n: v + update[n] for n, v in self._tables[index].items()}

    def factors(self) -> Factors:
        vectors = collect_user_vectors(self.silos)
        return Factors(vectors, tuple(self._tables), self._table_of_user)


def run(trial: Trial, world: World, add: Adder = add_in_the_clear) -> dict[str, Any]:
    """Train, and measure after every round.

    Returns:
        ``metrics`` of the last round by name, and of ``best_round`` by HR@10; HR@10 of every round
        as ``curve``; and for federations the ``bytes`` of an upload, the ``skew`` of the partition,
        and the HR@10 of users on ``weak`` and ``strong`` devices. ``failed`` with a reason where
        training came to an end, such as by a sum that cannot be divided.
    """
    config = TrainConfig(seed=trial.seed, proximal=trial.proximal)
    if trial.dataset == "toy":
        config = TrainConfig(4, batch_size=256, seed=trial.seed, proximal=trial.proximal)
    started = time.perf_counter()
    if trial.system == "popular":
        return _outcome([world.evaluator.by_user(_popular(world.split))], started)
    if trial.system != "federated":
        system: _Alone | _Federation = _Alone(trial, world, config)
        return _outcome(_measured(system, trial, world), started)
    federation = _Federation(trial, world, config, add)
    common = {
        "bytes": federation.plan.payload_bytes if trial.bits else 4 * federation.parameters,
        "skew": popularity_skew(world.split, federation.parts),
    }
    try:
        values = _measured(federation, trial, world)
    except SecaggError as error:
        return {"failed": error.reason, **common}
    if trial.weak:
        weak = np.isin(world.evaluator.users, federation.weak)
        common |= {"weak": values[-1][0, weak].mean(), "strong": values[-1][0, ~weak].mean()}
    return {**_outcome(values, started), **common, "train_s": median(federation.train_s)}


def _popular(split: Split) -> ScoresFn:
    counts = np.bincount(split.train_items, minlength=split.n_items).astype(np.float64)
    return lambda users: np.broadcast_to(counts, (users.size, counts.size))


def _measured(
    system: _Alone | _Federation, trial: Trial, world: World
) -> list[NDArray[np.float64]]:
    """Metrics of every user after every round, (metrics, users) each."""
    values = []
    for number in range(1, trial.rounds + 1):
        system.round(number)
        values.append(world.evaluator.by_user(system.factors().scores))
    return values


def _outcome(values: Sequence[NDArray[np.float64]], started: float) -> dict[str, Any]:
    curve = [float(each[0].mean()) for each in values]
    best = int(np.argmax(curve))

    def means(place: int) -> dict[str, float]:
        return {m: round(float(v.mean()), 5) for m, v in zip(METRICS, values[place], strict=True)}

    return {
        "metrics": means(-1),
        "best": means(best),
        "best_round": best + 1,
        "curve": [round(value, 4) for value in curve],
        "seconds": round(time.perf_counter() - started, 1),
    }
