"""What a key holder sees of one upload in its sketch, and what can be made of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from attacker import Integers, Residues, coefficients, key_of, named
from numpy.typing import NDArray

from secagg import ckks, onetime, ring
from secagg.context import RoundContext
from secagg.keyholder import KeyHolder
from secagg.norm_check import _digits
from secagg.parameters import MODULUS, RING_DEGREE, Layout, Plan
from secagg.residues import multiply
from secagg.sampling import Stream
from secagg.sealing import RoundKeyPair
from secagg.sketch_shape import NormShape, Shape, norm_shapes
from secagg.sketches import Rows, _NormLook, sketch

__all__ = [
    "Floats",
    "divided",
    "encrypted",
    "fixed_context",
    "likelihoods",
    "multiplied",
    "multipliers",
    "nats",
    "opened",
    "public",
    "reordered",
    "shown",
    "turned",
]

Floats = NDArray[np.float64]


def fixed_context(plan: Plan) -> RoundContext:
    """A round whose every byte is the same in every run."""
    private = b"".join(named("round key", part) for part in range(3))
    return KeyHolder(plan, pair=RoundKeyPair.from_bytes(private)).context


def encrypted(context: RoundContext, parts: Sequence[Integers], seed: bytes) -> Residues:
    """The ciphertexts of these integers, one array a segment, under the key of a seed."""
    noise = onetime.errors(named("errors", seed.hex()), context.plan.blocks)
    plaintext = coefficients(context.plan, parts) + noise
    return ckks.encrypt(plaintext, context.public_polynomials(), key_of([seed]))


def shown(
    context: RoundContext,
    ciphertexts: Residues,
    challenge: bytes,
    upload: bytes,
    shape: Shape | None = None,
) -> tuple[Rows, ...]:
    """The norm rows of each segment that is checked; of another shape, if given, in all of them."""
    with pytest.MonkeyPatch.context() as patch:
        if shape is not None:
            changed = [
                NormShape(shape.rows, shape.values, shape.dropped, each.segment)
                for each in norm_shapes(context.plan)
            ]
            patch.setattr("secagg.sketches.norm_shapes", lambda _: changed)
        return sketch(context, upload, [ciphertexts], challenge).norms


def opened(layout: Layout, rows: Rows, seed: bytes) -> Integers:
    """What the key holder reads: int64 (rows, digits, values), in quantisation steps."""
    return _digits(layout, rows, onetime.secret(seed))


def multipliers(
    plan: Plan, challenge: bytes, upload: bytes, shape: Shape | None = None
) -> Integers:
    """r_ij of whoever knows the challenge, of a plan of one segment: int64 (rows, blocks, 4096)."""
    shape = shape or norm_shapes(plan)[0]
    blocks = plan.layouts[0].blocks
    look = _NormLook(shape, slice(0, blocks), Stream.derive("sketch", challenge, upload, 0))
    blinds = look._blinds.reshape(shape.rows, -1, 1, RING_DEGREE)
    mixes = look._mixes.reshape(shape.rows, blinds.shape[1], 2, blocks, 1).astype(np.int64)
    mixed = mixes[:, :, 0] * blinds + mixes[:, :, 1] * turned(blinds)
    out: Integers = mixed.sum(axis=1)
    return out


def turned(polynomials: Integers, by: int = RING_DEGREE // 2) -> Integers:
    """Polynomials times X**by, by at most 4096."""
    kept = RING_DEGREE - by
    return np.concatenate([-polynomials[..., kept:], polynomials[..., :kept]], axis=-1)


def divided(numerators: Integers, denominator: Integers) -> Integers:
    """Polynomials (count, 4096) by one (4096,), modulo q: centred coefficients."""
    below = ring.to_ntt(denominator[None])[0]
    inverse = np.array([pow(int(each), MODULUS - 2, MODULUS) for each in below], dtype=np.uint64)
    return _coefficients(multiply(ring.to_ntt(numerators), inverse))


def multiplied(ones: Integers, others: Integers) -> Integers:
    """Products of polynomials modulo q, shapes that broadcast: centred coefficients."""
    first, second = (ring.to_ntt(np.atleast_2d(each)) for each in (ones, others))
    return _coefficients(multiply(first, second))


def public(context: RoundContext) -> Integers:
    """The round's public polynomials, in coefficients: (blocks, 4096)."""
    return _coefficients(np.asarray(context.public_polynomials()))


def _coefficients(transformed: Residues) -> Integers:
    out: Integers = ring.centre(ring.lift(ring.from_ntt(transformed)))
    return out


# --- what candidates predict ----------------------------------------------------------------------


def reordered(layout: Layout, values: Integers, number: int) -> Integers:
    """The same integers in another order within each digit of each block.

    So every norm that there is stays what it was: of a digit, of a block, of everything.
    """
    drawn = np.random.default_rng(number)
    out = values.copy()
    for start in range(0, values.size, RING_DEGREE):
        out[start : start + RING_DEGREE] = drawn.permutation(out[start : start + RING_DEGREE])
    return out


def _covariances(layout: Layout, values: Integers) -> Floats:
    """Of two digits at a distance: (digits, digits, 8192), for multipliers of variance 1."""
    slots = np.zeros(layout.blocks * layout.digits * RING_DEGREE)
    slots[: values.size] = values
    blocks = slots.reshape(layout.blocks, layout.digits, RING_DEGREE)
    spectrum = np.fft.rfft(np.concatenate([blocks, -blocks], axis=2))
    products = np.einsum("jdf,jef->def", spectrum, spectrum.conj())
    out: Floats = np.fft.irfft(products, 2 * RING_DEGREE) / 2
    return out


def _by_row(layout: Layout, values: Integers, positions: NDArray[np.uint16]) -> Floats:
    """Covariance matrices of what is shown: (rows, shown, shown), digit by digit."""
    lags = _covariances(layout, values)
    # A digit that holds nothing says nothing, and tells nobody apart.
    used = np.flatnonzero(lags[:, :, 0].diagonal())
    lags = lags[np.ix_(used, used)]
    places = positions.astype(np.intp)
    apart = (places[:, :, None] - places[:, None, :]) % (2 * RING_DEGREE)
    matrices = lags[:, :, apart].transpose(2, 0, 3, 1, 4)
    size = used.size * places.shape[1]
    return matrices.reshape(len(places), size, size) + 0.1 * np.eye(size)


def nats(layout: Layout, one: Integers, other: Integers, positions: NDArray[np.uint16]) -> float:
    """Kullback-Leibler divergence of what is shown of two updates at these positions."""
    first, second = (_by_row(layout, values, positions) for values in (one, other))
    quotient = np.linalg.solve(second, first)
    logs = np.linalg.slogdet(quotient)[1]
    traces = np.trace(quotient, axis1=1, axis2=2)
    return float((traces - logs - first.shape[1]).sum() / 2)


def likelihoods(layout: Layout, values: Integers, rows: Rows, digits: Integers) -> Floats:
    """Log-likelihood of each row for one candidate, up to a constant that all candidates share."""
    matrices = _by_row(layout, values, rows.positions)
    size = matrices.shape[1] // rows.shape.values
    seen = digits[:, :size].reshape(len(digits), -1, 1).astype(np.float64)
    quadratic = (seen * np.linalg.solve(matrices, seen)).sum(axis=(1, 2))
    return -(np.linalg.slogdet(matrices)[1] + quadratic) / 2
