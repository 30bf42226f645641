"""Integers to polynomial coefficients and back, with the two checks that make a sum trustworthy.

Several integers share one coefficient as balanced digits above a grid (see `Layout`). Unpacking a
sum separates noise from grid and digits from one another, and refuses whatever honest clients
cannot have produced, nor a norm check let through: noise beyond the guard, a digit beyond the
range, a value in a padding slot. Must never report *how far* off a sum was: that is a statistic of
secrets.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from secagg.errors import InputError, ReleaseError
from secagg.parameters import RING_DEGREE, Layout

__all__ = ["balanced_digits", "pack", "unpack"]


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
    slots = np.zeros(layout.blocks * layout.digits * RING_DEGREE, dtype=np.int64)
    slots[: values.size] = values
    digits = slots.reshape(layout.blocks, layout.digits, RING_DEGREE)
    coefficients = digits[:, -1, :].copy()
    for index in reversed(range(layout.digits - 1)):
        coefficients *= layout.base
        coefficients += digits[:, index, :]
    coefficients <<= layout.shift
    return coefficients


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
    grid = (coefficients + (1 << (layout.shift - 1))) >> layout.shift
    if _largest(coefficients - (grid << layout.shift)) > layout.guard:
        raise ReleaseError(
            "expected every coefficient of the sum on the grid; got noise beyond the guard: an "
            "upload is missing, repeated, foreign or damaged; abort and collect the round again"
        )
    values = balanced_digits(layout, grid).reshape(-1)
    most = clients * layout.max_abs + layout.summed_noise(clients) + layout.tolerance
    # Padding counts for the norm check like anything else, and is held to what that may let pass:
    # else one client could stop every round, unnamed, with a single step where no value is.
    if _largest(values) > most or np.abs(values[layout.values :]).max(initial=0) > layout.tolerance:
        raise ReleaseError(
            "expected every summed value within the planned range and padding of zero; got one "
            "beyond: a client did not follow the plan; abort and collect the round again"
        )
    return values[: layout.values]


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


def _largest(values: NDArray[np.int64]) -> int:
    return max(int(values.max()), -int(values.min()))
