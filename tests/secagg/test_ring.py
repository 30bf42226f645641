"""SEAL's NTT, there and back: exact, linear, multiplicative, and nothing left lying about."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from seal_support import dense, evaluations, negacyclic

from secagg import ring
from secagg.parameters import MODULUS

HALF = (MODULUS - 1) // 2
SIZES = [1, 2, 14, 15, 16, 30, 31]
SPARSE = st.dictionaries(
    st.integers(0, 4095), st.integers(-(MODULUS - 1), MODULUS - 1), min_size=1, max_size=6
)
EXTREMES = [0, 1, -1, HALF - 1, HALF, -HALF, 1 - HALF]


def centred(seed: int, blocks: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(-HALF, HALF, (blocks, 4096), endpoint=True)


def uniform(seed: int, blocks: int) -> NDArray[np.uint64]:
    return np.random.default_rng(seed).integers(0, MODULUS, (blocks, 4096), dtype=np.uint64)


def centre(value: int) -> int:
    return (value + HALF) % MODULUS - HALF


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", SIZES)
def test_from_ntt_undoes_to_ntt_for_every_batch_size(blocks: int) -> None:
    polynomials = centred(blocks, blocks)
    polynomials[:, : len(EXTREMES)] = EXTREMES
    residues = ring.to_ntt(polynomials)
    assert residues.dtype == np.uint64
    assert int(residues.max()) < MODULUS
    back = ring.from_ntt(residues)
    assert back.dtype == np.int64
    assert np.array_equal(back, polynomials)


@pytest.mark.parametrize("blocks", SIZES)
def test_to_ntt_undoes_from_ntt_for_every_batch_size(blocks: int) -> None:
    residues = uniform(blocks, blocks)
    residues[:, :3] = [0, 1, MODULUS - 1]
    polynomials = ring.from_ntt(residues)
    assert int(np.abs(polynomials).max()) <= HALF
    assert np.array_equal(ring.to_ntt(polynomials), residues)


@settings(deadline=None, max_examples=20)
@given(blocks=st.integers(0, 40), seed=st.integers(0, 2**32))
def test_each_polynomial_is_transformed_by_itself(blocks: int, seed: int) -> None:
    residues = uniform(seed, blocks)
    together = ring.from_ntt(residues)
    assert together.shape == (blocks, 4096)
    for at in range(0, blocks, 7):
        assert np.array_equal(ring.from_ntt(residues[at : at + 1])[0], together[at])


@pytest.mark.parametrize("value", EXTREMES)
def test_polynomials_of_one_extreme_value_survive(value: int) -> None:
    polynomials = np.full((2, 4096), value, dtype=np.int64)
    assert np.array_equal(ring.from_ntt(ring.to_ntt(polynomials)), polynomials)


@pytest.mark.parametrize("value", [HALF + 1, -HALF - 1, MODULUS - 1, 1 - MODULUS])
def test_magnitudes_from_half_of_q_to_q_come_back_centred(value: int) -> None:
    polynomials = np.full((1, 4096), value, dtype=np.int64)
    assert set(ring.from_ntt(ring.to_ntt(polynomials)).flat) == {centre(value)}


def test_nothing_becomes_nothing() -> None:
    # SEAL refuses an all-zero ciphertext elsewhere; both ways must stay clear of that.
    assert not ring.to_ntt(np.zeros((16, 4096), np.int64)).any()
    assert not ring.from_ntt(np.zeros((16, 4096), np.uint64)).any()


def test_arguments_of_any_stride_are_read_and_never_written() -> None:
    polynomials = centred(3, 6)[::-2, ::-1]
    residues = uniform(3, 6)[::-2, ::-1]
    before = polynomials.copy(), residues.copy()
    polynomials.flags.writeable = residues.flags.writeable = False
    forward, backward = ring.to_ntt(polynomials), ring.from_ntt(residues)
    assert np.array_equal(forward, ring.to_ntt(before[0]))
    assert np.array_equal(backward, ring.from_ntt(before[1]))


# --- against Python integers ----------------------------------------------------------------------


@settings(deadline=None, max_examples=5)
@given(SPARSE)
def test_the_ntt_evaluates_at_the_odd_powers_of_seals_root(polynomial: dict[int, int]) -> None:
    values = evaluations(polynomial)
    assert ring.to_ntt(dense(polynomial))[0].tolist() == values
    expected = [centre(value) for value in dense(polynomial)[0].tolist()]
    assert ring.from_ntt(np.array([values], dtype=np.uint64))[0].tolist() == expected


@settings(deadline=None, max_examples=20)
@given(first=SPARSE, second=SPARSE)
def test_products_of_evaluations_are_negacyclic_products(
    first: dict[int, int], second: dict[int, int]
) -> None:
    pairs = zip(
        ring.to_ntt(dense(first))[0].tolist(), ring.to_ntt(dense(second))[0].tolist(), strict=True
    )
    product = np.array([[a * b % MODULUS for a, b in pairs]], dtype=np.uint64)
    assert ring.from_ntt(product)[0].tolist() == negacyclic(first, second)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32), factor=st.integers(0, 255))
def test_both_ways_are_linear(seed: int, factor: int) -> None:
    first, second = uniform(seed, 2), uniform(seed + 1, 2)
    # 255 residues and one more fit into 64 bits.
    combined = (first * np.uint64(factor) + second) % np.uint64(MODULUS)
    parts = zip(ring.from_ntt(first).flat, ring.from_ntt(second).flat, strict=True)
    expected = [centre(int(a) * factor + int(b)) for a, b in parts]
    opened = ring.from_ntt(combined)
    assert opened.reshape(-1).tolist() == expected
    assert np.array_equal(ring.to_ntt(opened), combined)


@pytest.mark.parametrize("position", [0, 1, 2047, 4095])
def test_one_changed_residue_changes_every_coefficient(position: int) -> None:
    residues = uniform(position, 1)
    changed = residues.copy()
    changed[0, position] = (int(changed[0, position]) + 1) % MODULUS
    assert (ring.from_ntt(residues) != ring.from_ntt(changed)).all()


# --- refusals, and hygiene ------------------------------------------------------------------------


def scratch() -> bytes:
    """What lies in the scratch files, but for the head of what SEAL read last, and for zeros."""
    scratch = ring._SCRATCH
    read = os.pread(scratch.inbox._descriptor, 1 << 20, 0)
    written = os.pread(scratch.outbox._descriptor, 1 << 20, 0)
    return read[ring._HEADER.size + ring._RESIDUES_AT :].strip(b"\0") + written


@pytest.mark.parametrize("value", [MODULUS, MODULUS + 1, (1 << 64) - 1])
def test_residues_of_q_or_more_are_refused_by_seal_and_leave_no_trace(value: int) -> None:
    residues = uniform(1, 2)
    residues[1, 4095] = value
    with pytest.raises(RuntimeError):
        ring.from_ntt(residues)
    assert scratch() == b""


@pytest.mark.parametrize("value", [MODULUS, MODULUS + 1, -MODULUS - 1, 1 << 62, -(1 << 63)])
def test_coefficients_of_magnitude_q_or_more_are_refused_by_seal(value: int) -> None:
    polynomials = centred(1, 1)
    polynomials[0, 0] = value
    with pytest.raises(RuntimeError):
        ring.to_ntt(polynomials)
    assert scratch() == b""


def test_nothing_is_left_in_the_scratch_file() -> None:
    ring.from_ntt(ring.to_ntt(centred(1, 16)))
    assert scratch() == b""


def test_the_ring_knows_no_key() -> None:
    assert not {"encrypt", "decrypt"} & set(dir(ring))
