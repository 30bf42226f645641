"""A list in order by local and server scores together."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secagg_recommender.hybrid import ServerScores, refine
from secagg_recommender.index import Hits
from secagg_recommender.interactions import DataError

SERVER = np.array([0.0, 5.0, 0.0, 9.0, -4.0])


def hits(items: list[int], scores: list[float]) -> Hits:
    return Hits(np.array(items, np.int64), np.array(scores, np.float32))


LOCAL = hits([2, 0, 4, 1], [4.0, 3.0, 2.0, 1.0])


def test_weights_lead_from_the_devices_order_to_the_servers() -> None:
    assert refine(LOCAL, SERVER, 4, 0.0).items.tolist() == [2, 0, 4, 1]
    assert refine(LOCAL, SERVER, 4, 1.0).items.tolist() == [1, 0, 2, 4]
    assert refine(LOCAL, SERVER, 1, 0.7).items.tolist() == [1]


def test_nothing_but_candidates_is_shown() -> None:
    """Item 3 is the server's best, and no candidate of this device."""
    assert 3 not in refine(LOCAL, SERVER, 4, 1.0).items


@given(
    st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), max_size=20),
    st.integers(1, 25),
    st.floats(0, 1),
    st.integers(1, 1000),
)
def test_units_do_not_matter(
    levels: list[tuple[int, int]], k: int, weight: float, unit: int
) -> None:
    mine = hits(list(range(len(levels))), [float(a) for a, _ in levels])
    server = np.array([float(b) for _, b in levels])
    plain = refine(mine, server, k, weight)
    scaled = refine(mine, server * unit + unit, k, weight)
    assert np.allclose(plain.scores, scaled.scores, atol=1e-4)
    assert len(plain.items) == min(k, len(levels))
    assert (np.diff(plain.scores) <= 1e-6).all()


def test_equal_scores_say_nothing() -> None:
    assert refine(LOCAL, np.full(5, 7.1), 4, 0.9).items.tolist() == [2, 0, 4, 1]
    assert refine(hits([4, 1, 3], [0.3, 0.3, 0.3]), np.zeros(5), 3).items.tolist() == [1, 3, 4]


@pytest.mark.parametrize(
    ("k", "weight", "n_items"),
    [(0, 0.5, 5), (1, -0.1, 5), (1, 1.1, 5), (1, np.nan, 5), (1, 0.5, 4)],
)
def test_wishes_that_cannot_be_met_are_refused(k: int, weight: float, n_items: int) -> None:
    with pytest.raises(DataError, match="expected"):
        refine(LOCAL, SERVER[:n_items], k, weight)


def test_a_table_comes_from_scores_or_from_a_models_biases() -> None:
    biases, scores = np.arange(3, dtype=np.float32), np.ones((2, 3), np.float32)
    assert ServerScores.from_model({"item_bias": biases}).of(0, 3).tolist() == [0, 1, 2]
    both = ServerScores.from_model({"item_bias": biases, "item_scores": scores})
    assert both.of(1, 3).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"item_factors": np.zeros((3, 2))},
        {"item_scores": np.zeros((1, 2, 3))},
        {"item_scores": np.zeros((0, 3))},
        {"item_bias": np.array([0.0, np.nan])},
    ],
)
def test_models_that_score_nothing_are_refused(tensors: dict[str, npt.NDArray[np.float64]]) -> None:
    with pytest.raises(DataError, match="expected"):
        ServerScores.from_model(tensors)


@pytest.mark.parametrize(("bucket", "n_items"), [(-1, 3), (1, 3), (0, 4)])
def test_another_bucket_or_catalogue_is_refused(bucket: int, n_items: int) -> None:
    with pytest.raises(DataError, match="bucket below 1"):
        ServerScores(np.zeros((1, 3))).of(bucket, n_items)
