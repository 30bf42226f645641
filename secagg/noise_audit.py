"""The noise audit: show the key holder an upload's noise, and next to nothing of its values.

One upload that is off the grid makes a whole sum refuse to open, and a refusal says no more. Values
are multiples of the grid 2**s, noise is what lies beside it, so the audit moves the low s bits of
each coefficient only: the server sends those of the ciphertext, the key holder adds those of the
client's mask a_j s, which it can compute, and what is left is the noise.

This works because q is 1 modulo 2**24: a wrap modulo q, of which the low bits know nothing, moves
the noise by exactly one. Whether it has wrapped would tell the key holder on which side of a_j s
the value lies, so the server *dithers*: it takes one from a coefficient c with probability c / q.
What is left to see is, on average, a gentle slope in the value, and lost in the error: see
docs/cipher.md for what it is worth. Who can open the sum knows what all errors add up to, and with
it what all dithers do, so the server *covers* them with a little noise of its own. Errors of honest
clients lie in [-21, 21], hence what an audit sees of them in [-24, 25].

A sum is looked at in the same way before it is handed over. Otherwise a key holder that says a sum
does not open, and names a client, would be given a second sum without that client, and read its
upload off the difference.

Noise is all an audit can judge. It cannot see a value beyond the planned range, nor many clients
whose errors within the limit all push one way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from secagg import ring
from secagg.errors import InputError, MalformedError
from secagg.parameters import CHUNK_BLOCKS, MODULUS, RING_DEGREE, Layout, Plan
from secagg.sampling import CBD_BITS, Stream, uniform_polynomials

__all__ = [
    "HIGHEST",
    "LOWEST",
    "LOW_BYTES",
    "dithered",
    "low_from_bytes",
    "low_to_bytes",
    "off_grid",
    "opens",
]

_COVER = 2  # the server's own noise: four fair bits, less their mean

LOWEST, HIGHEST = -CBD_BITS - 1 - _COVER, CBD_BITS + 2 + _COVER
"""Noise in between passes: an honest error, less one for the dither, up to two wraps, the cover."""

LOW_BYTES = 4
"""Bytes of one coefficient's low bits on the wire."""


def dithered(
    plan: Plan, residues: NDArray[np.uint64], randomness: Stream | None = None
) -> NDArray[np.uint32]:
    """The low bits of an upload's coefficients, at most 24 of 56, dithered and covered.

    Args:
        plan: what the upload consists of.
        residues: uint64 of shape (plan.blocks, 4096): one upload's ciphertexts, below q; or
            (plan.sum_blocks, 4096): a sum's.
        randomness: source of dither and cover; the operating system when omitted. Otherwise a
            stream keyed by it for this very upload, so that an audit can be repeated.

    Returns:
        uint32 of the same shape, each below its layout's 2**shift. Once an upload: further copies
        with dithers of their own tell more.

    Raises:
        InputError: another shape or type, or a residue of q or more.
    """
    _check(residues, (plan.blocks, plan.sum_blocks), np.dtype(np.uint64))
    if residues.max() >= MODULUS:
        raise InputError(f"expected residues below q={MODULUS}; one is not; use `residues.widen`")
    stream = Stream.from_os() if randomness is None else randomness
    low = np.empty(residues.shape, dtype=np.uint32)
    for shift, part in _parts(plan, residues.shape[0]):
        coefficients = _lifted(ring.from_ntt(residues[part]))
        taken = uniform_polynomials(stream, len(coefficients)) < coefficients
        moved = coefficients - taken + _cover(stream, len(coefficients))
        low[part] = moved & np.uint64((1 << shift) - 1)
    return low


def _cover(stream: Stream, blocks: int) -> NDArray[np.uint64]:
    """Binomial noise of variance 1 in [-2, 2]; negative numbers modulo 2**64."""
    octets = np.frombuffer(stream.read(blocks * RING_DEGREE), dtype=np.uint8)
    bits = np.bitwise_count(octets & np.uint8((1 << 2 * _COVER) - 1))
    noise: NDArray[np.uint64] = bits.astype(np.uint64) - np.uint64(_COVER)
    return noise.reshape(blocks, RING_DEGREE)


def off_grid(plan: Plan, low: NDArray[np.uint32], masks: NDArray[np.int64]) -> bool:
    """Whether some coefficient of an upload carries noise that no honest client adds.

    Never named: an honest upload. Named for certain: an error of 29 or more on any coefficient,
    whatever value it sits on. In between it depends on the dither and the cover.

    Args:
        plan: what the upload consists of.
        low: see :func:`dithered`.
        masks: int64 (plan.blocks, 4096), centred modulo q: a_j s of this client in coefficients.

    Raises:
        InputError: another shape or type.
    """
    return _beyond(plan, plan.blocks, low, masks, lambda _: 0)


def opens(plan: Plan, low: NDArray[np.uint32], masks: NDArray[np.int64]) -> bool:
    """Whether a sum's noise stays within the guard, as far as its low bits show.

    They show more than they can hide: an honest sum always passes, and one whose noise leaves the
    guard by 8 or more never does, unless the guard fills its grid to less than that.

    Args:
        plan: what was summed.
        low: of the sum; see :func:`dithered`.
        masks: int64 (plan.sum_blocks, 4096), centred modulo q: a_j S for the sum S of the keys.

    Raises:
        InputError: another shape or type.
    """
    return not _beyond(plan, plan.sum_blocks, low, masks, lambda layout: layout.guard - CBD_BITS)


def _beyond(
    plan: Plan,
    count: int,
    low: NDArray[np.uint32],
    masks: NDArray[np.int64],
    allowance: Callable[[Layout], int],
) -> bool:
    """Whether some noise lies beyond an honest upload's, and what its layout allows on top."""
    _check(low, (count,), np.dtype(np.uint32))
    _check(masks, (count,), np.dtype(np.int64))
    for layout, blocks in _ranges(plan, count):
        more, half = allowance(layout), 1 << (layout.shift - 1)
        for part in _slices(blocks):
            seen = (low[part] + _lifted(masks[part])) & np.uint64(2 * half - 1)
            noise = seen.astype(np.int64)
            noise[noise >= half] -= 2 * half
            if noise.min() < LOWEST - more or noise.max() > HIGHEST + more:
                return True
    return False


def low_to_bytes(low: NDArray[np.uint32]) -> bytes:
    """Low bits on the wire: four bytes each, little endian, in C order."""
    return np.ascontiguousarray(low, dtype="<u4").tobytes()


def low_from_bytes(
    plan: Plan, data: bytes | bytearray, *, of_sum: bool = False
) -> NDArray[np.uint32]:
    """Low bits from untrusted bytes.

    Args:
        of_sum: whether they are a sum's; otherwise an upload's.

    Raises:
        MalformedError: not exactly the plan's size, or a number that its layout's grid rules out.
    """
    count = plan.sum_blocks if of_sum else plan.blocks
    expected = count * RING_DEGREE * LOW_BYTES
    if len(data) != expected:
        raise MalformedError(f"expected low bits of {expected} bytes; got bytes={len(data)}")
    low = np.frombuffer(bytes(data), dtype="<u4").astype(np.uint32).reshape(-1, RING_DEGREE)
    if any(low[part].max() >> shift for shift, part in _parts(plan, count)):
        raise MalformedError("expected low bits below the grid; one is not; send them as dithered")
    return low


def _lifted(centred: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Centred coefficients as residues in [0, q)."""
    return np.where(centred < 0, centred + MODULUS, centred).astype(np.uint64)


def _ranges(plan: Plan, count: int) -> Iterator[tuple[Layout, slice]]:
    """Each layout with its blocks, of an upload or, without the noises, of a sum."""
    for layout, blocks in plan.upload_ranges():
        if blocks.start < count:
            yield layout, blocks


def _parts(plan: Plan, count: int) -> Iterator[tuple[int, slice]]:
    """Each layout's shift with slices of its blocks."""
    for layout, blocks in _ranges(plan, count):
        for part in _slices(blocks):
            yield layout.shift, part


def _slices(blocks: slice) -> Iterator[slice]:
    """Short enough that copies stay small."""
    for start in range(blocks.start, blocks.stop, CHUNK_BLOCKS):
        yield slice(start, min(start + CHUNK_BLOCKS, blocks.stop))


def _check(
    array: NDArray[np.generic], counts: tuple[int, ...], dtype: np.dtype[np.generic]
) -> None:
    if array.shape not in [(count, RING_DEGREE) for count in counts] or array.dtype != dtype:
        raise InputError(
            f"expected {dtype} of shape={(counts[0], RING_DEGREE)}; got dtype={array.dtype}, "
            f"shape={array.shape}; audit an upload under the plan of its own round"
        )
