"""Sizes, noise and grids of sketches, derived here once more."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.parameters import BLOCK_BYTES, FloatSegment, IntegerSegment, NormCheck, Plan, TensorSpec
from secagg.planner import make_plan, plan_integers, plan_tensors
from secagg.sketch_shape import (
    SMALLEST_DIRECTION,
    Shape,
    direction_shape,
    noise_energy,
    norm_shapes,
    quietest_shift,
    sketch_bytes,
)

CHECK = NormCheck()

PLANS = st.builds(
    lambda parameters, clients, bits, sketches: plan_tensors(
        parameters,
        max_clients=clients,
        clip=1.0,
        bits=bits,
        norm_check=replace(CHECK, sketches=sketches, min_cosine=-0.1),
    ),
    st.integers(SMALLEST_DIRECTION, 1 << 22),
    st.integers(3, 10_000),
    st.integers(2, 16),
    st.integers(8, 64),
)


def noise(plan: Plan, dropped: int) -> float:
    """Variance of a shown value's noise, in squared steps; upload's errors and mask's error."""
    (layout,) = plan.layouts
    uploads = 10.5 * 4096 * layout.blocks
    masks = 256.0 ** (2 * dropped) / 6 * 4096 * 2 / 3
    return (uploads + masks) / 4.0**layout.shift


@settings(deadline=None, max_examples=100)
@given(plan=PLANS)
def test_shapes_show_enough_values_and_are_quiet_enough(plan: Plan) -> None:
    (shape,), (layout,) = norm_shapes(plan), plan.layouts
    assert plan.norm_check is not None
    assert shape.rows == plan.norm_check.sketches
    # A power of two of equal stretches.
    assert 4096 % shape.values == 0
    shown = shape.rows * shape.values
    assert shown * layout.digits >= 512
    assert shown >= 256
    assert (shown // 2) * layout.digits < 512 or shown // 2 < 256
    assert shape.dropped in (1, 2)
    assert noise_energy(layout, shape) == pytest.approx(noise(plan, shape.dropped))
    assert noise(plan, shape.dropped) <= 1e-3 * layout.norm**2
    if shape.dropped == 1:
        assert noise(plan, 2) > 1e-3 * layout.norm**2


@settings(deadline=None, max_examples=100)
@given(plan=PLANS)
def test_direction_rows_find_what_they_look_for(plan: Plan) -> None:
    shape, (layout,) = direction_shape(plan), plan.layouts
    assert shape is not None
    assert (shape.segment, shape.values) == (0, 1)
    assert 1 <= shape.digits <= layout.digits
    assert shape.rows % shape.digits == 0
    assert shape.coordinates == shape.rows * shape.sampled
    # Each digit that is looked at holds as many coordinates as a row wants, in one block even.
    last_digit_of_first_block = layout.values - (shape.digits - 1) * 4096
    assert 1 <= shape.sampled <= min(4096, last_digit_of_first_block)
    # All that the norm check lets through, in one digit and in line, stays within half of it, with
    # room for how the number of coordinates in a row strays.
    assert plan.norm_check is not None
    norm = (1 + plan.norm_check.margin) * layout.norm
    largest = norm * math.sqrt(shape.digits / layout.values)
    most = layout.base / 2.5 * (1 + 1e-12)  # may be reached, but for the rounding of floats
    assert shape.sampled == 1 or shape.sampled * largest <= most
    assert shape.bytes == shape.rows * (9 + 4096 * 6)


@settings(deadline=None, max_examples=50)
@given(rows=st.integers(1, 64), values=st.sampled_from([1, 2, 32, 64]), dropped=st.integers(1, 2))
def test_bytes_are_positions_values_and_masks(rows: int, values: int, dropped: int) -> None:
    shape = Shape(rows, values, dropped)
    assert shape.mask_bytes == 7 - dropped
    assert shape.bytes == rows * (values * 2 + values * 7 + 4096 * (7 - dropped))


@settings(deadline=None, max_examples=60)
@given(norm=st.integers(1, 1 << 40), values=st.integers(1, 1 << 28))
def test_the_quietest_shift_is_the_smallest_quiet_one(norm: int, values: int) -> None:
    shift = quietest_shift(norm, values)
    blocks = -(-values // 4096)
    variance = 10.5 * 4096 * blocks + 256.0**2 / 6 * 4096 * 2 / 3
    assert variance <= 1e-3 * 4.0**shift * norm**2
    assert shift == 0 or variance > 1e-3 * 4.0 ** (shift - 1) * norm**2


def test_without_a_check_there_are_no_shapes() -> None:
    plan = plan_tensors(1000, max_clients=5, clip=1.0)
    assert norm_shapes(plan) == []
    assert direction_shape(plan) is None
    assert sketch_bytes(plan, direction=True) == 0


def test_without_a_cosine_there_is_no_direction() -> None:
    plan = plan_tensors(1000, max_clients=5, clip=1.0, norm_check=CHECK)
    assert direction_shape(plan) is None
    assert sketch_bytes(plan, direction=True) == sketch_bytes(plan, direction=False) > 0


def test_a_sketch_of_a_million_parameters_is_a_tenth_of_its_upload() -> None:
    plan = plan_tensors(1_000_000, max_clients=1000, clip=1.0, norm_check=CHECK)
    assert sketch_bytes(plan, direction=False) < 0.1 * plan.payload_bytes
    assert plan.payload_bytes == plan.blocks * BLOCK_BYTES


def test_more_rows_cost_what_the_documentation_says() -> None:
    # 20 to 24 KiB each, and a little for the values.
    for plan in (
        plan_tensors(1_000_000, max_clients=1000, clip=1.0, norm_check=CHECK),
        plan_integers(10_000, max_clients=100, max_abs=1, max_norm=1, norm_check=CHECK),
        plan_integers(10_000, max_clients=3, max_abs=10**6, max_norm=1e7, norm_check=CHECK),
    ):
        (shape,) = norm_shapes(plan)
        assert 20 * 1024 <= shape.bytes / shape.rows <= 24.6 * 1024


def test_a_directions_segment_is_the_float_one_wherever_it_is() -> None:
    plan = make_plan(
        [
            IntegerSegment("counts", 10, 5),
            FloatSegment("update", (TensorSpec("w", (9000,)),), 1.0),
        ],
        max_clients=5,
        norm_check=replace(CHECK, min_cosine=0.1),
    )
    shape = direction_shape(plan)
    assert shape is not None
    assert shape.segment == 1
    everything = sum(each.bytes for each in norm_shapes(plan)) + shape.bytes
    assert sketch_bytes(plan, direction=True) == everything
