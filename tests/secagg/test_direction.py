"""The direction check: what the cosine of an update to a known direction comes out as."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from secagg import ring
from secagg.context import RoundContext
from secagg.direction import SIGN_EFFICIENCY, Direction
from secagg.errors import PlanError, SchemaError
from secagg.keyholder import KeyHolder
from secagg.norm_check import _cosine, _energy, passes
from secagg.packing import pack
from secagg.parameters import FloatSegment, IntegerSegment, NormCheck, Plan, TensorSpec
from secagg.planner import make_plan, plan_integers, plan_tensors
from secagg.quantize import quantize, rotated
from secagg.sampling import Stream
from secagg.sketch_shape import SMALLEST_DIRECTION, direction_shape
from secagg.sketches import Sketch, sketch

CHECK = NormCheck(min_cosine=0.0)
NO_KEY = np.zeros(4096, dtype=np.int64)

Floats = NDArray[np.floating]


@functools.cache
def plan_of(size: int, clients: int = 8) -> Plan:
    return plan_tensors(size, max_clients=clients, clip=1.0, norm_check=CHECK)


@functools.cache
def context_of(plan: Plan) -> RoundContext:
    return KeyHolder(plan).context


def known_of(plan: Plan) -> NDArray[np.float32]:
    segment = plan.segments[0]
    assert isinstance(segment, FloatSegment)
    drawn = np.random.default_rng(0).standard_normal(segment.parameters)
    return (drawn / np.linalg.norm(drawn)).astype(np.float32)


def direction_of(plan: Plan) -> Direction:
    segment = plan.segments[0]
    assert isinstance(segment, FloatSegment)
    found = Direction.of(segment, known_of(plan), context_of(plan).rotation)
    assert found is not None
    return found


def at_cosine(plan: Plan, cosine: float, number: int, norm: float = 1.0) -> Floats:
    known = known_of(plan).astype(np.float64)
    other = np.random.default_rng(number + 1).standard_normal(known.size)
    other -= known * (other @ known)
    other /= np.linalg.norm(other)
    return norm * (cosine * known + (1 - cosine**2) ** 0.5 * other)


def sketched(plan: Plan, update: Floats, number: int) -> Sketch:
    context = context_of(plan)
    parts = quantize(
        plan,
        {plan.segments[0].name: update},
        samples=1,
        rotation=context.rotation,
        randomness=Stream.derive("test rounding", number),
    )
    residues = ring.to_ntt(pack(plan.layouts[0], parts[0].values))
    key = Stream.derive("test challenge", number).read(32)
    return sketch(context, key[::-1], [residues], key, direction_of(plan))


def cosine_of(plan: Plan, made: Sketch) -> float:
    layout, shape = plan.layouts[0], direction_shape(plan)
    assert shape is not None
    assert made.direction is not None
    return _cosine(layout, shape, made.direction, NO_KEY, _energy(layout, made.norms[0], NO_KEY))


# The smallest models fill one block of several digits, and not all of those.
SIZES = [SMALLEST_DIRECTION, 9000, 13_000, 60_000]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cosine", [-0.5, 0.0, 0.9])
def test_the_cosine_is_estimated_whatever_the_size_of_the_model(size: int, cosine: float) -> None:
    plan = plan_of(size)
    found = [
        cosine_of(plan, sketched(plan, at_cosine(plan, cosine, number), number))
        for number in range(12)
    ]
    # 0.02 to 0.05 each: six standard deviations of the mean.
    assert np.mean(found) == pytest.approx(cosine, abs=6 * 0.05 / 12**0.5)
    assert np.std(found) < 0.08


def test_several_digits_and_blocks_are_among_the_plans_of_this_file() -> None:
    layouts = [plan_of(size).layouts[0] for size in SIZES]
    assert {layout.blocks for layout in layouts} > {1}
    assert max(layout.digits for layout in layouts) > 2
    # One with a digit that no block fills.
    assert any(layout.values < layout.digits * 4096 for layout in layouts)


def test_the_norm_of_the_update_does_not_matter() -> None:
    plan = plan_of(9000)
    for norm in (0.05, 0.5):
        made = sketched(plan, at_cosine(plan, 0.8, 3, norm), 3)
        assert cosine_of(plan, made) == pytest.approx(0.8, abs=0.2)


def test_who_pushes_back_is_refused_and_who_agrees_is_not() -> None:
    plan = plan_of(13_000)
    for number in range(15):
        assert passes(plan, NO_KEY, sketched(plan, at_cosine(plan, 0.4, number), number))
        assert not passes(plan, NO_KEY, sketched(plan, at_cosine(plan, -0.4, number), number))


def test_the_norm_is_checked_all_the_same() -> None:
    plan = plan_of(13_000)
    layout = plan.layouts[0]
    drawn = np.random.default_rng(1).standard_normal(layout.values)
    values = direction_of(plan).signs * np.abs(drawn)
    values = np.rint(values * 1.7 * layout.norm / np.linalg.norm(values)).astype(np.int64)
    made = sketch(
        context_of(plan),
        bytes(32),
        [ring.to_ntt(pack(layout, values))],
        bytes(32),
        direction_of(plan),
    )
    assert cosine_of(plan, made) > 0.5
    assert not passes(plan, NO_KEY, made)
    assert passes(plan, NO_KEY, replace(made, norms=sketched(plan, known_of(plan), 1).norms))


@pytest.mark.parametrize("form", ["flat", "one digit"])
@pytest.mark.parametrize("norm", [0.3, 0.8, 1.0, 1.1, 1.15])
def test_no_sum_folds_over_into_the_other_direction(form: str, norm: float) -> None:
    """Within the norm check's margin, against the direction with all that there is."""
    for size in (9000, 60_000):
        plan = plan_of(size)
        layout = plan.layouts[0]
        slots = np.zeros((layout.blocks, layout.digits, 4096))
        slots.reshape(-1)[: layout.values] = -direction_of(plan).signs
        if form == "one digit":
            slots[:, 1:] = 0
        slots *= norm * layout.norm / np.linalg.norm(slots)
        values = np.rint(slots.reshape(-1)[: layout.values]).astype(np.int64)
        residues = ring.to_ntt(pack(layout, values))
        for number in range(4):
            key = Stream.derive("test challenge", number).read(32)
            made = sketch(context_of(plan), key, [residues], key, direction_of(plan))
            assert cosine_of(plan, made) < -0.5
            assert not passes(plan, NO_KEY, made)


def test_without_a_direction_only_the_norm_counts() -> None:
    plan = plan_of(9000)
    context = context_of(plan)
    opposite = sketched(plan, at_cosine(plan, -0.9, 1), 1)
    assert not passes(plan, NO_KEY, opposite)
    assert passes(plan, NO_KEY, replace(opposite, direction=None))
    assert context.plan is plan


def test_signs_lose_a_known_factor() -> None:
    drawn = np.random.default_rng(1).standard_normal((2, 1_000_000))
    other = 0.6 * drawn[0] + 0.8 * drawn[1]
    assert (other * np.sign(drawn[0])).mean() == pytest.approx(0.6 * SIGN_EFFICIENCY, abs=0.005)


# --- the direction itself -------------------------------------------------------------------------


def segment_of(parameters: int, weighting: str = "equal") -> FloatSegment:
    return FloatSegment("update", (TensorSpec("w", (parameters,)),), 1.0, 8, weighting)


def test_signs_are_those_of_the_rotated_vector() -> None:
    for weighting in ("equal", "samples"):
        segment = segment_of(5000, weighting)
        vector = np.random.default_rng(1).standard_normal(5000).astype(np.float32)
        found = Direction.of(segment, vector, bytes(32))
        assert found is not None
        assert found.signs.dtype == np.int8
        expected = np.where(rotated(segment, vector, bytes(32)) < 0, -1, 1)
        # Scaling rounds differently where a coordinate is nearly zero.
        assert (found.signs == expected).mean() > 0.999
        assert found.signs.shape == (segment.values,)


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1.0, 1e20, 1e38])
def test_the_length_of_a_direction_does_not_matter(scale: float) -> None:
    segment = segment_of(300)
    vector = np.random.default_rng(1).uniform(-1, 1, 300).astype(np.float32)
    first = Direction.of(segment, vector, bytes(32))
    other = Direction.of(segment, vector * np.float32(scale), bytes(32))
    assert first is not None
    assert other is not None
    assert (first.signs == other.signs).mean() > 0.99


def test_a_zero_vector_has_no_direction() -> None:
    assert Direction.of(segment_of(300), np.zeros(300, dtype=np.float32), bytes(32)) is None


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_direction_that_is_not_finite_is_refused(bad: float) -> None:
    vector = np.ones(300, dtype=np.float32)
    vector[7] = bad
    with pytest.raises(SchemaError, match="finite direction"):
        Direction.of(segment_of(300), vector, bytes(32))


@pytest.mark.parametrize("shape", [(299,), (301,), (300, 1), (0,)])
def test_a_direction_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(SchemaError, match="shape"):
        Direction.of(segment_of(300), np.ones(shape, dtype=np.float32), bytes(32))


def test_signs_lie_in_digits_as_packed_values_do() -> None:
    plan = plan_of(13_000)
    layout, known = plan.layouts[0], direction_of(plan)
    # All digits together, packed by hand, are what packing the signs gives.
    digits = [known.of_digit(layout, digit) for digit in range(layout.digits)]
    weights = [layout.base**digit << layout.shift for digit in range(layout.digits)]
    total = sum(part * weight for part, weight in zip(digits, weights, strict=True))
    assert np.array_equal(total, pack(layout, known.signs.astype(np.int64)))


def test_a_direction_shows_no_signs() -> None:
    assert "signs" not in repr(direction_of(plan_of(9000)))


# --- plans ----------------------------------------------------------------------------------------


def test_a_cosine_needs_one_float_segment() -> None:
    update = segment_of(20_000)
    for segments in ([IntegerSegment("a", 9, 1, 1.0)], [update, replace(update, name="b")]):
        with pytest.raises(PlanError, match="one float segment"):
            make_plan(segments, max_clients=5, norm_check=CHECK)
    with pytest.raises(PlanError, match="one float segment"):
        plan_integers(9, max_clients=5, max_abs=1, max_norm=1, norm_check=CHECK)


def test_a_model_too_small_for_its_coordinates_to_be_hidden_has_no_direction_check() -> None:
    plan_of(SMALLEST_DIRECTION)
    with pytest.raises(PlanError, match=str(SMALLEST_DIRECTION)):
        plan_of(SMALLEST_DIRECTION // 2)
