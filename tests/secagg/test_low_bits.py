"""Low bits on the wire, and what the noise audit refuses to look at."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from grids import PLANS, shifts
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.errors import InputError, MalformedError
from secagg.noise_audit import dithered, low_from_bytes, low_to_bytes, off_grid
from secagg.parameters import MODULUS, Plan
from secagg.planner import plan_integers
from secagg.sampling import Stream, uniform_polynomials

any_plan = st.sampled_from(list(PLANS.values()))


def stream(seed: int) -> Stream:
    return Stream.derive("test low bits", seed)


# --- the wire -------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(plan=any_plan, seed=st.integers(0, 2**32), kind=st.sampled_from([bytes, bytearray]))
def test_low_bits_survive_the_wire(
    plan: Plan, seed: int, kind: Callable[[bytes], bytes | bytearray]
) -> None:
    low = dithered(plan, uniform_polynomials(stream(seed), plan.blocks), stream(seed))
    data = low_to_bytes(low)
    assert len(data) == plan.blocks * 4096 * 4
    again = low_from_bytes(plan, kind(data))
    assert again.dtype == np.uint32
    assert np.array_equal(again, low)


def test_low_bits_are_little_endian_in_c_order() -> None:
    low = np.arange(4096 * 2, dtype=np.uint32).reshape(4096, 2).T
    assert low_to_bytes(low)[:12] == bytes([0, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0])


@settings(deadline=None, max_examples=60)
@given(plan=any_plan, data=st.data())
def test_low_bits_of_any_other_size_are_malformed(plan: Plan, data: st.DataObject) -> None:
    size = plan.blocks * 4096 * 4
    sizes = st.integers(0, 2 * size) | st.sampled_from([0, size - 4, size - 1, size + 1, size + 4])
    other = data.draw(sizes.filter(lambda drawn: drawn != size))
    with pytest.raises(MalformedError, match=f"of {size} bytes"):
        low_from_bytes(plan, bytes(other))


@settings(deadline=None, max_examples=100)
@given(plan=any_plan, data=st.data())
def test_a_number_is_malformed_exactly_from_the_grid_of_its_own_layout_on(
    plan: Plan, data: st.DataObject
) -> None:
    block, position = data.draw(st.integers(0, plan.blocks - 1)), data.draw(st.integers(0, 4095))
    grid = 1 << int(shifts(plan)[block, 0])
    number = data.draw(st.integers(0, 2**32 - 1) | st.sampled_from([grid - 1, grid, 2**32 - 1]))
    low = np.zeros((plan.blocks, 4096), np.uint32)
    low[block, position] = number
    if number < grid:
        assert np.array_equal(low_from_bytes(plan, low_to_bytes(low)), low)
    else:
        with pytest.raises(MalformedError, match="below the grid") as refused:
            low_from_bytes(plan, low_to_bytes(low))
        assert str(number) not in str(refused.value)


@settings(deadline=None, max_examples=60)
@given(data=st.binary(max_size=4096 * 4), fill=st.binary(min_size=1, max_size=8))
def test_any_bytes_are_low_bits_or_malformed(data: bytes, fill: bytes) -> None:
    plan = PLANS["smallest grid"]
    data += fill * 4096 * 4
    try:
        low = low_from_bytes(plan, data[: 4096 * 4])
    except MalformedError:
        return
    assert low.max() < 1 << plan.layouts[0].shift
    assert low_to_bytes(low) == data[: 4096 * 4]


# --- arguments ------------------------------------------------------------------------------------

SHAPES = [(0, 4096), (1, 4096), (4, 4096), (3, 4095), (3 * 4096,), (1, 3, 4096), (4096, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    plan = plan_integers(3 * 4096, max_clients=3, max_abs=1 << 40)
    assert plan.blocks == 3
    with pytest.raises(InputError, match="shape"):
        dithered(plan, np.zeros(shape, np.uint64))
    low, mask = np.zeros((3, 4096), np.uint32), np.zeros((3, 4096), np.int64)
    with pytest.raises(InputError, match="shape"):
        off_grid(plan, np.zeros(shape, np.uint32), mask)
    with pytest.raises(InputError, match="shape"):
        off_grid(plan, low, np.zeros(shape, np.int64))


@pytest.mark.parametrize("dtype", [np.int64, np.uint32, np.float64, ">u8", bool, object])
def test_other_types_of_residues_are_refused(dtype: str) -> None:
    with pytest.raises(InputError, match="uint64"):
        dithered(PLANS["smallest grid"], np.zeros((1, 4096), dtype))


@pytest.mark.parametrize("dtype", [np.uint64, np.int32, np.float64, ">u4", bool, object])
def test_other_types_of_low_bits_are_refused(dtype: str) -> None:
    mask = np.zeros((1, 4096), np.int64)
    with pytest.raises(InputError, match="uint32"):
        off_grid(PLANS["smallest grid"], np.zeros((1, 4096), dtype), mask)


@pytest.mark.parametrize("dtype", [np.uint64, np.int32, np.float64, ">i8", bool, object])
def test_other_types_of_masks_are_refused(dtype: str) -> None:
    low = np.zeros((1, 4096), np.uint32)
    with pytest.raises(InputError, match="int64"):
        off_grid(PLANS["smallest grid"], low, np.zeros((1, 4096), dtype))


@pytest.mark.parametrize("value", [MODULUS, MODULUS + 1, (1 << 64) - 1])
def test_residues_of_q_or_more_are_refused(value: int) -> None:
    residues = np.zeros((1, 4096), np.uint64)
    residues[0, 4095] = value
    with pytest.raises(InputError, match="below q"):
        dithered(PLANS["smallest grid"], residues)


def test_refusals_show_no_values() -> None:
    low, mask = np.full((2, 4096), 987_654, np.uint32), np.full((2, 4096), 987_654_321)
    with pytest.raises(InputError) as refused:
        off_grid(PLANS["smallest grid"], low, mask)
    assert "987" not in str(refused.value)


def test_memory_is_that_of_a_few_chunks_beyond_the_result() -> None:
    plan = plan_integers(4096 * 400, max_clients=3, max_abs=1 << 40)
    residues = np.zeros((plan.blocks, 4096), np.uint64)
    chunk = 32 * 4096 * 8
    assert residues.nbytes > 12 * chunk
    low, opened = np.zeros(residues.shape, np.uint32), residues.view(np.int64)
    assert peak(lambda: dithered(plan, residues)) < low.nbytes + 8 * chunk
    assert peak(lambda: off_grid(plan, low, opened)) < 5 * chunk


def peak(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
