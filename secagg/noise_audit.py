"""The noise audit: show the key holder an upload's noise under a mask over its values.

One upload that is off the grid makes a whole sum refuse to open, and a refusal says no more. To
find it, the server adds a random multiple of the grid to every coefficient of each upload and sends
the result to the key holder, who opens it: the values drown in the mask, the noise remains.

It remains even where the masked value wraps, because q is 1 modulo 2**24: in centred form, a mask
from [0, q / 2**shift) makes a coefficient wrap downwards at most once, which takes exactly one from
its noise. Honest errors lie in [-21, 21], so what an audit sees of them lies in [-22, 21].

A wrap also tells whoever knows the errors, as the key holder does, that the value lies beyond the
opened one: for honest values with a probability below 1 / (4 max_clients) a coefficient.

Noise is all an audit can judge. It cannot see a value beyond the planned range, nor many clients
whose errors within the limit all push one way; see docs/cipher.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from secagg import ring
from secagg.errors import InputError
from secagg.parameters import CHUNK_BLOCKS, MODULUS, RING_DEGREE, Plan
from secagg.sampling import CBD_BITS, Stream, uniform_polynomials

__all__ = ["LIMIT", "masked", "off_grid"]

LIMIT = CBD_BITS + 1
"""Noise from -22 to 21 passes, anything else is named: errors up to 21, less one for a wrap."""

_Q = np.uint64(MODULUS)


def masked(
    plan: Plan, residues: NDArray[np.uint64], randomness: Stream | None = None
) -> NDArray[np.uint64]:
    """An upload under a fresh random multiple of the grid in every coefficient.

    Args:
        plan: what the upload consists of.
        residues: uint64 of shape (plan.blocks, 4096): one upload's ciphertexts, below q.
        randomness: source of the mask; the operating system when omitted. Whoever knows the mask
            and opens the result reads the values: a seeded stream is for tests only.

    Returns:
        uint64 of the same shape, below q. Mask an upload once: with every further copy, wraps tell
        the key holder more of its values.

    Raises:
        InputError: another shape or type, or a residue of q or more.
    """
    _check(plan, residues, np.dtype(np.uint64))
    if residues.max() >= _Q:
        raise InputError(f"expected residues below q={MODULUS}; one is not; use `residues.widen`")
    stream = Stream.from_os() if randomness is None else randomness
    out = np.empty_like(residues)
    for shift, part in _parts(plan):
        mask = ring.to_ntt(_multiples(stream, shift, part.stop - part.start))
        np.remainder(residues[part] + mask, _Q, out=out[part])
    return out


def off_grid(plan: Plan, opened: NDArray[np.int64]) -> bool:
    """Whether some coefficient of an opened, masked upload carries noise no honest client adds.

    Named for certain: a coefficient 23 or more off its grid, for any value of the client's
    choosing. Never named: an honest upload. At 22 it depends on the mask.

    Args:
        plan: what the upload consists of.
        opened: int64 of shape (plan.blocks, 4096), centred modulo q; see `ckks.decrypt`.

    Raises:
        InputError: another shape or type.
    """
    _check(plan, opened, np.dtype(np.int64))
    return any(_beyond(opened[part], shift) for shift, part in _parts(plan))


def _beyond(coefficients: NDArray[np.int64], shift: int) -> bool:
    half = 1 << (shift - 1)
    noise = ((coefficients + half) & ((1 << shift) - 1)) - half
    return bool(noise.min() < -LIMIT or noise.max() >= LIMIT)


def _multiples(stream: Stream, shift: int, blocks: int) -> NDArray[np.int64]:
    """Uniform multiples of 2**shift in [0, q - 1): what a wrap leaves of the grid modulo q."""
    drawn = uniform_polynomials(stream, blocks).astype(np.int64)
    # q - 1 is a multiple of the grid itself, and would be a second zero after the wrap.
    drawn[drawn == MODULUS - 1] = 0
    return (drawn >> shift) << shift


def _parts(plan: Plan) -> Iterator[tuple[int, slice]]:
    """Each layout's shift with slices of its blocks, short enough that copies stay small."""
    for _, layout, blocks in plan.block_ranges():
        for start in range(blocks.start, blocks.stop, CHUNK_BLOCKS):
            yield layout.shift, slice(start, min(start + CHUNK_BLOCKS, blocks.stop))


def _check(plan: Plan, array: NDArray[np.generic], dtype: np.dtype[np.generic]) -> None:
    expected = (plan.blocks, RING_DEGREE)
    if array.shape != expected or array.dtype != dtype:
        raise InputError(
            f"expected {dtype} of shape={expected}; got dtype={array.dtype}, shape={array.shape}; "
            "audit an upload under the plan of its own round"
        )
