"""The serving benchmarks on toy data: what they measure is what they say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from secagg.planner import plan_tensors
from secagg_bench.recommender import cold_start, latency
from secagg_recommender.cohorts import CohortLearner, cohort_plan
from secagg_recommender.factorisation import TrainConfig
from secagg_recommender.graph_index import recall
from secagg_recommender.index import ExactIndex
from secagg_recommender.interactions import DataError, Split, from_events, split_leave_one_out

USERS, ITEMS = 45, 30
RESULTS = Path(__file__).parents[2] / "bench" / "results"


@pytest.fixture(scope="module")
def split() -> Split:
    """Two cohorts, each of which likes a half of the catalogue."""
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(USERS), 8)
    halves = [
        rng.choice(ITEMS // 2, 8, replace=False) + user % 2 * ITEMS // 2 for user in range(USERS)
    ]
    return split_leave_one_out(
        from_events("toy", users, np.concatenate(halves), np.arange(users.size))
    )


@pytest.fixture(scope="module")
def tables(split: Split) -> list[dict[str, Any]]:
    cohorts = np.arange(USERS) % 2
    config = TrainConfig(dimensions=2, local_epochs=1)
    made = cold_start.measure(split, cohorts, 2, config=config, least=2, rounds=1, histories=(0, 2))
    return list(made["tables"])


def test_newcomers_of_a_cohort_with_a_taste_gain_by_it(tables: list[dict[str, Any]]) -> None:
    rows = {(row[0], row[1]): row[2:] for row in tables[0]["rows"]}
    assert rows[0, "cohort start"][1] > rows[0, "most popular"][1] + 0.1
    gain, interval = rows[0, "cohort start"][4:6]
    low, high = (float(bound) for bound in interval.split(" to "))
    assert 0 < low <= gain <= high
    assert (2, "fit alone") in rows
    assert (0, "fit alone") not in rows


def test_encrypted_counts_are_the_clear_ones(tables: list[dict[str, Any]]) -> None:
    assert [row[3] for row in tables[1]["rows"]] == ["yes"] * 5
    assert sum(USERS - row[1] for row in tables[1]["rows"]) == USERS, "each is out of one fold"


def test_a_plan_without_a_threshold_is_no_plan_for_counting(split: Split) -> None:
    plan = plan_tensors(3, max_clients=9, clip=1.0)
    with pytest.raises(DataError, match="with a threshold"):
        cold_start.counted(split, np.arange(3), np.zeros(USERS, np.int64), plan, 1)


def test_a_difference_in_counting_would_be_seen(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = cohort_plan(2, ITEMS, max_clients=9, least=2, most_items=ITEMS)
    honest = cold_start.CohortLearner.counts

    def fewer(self: CohortLearner) -> npt.NDArray[np.int64]:
        """Contributes to an item that it does not count itself among."""
        counts = honest(self)
        counts[np.flatnonzero(counts)[-1]] = 0
        return counts

    monkeypatch.setattr(cold_start.CohortLearner, "counts", fewer)
    made = cold_start.counted(split, np.arange(4), np.zeros(USERS, np.int64), plan, 2)
    assert not made.equal


def test_latency_is_of_every_kind_of_index() -> None:
    rows = latency.measure(600, 4, count=5)
    assert [len(row) for row in rows] == [len(latency._COLUMNS)] * 5
    assert all(row[3] <= row[4] for row in rows)  # type: ignore[operator]
    assert [row[5] for row in rows[:2]] == [1.0, 1.0]
    assert all(row[5] > 0.9 for row in rows)  # type: ignore[operator]


def test_queries_have_neighbours_and_are_no_items() -> None:
    rng = np.random.default_rng(0)
    vectors, bias = latency.catalogue(500, 4, rng)
    index = ExactIndex(vectors, bias)
    assert recall(index, index, latency.queries(vectors, 4, rng), 5) == 1.0
    assert vectors.shape == (500, 4)


@pytest.mark.parametrize("name", ["latency", "cold_start"])
def test_committed_results_are_tables(name: str) -> None:
    file = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    for table in file.get("tables", [file]):
        assert table["title"]
        assert table["note"]
        assert table["rows"]
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
