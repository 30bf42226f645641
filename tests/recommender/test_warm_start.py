"""Starting from a trained model: by label where the file has labels, else by position."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg_recommender.factorisation import ITEM_BIAS, ITEM_FACTORS, init_shared
from secagg_recommender.interactions import DataError
from secagg_recommender.warm_start import LABELS, labels_of, warm_start

OWN = ("a", "b", "c", "d")
FRESH = init_shared(4, 2, 0)


def model(*labels: str, **changes: Any) -> dict[str, Any]:  # noqa: ANN401
    """A trained model whose row i is i + 1 all over."""
    rows = np.arange(1, len(labels) + 1, dtype=np.float32)
    arrays = {
        ITEM_BIAS: rows,
        ITEM_FACTORS: np.tile(rows[:, None], 2),
        LABELS: np.array(labels),
        "something else": np.zeros(3),
    }
    return {name: value for name, value in (arrays | changes).items() if value is not None}


def test_rows_go_to_the_items_of_their_labels_and_new_items_start_afresh() -> None:
    started, known = warm_start(model("d", "unknown", "b"), OWN, FRESH)
    assert known == 2
    np.testing.assert_array_equal(started[ITEM_BIAS], [0, 3, 0, 1])
    np.testing.assert_array_equal(started[ITEM_FACTORS][[1, 3]], [[3, 3], [1, 1]])
    np.testing.assert_array_equal(started[ITEM_FACTORS][[0, 2]], FRESH[ITEM_FACTORS][[0, 2]])
    assert started[ITEM_FACTORS].dtype == np.float32


@settings(deadline=None)
@given(st.permutations(OWN), st.integers(1, 4))
def test_whatever_the_order_of_the_rows(order: list[str], count: int) -> None:
    started, known = warm_start(model(*order[:count]), OWN, FRESH)
    assert known == count
    for row, label in enumerate(order[:count], 1):
        assert started[ITEM_BIAS][OWN.index(label)] == row


def test_a_file_without_labels_is_of_the_same_catalogue() -> None:
    started, known = warm_start(model(*"wxyz", **{LABELS: None}), OWN, FRESH)
    assert known == 4
    np.testing.assert_array_equal(started[ITEM_BIAS], [1, 2, 3, 4])
    for count in (3, 5):
        with pytest.raises(DataError, match=rf"catalogue's 4 items.*rows=\({count},\)"):
            warm_start(model(*"vwxyz"[:count], **{LABELS: None}), OWN, FRESH)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({ITEM_BIAS: None}, "got none of .*item_bias"),
        ({ITEM_FACTORS: np.zeros((2, 3), np.float32)}, r"sides \(2,\).*prepare with the model's"),
        ({ITEM_FACTORS: np.zeros((2, 2), np.int64)}, "expected item_factors as floats"),
        ({ITEM_FACTORS: np.full((2, 2), np.nan)}, "finite item_factors"),
        ({ITEM_BIAS: np.zeros((2, 1))}, "expected item_bias as floats"),
        ({LABELS: np.array(["a"])}, "a label for each"),
        ({LABELS: np.array(["a", "a"])}, "distinct"),
        ({LABELS: np.array([1, 2])}, "expected texts"),
        ({LABELS: np.array([["a", "b"]])}, "expected texts"),
        ({LABELS: np.array(["y", "z"])}, "knows an item of this catalogue, got none"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_by_its_name(
    changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        warm_start(model("a", "b", **changes), OWN, FRESH)


def test_a_file_of_one_number_is_no_model() -> None:
    with pytest.raises(DataError):
        warm_start({ITEM_BIAS: np.float32(1), ITEM_FACTORS: np.float32(1)}, OWN, FRESH)


def test_labels_are_those_of_the_file_or_none() -> None:
    np.testing.assert_array_equal(labels_of(model("a", "b")), ["a", "b"])
    with pytest.raises(DataError, match="expected texts"):
        labels_of({})
