"""Integers to polynomial coefficients and back, with the two checks that make a sum trustworthy.

Several integers share one coefficient as balanced digits above a grid (see `Layout`). Unpacking a
sum separates noise from grid and digits from one another, and refuses whatever honest clients
cannot have produced, nor a norm check let through: noise beyond the guard, a digit beyond the
range, a value in a padding slot. Must never report *how far* off a sum was: that is a statistic of
secrets.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from secagg.errors import InputError, ReleaseError
from secagg.parameters import RING_DEGREE, Layout

__all__ = ["balanced_digits", "largest", "pack", "unpack"]

_PASS_BLOCKS = 8


def pack(layout: Layout, values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Place integers into coefficients; linear, so that sums may be packed as well.

    Args:
        values: int64 of shape (layout.values,), magnitudes of at most ``layout.sum_abs``.

    Returns:
        int64 of shape (layout.blocks, 4096), multiples of 2**shift.

    Raises:
        InputError: another number of values.
    """
    if values.shape != (layout.values,):
        raise InputError(
            f"expected {layout.values} integers; got shape={values.shape}; quantise with the "
            "round's plan"
        )
    out = np.empty((layout.blocks, RING_DEGREE), dtype=np.int64)
    for blocks in _passes(layout.blocks):
        coefficients, digits = out[blocks], _digits_of(layout, values, blocks)
        coefficients[...] = digits[:, -1, :]
        for index in reversed(range(layout.digits - 1)):
            coefficients *= layout.base
            coefficients += digits[:, index, :]
        coefficients <<= layout.shift
    return out


def _digits_of(layout: Layout, values: NDArray[np.int64], blocks: slice) -> NDArray[np.int64]:
    """The values that go into these blocks: (blocks, digits, 4096), zero beyond the last one."""
    size = layout.digits * RING_DEGREE
    found = values[blocks.start * size : blocks.stop * size]
    short = (blocks.stop - blocks.start) * size - found.size
    padded = np.pad(found, (0, short)) if short else found
    return padded.reshape(-1, layout.digits, RING_DEGREE)


def unpack(layout: Layout, coefficients: NDArray[np.int64], clients: int) -> NDArray[np.int64]:
    """Recover the exact sum of packed integers from noisy coefficients.

    Args:
        coefficients: int64 of shape (layout.blocks, 4096), centred modulo q.
        clients: how many are in the sum; no value may exceed what so many honest ones can reach
            with their noise, and what the norm check may let through.

    Returns:
        int64 of shape (layout.values,).

    Raises:
        ReleaseError: the coefficients are not a sum of honest uploads under the right keys.
    """
    values = np.empty((layout.blocks, layout.digits, RING_DEGREE), dtype=np.int64)
    noise = 0
    for blocks in _passes(layout.blocks):
        part = coefficients[blocks]
        grid = (part + (1 << (layout.shift - 1))) >> layout.shift
        values[blocks] = balanced_digits(layout, grid)
        grid <<= layout.shift
        noise = max(noise, largest(part - grid))
    if noise > layout.guard:
        raise ReleaseError(
            "expected every coefficient of the sum on the grid; got noise beyond the guard: an "
            "upload is missing, repeated, foreign or damaged; abort and collect the round again"
        )
    slots = values.reshape(-1)
    most = clients * layout.max_abs + layout.summed_noise(clients) + layout.tolerance
    # Padding counts for the norm check like anything else, and is held to what that may let pass:
    # else one client could stop every round, unnamed, with a single step where no value is.
    if largest(slots) > most or largest(slots[layout.values :]) > layout.tolerance:
        raise ReleaseError(
            "expected every summed value within the planned range and padding of zero; got one "
            "beyond: a client did not follow the plan; abort and collect the round again"
        )
    return slots[: layout.values]


def balanced_digits(layout: Layout, grid: NDArray[np.int64]) -> NDArray[np.int64]:
    """Split grid numbers into digits.

    Args:
        grid: int64 of shape (rows, columns), magnitudes below 2**52.

    Returns:
        int64 of shape (rows, layout.digits, columns); all but the last digit within half a base.
    """
    digits = np.empty((grid.shape[0], layout.digits, grid.shape[1]), dtype=np.int64)
    half = layout.base // 2
    for index in range(layout.digits - 1):
        shifted = grid + half
        # Safe because |shifted| < 2**53: the float quotient lies closer to the true one than any
        # integer that is not its floor.
        grid = np.floor(shifted / layout.base).astype(np.int64)
        np.subtract(shifted - half, grid * layout.base, out=digits[:, index, :])
    digits[:, -1, :] = grid
    return digits


def largest(values: NDArray[np.int64]) -> int:
    """The largest magnitude; 0 of nothing."""
    return max(int(values.max(initial=0)), -int(values.min(initial=0)))


def _passes(blocks: int) -> Iterator[slice]:
    """So many blocks at a time as stay in a level-2 cache."""
    return (slice(at, min(at + _PASS_BLOCKS, blocks)) for at in range(0, blocks, _PASS_BLOCKS))
