"""Seven-byte residues and their sums, against Python integers and SEAL's own evaluator."""

from __future__ import annotations

import numpy as np
import pytest
import tenseal.sealapi as seal
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from secagg import ring
from secagg.errors import MalformedError
from secagg.parameters import BLOCK_BYTES, MODULUS
from secagg.residues import (
    HALF_BITS,
    ResidueSum,
    halves,
    joined,
    multiply,
    narrow,
    reduced,
    widen,
)


def uniform(seed: int, blocks: int) -> NDArray[np.uint64]:
    return np.random.default_rng(seed).integers(0, MODULUS, (blocks, 4096), dtype=np.uint64)


def with_residue(value: int, position: int, blocks: int = 2) -> bytes:
    data = bytearray(blocks * BLOCK_BYTES)
    data[7 * position : 7 * position + 7] = value.to_bytes(7, "little")
    return bytes(data)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32), blocks=st.integers(1, 4))
def test_narrow_and_widen_are_inverse(seed: int, blocks: int) -> None:
    residues = uniform(seed, blocks)
    data = narrow(residues)
    assert len(data) == blocks * BLOCK_BYTES
    for carrier in (data, bytearray(data), memoryview(data)):
        wide = widen(carrier, blocks)
        assert wide.dtype == np.uint64
        assert np.array_equal(wide, residues)


def test_the_wire_form_is_little_endian_in_c_order() -> None:
    residues = uniform(1, 2)
    expected = b"".join(int(value).to_bytes(7, "little") for value in residues.reshape(-1))
    assert narrow(residues) == expected
    assert narrow(np.asfortranarray(residues)) == expected
    assert narrow(residues[:, ::-1])[:7] == int(residues[0, -1]).to_bytes(7, "little")


@pytest.mark.parametrize("value", [0, 1, MODULUS - 1, 0xFF, 1 << 48])
@pytest.mark.parametrize("position", [0, 1, 4095, 4096, 8191])
def test_every_residue_below_q_is_read_in_its_place(value: int, position: int) -> None:
    wide = widen(with_residue(value, position), 2).reshape(-1)
    assert int(wide[position]) == value
    assert np.count_nonzero(wide) == (value != 0)


@pytest.mark.parametrize("value", [MODULUS, MODULUS + 1, (1 << 56) - 1])
@pytest.mark.parametrize("position", [0, 1, 4095, 4096, 8191])
def test_a_residue_of_q_or_more_is_refused_with_its_place(value: int, position: int) -> None:
    place = rf"block={position // 4096}, position={position % 4096} "
    with pytest.raises(MalformedError, match=place):
        widen(with_residue(value, position), 2)


def test_the_first_of_several_bad_residues_is_named() -> None:
    data = bytearray(with_residue(MODULUS, 4100))
    data[7 * 8000 : 7 * 8000 + 7] = b"\xff" * 7
    with pytest.raises(MalformedError, match="block=1, position=4 "):
        widen(data, 2)


@pytest.mark.parametrize(
    "size", [0, 1, 6, 7, BLOCK_BYTES - 1, BLOCK_BYTES + 1, 2 * BLOCK_BYTES - 7, 3 * BLOCK_BYTES]
)
def test_every_other_size_is_refused_before_the_bytes_are_read(size: int) -> None:
    with pytest.raises(MalformedError, match=f"got bytes={size};"):
        widen(b"\xff" * size, 2)


def test_no_blocks_are_no_bytes() -> None:
    assert widen(b"", 0).shape == (0, 4096)
    with pytest.raises(MalformedError):
        widen(b"\0", 0)


def test_the_callers_bytes_are_not_changed_nor_aliased() -> None:
    data = bytearray(narrow(uniform(3, 1)))
    before = bytes(data)
    wide = widen(data, 1)
    wide[...] = 0
    assert data == before


# --- sums -----------------------------------------------------------------------------------------


def test_sums_equal_python_integers_across_the_reduction_border() -> None:
    # 2**64 // q = 256 residues fit into a word; 600 addends cross the border twice.
    total = ResidueSum(1)
    columns = 64
    exact = [0] * columns
    for count in range(1, 601):
        addend = uniform(count, 1)
        if count % 3 == 0:
            addend[...] = MODULUS - 1
        total.add(addend)
        exact = [a + int(b) for a, b in zip(exact, addend[0, :columns], strict=True)]
        if count in (1, 2, 254, 255, 256, 257, 258, 511, 512, 513, 600):
            expected = [a % MODULUS for a in exact]
            # Not value(), which would reduce and so hide the border: read a copy.
            snapshot = ResidueSum(1)
            snapshot._total, snapshot._pending = total._total.copy(), total._pending
            assert snapshot.value()[0, :columns].tolist() == expected


@pytest.mark.parametrize("count", [1, 2, 254, 255, 256, 257, 509, 510, 511, 512, 600])
def test_the_largest_residues_never_overflow(count: int) -> None:
    total = ResidueSum(1)
    largest = np.full((1, 4096), MODULUS - 1, dtype=np.uint64)
    for _ in range(count):
        total.add(largest)
    assert set(total.value().reshape(-1).tolist()) == {count * (MODULUS - 1) % MODULUS}


@settings(deadline=None, max_examples=20)
@given(plan=st.lists(st.booleans(), min_size=1, max_size=600), seed=st.integers(0, 2**32))
def test_reading_the_sum_in_between_changes_nothing(plan: list[bool], seed: int) -> None:
    addend = uniform(seed, 1)
    read, unread = ResidueSum(1), ResidueSum(1)
    for look in plan:
        read.add(addend)
        unread.add(addend)
        if look:
            read.value()
    assert np.array_equal(read.value(), unread.value())
    assert int(read.value()[0, 0]) == int(addend[0, 0]) * len(plan) % MODULUS


def test_the_sum_equals_seals_evaluator() -> None:
    evaluator = seal.Evaluator(ring.CONTEXT)
    total = ResidueSum(1)
    theirs = ring.load(np.zeros((1, 4096), np.uint64), ntt=True)
    for count in range(1, 301):
        addend = uniform(count, 1)
        total.add(addend)
        evaluator.add_inplace(theirs, ring.load(addend, ntt=True))
        if count in (1, 2, 255, 256, 257, 300):
            assert np.array_equal(total.value(), ring.dump(theirs))


def test_the_value_is_a_copy() -> None:
    total = ResidueSum(1)
    total.add(uniform(1, 1))
    first = total.value()
    first[...] = 0
    assert np.array_equal(total.value(), uniform(1, 1))


def test_an_empty_sum_is_zero() -> None:
    assert not ResidueSum(2).value().any()


# --- products and mixes ---------------------------------------------------------------------------


RESIDUES = st.one_of(
    st.integers(0, MODULUS - 1),
    st.sampled_from([0, 1, 2, MODULUS // 2, MODULUS // 2 + 1, MODULUS - 2, MODULUS - 1]),
    st.integers(0, 56).map(lambda bit: min(1 << bit, MODULUS - 1)),
)
EXTREMES = [0, 1, 2, (1 << 28) - 1, 1 << 28, MODULUS // 2, MODULUS // 2 + 1]
EXTREMES += [MODULUS - (1 << 28), MODULUS - 2, MODULUS - 1]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(RESIDUES, RESIDUES), min_size=1, max_size=50))
def test_products_equal_python_integers(pairs: list[tuple[int, int]]) -> None:
    first, second = (np.array(side, dtype=np.uint64) for side in zip(*pairs, strict=True))
    product = multiply(first, second)
    assert product.dtype == np.uint64
    assert product.tolist() == [a * b % MODULUS for a, b in pairs]


def test_products_of_extremes_and_of_many_random_residues_are_exact() -> None:
    extremes = np.array(EXTREMES, dtype=np.uint64)
    table = multiply(extremes[:, None], extremes[None])
    assert table.tolist() == [[a * b % MODULUS for b in EXTREMES] for a in EXTREMES]
    first, second = uniform(1, 5), uniform(2, 5)
    exact = first.astype(object) * second.astype(object) % MODULUS
    assert np.array_equal(multiply(first, second).astype(object), exact)
    # Products next to a multiple of q, where a wrong quotient would show.
    rng = np.random.default_rng(3)
    for small in (1, -1, 7, -7):
        left = rng.integers(1, MODULUS, 300, dtype=np.uint64)
        right = [small * pow(int(a), -1, MODULUS) % MODULUS for a in left]
        product = multiply(left, np.array(right, dtype=np.uint64))
        assert set(product.tolist()) == {small % MODULUS}


def test_factors_are_not_changed() -> None:
    first, second = uniform(1, 1), uniform(2, 1)
    copies = first.copy(), second.copy()
    multiply(first, second)
    halves(first)
    assert np.array_equal(first, copies[0])
    assert np.array_equal(second, copies[1])


@settings(deadline=None, max_examples=100)
@given(st.lists(RESIDUES, min_size=1, max_size=50))
def test_halves_are_exact_and_joined_again(values: list[int]) -> None:
    split = halves(np.array(values, dtype=np.uint64))
    assert split.dtype == np.float64
    assert split[0].tolist() == [value % (1 << HALF_BITS) for value in values]
    assert split[1].tolist() == [value >> HALF_BITS for value in values]
    assert joined(split).tolist() == values


WHOLE = st.integers(-(2**53) + 1, 2**53 - 1)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(WHOLE, WHOLE), min_size=1, max_size=50))
def test_any_sums_of_halves_are_joined_modulo_q(pairs: list[tuple[int, int]]) -> None:
    sums = np.array(pairs, dtype=np.float64).T
    expected = [((upper << HALF_BITS) + lower) % MODULUS for lower, upper in pairs]
    found = joined(sums)
    assert found.dtype == np.uint64
    assert found.tolist() == expected


def test_the_largest_sums_of_halves_are_joined_modulo_q() -> None:
    most = 2**53 - 1
    for lower in (-most, -1, 0, 1, most):
        for upper in (-most, -1, 0, 1, most):
            found = joined(np.array([[lower], [upper]], dtype=np.float64))
            assert found.tolist() == [((upper << HALF_BITS) + lower) % MODULUS]


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 40))
def test_signed_mixes_of_polynomials_equal_python_integers(seed: int, count: int) -> None:
    residues = uniform(seed, count)[:, :64]
    weights = np.random.default_rng(seed).integers(-1, 2, (3, count))
    found = joined(weights.astype(np.float64) @ halves(residues))
    exact = weights.astype(object) @ residues.astype(object) % MODULUS
    assert np.array_equal(found.astype(object), exact)


def test_any_numbers_are_reduced() -> None:
    multiples = [factor * MODULUS + offset for factor in (1, 2, 255) for offset in (-1, 0, 1)]
    numbers = [0, 1, *multiples, 256 * MODULUS - 1, 2**63, 2**64 - 1]
    found = reduced(np.array(numbers, dtype=np.uint64))
    assert found.dtype == np.uint64
    assert found.tolist() == [number % MODULUS for number in numbers]
    drawn = np.random.default_rng(1).integers(0, 2**64, (3, 1000), dtype=np.uint64)
    assert np.array_equal(reduced(drawn).astype(object), drawn.astype(object) % MODULUS)
