"""Measures utility against epsilon, sweeps over one factor, and membership attacks.

Results are tidy rows: one mean with its interval each. Sections are measured one after another, and
may be run alone. Read `report` next.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from secagg_bench.privacy import membership
from secagg_bench.privacy.mechanism import Budget, Channel
from secagg_bench.privacy.methods import METHODS, Trial, popular, sampled_local_only
from secagg_bench.privacy.population import Clients, bootstrap, load_split
from secagg_bench.privacy.ranking import METRICS, UserEvaluator, interval
from secagg_bench.privacy.settings import Population, Sizes, delta_of, tuned
from secagg_recommender.evaluation import ScoresFn
from secagg_recommender.interactions import Split

__all__ = ["SECTIONS", "Say", "measure", "validate"]

Row = dict[str, Any]

Say = Callable[[str, int, int, str], None]
"""Told the section, how many of its steps are done, of how many, and what was found last."""

_EVALUATION_SEED = 1
_REFERENCE_NOISE = 0.5  # about epsilon 8


class _World:
    """A dataset, whose users are evaluated whoever trains."""

    def __init__(self, dataset: str, data_dir: Path | None) -> None:
        self.dataset = dataset
        self.split: Split = load_split(dataset, data_dir)
        self.users = Clients.of(self.split)

    @cached_property
    def evaluator(self) -> UserEvaluator:
        return UserEvaluator(self.split, _EVALUATION_SEED)

    @cached_property
    def popular(self) -> NDArray[np.float64]:
        """Metrics of exact popularity, (metrics, users)."""
        return self.evaluator.by_user(popular(self.users))

    def clients(self, factor: float, keep: float, seed: int) -> Clients:
        """Another population of clients: a part of the users, all of them, or a bootstrap."""
        rng = np.random.default_rng([seed, 5])
        count = round(factor * len(self.users))
        if factor == 1:
            return self.users
        if factor > 1:
            return bootstrap(self.users, count, keep, rng)
        return self.users.chosen(np.sort(rng.choice(len(self.users), count, replace=False)))


class _Measurement:
    """One section of the results."""

    def __init__(self, sizes: Sizes, data_dir: Path | None, say: Say) -> None:
        self.sizes, self._data_dir, self._say = sizes, data_dir, say
        self._worlds: dict[str, _World] = {}
        self._done = 0

    def world(self, dataset: str) -> _World:
        if dataset not in self._worlds:
            self._worlds[dataset] = _World(dataset, self._data_dir)
        return self._worlds[dataset]

    def tell(self, section: str, total: int, found: str) -> None:
        self._done += 1
        self._say(section, self._done, total, found)

    # --- utility ----------------------------------------------------------------------------------

    def utility(self) -> list[Row]:
        """Every method at every epsilon, with the users themselves as clients."""
        populations = self.sizes.populations
        datasets = list(dict.fromkeys(each.dataset for each in populations))
        total = 2 * len(datasets) + sum(map(_steps, populations))
        rows: list[Row] = []
        for dataset in datasets:
            rows += self._references(self.world(dataset), total)
        for each in populations:
            rows += self._curves("utility", each, total)
        return rows

    def larger(self) -> list[Row]:
        """The same with larger populations as clients."""
        total = sum(map(_steps, self.sizes.larger))
        return [row for each in self.sizes.larger for row in self._curves("larger", each, total)]

    def _references(self, world: _World, total: int) -> list[Row]:
        common = {"dataset": world.dataset, "users": len(world.users), "factor": 1, "epsilon": None}
        rows = self._rows({**common, "method": "popular"}, world.popular[:, None], world)
        self.tell("utility", total, f"{world.dataset}: most popular")
        alone, scores = sampled_local_only(world.split, self.sizes.local_users, seed=0)
        values = UserEvaluator(alone, _EVALUATION_SEED).by_user(scores)
        rows += self._rows({**common, "method": "local"}, values[:, None], None)
        self.tell("utility", total, f"{world.dataset}: local only")
        return rows

    def _curves(self, section: str, population: Population, total: int) -> list[Row]:
        rows, world = [], self.world(population.dataset)
        for epsilon in population.epsilons:
            baseline: NDArray[np.float64] | None = None
            for method in population.methods:
                values, common = self._trials(
                    world, method, epsilon, population.factor, population.seeds
                )
                if method == "dp_popularity":
                    baseline = values
                rows += self._rows(common, values, world, baseline)
                found = f"{world.dataset} x{population.factor}, {method}, epsilon {epsilon:g}: "
                self.tell(section, total, f"{found}HR@10 {values[0].mean():.3f}")
        return rows

    def _trials(
        self,
        world: _World,
        method: str,
        epsilon: float,
        factor: float,
        seeds: int,
        *,
        bits: int | None = None,
        participation: float = 1.0,
    ) -> tuple[NDArray[np.float64], Row]:
        """Metrics of shape (metrics, seeds, users), and what they are of."""
        values = []
        for seed in range(seeds):
            clients = world.clients(factor, self.sizes.keep, seed)
            budget = Budget(epsilon, delta_of(len(clients)))
            channel = Channel(budget, np.random.default_rng([seed, 6]), bits)
            trial = Trial(
                clients,
                world.users,
                tuned(world.dataset, len(clients), budget.multiplier()),
                channel,
                np.random.default_rng([seed, 7]),
                participation,
            )
            scores: ScoresFn = METHODS[method](trial)
            values.append(world.evaluator.by_user(scores))
        common = {
            "dataset": world.dataset,
            "users": len(clients),
            "factor": factor,
            "method": method,
            "epsilon": _finite(epsilon),
            "delta": budget.delta,
            "rounds": len(channel.releases),
            "noise_multiplier": channel.releases[-1].multiplier,
            "bits": bits,
            "participation": participation,
        }
        return np.stack(values, axis=1), common

    def _rows(
        self,
        common: Row,
        values: NDArray[np.float64],
        world: _World | None,
        baseline: NDArray[np.float64] | None = None,
    ) -> list[Row]:
        """A row a metric, with the gains over popularity, user by user."""
        rows = []
        for place, metric in enumerate(METRICS):
            mine = values[place]
            row = {**common, "metric": metric, **_interval(mine, ""), "seeds": len(mine)}
            if world is not None:
                row |= _interval(mine - world.popular[place], "over_popular_")
            if baseline is not None:
                row |= _interval(mine - baseline[place], "over_dp_popularity_")
            rows.append(row)
        return rows

    # --- sweeps -----------------------------------------------------------------------------------

    def sweeps(self) -> list[Row]:
        """One factor at a time: clients, bits of a quantised value, participation."""
        sizes, world = self.sizes, self.world(self.sizes.swept)
        both = ("dp_federated", "dp_cooccurrence")
        plans: list[tuple[str, float, str, float, Row]] = [
            *(("clients", f, method, f, {}) for f in sizes.clients for method in both),
            *(("bits", b, method, 1, {"bits": b}) for b in sizes.bits for method in both),
            *(
                ("participation", p, "dp_federated", 1, {"participation": p})
                for p in sizes.participation
            ),
        ]
        rows: list[Row] = []
        total = len(plans) * len(sizes.sweep_epsilons)
        for sweep, value, method, factor, how in plans:
            for epsilon in sizes.sweep_epsilons:
                values, common = self._trials(
                    world, method, epsilon, factor, sizes.sweep_seeds, **how
                )
                rows += self._rows({"sweep": sweep, "value": value, **common}, values, world)
                found = f"{sweep} {value:g}, {method}, epsilon {epsilon:g}: "
                self.tell("sweeps", total, f"{found}HR@10 {values[0].mean():.3f}")
        return rows

    # --- membership -------------------------------------------------------------------------------

    def membership(self) -> list[Row]:
        """Attacks on random halves of the users, and on the canary."""
        sizes, world = self.sizes, self.world(self.sizes.swept)
        clients, rows = world.users, []
        total = len(sizes.attacked) * (
            sizes.cohorts + sizes.canary_trials * len(sizes.canary_sizes)
        )
        for epsilon in sizes.attacked:
            budget = Budget(epsilon, delta_of(len(clients) // 2))
            # The same hyperparameters with and without noise: only noise differs.
            settings = tuned(world.dataset, len(clients), _REFERENCE_NOISE).federated

            def done(epsilon: float = epsilon) -> None:
                self.tell("membership", total, f"epsilon {epsilon:g}")

            attacked = membership.attack_cohorts(clients, settings, budget, sizes.cohorts, 0, done)
            half = len(clients) // 2
            common = {"dataset": world.dataset, "users": half, "target": "users"}
            for name, statistic in attacked.statistics.items():
                ratios = membership.likelihood_ratios(statistic, attacked.members)
                rows.append(_attack_row(common, name, budget, statistic, attacked.members))
                name = f"{name}, likelihood ratio"
                rows.append(_attack_row(common, name, budget, ratios, attacked.members))
            for size in sizes.canary_sizes:
                canary = membership.canary_trials(
                    clients, settings, budget, size, sizes.canary_trials, 0, done
                )
                common = {"dataset": world.dataset, "users": size, "target": "canary"}
                rows += [
                    _attack_row(common, name, budget, statistic, canary.members)
                    for name, statistic in canary.statistics.items()
                ]
        return rows


SECTIONS: Final[dict[str, Callable[[_Measurement], list[Row]]]] = {
    "utility": _Measurement.utility,
    "membership": _Measurement.membership,
    "sweeps": _Measurement.sweeps,
    "larger": _Measurement.larger,
}
"""What can be measured."""


def _steps(population: Population) -> int:
    return len(population.methods) * len(population.epsilons)


def _finite(epsilon: float) -> float | None:
    """JSON knows no infinity: None stands for no noise."""
    return None if math.isinf(epsilon) else epsilon


def _interval(values: NDArray[np.float64], prefix: str) -> Row:
    found = interval(values)
    row: Row = {
        f"{prefix}mean": found.mean,
        f"{prefix}ci_low": found.low,
        f"{prefix}ci_high": found.high,
    }
    if not prefix:
        width = found.seed_half_width
        row["seed_half_width"] = None if math.isnan(width) else width
    return row


def _attack_row(
    common: Row,
    attack: str,
    budget: Budget,
    scores: NDArray[np.float64],
    members: NDArray[np.bool_],
) -> Row:
    found = membership.success(scores, members)
    row = {**common, "attack": attack, "epsilon": _finite(budget.epsilon), "delta": budget.delta}
    for name, (mean, low, high) in (("auc", found.auc), ("tpr", found.tpr)):
        row |= {name: mean, f"{name}_ci_low": low, f"{name}_ci_high": high}
    return row | {
        "fpr": membership.FPR,
        "tpr_bound": membership.tpr_bound(budget),
        "tpr_bound_gaussian": membership.gaussian_bound(budget),
        "cohorts": len(members),
    }


def measure(
    sizes: Sizes,
    data_dir: Path | None,
    say: Say,
    section: str,
    *,
    earlier: Row | None = None,
    command: str = "",
) -> Row:
    """Measure a section, and keep the others as they were.

    Args:
        sizes: how much.
        data_dir: where the datasets are.
        say: told about every step.
        section: one of `SECTIONS`.
        earlier: results that the other sections are taken from.
        command: how to repeat it, for the record.

    Returns:
        What is written to ``bench/results/privacy.json``, validated.
    """
    started = time.perf_counter()
    rows = SECTIONS[section](_Measurement(sizes, data_dir, say))
    measured = {
        "command": command,
        "seconds": time.perf_counter() - started,
        "machine": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in ("secagg", "numpy", "dp-accounting")},
        },
        "sizes": _recorded(sizes),
        "rows": rows,
    }
    results = {"sections": {**(earlier or {}).get("sections", {}), section: measured}}
    validate(results)
    return results


def _recorded(sizes: Sizes) -> Row:
    """Sizes as JSON can hold them."""

    def plain(value: object) -> object:
        if isinstance(value, float):
            return _finite(value)
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [plain(each) for each in value]
        return value

    recorded = plain(asdict(sizes))
    if not isinstance(recorded, dict):
        raise TypeError("expected sizes with fields")
    return recorded


def validate(results: Row) -> None:
    """Check that every row is in range and inside its interval.

    Raises:
        ValueError: says which is not.
    """
    if set(results) != {"sections"} or not set(results["sections"]) <= set(SECTIONS):
        raise ValueError(f"expected sections among {sorted(SECTIONS)}; got {results.keys()}")
    for name, section in results["sections"].items():
        if not section["rows"]:
            raise ValueError(f"expected rows in {name}; got none")
        for row in section["rows"]:
            for mean, low, high in _triples(row, name):
                if not (0 <= mean <= 1 and low <= mean + 1e-9 and mean <= high + 1e-9):
                    raise ValueError(f"expected means in [0, 1], in their intervals; got {row}")
            if row.get("noise_multiplier") == 0 and row["epsilon"] is not None:
                raise ValueError(f"expected noise at a finite epsilon; got {row}")


def _triples(row: Row, section: str) -> list[tuple[float, float, float]]:
    if section != "membership":
        return [(row["mean"], row["ci_low"], row["ci_high"])]
    return [(row[name], row[f"{name}_ci_low"], row[f"{name}_ci_high"]) for name in ("auc", "tpr")]
