"""The key holder's side of the norm check: open a sketch's few values and compare their energy.

One bit leaves. The estimate itself is a statistic of somebody's update and is never told.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from secagg.direction import SIGN_EFFICIENCY
from secagg.packing import balanced_digits
from secagg.parameters import MODULUS, RING_DEGREE, Layout, NormCheck, Plan
from secagg.residues import halves, joined
from secagg.ring import centre
from secagg.sketch_shape import DirectionShape, direction_shape, noise_energy, norm_shapes
from secagg.sketches import Rows, Sketch

__all__ = ["passes"]


def passes(plan: Plan, key: NDArray[np.int64], sketch: Sketch) -> bool:
    """Whether a sketch is that of an update within the plan's bounds.

    Each segment is held to its own bound, by one estimate over all its digits: more estimates would
    allow more in all. An update fails by any of its segments, or by its direction.

    Args:
        plan: what the round computes on; has a norm check.
        key: int64 (4096,): the client's one-time key, ternary.
        sketch: of the client's upload.
    """
    check = plan.norm_check
    if check is None:
        raise ValueError("expected a plan with a norm check")
    energies = {
        shape.segment: _energy(plan.layouts[shape.segment], rows, key)
        for shape, rows in zip(norm_shapes(plan), sketch.norms, strict=True)
    }
    # All of them, always: how long it takes must not tell which one it was.
    findings = [
        energy <= (1 + check.margin) ** 2 * plan.layouts[segment].norm ** 2
        for segment, energy in energies.items()
    ]
    findings.append(_agrees(plan, check, key, sketch, energies))
    return all(findings)


def _energy(layout: Layout, rows: Rows, key: NDArray[np.int64]) -> float:
    """An estimate of the squared norm of a segment's integers, in squared quantisation steps.

    Multipliers have coefficients of variance 1, so that each shown value, digit by digit, has the
    squared norm for its mean square.
    """
    digits = _digits(layout, rows, key).astype(np.float64)
    energy = float(np.square(digits).sum(axis=1).mean())
    return energy - noise_energy(layout, rows.shape)


def _agrees(
    plan: Plan,
    check: NormCheck,
    key: NDArray[np.int64],
    sketch: Sketch,
    energies: dict[int, float],
) -> bool:
    """Whether an update's direction is not too far from the known one, if that is asked."""
    shape, rows = direction_shape(plan), sketch.direction
    if shape is None or rows is None or check.min_cosine is None:
        return True
    layout = plan.layouts[shape.segment]
    return _cosine(layout, shape, rows, key, energies[shape.segment]) >= check.min_cosine


def _cosine(
    layout: Layout, shape: DirectionShape, rows: Rows, key: NDArray[np.int64], energy: float
) -> float:
    """An estimate of the cosine between an update and the direction of the signs."""
    digits = _digits(layout, rows, key)[:, :, 0]
    summed = sum(int(digits[row, row % shape.digits]) for row in range(shape.rows))
    spread = math.sqrt(max(energy, 1.0) / layout.values)
    return summed / (shape.rows * shape.sampled * SIGN_EFFICIENCY * spread)


def _digits(layout: Layout, rows: Rows, key: NDArray[np.int64]) -> NDArray[np.int64]:
    """What the shown values hold: int64 (rows, digits, values), in quantisation steps."""
    opened = centre((rows.values + _masked(rows, key)) % np.uint64(MODULUS))
    grid = (opened + (1 << (layout.shift - 1))) >> layout.shift
    return balanced_digits(layout, grid)


def _masked(rows: Rows, key: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The shown coefficients of each mask times the key: uint64 like the values, below q.

    Coefficient k of m s is the inner product of m with the coefficients of s, turned: as few are
    wanted, that is cheaper than a transform. Turned by k, they are one window of a fixed sequence.
    """
    sequence = np.concatenate([key[::-1], -key[::-1]]).astype(np.float64)
    turned = np.lib.stride_tricks.sliding_window_view(sequence, RING_DEGREE)[RING_DEGREE - 1 :: -1]
    products = np.empty((2, *rows.values.shape))
    masks = halves(rows.masks << np.uint64(8 * rows.shape.dropped))
    for row, positions in enumerate(rows.positions):
        products[:, row] = masks[:, row] @ turned[positions].T
    return joined(products)
