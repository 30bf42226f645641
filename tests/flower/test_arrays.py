"""What of a model travels, and what becomes of the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from secagg.errors import SchemaError
from secagg.flower.arrays import as_received, difference, moved, tensors_of


def record(**arrays: Any) -> ArrayRecord:  # noqa: ANN401
    return ArrayRecord({key: Array(np.asarray(value)) for key, value in arrays.items()})


def test_floats_travel_and_nothing_else() -> None:
    model = record(
        b=np.ones(2, dtype=np.float16),
        a=np.float64(3),
        count=np.int64(4),
        mask=np.array([True]),
        none=np.zeros((0, 2), dtype=np.float32),
    )
    assert list(tensors_of(model)) == ["a", "b"]


def test_differences_are_taken_before_they_are_rounded() -> None:
    before = record(w=np.float64(1e8))
    after = record(w=np.float64(1e8) + 0.125)
    assert difference(before, after) == {"w": 0.125}
    assert difference(record(w=np.float32(1)), record(w=np.int64(3))) == {"w": 2.0}


def test_a_model_that_moves_keeps_widths_order_and_counters() -> None:
    model = record(z=np.ones(2, dtype=np.float16), n=np.int32(5), a=np.zeros(1, dtype=np.float64))
    result = moved(model, {"z": np.array([0.5, -0.25]), "a": np.array([1e-9])})
    assert list(result) == ["z", "n", "a"]
    assert [array.dtype for array in result.values()] == ["float16", "int32", "float64"]
    np.testing.assert_array_equal(result["z"].numpy(), np.array([1.5, 0.75], dtype=np.float16))
    assert result["a"].numpy() == 1e-9
    assert result["n"].numpy() == 5


def test_what_a_strategy_widened_is_narrowed_and_counters_are_put_back() -> None:
    model = record(w=np.ones(2, dtype=np.float32), n=np.int64(2**60 + 1), flag=np.array(True))
    widened = record(w=np.full(2, 0.1), n=np.float64(2**60), flag=np.float64(1), new=np.float64(7))
    result = as_received(model, widened)
    assert [array.dtype for array in result.values()] == ["float32", "int64", "bool", "float64"]
    assert result["n"].numpy() == 2**60 + 1
    np.testing.assert_array_equal(result["w"].numpy(), np.full(2, 0.1, dtype=np.float32))


def test_a_name_that_no_plan_may_have_numbers_all_of_them() -> None:
    model = record(**{"dense 1:0": np.zeros(2), "b": np.ones(3), "n": np.int64(1)})
    assert {name: value.shape for name, value in tensors_of(model).items()} == {
        "0000": (3,),
        "0001": (2,),
    }
    trained = record(**{"n": np.int64(1), "dense 1:0": np.ones(2), "b": np.ones(3)})
    assert difference(model, trained)["0001"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (record(n=np.int64(1)), "at least one array of floats"),
        (ArrayRecord(), "got 0 arrays"),
        (record(c=np.ones(2, dtype=np.complex64)), "real numbers; got complex64"),
        (ArrayRecord({"t": Array("float32", (1,), "torch", b"1234")}), "another serialisation"),
        (ArrayRecord({"t": Array("float32", (1,), "numpy.ndarray", b"1234")}), "serialisation"),
        (ArrayRecord({"t": Array("float32", (1,), "numpy.ndarray", b"")}), "serialisation"),
    ],
)
def test_models_that_cannot_be_summed_are_refused(model: ArrayRecord, match: str) -> None:
    with pytest.raises(SchemaError, match=match):
        tensors_of(model)
