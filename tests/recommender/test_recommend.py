"""The list a person sees."""

import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secagg_recommender.interactions import DataError
from secagg_recommender.recommend import Recommendation, best_items, recommend

TITLES = ("Lamp", "Lens", "Mouse", "Radio")


def model(scores: list[float]) -> dict[str, npt.NDArray[np.float32]]:
    """A table whose biases are the scores, for a zero user vector."""
    return {
        "item_factors": np.zeros((len(scores), 2), np.float32),
        "item_bias": np.array(scores, np.float32),
    }


ZERO = np.zeros(2, np.float32)


def test_best_items_come_first_with_titles() -> None:
    best = recommend(ZERO, model([0.0, 3.0, 1.0, 2.0]), [], 2, TITLES)
    assert best == [Recommendation(1, 1, "Lens", 3.0), Recommendation(2, 3, "Radio", 2.0)]


def test_user_vector_takes_part_in_the_score() -> None:
    shared = model([0.0, 0.0, 0.0, 0.5])
    shared["item_factors"][2] = [1.0, 2.0]
    best = recommend(np.array([3.0, -1.0], np.float32), shared, [], 1, TITLES)
    assert best == [Recommendation(1, 2, "Mouse", 1.0)]


def test_equal_scores_come_in_order_of_item_id() -> None:
    best = recommend(ZERO, model([1.0, 1.0, 2.0, 1.0]), [], 4, TITLES)
    assert [line.item for line in best] == [2, 0, 1, 3]


def test_list_is_shorter_where_items_run_out() -> None:
    assert len(recommend(ZERO, model([1.0, 2.0, 3.0, 4.0]), [0, 3], 10, TITLES)) == 2
    assert recommend(ZERO, model([1.0, 2.0, 3.0, 4.0]), [0, 1, 2, 3], 1, TITLES) == []


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.integers(1, 50), st.data())
def test_own_items_never_appear_and_order_holds(
    levels: list[int], k: int, draw: st.DataObject
) -> None:
    n_items = len(levels)
    own = draw.draw(st.lists(st.integers(0, n_items - 1), max_size=n_items))
    best = recommend(ZERO, model([float(x) for x in levels]), own, k, ["t"] * n_items)
    allowed = [item for item in range(n_items) if item not in own]
    expected = sorted(allowed, key=lambda item: (-levels[item], item))[:k]
    assert [line.item for line in best] == expected
    assert [line.rank for line in best] == list(range(1, len(expected) + 1))


@pytest.mark.parametrize("k", [0, -1])
def test_list_length_below_one_is_refused(k: int) -> None:
    with pytest.raises(DataError, match="k >= 1"):
        recommend(ZERO, model([1.0] * 4), [], k, TITLES)


@pytest.mark.parametrize("own", [[4], [-1], [0, 99]])
def test_own_items_outside_the_catalogue_are_refused(own: list[int]) -> None:
    with pytest.raises(DataError, match="own items in"):
        recommend(ZERO, model([1.0] * 4), own, 1, TITLES)


@pytest.mark.parametrize("vector", [np.zeros(3), np.zeros(1), np.zeros((2, 1)), np.zeros(0)])
def test_vector_of_another_model_is_refused(vector: npt.NDArray[np.float64]) -> None:
    with pytest.raises(DataError, match="vectors of the same model"):
        recommend(vector, model([1.0] * 4), [], 1, TITLES)


def test_missing_titles_are_refused() -> None:
    with pytest.raises(DataError, match="one title per item"):
        recommend(ZERO, model([1.0] * 4), [], 1, TITLES[:3])


@pytest.mark.parametrize("name", ["item_factors", "item_bias"])
def test_missing_tensor_is_refused(name: str) -> None:
    shared = model([1.0] * 4)
    del shared[name]
    with pytest.raises(DataError, match="shared tensors"):
        recommend(ZERO, shared, [], 1, TITLES)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_scores_are_refused(bad: float) -> None:
    with pytest.raises(DataError, match="finite vectors and biases"):
        recommend(ZERO, model([1.0, bad, 1.0, 1.0]), [], 1, TITLES)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.integers(1, 50), st.data())
def test_scores_of_any_model_are_ranked_alike(
    levels: list[int], k: int, draw: st.DataObject
) -> None:
    own = draw.draw(st.sets(st.integers(0, len(levels) - 1)))
    found = best_items(np.array(levels, dtype=float), list(own), k)
    allowed = [item for item in range(len(levels)) if item not in own]
    assert found.items.tolist() == sorted(allowed, key=lambda item: (-levels[item], item))[:k]
    assert found.scores.tolist() == [levels[item] for item in found.items]


@pytest.mark.parametrize(
    ("scores", "own", "k", "what"),
    [
        ([1.0, np.nan], [], 1, "non_finite=1"),
        ([[1.0, 2.0]], [], 1, "finite scores"),
        ([1.0, 2.0], [2], 1, "own items in"),
        ([1.0, 2.0], [], 0, "k >= 1"),
    ],
)
def test_scores_that_cannot_be_ranked_are_refused(
    scores: list[float], own: list[int], k: int, what: str
) -> None:
    with pytest.raises(DataError, match=what):
        best_items(np.array(scores), own, k)


def test_a_table_beyond_the_memory_allowed_is_refused() -> None:
    with pytest.raises(DataError, match="budget_bytes=1000"):
        recommend(ZERO, model([1.0] * 4), [], 1, TITLES, budget_bytes=1000)


def test_recommending_and_evaluating_need_no_torch() -> None:
    code = (
        "import sys, secagg_recommender.recommend, secagg_recommender.evaluation\n"
        "import secagg_recommender.index_files, secagg_recommender.hybrid\n"
        "import secagg_recommender.explain, secagg_recommender.cohorts\n"
        "sys.exit('torch' in sys.modules)"
    )
    paths = [path for path in sys.path if path]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{code}"],
        check=False,
        timeout=60,
    )
    assert done.returncode == 0
