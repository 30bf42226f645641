"""Ranking metrics, against a naive loop over users."""

import math
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg_recommender import evaluation
from secagg_recommender.datasets import load_dataset
from secagg_recommender.evaluation import Evaluator, Metrics, ScoresFn, evaluate, factor_scores
from secagg_recommender.interactions import (
    NO_TEST_ITEM,
    DataError,
    Split,
    from_events,
    split_leave_one_out,
)

REAL_DATA = os.environ.get("SECAGG_DATA_DIR", "")
HAS_MOVIELENS = bool(REAL_DATA) and Path(REAL_DATA, "ml-100k", "ratings.csv").is_file()


def random_split(seed: int, n_users: int = 12, n_items: int = 150) -> Split:
    rng = np.random.default_rng(seed)
    users, items = [], []
    for user in range(n_users):
        own = rng.choice(n_items, rng.integers(1, 12), replace=False)
        users += [user] * own.size
        items += own.tolist()
    users.append(n_users)  # A last user who has everything keeps the catalogue complete.
    items.append(0)
    for item in range(1, n_items):
        users.append(n_users)
        items.append(item)
    return split_leave_one_out(from_events("x", users, items, np.arange(len(users))))


def table(scores: npt.NDArray[np.float64]) -> ScoresFn:
    return lambda users: scores[users]


def naive_full(scores: npt.NDArray[np.float64], split: Split) -> tuple[float, float]:
    """One user and one item at a time, straight from the definitions."""
    hits, gains = [], []
    for user in range(split.n_users):
        test = int(split.test_item[user])
        if test == NO_TEST_ITEM:
            continue
        train = set(split.items_of(user).tolist())
        rank = 0
        for item in range(split.n_items):
            if item != test and item not in train and scores[user, item] >= scores[user, test]:
                rank += 1
        hits.append(1.0 if rank < 10 else 0.0)
        gains.append(1.0 / math.log2(rank + 2) if rank < 10 else 0.0)
    return float(np.mean(hits)), float(np.mean(gains))


def naive_sampled(
    scores: npt.NDArray[np.float64], split: Split, evaluator: Evaluator
) -> tuple[float, float]:
    hits, gains = [], []
    for chunk in evaluator._chunks:
        for draw in chunk.negatives:
            for user, negatives in zip(chunk.users, draw, strict=True):
                own = scores[user, split.test_item[user]]
                rank = sum(1 for item in negatives if item >= 0 and scores[user, item] >= own)
                hits.append(1.0 if rank < 10 else 0.0)
                gains.append(1.0 / math.log2(rank + 2) if rank < 10 else 0.0)
    return float(np.mean(hits)), float(np.mean(gains))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 6), st.sampled_from([60, 150]))
def test_metrics_equal_a_naive_loop(seed: int, levels: int, n_items: int) -> None:
    split = random_split(seed, n_items=n_items)
    rng = np.random.default_rng(seed)
    # Few score levels, so that ties are everywhere.
    scores = rng.integers(0, levels**3, (split.n_users, n_items)).astype(np.float64)
    evaluator = Evaluator(split, seed)
    metrics = evaluator.evaluate(table(scores))
    full, sampled = naive_full(scores, split), naive_sampled(scores, split, evaluator)
    assert (metrics.full_hr10, metrics.full_ndcg10) == pytest.approx(full, abs=1e-12)
    assert (metrics.hr10, metrics.ndcg10) == pytest.approx(sampled, abs=1e-12)


def test_small_chunks_change_no_full_ranking(monkeypatch: pytest.MonkeyPatch) -> None:
    split = random_split(1)
    scores = np.random.default_rng(1).normal(size=(split.n_users, split.n_items))
    whole = evaluate(table(scores), split, 0)
    monkeypatch.setattr(evaluation, "_USERS_PER_CHUNK", 5)
    parts = evaluate(table(scores), split, 0)
    assert parts.full_hr10 == whole.full_hr10
    assert parts.full_ndcg10 == pytest.approx(whole.full_ndcg10)


@pytest.mark.parametrize("n_items", [40, 150, 400])
def test_negatives_are_distinct_and_never_train_or_test_items(n_items: int) -> None:
    split = random_split(3, n_items=n_items)
    for chunk in Evaluator(split, 3)._chunks:
        assert chunk.negatives.shape[0] == 3
        for draw in chunk.negatives:
            for user, padded in zip(chunk.users, draw, strict=True):
                negatives = padded[padded >= 0].tolist()
                own = {*split.items_of(int(user)).tolist(), int(split.test_item[user])}
                assert len(set(negatives)) == len(negatives)
                assert not own & set(negatives)
                assert len(negatives) == min(99, n_items - len(own))


def test_negatives_are_uniform_over_the_candidates() -> None:
    # 400 seeds × 3 draws; every candidate has probability 99/148. The largest of 148 deviations
    # passes five standard deviations with probability below 1e-4.
    split = split_leave_one_out(
        from_events("x", [0, 0, *[1] * 150], [0, 1, *range(150)], [0] * 152)
    )
    counts = np.zeros(150)
    for seed in range(400):
        counts += np.bincount(
            Evaluator(split, seed)._chunks[0].negatives[:, 0].ravel(), minlength=150
        )
    own = [0, 1]
    assert counts[own].tolist() == [0, 0]
    p = 99 / 148
    deviation = np.abs(np.delete(counts, own) - 1200 * p) / math.sqrt(1200 * p * (1 - p))
    assert deviation.max() < 5


def test_perfect_scores_give_one() -> None:
    split = random_split(2)
    scores = np.zeros((split.n_users, split.n_items))
    tested = np.flatnonzero(split.test_item != NO_TEST_ITEM)
    scores[tested, split.test_item[tested]] = 1.0
    assert evaluate(table(scores), split, 0) == Metrics(1.0, 1.0, 1.0, 1.0)


def test_constant_scores_give_nothing() -> None:
    split = random_split(2, n_items=200)
    few = Split(
        split.train_users[split.train_users < 12],
        split.train_items[split.train_users < 12],
        split.test_item[:12],
        12,
        split.n_items,
    )
    scores = np.full((12, few.n_items), 0.5)
    assert evaluate(table(scores), few, 0) == Metrics(0.0, 0.0, 0.0, 0.0)


def test_same_seed_same_metrics_and_other_seed_other_draws() -> None:
    split = random_split(4, n_users=60)
    scores = np.random.default_rng(4).normal(size=(split.n_users, split.n_items))
    first, again, other = (evaluate(table(scores), split, seed) for seed in (1, 1, 2))
    assert first == again
    assert first.ndcg10 != other.ndcg10
    assert first.full_ndcg10 == other.full_ndcg10


def test_scores_are_left_unchanged() -> None:
    split = random_split(5)
    scores = np.random.default_rng(5).normal(size=(split.n_users, split.n_items))
    before = scores.copy()
    evaluate(table(scores), split, 0)
    assert np.array_equal(scores, before)


def test_split_without_test_items_is_refused() -> None:
    split = split_leave_one_out(from_events("x", [1, 2], [1, 2], [1, 1]))
    with pytest.raises(DataError, match="test_users=0"):
        Evaluator(split, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_scores_are_refused(bad: float) -> None:
    split = random_split(6)
    scores = np.zeros((split.n_users, split.n_items))
    scores[np.flatnonzero(split.test_item >= 0)[0], 3] = bad
    with pytest.raises(DataError, match="non_finite=1"):
        evaluate(table(scores), split, 0)


def test_scores_of_another_shape_are_refused() -> None:
    split = random_split(6)
    with pytest.raises(DataError, match="expected scores of shape"):
        evaluate(lambda users: np.zeros((users.size, split.n_items - 1)), split, 0)


def test_factor_scores_follow_the_formula() -> None:
    rng = np.random.default_rng(7)
    vectors = rng.normal(size=(4, 3)).astype(np.float32)
    shared = {
        "item_factors": rng.normal(size=(5, 3)).astype(np.float32),
        "item_bias": rng.normal(size=5).astype(np.float32),
    }
    scores = factor_scores(vectors, shared)(np.array([2, 0]))
    expected = sum(
        float(a) * float(b) for a, b in zip(vectors[2], shared["item_factors"][4], strict=True)
    )
    assert scores.shape == (2, 5)
    assert scores[0, 4] == pytest.approx(expected + float(shared["item_bias"][4]), rel=1e-5)


@pytest.mark.realdata
@pytest.mark.skipif(not HAS_MOVIELENS, reason="SECAGG_DATA_DIR has no ml-100k/ratings.csv")
def test_most_popular_on_movielens_meets_its_reference_points() -> None:
    split = split_leave_one_out(load_dataset("ml-100k", REAL_DATA))
    counts = np.bincount(split.train_items, minlength=split.n_items).astype(float)
    metrics = evaluate(lambda users: np.tile(counts, (users.size, 1)), split, seed=1)
    # Other draws of the negatives move the sampled metrics by about 0.01.
    assert metrics.hr10 == pytest.approx(0.410, abs=0.012)
    assert metrics.ndcg10 == pytest.approx(0.225, abs=0.008)
    assert metrics.full_hr10 == pytest.approx(0.082, abs=0.0006)
    assert metrics.full_ndcg10 == pytest.approx(0.0395, abs=0.001)
