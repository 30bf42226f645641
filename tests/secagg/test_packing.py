"""Digits on a grid: what goes in comes out, noise up to the guard is removed, the rest refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from secagg.errors import PlanError, ReleaseError
from secagg.packing import balanced_digits, pack, unpack
from secagg.parameters import MODULUS, Layout, NormCheck
from secagg.planner import plan_integers


def layout_of(clients: int, magnitude: int, size: int) -> Layout:
    return plan_integers(size, max_clients=clients, max_abs=magnitude).layouts[0]


TWO_DIGITS = layout_of(1000, 127, 4096 * 2)
ONE_DIGIT = layout_of(1000, 1 << 30, 4096)
MANY_DIGITS = layout_of(3, 1, 4096 * 12)
SHORT = layout_of(1000, 127, 5000)
LAYOUTS = [TWO_DIGITS, ONE_DIGIT, MANY_DIGITS, SHORT]


def digit_unit(layout: Layout, digit: int) -> int:
    return int(layout.base**digit) << layout.shift


def zeros(layout: Layout) -> NDArray[np.int64]:
    return np.zeros((layout.blocks, 4096), dtype=np.int64)


def test_the_layouts_of_this_file_have_the_digits_they_are_named_for() -> None:
    assert [layout.digits for layout in LAYOUTS] == [2, 1, 12, 2]


@settings(deadline=None, max_examples=80)
@given(
    clients=st.integers(3, 100_000),
    magnitude=st.integers(1, 1 << 46),
    size=st.integers(1, 20_000),
    seed=st.integers(0, 2**32),
)
def test_any_sum_in_range_survives_any_noise_within_the_guard(
    clients: int, magnitude: int, size: int, seed: int
) -> None:
    try:
        layout = layout_of(clients, magnitude, size)
    except PlanError:
        assume(False)
    drawn = np.random.default_rng(seed)
    values = drawn.integers(-layout.sum_abs, layout.sum_abs, size, endpoint=True)
    shape = (layout.blocks, 4096)
    noise = drawn.integers(-layout.guard, layout.guard, shape, endpoint=True)
    noise.flat[0], noise.flat[-1] = layout.guard, -layout.guard
    packed = pack(layout, values)
    assert packed.shape == shape
    assert np.abs(packed).max() + layout.guard < MODULUS // 2
    assert np.array_equal(unpack(layout, packed + noise, layout.sum_abs // layout.max_abs), values)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_coefficient_is_the_documented_sum(layout: Layout) -> None:
    values = np.arange(layout.values, dtype=np.int64) % 11 - 5
    packed = pack(layout, values)
    for coefficient in (0, 1, 903, 4095):
        at = [d * 4096 + coefficient for d in range(layout.digits)]
        digits = [int(values[i]) if i < layout.values else 0 for i in at]
        expected = sum(digit_unit(layout, d) * v for d, v in enumerate(digits))
        assert int(packed[0, coefficient]) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pattern", ["max", "min", "alternating", "digitwise"])
def test_extreme_sums_survive_extreme_noise(layout: Layout, pattern: str) -> None:
    index = np.arange(layout.values)
    sign = {
        "max": np.ones_like(index),
        "min": -np.ones_like(index),
        "alternating": 1 - 2 * (index % 2),
        "digitwise": 1 - 2 * (index // 4096 % 2),
    }[pattern]
    values = sign * layout.sum_abs
    for noise in (layout.guard, -layout.guard, 0):
        assert np.array_equal(
            unpack(layout, pack(layout, values) + noise, layout.sum_abs // layout.max_abs), values
        )


def test_every_sign_pattern_of_all_digits_survives() -> None:
    patterns = np.array(list(itertools.product((-1, 1), repeat=12)))
    assert patterns.shape == (4096, 12)
    values = patterns.T.reshape(-1) * MANY_DIGITS.sum_abs
    for noise in (MANY_DIGITS.guard, -MANY_DIGITS.guard):
        assert np.array_equal(
            unpack(
                MANY_DIGITS,
                pack(MANY_DIGITS, values) + noise,
                MANY_DIGITS.sum_abs // MANY_DIGITS.max_abs,
            ),
            values,
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_noise_beyond_the_guard_is_refused_wherever_it_is(layout: Layout, sign: int) -> None:
    for position in (0, 2047, 4095):
        for excess in (1, 2, (1 << (layout.shift - 1)) - layout.guard):
            noisy = zeros(layout)
            noisy[-1, position] = sign * (layout.guard + excess)
            with pytest.raises(ReleaseError, match="noise beyond the guard"):
                unpack(layout, noisy, layout.sum_abs // layout.max_abs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_digit_beyond_the_range_is_refused_in_every_place(layout: Layout, sign: int) -> None:
    # All digits but the top one wrap at B / 2 = 2 R + 1: everything up to there must be noticed.
    for digit in range(layout.digits):
        for excess in (1, 2, layout.sum_abs // 2, layout.sum_abs):
            noisy = zeros(layout)
            noisy[0, 17] = sign * (layout.sum_abs + excess) * digit_unit(layout, digit)
            with pytest.raises(ReleaseError, match="planned range"):
                unpack(layout, noisy, layout.sum_abs // layout.max_abs)
        noisy[0, 17] = sign * layout.sum_abs * digit_unit(layout, digit)
        if digit * 4096 + 17 < layout.values:
            unpack(layout, noisy, layout.sum_abs // layout.max_abs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_largest_residues_are_refused_rather_than_read(layout: Layout) -> None:
    for value in (MODULUS // 2, -(MODULUS // 2)):
        noisy = zeros(layout)
        # On the grid, so that the noise alone does not refuse it.
        noisy[0, 0] = value >> layout.shift << layout.shift
        with pytest.raises(ReleaseError, match="planned range"):
            unpack(layout, noisy, layout.sum_abs // layout.max_abs)


def test_anything_in_the_padding_is_refused() -> None:
    first = SHORT.values - 4096  # first padding slot of the top digit
    for position, value in ((first, 1), (first, -1), (4095, 1), (4095, SHORT.sum_abs)):
        noisy = zeros(SHORT)
        noisy[0, position] = value * digit_unit(SHORT, 1)
        with pytest.raises(ReleaseError, match="padding"):
            unpack(SHORT, noisy, SHORT.sum_abs // SHORT.max_abs)
    noisy = zeros(SHORT)
    noisy[0, first - 1] = digit_unit(SHORT, 1)
    assert unpack(SHORT, noisy, SHORT.sum_abs // SHORT.max_abs)[-1] == 1


def test_refusals_do_not_say_how_far_off_the_sum_was() -> None:
    for layout in LAYOUTS:
        messages = set()
        for excess in (1, 2):
            noisy = zeros(layout)
            noisy[0, excess] = layout.guard + excess
            with pytest.raises(ReleaseError) as error:
                unpack(layout, noisy, layout.sum_abs // layout.max_abs)
            messages.add(str(error.value))
        assert len(messages) == 1
        assert not any(character.isdigit() for character in messages.pop())


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32))
def test_random_residues_are_refused(seed: int) -> None:
    # What the wrong key leaves: uniform coefficients. A coefficient passes the noise check with
    # probability (2 G + 1) / 2^s < 0.99, so 4096 of them with less than 2^-59.
    layout = LAYOUTS[seed % len(LAYOUTS)]
    shape = (layout.blocks, 4096)
    uniform = np.random.default_rng(seed).integers(-(MODULUS // 2), MODULUS // 2, shape)
    assert (2 * layout.guard + 1) / (1 << layout.shift) < 0.99
    with pytest.raises(ReleaseError):
        unpack(layout, uniform, layout.sum_abs // layout.max_abs)


# --- with a norm check ----------------------------------------------------------------------------


CHECKED = plan_integers(
    5000, max_clients=100, max_abs=50, max_norm=300, norm_check=NormCheck(tolerated=2)
).layouts[0]


def test_a_sum_may_be_off_by_what_the_norm_check_may_let_through() -> None:
    assert CHECKED.tolerance == 2 * 450
    for clients in (3, 100):
        most = clients * CHECKED.max_abs + CHECKED.tolerance
        for place in (0, 17, 4096, 4999):
            values = np.zeros(5000, dtype=np.int64)
            for value in (most, -most):
                values[place] = value
                assert np.array_equal(unpack(CHECKED, pack(CHECKED, values), clients), values)
            for value in (most + 1, -most - 1):
                values[place] = value
                with pytest.raises(ReleaseError, match="planned range"):
                    unpack(CHECKED, pack(CHECKED, values), clients)


def test_padding_may_be_off_by_the_same_and_is_dropped() -> None:
    assert CHECKED.digits >= 2
    values = np.arange(5000) % 7
    packed = pack(CHECKED, values)
    unit, place = digit_unit(CHECKED, 1), 5000 - 4096  # the first slot of padding
    for extra in (1, -1, CHECKED.tolerance, -CHECKED.tolerance):
        noisy = packed.copy()
        noisy[0, place] += extra * unit
        assert np.array_equal(unpack(CHECKED, noisy, 3), values)
    for extra in (CHECKED.tolerance + 1, -CHECKED.tolerance - 1):
        noisy = packed.copy()
        noisy[0, place] += extra * unit
        with pytest.raises(ReleaseError, match="padding"):
            unpack(CHECKED, noisy, 3)


@settings(deadline=None, max_examples=60)
@given(
    base=st.integers(3, 1 << 20),
    digits=st.integers(1, 12),
    numbers=st.lists(st.integers(-(2**52) + 1, 2**52 - 1), min_size=1, max_size=40),
)
def test_balanced_digits_are_small_and_add_up(base: int, digits: int, numbers: list[int]) -> None:
    layout = Layout(4096 * digits, 1, 1, base, digits, 1, 1)
    found = balanced_digits(layout, np.array([numbers], dtype=np.int64))
    assert found.shape == (1, digits, len(numbers))
    back = [
        sum(int(found[0, digit, at]) * base**digit for digit in range(digits))
        for at in range(len(numbers))
    ]
    assert back == numbers
    lower = found[0, :-1]
    assert (2 * np.abs(lower) <= base).all()
