"""Baselines: what each of them learns, and that the comparison is fair."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from secagg_bench.baselines import (
    BaselineResult,
    Progress,
    RunConfig,
    build_silos,
    centralised,
    collect_user_vectors,
    federated_average,
    federated_float,
    local_only,
    popular,
    silo_weight,
)
from secagg_recommender.datasets import load_dataset
from secagg_recommender.evaluation import evaluate
from secagg_recommender.factorisation import LocalUpdate, TrainConfig, init_shared
from secagg_recommender.interactions import DataError, Split, split_leave_one_out

CONFIG = RunConfig(
    train=TrainConfig(batch_size=256), n_silos=4, rounds=12, evaluate_every=5, sample_cap=2_000
)
SHORT = RunConfig(train=TrainConfig(batch_size=256), n_silos=3, rounds=2, evaluate_every=1)


@cache
def marketplace() -> Split:
    return split_leave_one_out(load_dataset("marketplace"))


@cache
def federated() -> BaselineResult:
    return federated_float(marketplace(), CONFIG)


def update_of(samples: int) -> LocalUpdate:
    return LocalUpdate(update=init_shared(2, 1, 0), samples=samples, loss=0.0)


# --- what they learn ----------------------------------------------------------------------------


def test_federated_beats_popularity_and_local_training_clearly() -> None:
    together = federated().metrics
    alone = local_only(marketplace(), CONFIG).metrics
    most_popular = popular(marketplace(), CONFIG).metrics
    # One split of 600 users has a standard error of 0.02.
    assert together.hr10 > most_popular.hr10 + 0.1
    assert together.hr10 > alone.hr10 + 0.05
    assert together.full_hr10 > most_popular.full_hr10 + 0.05


def test_federating_costs_little_against_one_place() -> None:
    one_place = centralised(marketplace(), CONFIG).metrics
    assert federated().metrics.hr10 > one_place.hr10 - 0.05


def test_one_federated_silo_is_the_centralised_run() -> None:
    config = RunConfig(train=TrainConfig(batch_size=256), n_silos=1, rounds=2)
    one, all_data = federated_float(marketplace(), config), centralised(marketplace(), config)
    assert one.metrics == all_data.metrics


# --- results ------------------------------------------------------------------------------------


def test_curve_has_every_evaluated_round_and_ends_with_the_result() -> None:
    result = federated()
    assert [point.round_number for point in result.curve] == [5, 10, 12]
    assert result.curve[-1].metrics == result.metrics
    assert result.seconds > 0


def test_returned_factors_reproduce_the_returned_metrics() -> None:
    for system in (local_only, centralised, federated_float):
        result = system(marketplace(), SHORT)
        assert result.factors is not None
        again = evaluate(result.factors.scores, marketplace(), SHORT.evaluation_seed)
        assert again == result.metrics


def test_local_silos_keep_tables_of_their_own() -> None:
    factors = local_only(marketplace(), SHORT).factors
    assert factors is not None
    assert len(factors.tables) == 3
    assert np.bincount(factors.table_of_user).tolist() == [200, 200, 200]
    first, second, _ = factors.tables
    assert not np.array_equal(first["item_factors"], second["item_factors"])


def test_popularity_trains_nothing_and_counts_training_items_only() -> None:
    result = popular(marketplace(), CONFIG)
    split = marketplace()
    counts = np.bincount(split.train_items, minlength=split.n_items).astype(float)
    expected = evaluate(
        lambda users: np.tile(counts, (users.size, 1)), split, CONFIG.evaluation_seed
    )
    assert (result.curve, result.factors) == ((), None)
    assert result.metrics == expected


@pytest.mark.parametrize("system", [local_only, centralised, federated_float])
def test_runs_repeat_exactly_and_report_every_round(system: Any) -> None:  # noqa: ANN401
    seen: list[Progress] = []
    config = RunConfig(train=TrainConfig(batch_size=256), n_silos=3, rounds=3, evaluate_every=2)
    first = system(marketplace(), config, seen.append)
    assert first.metrics == system(marketplace(), config).metrics
    assert [(p.system, p.round_number, p.rounds) for p in seen] == [
        (first.name, number, 3) for number in (1, 2, 3)
    ]
    assert [p.metrics is None for p in seen] == [True, False, False]


def test_another_seed_gives_another_run() -> None:
    other = RunConfig(train=TrainConfig(batch_size=256, seed=1), n_silos=3, rounds=2)
    first, second = (federated_float(marketplace(), c).factors for c in (SHORT, other))
    assert first is not None
    assert second is not None
    assert not np.array_equal(first.user_vectors, second.user_vectors)


# --- averaging ----------------------------------------------------------------------------------


def test_average_follows_its_formula() -> None:
    a, b = init_shared(5, 2, 1), init_shared(5, 2, 2)
    mean = federated_average([a, b], [1.0, 0.5])
    expected = (a["item_factors"].astype(float) + 0.5 * b["item_factors"]) / 1.5
    assert mean["item_factors"] == pytest.approx(expected, rel=1e-6)
    assert mean["item_factors"].dtype == np.float32


def test_average_of_equal_updates_is_that_update() -> None:
    one = init_shared(5, 2, 1)
    mean = federated_average([one] * 3, [0.3, 1.0, 0.7])
    assert mean["item_factors"] == pytest.approx(one["item_factors"], rel=1e-6)


@pytest.mark.parametrize(
    ("count", "weights"),
    [(0, []), (2, [1.0]), (1, [0.0]), (1, [float("nan")]), (2, [2.0, -1.0])],
)
def test_average_without_positive_weights_is_refused(count: int, weights: list[float]) -> None:
    with pytest.raises(DataError, match="one positive weight per update"):
        federated_average([init_shared(3, 2, 0)] * count, weights)


@pytest.mark.parametrize(
    ("samples", "weight"), [(1, 0.0005), (1_000, 0.5), (2_000, 1.0), (9_999, 1.0)]
)
def test_weight_by_samples_is_capped(samples: int, weight: float) -> None:
    assert silo_weight(update_of(samples), CONFIG) == weight


def test_equal_weighting_ignores_samples() -> None:
    config = RunConfig(weighting="equal")
    assert {silo_weight(update_of(n), config) for n in (1, 10**9)} == {1.0}


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["n_silos", "rounds", "evaluate_every", "sample_cap"])
def test_run_that_would_do_nothing_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=name):
        replace(SHORT, **{name: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize("system", [local_only, federated_float])
def test_more_silos_than_users_are_refused(system: Any) -> None:  # noqa: ANN401
    with pytest.raises(DataError, match="n_silos"):
        system(marketplace(), RunConfig(n_silos=601))


def test_user_vectors_need_all_silos_once() -> None:
    silos = build_silos(marketplace(), SHORT)
    assert collect_user_vectors(silos).shape == (600, 16)
    for some in ([], silos[:2], [*silos, silos[0]]):
        with pytest.raises(DataError, match="all silos of one run"):
            collect_user_vectors(some)


def test_user_vectors_are_ordered_by_user() -> None:
    silos = build_silos(marketplace(), SHORT)
    vectors = collect_user_vectors(silos)
    assert np.array_equal(vectors[silos[1].users], silos[1].user_vectors)
