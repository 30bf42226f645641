"""Clip, weigh, rotate, round and back: each step against an independent derivation."""

from __future__ import annotations

import hashlib
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.linalg import hadamard

from secagg import quantize as quantizer
from secagg.errors import InputError, NonFiniteError, PlanError, SchemaError
from secagg.parameters import FloatSegment, IntegerSegment, NormCheck, TensorSpec
from secagg.planner import make_plan, plan_tensors
from secagg.quantize import (
    dequantize_integers,
    dequantize_update,
    flatten,
    quantize,
    quantize_integers,
    quantize_update,
    unflatten,
)
from secagg.sampling import Stream, signs
from secagg.sketch_shape import honest_norm

ROTATION = bytes(range(32))


def seeded(number: int) -> Stream:
    return Stream(number.to_bytes(32, "big"))


def vector_segment(
    parameters: int, *, clip: float = 1.0, bits: int = 8, cap: int = 0
) -> FloatSegment:
    weighting = "samples" if cap else "equal"
    spec = TensorSpec("vector", (parameters,))
    return FloatSegment("update", (spec,), clip, bits, weighting, max(cap, 1))


def gaussian(seed: int, size: int, norm: float) -> NDArray[np.float32]:
    values = np.random.default_rng(seed).standard_normal(size)
    return (values * norm / np.linalg.norm(values)).astype(np.float32)


def there_and_back(
    segment: FloatSegment, update: NDArray[np.float32], samples: int = 1, seed: int = 1
) -> tuple[NDArray[np.float64], float]:
    done = quantize_update(
        segment, {"vector": update}, samples=samples, rotation=ROTATION, randomness=seeded(seed)
    )
    assert done.saturated == 0
    tensors, weight = dequantize_update(segment, done.values, rotation=ROTATION)
    return tensors["vector"], weight


# --- rotation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", [1, 5, 300, 5000])
@pytest.mark.parametrize("largest", [1, 1 << 18, 1 << 19, 1 << 31, 1 << 40])
def test_a_sum_of_any_size_is_turned_back_as_the_hadamard_matrix_turns_it(
    parameters: int, largest: int
) -> None:
    segment = vector_segment(parameters)
    total = np.random.default_rng(1).integers(-largest, largest, segment.values, endpoint=True)
    total[0] = -largest
    ((count, length),) = segment.rotations
    first, second = (
        signs(Stream.derive(label, ROTATION, segment.name), segment.values)
        for label in ("rotated", "rotation")
    )
    turned = (total * first).reshape(count, length) @ hadamard(length, dtype=np.int64)
    expected = (turned.reshape(-1) * second)[quantizer.value_places(segment)]
    tensors, _ = dequantize_update(segment, total, rotation=ROTATION)
    scale = segment.step / math.sqrt(length)
    np.testing.assert_allclose(
        tensors["vector"], expected * scale, rtol=1e-12, atol=1e-12 * largest * scale
    )


@pytest.mark.parametrize("length", [1, 2, 8, 256])
def test_the_rotation_is_the_orthonormal_hadamard_matrix(length: int) -> None:
    rows = np.eye(length)
    quantizer._rotate(rows)
    expected = hadamard(length) / math.sqrt(length)
    # One rounding a stage and one for the scale, relative to entries of 1 / sqrt(length).
    assert np.abs(rows - expected).max() <= 2e-16 * (math.log2(length) + 1)
    quantizer._rotate(rows)
    assert np.abs(rows - np.eye(length)).max() <= 1e-14


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33])
def test_the_rotation_treats_every_row_alike(rows: int) -> None:
    data = np.random.default_rng(rows).standard_normal((rows, 4096))
    turned = data.copy()
    quantizer._rotate(turned)
    assert np.allclose(np.linalg.norm(turned, axis=1), np.linalg.norm(data, axis=1), rtol=1e-12)
    for row in (0, rows - 1):
        alone = data[row : row + 1].copy()
        quantizer._rotate(alone)
        assert np.array_equal(alone[0], turned[row])
    quantizer._rotate(turned)
    assert np.abs(turned - data).max() <= 1e-12


@settings(deadline=None, max_examples=60)
@given(parameters=st.integers(1, 20_000), cap=st.sampled_from([0, 1, 100]))
def test_what_comes_back_is_what_went_in_to_within_the_rounding(parameters: int, cap: int) -> None:
    # Every rotated coordinate is off by less than one step; an orthonormal map keeps the L2 norm of
    # that. Sixteen bits, so that a coordinate in the wrong place cannot hide in the tolerance.
    segment = vector_segment(parameters, bits=16, cap=cap)
    update = gaussian(parameters, parameters, 0.4)
    back, weight = there_and_back(segment, update, samples=max(cap, 1))
    bound = segment.step * math.sqrt(segment.values) * 1.001 + 1e-5
    assert np.linalg.norm(back - update) <= bound
    assert math.isnan(weight) if not cap else abs(weight - 1) <= bound * math.sqrt(2)


def test_the_rotation_depends_on_the_public_string_and_the_segment() -> None:
    update = {"vector": gaussian(1, 4096, 0.9)}
    segment = vector_segment(4096)
    other = FloatSegment("other", segment.tensors, 1.0)
    results = [
        quantize_update(which, update, samples=1, rotation=string, randomness=seeded(1)).values
        for which, string in ((segment, ROTATION), (segment, bytes(32)), (other, ROTATION))
    ]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        # Signs agree by chance in half the places: 2048 +- 8 * 32, false alarm below 2**-45.
        agreeing = np.count_nonzero(np.sign(results[i]) == np.sign(results[j]))
        assert agreeing < 2048 + 256


# --- rounding -----------------------------------------------------------------------------------


def rotated(segment: FloatSegment, update: NDArray[np.float32]) -> NDArray[np.float64]:
    """The exact steps before rounding, in float64, for one block and no clipping."""
    laid = np.zeros(segment.values)
    slots = segment.values
    stride = max(1, round(slots * (math.sqrt(5) - 1) / 2))
    while math.gcd(stride, slots) != 1:
        stride += 1
    for index, value in enumerate(update):
        laid[index * stride % slots] = value
    laid *= signs(Stream.derive("rotation", ROTATION, segment.name), segment.values)
    turned = laid @ hadamard(segment.values) / math.sqrt(segment.values) / segment.step
    exact: NDArray[np.float64] = turned * signs(
        Stream.derive("rotated", ROTATION, segment.name), segment.values
    )
    return exact


def test_rounding_is_unbiased_and_within_one_step() -> None:
    repeats, size = 400, 256
    segment = vector_segment(size)
    update = gaussian(3, size, 0.9)
    exact = rotated(segment, update)
    drawn = np.stack(
        [
            quantize_update(
                segment, {"vector": update}, samples=1, rotation=ROTATION, randomness=seeded(i)
            ).values
            for i in range(repeats)
        ]
    )
    # Coordinates reach 127 steps in float32 after 8 stages: 127 * 9 * 2**-24 < 1e-4.
    float32 = 1e-4
    assert np.abs(drawn - exact).max() < 1 + float32
    # Hoeffding, one draw in an interval of length 1: P(|mean - x| > t) <= 2 exp(-2 repeats t^2),
    # 2 exp(-32) * 256 < 4e-12 over all coordinates; seeds are fixed besides.
    assert np.abs(drawn.mean(axis=0) - exact).max() <= 4 / math.sqrt(repeats) + float32
    # And over all draws together, where a constant bias would show: 2 exp(-32).
    assert abs((drawn - exact).mean()) <= 4 / math.sqrt(repeats * size) + float32


def test_integers_on_the_grid_are_not_moved() -> None:
    segment = vector_segment(1, clip=127.0)  # one coordinate, step 1
    for value in (-127.0, -3.0, 0.0, 126.0, 127.0):
        done = quantize_update(
            segment, {"vector": [value]}, samples=1, rotation=ROTATION, randomness=seeded(5)
        )
        assert abs(int(done.values[0])) == abs(value)


@pytest.mark.parametrize("bits", range(2, 17))
def test_no_integer_leaves_the_planned_range(bits: int) -> None:
    segment = vector_segment(4096 * 20, bits=bits)
    update = np.zeros(4096 * 20, dtype=np.float32)
    update[7] = 1.0
    done = quantize_update(
        segment, {"vector": update}, samples=1, rotation=ROTATION, randomness=seeded(bits)
    )
    assert np.abs(done.values).max() == segment.max_abs == 2 ** (bits - 1) - 1


def test_saturated_coordinates_are_counted() -> None:
    # One coordinate of norm C fills its rotation block with C / 64 each; with 64 blocks the range
    # is 4 C / 512, half of that.
    segment = vector_segment(4096 * 64)
    update = np.zeros(4096 * 64, dtype=np.float32)
    update[123] = 1.0
    done = quantize_update(
        segment, {"vector": update}, samples=1, rotation=ROTATION, randomness=seeded(1)
    )
    assert done.saturated == 4096
    assert np.count_nonzero(done.values) == 4096
    spread = gaussian(1, 4096 * 64, 0.5)
    done = quantize_update(
        segment, {"vector": spread}, samples=1, rotation=ROTATION, randomness=seeded(1)
    )
    assert done.saturated == 0


# --- clipping and weights -----------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.01, 10.0, 1e30])
def test_a_larger_update_is_scaled_to_the_clip_norm(factor: float) -> None:
    segment = vector_segment(1000, clip=2.0, bits=16)
    unit = gaussian(9, 1000, 1.0)
    update = (unit * np.float32(2.0 * factor)).astype(np.float32)
    done = quantize_update(
        segment, {"vector": update}, samples=1, rotation=ROTATION, randomness=seeded(2)
    )
    assert done.clipped
    back, _ = dequantize_update(segment, done.values, rotation=ROTATION)
    bound = segment.step * math.sqrt(segment.values) + 1e-5
    assert np.linalg.norm(back["vector"] - 2.0 * unit) <= bound


def test_an_update_at_the_clip_norm_is_left_alone() -> None:
    segment = vector_segment(2, clip=5.0)
    for update, clipped in (([3.0, 4.0], False), ([3.0, 4.0001], True), ([0.0, 0.0], False)):
        done = quantize_update(
            segment, {"vector": update}, samples=1, rotation=ROTATION, randomness=seeded(1)
        )
        assert done.clipped is clipped


@pytest.mark.parametrize(("samples", "weight"), [(1, 0.01), (50, 0.5), (100, 1.0), (10**9, 1.0)])
def test_the_weight_scales_the_update_and_stops_at_its_cap(samples: int, weight: float) -> None:
    segment = vector_segment(4000, bits=16, cap=100)
    update = gaussian(4, 4000, 0.5)
    back, returned = there_and_back(segment, update, samples)
    bound = segment.step * math.sqrt(segment.values) + 1e-5
    assert np.linalg.norm(back - weight * update) <= bound
    assert abs(returned - weight) <= bound


def test_equal_weights_ignore_the_samples() -> None:
    segment = vector_segment(100)
    update = gaussian(4, 100, 0.5)
    few, many = (there_and_back(segment, update, samples)[0] for samples in (1, 10**6))
    assert np.array_equal(few, many)


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.integers(1, 300), min_size=3, max_size=12),
    st.integers(0, 2**32),
)
def test_the_weighted_mean_of_many_clients_is_close_to_the_true_one(
    samples: list[int], seed: int
) -> None:
    segment = vector_segment(6000, cap=100)
    clients = len(samples)
    updates = [gaussian(seed + i, 6000, 0.3 + 0.05 * i) for i in range(clients)]
    total = np.zeros(segment.values, dtype=np.int64)
    for i, (update, count) in enumerate(zip(updates, samples, strict=True)):
        done = quantize_update(
            segment,
            {"vector": update},
            samples=count,
            rotation=ROTATION,
            randomness=seeded(seed * 16 + i),
        )
        assert done.saturated == 0
        total += done.values
    weights = [min(count, 100) / 100 for count in samples]
    expected = sum(w * u.astype(np.float64) for w, u in zip(weights, updates, strict=True))
    tensors, weight = dequantize_update(segment, total, rotation=ROTATION)
    # Rounding errors: independent, mean 0, variance at most step^2 / 4 a client and coordinate, so
    # the squared L2 error of the sum has mean at most clients * values * step^2 / 4, and its
    # distribution is that of ~8000 bounded terms: 1.5 times the root is more than 40 of its
    # standard deviations away. The weight is one coordinate with the same variance, relative to
    # the clip norm: 8 standard deviations, false alarm below 2e-15 (Hoeffding: 3e-14).
    assert np.linalg.norm(tensors["vector"] - expected) <= (
        1.5 * math.sqrt(clients * segment.values) * segment.step / 2
    )
    assert abs(weight - sum(weights)) <= 8 * 0.5 * segment.step * math.sqrt(clients)


def test_samples_below_one_are_refused() -> None:
    segment = vector_segment(4, cap=10)
    for samples in (0, -1):
        with pytest.raises(InputError, match="samples"):
            quantize_update(
                segment,
                {"vector": np.zeros(4)},
                samples=samples,
                rotation=ROTATION,
                randomness=seeded(1),
            )


# --- flattening ---------------------------------------------------------------------------------


MIXED = FloatSegment(
    "update",
    (TensorSpec("w/1", (2, 3)), TensorSpec("bias", ()), TensorSpec("a.kernel", (4,))),
    10.0,
)


def mixed_update() -> dict[str, NDArray[np.float32]]:
    return {
        "w/1": np.arange(6, dtype=np.float32).reshape(2, 3),
        "bias": np.float32(-1.5) * np.ones((), np.float32),
        "a.kernel": np.array([9, 8, 7, 6], dtype=np.float32),
    }


def test_tensors_are_flattened_by_name_in_c_order() -> None:
    expected = [9, 8, 7, 6, -1.5, 0, 1, 2, 3, 4, 5]
    update = mixed_update()
    assert flatten(MIXED, update).tolist() == expected
    assert flatten(MIXED, dict(reversed(update.items()))).tolist() == expected
    update["w/1"] = np.asfortranarray(update["w/1"])
    assert flatten(MIXED, update).tolist() == expected


def test_unflatten_is_the_inverse() -> None:
    update = mixed_update()
    back = unflatten(MIXED, flatten(MIXED, update).astype(np.float64))
    assert back.keys() == update.keys()
    for name, tensor in update.items():
        assert back[name].shape == tensor.shape
        assert np.array_equal(back[name], tensor)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32, np.int8])
def test_other_numeric_types_are_converted(dtype: type) -> None:
    update = {name: (tensor * 2).astype(dtype) for name, tensor in mixed_update().items()}
    assert flatten(MIXED, update).tolist() == [18, 16, 14, 12, -3, 0, 2, 4, 6, 8, 10]


def test_plain_numbers_and_lists_are_tensors_too() -> None:
    update = {"w/1": [[0, 1, 2], [3, 4, 5]], "bias": -1.5, "a.kernel": [9, 8, 7, 6]}
    assert np.array_equal(flatten(MIXED, update), flatten(MIXED, mixed_update()))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_named(bad: float) -> None:
    update = mixed_update()
    update["w/1"][1, 2] = bad
    with pytest.raises(NonFiniteError, match=r"'w/1'.*index=\(1, 2\)"):
        flatten(MIXED, update)
    update = mixed_update() | {"bias": np.float32(bad)}
    with pytest.raises(NonFiniteError, match=r"'bias'.*index=\(\)"):
        flatten(MIXED, update)


def test_wrong_names_are_refused_and_listed() -> None:
    missing = mixed_update()
    del missing["bias"]
    with pytest.raises(SchemaError, match=r"missing=\['bias'\]"):
        flatten(MIXED, missing)
    with pytest.raises(SchemaError, match=r"unexpected=\['extra'\]"):
        flatten(MIXED, mixed_update() | {"extra": np.zeros(1)})
    with pytest.raises(SchemaError):
        flatten(MIXED, {})


@pytest.mark.parametrize("shape", [(3, 2), (6,), (2, 3, 1), (1, 2, 3), (2, 4), ()])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(SchemaError, match="'w/1': expected shape"):
        flatten(MIXED, mixed_update() | {"w/1": np.zeros(shape)})


@pytest.mark.parametrize("value", [["x"] * 4, [object()] * 4, [[1], [1, 2], 3, 4]])
def test_what_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(SchemaError, match=r"'a\.kernel': expected numbers"):
        flatten(MIXED, mixed_update() | {"a.kernel": value})


def test_a_value_too_large_for_float32_is_refused_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(NonFiniteError, match=r"'bias'"):
            flatten(MIXED, mixed_update() | {"bias": np.float64(1e39)})


@pytest.mark.parametrize("value", [["1"] * 4, np.zeros(4, complex), np.zeros(4, "datetime64[s]")])
def test_types_that_are_no_real_numbers_are_refused(value: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(SchemaError, match=r"a\.kernel"):
            flatten(MIXED, mixed_update() | {"a.kernel": value})


def test_the_error_about_a_value_does_not_quote_it() -> None:
    with pytest.raises(SchemaError) as error:
        flatten(MIXED, mixed_update() | {"a.kernel": ["hush"] * 4})
    assert "hush" not in str(error.value)


@pytest.mark.parametrize("clip", [1e-42, 1e-300, 1e300, float("nan"), float("inf"), 0.0, -1.0])
def test_a_clip_norm_that_float32_cannot_follow_is_refused(clip: float) -> None:
    with pytest.raises(PlanError, match="clip"):
        vector_segment(10, clip=clip)


@pytest.mark.parametrize("clip", [1e-20, 1e20])
def test_an_extreme_clip_norm_gives_integers_in_range(clip: float) -> None:
    segment = vector_segment(10, clip=clip)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = quantize_update(
            segment, {"vector": np.zeros(10)}, samples=1, rotation=ROTATION, randomness=seeded(1)
        )
    assert -segment.max_abs <= done.values.min() <= done.values.max() <= segment.max_abs


# --- integers -----------------------------------------------------------------------------------

COUNTS = IntegerSegment("counts", 5, 100)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.uint64])
def test_integers_come_back_exactly(dtype: type) -> None:
    values = np.array([0, 1, 100, 7, 99], dtype=dtype)
    done = quantize_integers(COUNTS, values, rotation=ROTATION)
    assert not done.clipped
    back = dequantize_integers(COUNTS, done.values, rotation=ROTATION)
    assert back.tolist() == values.tolist()
    assert dequantize_integers(COUNTS, done.values * 3, rotation=ROTATION).tolist() == [
        0,
        3,
        300,
        21,
        297,
    ]


def test_equal_integers_do_not_line_up() -> None:
    segment = IntegerSegment("counts", 4096, 1)
    done = quantize_integers(segment, np.ones(4096, np.int64), rotation=ROTATION)
    # Fair signs: 8 standard deviations of 64, false alarm below 2**-45 (and the string is fixed).
    assert abs(int(done.values.sum())) < 8 * 64


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (np.int64, 101),
        (np.int64, -101),
        (np.int64, np.iinfo(np.int64).min),
        (np.int64, np.iinfo(np.int64).max),
        (np.uint64, np.iinfo(np.uint64).max),
        (np.uint64, 1 << 63),
        (np.int8, 127),
        (np.int8, -128),
    ],
)
def test_an_integer_beyond_its_range_is_refused_by_index(dtype: type, value: int) -> None:
    values = np.zeros(5, dtype=dtype)
    values[3] = value
    with pytest.raises(InputError, match="index=3") as error:
        quantize_integers(COUNTS, values, rotation=ROTATION)
    assert str(value) not in str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        np.zeros(4, np.int64),
        np.zeros(6, np.int64),
        np.zeros((5, 1), np.int64),
        np.zeros(5),
        np.zeros(5, bool),
        np.zeros(5, complex),
        ["a"] * 5,
        [2**70] * 5,
        7,
    ],
)
def test_what_is_no_vector_of_integers_is_refused(values: object) -> None:
    with pytest.raises(SchemaError, match="expected integers of shape"):
        quantize_integers(COUNTS, values, rotation=ROTATION)  # type: ignore[arg-type]


# --- whole plans --------------------------------------------------------------------------------


def quantize_plan(contributions: dict[str, object]) -> list[quantizer.Quantized]:
    plan = make_plan([MIXED, COUNTS], max_clients=5)
    return quantize(
        plan,
        contributions,  # type: ignore[arg-type]
        samples=1,
        rotation=ROTATION,
        randomness=seeded(1),
    )


def test_segments_are_quantised_in_the_order_of_the_plan() -> None:
    parts = quantize_plan({"counts": np.arange(5), "update": mixed_update()})
    assert [part.values.size for part in parts] == [16, 5]


@pytest.mark.parametrize(
    "contributions",
    [
        {},
        {"update": mixed_update()},
        {"update": mixed_update(), "counts": np.arange(5), "more": np.arange(5)},
        {"update": np.zeros(11), "counts": np.arange(5)},
        {"update": mixed_update(), "counts": {"counts": np.arange(5)}},
    ],
)
def test_contributions_that_do_not_fit_the_plan_are_refused(
    contributions: dict[str, object],
) -> None:
    with pytest.raises(SchemaError):
        quantize_plan(contributions)


def test_the_integers_are_not_shown() -> None:
    parts = quantize_plan({"counts": np.array([41, 42, 43, 44, 45]), "update": mixed_update()})
    assert "values" not in repr(parts)
    assert "43" not in repr(parts)


def test_the_format_of_the_quantised_integers_is_stable() -> None:
    # A change here means that clients of two versions would not add up to a meaningful sum: change
    # the protocol version with it. The update is not clipped and made without any library's
    # generator, so that the bytes are the same on every machine.
    plan = plan_tensors(
        {"w": (100, 70), "b": (70,)}, max_clients=9, clip=4.0, weighting="samples", weight_cap=8
    )
    parts = quantize(
        plan,
        {
            "update": {
                "w": ((np.arange(7000) * 37 % 101 - 50) / 2048).reshape(100, 70),
                "b": (np.arange(70) % 5 - 2) / 512,
            }
        },
        samples=3,
        rotation=ROTATION,
        randomness=seeded(7),
    )
    assert not parts[0].clipped
    data = parts[0].values.astype("<i8").tobytes()
    assert (
        hashlib.sha256(data).hexdigest()
        == "7790d58623e1c015038b9157d821ba13910e2d0642d9aefd0e6539ae2d580a32"
    )


# --- the norm that no honest client exceeds -------------------------------------------------------


def honest_vectors(size: int, seed: int) -> dict[str, NDArray[np.float32]]:
    """Updates at a clip norm of 1, of the forms whose rounding adds the most, and of others."""
    drawn = np.random.default_rng(seed)
    spike, few = np.zeros(size), np.zeros(size)
    spike[seed % size] = 1.0
    few[drawn.integers(0, size, 9)] = 1.0
    forms = {
        "gaussian": drawn.standard_normal(size),
        "flat": np.ones(size),
        "signs": drawn.choice([-1.0, 1.0], size),
        "heavy": drawn.standard_t(1.5, size),
        "spike": spike,
        "few": few,
        # Far beyond the bound, so that it is clipped to it.
        "clipped": 1e6 * drawn.standard_normal(size),
        # Nothing but a sliver: all of the norm is rounding.
        "tiny": 1e-3 * drawn.standard_normal(size) / math.sqrt(size),
    }
    norms = {name: np.linalg.norm(vector) for name, vector in forms.items()}
    keep = ("clipped", "tiny")
    return {
        name: (vector if name in keep else vector / norms[name]).astype(np.float32)
        for name, vector in forms.items()
    }


@pytest.mark.parametrize("cap", [0, 10], ids=["equal", "weighted"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("size", [1, 2, 7, 100, 1024, 5000, 100_000])
def test_no_honest_norm_exceeds_the_planned_one(size: int, bits: int, cap: int) -> None:
    segment = vector_segment(size, bits=bits, cap=cap)
    bound = honest_norm(segment)
    largest = 0.0
    for seed in range(1 if size > 10_000 else 4):
        for vector in honest_vectors(size, seed).values():
            done = quantize_update(
                segment,
                {"vector": vector},
                samples=max(cap, 1),
                rotation=seed.to_bytes(32, "big"),
                randomness=seeded(seed),
            )
            largest = max(largest, float(np.linalg.norm(done.values)))
    assert largest <= bound
    # And it is no looser than rounding makes it: by a tenth, with bits and values enough.
    if size >= 1000 and bits >= 4:
        assert largest > 0.9 * bound


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("samples", [1, 3, 10, 50])
def test_a_client_of_less_weight_keeps_to_a_smaller_norm(samples: int, bits: int) -> None:
    for size in (5, 1000, 9000):
        segment = vector_segment(size, bits=bits, cap=10)
        weight = min(samples / 10, 1.0)
        bound = honest_norm(segment, weight)
        assert bound <= honest_norm(segment)
        for seed, vector in enumerate(honest_vectors(size, 7).values()):
            done = quantize_update(
                segment,
                {"vector": vector},
                samples=samples,
                rotation=ROTATION,
                randomness=seeded(seed),
            )
            assert np.linalg.norm(done.values) <= bound


@pytest.mark.parametrize("cap", [0, 10])
def test_the_planned_norm_is_that_one(cap: int) -> None:
    segment = vector_segment(3000, cap=cap)
    plan = make_plan([segment], max_clients=5, norm_check=NormCheck())
    assert plan.layouts[0].norm == honest_norm(segment)


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(1, 3000),
    bits=st.integers(2, 16),
    weighted=st.booleans(),
    samples=st.integers(1, 20),
    seed=st.integers(0, 2**32),
    exponent=st.floats(-3, 3),
)
def test_no_random_updates_norm_exceeds_the_planned_one(
    size: int, bits: int, weighted: bool, samples: int, seed: int, exponent: float
) -> None:
    segment = vector_segment(size, bits=bits, cap=10 if weighted else 0)
    bound = honest_norm(segment)
    drawn = np.random.default_rng(seed)
    vector = drawn.standard_normal(size) * np.exp(exponent * drawn.standard_normal(size))
    norm = np.linalg.norm(vector)
    done = quantize_update(
        segment,
        {"vector": (vector / norm).astype(np.float32)},
        samples=samples,
        rotation=ROTATION,
        randomness=seeded(seed),
    )
    assert np.linalg.norm(done.values) <= bound


def test_rounding_up_everywhere_at_its_worst_place_stays_within_the_expected_norm() -> None:
    # By the law itself: the mean square of the stochastic rounding of x is x^2 + p (1 - p).
    for bits in (2, 3, 8):
        segment = vector_segment(4096, bits=bits)
        bound = honest_norm(segment)
        energy = (segment.norm_bound / segment.step) ** 2
        for share in np.linspace(0.01, 1.0, 60):
            # All of the energy on a share of the coordinates, equal magnitudes.
            count = max(1, round(share * 4096))
            magnitude = min(math.sqrt(energy / count), segment.max_abs)
            part = magnitude % 1
            mean = count * (magnitude**2 + part * (1 - part))
            assert mean <= bound**2


def test_integers_beyond_their_norm_are_refused_and_those_at_it_are_not() -> None:
    segment = IntegerSegment("counts", 50, 10, 20.0)
    values = np.zeros(50, dtype=np.int64)
    values[:4] = 10  # a norm of exactly 20
    assert np.linalg.norm(quantize_integers(segment, values, rotation=ROTATION).values) == 20
    values[4] = 1
    with pytest.raises(InputError, match="norm of at most 20"):
        quantize_integers(segment, values, rotation=ROTATION)
    votes = IntegerSegment("votes", 50, 1, 1.0)
    assert quantize_integers(votes, np.eye(50, dtype=np.int8)[7], rotation=ROTATION).values.any()
    with pytest.raises(InputError, match="norm of at most 1;"):
        quantize_integers(votes, np.eye(50, dtype=np.int8)[:2].sum(axis=0), rotation=ROTATION)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.uint64])
def test_the_norm_of_integers_does_not_overflow(dtype: type) -> None:
    segment = IntegerSegment("counts", 5000, 127, 8000.0)
    values = np.full(5000, 127, dtype=dtype)  # a norm of 8980, and squares beyond 8 bits
    with pytest.raises(InputError, match="norm"):
        quantize_integers(segment, values, rotation=ROTATION)
