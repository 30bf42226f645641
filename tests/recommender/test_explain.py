"""Reasons: exact terms where a model is linear, and leave-one-out where a vector is fitted."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secagg_recommender.ease import Ease
from secagg_recommender.explain import Reason, fit_effects, history_effects, reasons
from secagg_recommender.factorisation import SharedTensors, TrainConfig, fit_user
from secagg_recommender.interactions import DataError
from secagg_recommender.transitions import Transitions, popularity, transition_counts

N_ITEMS, D = 60, 4
CONFIG = TrainConfig(dimensions=D)


def model(seed: int = 0) -> SharedTensors:
    rng = np.random.default_rng(seed)
    return {
        "item_factors": rng.normal(size=(N_ITEMS, D)).astype(np.float32),
        "item_bias": rng.normal(-1.0, 0.5, N_ITEMS).astype(np.float32),
    }


def effects(
    vector: npt.NDArray[np.floating], shared: SharedTensors, own: list[int], items: list[int]
) -> npt.NDArray[np.float64]:
    return fit_effects(
        vector, shared, np.array(own), np.array(items), l2=CONFIG.l2, negatives=CONFIG.negatives
    )


def left_out(shared: SharedTensors, own: list[int], items: list[int]) -> npt.NDArray[np.float64]:
    """How far scores move when each item is left out of the fit: the definition."""
    factors = shared["item_factors"][items]
    whole = fit_user(shared, np.array(own), CONFIG)
    rest = [[one for one in own if one != item] for item in own]
    return np.stack([factors @ (whole - fit_user(shared, np.array(r), CONFIG)) for r in rest])


@given(st.integers(0, 30), st.sets(st.integers(0, N_ITEMS - 1), min_size=6, max_size=20))
def test_effects_are_close_to_leaving_an_item_out(seed: int, own: set[int]) -> None:
    shared, mine, items = model(seed), sorted(own), [0, 1, 2, 3]
    vector = fit_user(shared, np.array(mine), CONFIG)
    estimated, exact = effects(vector, shared, mine, items), left_out(shared, mine, items)
    assert np.corrcoef(estimated.ravel(), exact.ravel())[0, 1] > 0.97
    for column in range(len(items)):
        # Removing the first reason changes the score most, or within a hair of that.
        top = estimated[:, column].argmax()
        assert exact[top, column] >= exact[:, column].max() - 0.15 * np.ptp(exact[:, column])


def test_a_like_item_is_the_reason() -> None:
    shared = model()
    shared["item_factors"][10] = shared["item_factors"][20] = [3.0, 0.0, 0.0, 0.0]
    own = [5, 10, 15]
    vector = fit_user(shared, np.array(own), CONFIG)
    (first, *_) = reasons(np.array(own), effects(vector, shared, own, [20])[:, 0])
    assert first.item == 10


def test_a_vector_that_was_trained_is_explained_by_what_it_would_lose() -> None:
    """Not at its optimum: what is missing to it is no item's effect."""
    shared, own = model(), [3, 8, 30, 44]
    fitted = fit_user(shared, np.array(own), CONFIG)
    there, far = effects(fitted, shared, own, [0, 1]), effects(fitted * 1.3, shared, own, [0, 1])
    assert np.allclose(there, far, atol=0.25 * np.abs(there).max())


def test_without_its_only_item_a_vector_is_nothing() -> None:
    shared = model()
    vector = fit_user(shared, np.array([7]), CONFIG)
    expected = shared["item_factors"][[1, 2]] @ vector
    assert np.allclose(effects(vector, shared, [7], [1, 2])[0], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("vector", "own", "items"),
    [
        (np.zeros(D), [], [1]),
        (np.zeros(D), [N_ITEMS], [1]),
        (np.zeros(D), [-1], [1]),
        (np.zeros(D), [1, 1], [1]),
        (np.zeros(D), list(range(N_ITEMS)), [1]),
        (np.zeros(D), [1], [N_ITEMS]),
        (np.zeros(D + 1), [1], [2]),
        (np.full(D, np.nan), [1], [2]),
    ],
)
def test_what_cannot_be_explained_is_refused(
    vector: npt.NDArray[np.floating], own: list[int], items: list[int]
) -> None:
    with pytest.raises(DataError, match="expected"):
        fit_effects(vector, model(), np.array(own, np.int64), np.array(items), l2=0.01, negatives=4)


# --- models of histories ------------------------------------------------------------------------


def ease(seed: int) -> Ease:
    weights = np.random.default_rng(seed).normal(size=(12, 12)).astype(np.float32)
    np.fill_diagonal(weights, 0.0)
    return Ease(weights)


@given(st.integers(0, 50), st.lists(st.integers(0, 11), min_size=1, max_size=8, unique=True))
def test_terms_of_a_linear_model_add_up(seed: int, history: list[int]) -> None:
    made, own, items = ease(seed), np.array(history), np.arange(12)
    terms = history_effects(made, own, items)
    assert np.allclose(terms.sum(axis=0), made.score(own), atol=1e-5)
    if len(history) > 1:
        removed = np.stack(
            [made.score(own) - made.score(np.delete(own, i)) for i in range(len(own))]
        )
        assert np.allclose(terms, removed, atol=1e-5)


def test_terms_of_transitions_add_up_but_for_what_parts_ties() -> None:
    histories = [[0, 1, 2, 3], [1, 2, 4], [0, 2, 3], [3, 4, 1]]
    made = Transitions.of(transition_counts(histories, 5), popularity(histories, 5))
    own, items = np.array([0, 1, 2]), np.arange(5)
    assert np.allclose(history_effects(made, own, items).sum(axis=0), made.score(own), atol=1e-6)


@pytest.mark.parametrize(("history", "items"), [([], [1]), ([12], [1]), ([1], [12]), ([-1], [1])])
def test_histories_that_cannot_be_explained_are_refused(
    history: list[int], items: list[int]
) -> None:
    with pytest.raises(DataError, match="expected"):
        history_effects(ease(0), np.array(history, np.int64), np.array(items))


# --- reasons ------------------------------------------------------------------------------------


def test_reasons_are_the_largest_effects_that_add_at_all() -> None:
    own, effect = np.array([8, 3, 5, 9]), np.array([0.5, 0.5, -1.0, 0.7])
    assert reasons(own, effect, 3) == [Reason(9, 0.7), Reason(3, 0.5), Reason(8, 0.5)]
    assert reasons(own, -np.abs(effect)) == []


@pytest.mark.parametrize(
    ("effect", "most"),
    [(np.zeros(3), 2), (np.zeros((2, 1)), 2), (np.zeros(2), 0), ([np.nan, 1], 2)],
)
def test_effects_of_another_history_are_refused(effect: npt.NDArray[np.float64], most: int) -> None:
    with pytest.raises(DataError, match="expected"):
        reasons(np.array([1, 2]), np.asarray(effect), most)
