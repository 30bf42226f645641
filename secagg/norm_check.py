"""The key holder's side of the norm check: open a sketch's few values and compare their energy.

One bit leaves. The estimate itself is a statistic of somebody's update and is never told.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from secagg.direction import SIGN_EFFICIENCY
from secagg.packing import balanced_digits
from secagg.parameters import MODULUS, RING_DEGREE, FloatSegment, Layout, NormCheck, Plan
from secagg.residues import halves, joined
from secagg.ring import centre
from secagg.sketch_shape import (
    NormShape,
    ProbeShape,
    direction_shape,
    honest_norm,
    noise_energy,
    noise_spread,
    norm_shapes,
    probe_noise_energy,
    weight_shapes,
)
from secagg.sketches import Rows, Sketch

__all__ = ["passes"]

# How far an honest weight may be underestimated, and noise overestimated, in standard deviations.
_WEIGHT_SIGMAS = 5.0
_NOISE_SIGMAS = 6.0


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
    shapes = norm_shapes(plan)
    energies = {
        shape.segment: _energy(plan.upload_layouts[shape.segment], rows, key)
        for shape, rows in zip(shapes, sketch.norms, strict=True)
    }
    weights = {
        shape.segment: (shape, rows)
        for shape, rows in zip(weight_shapes(plan), sketch.weights, strict=True)
    }
    # All of them, always: how long it takes must not tell which one it was.
    findings = [
        energies[shape.segment]
        <= _allowed(plan, check, shape, energies[shape.segment], weights.get(shape.segment), key)
        for shape in shapes
    ]
    findings.append(_agrees(plan, check, key, sketch, energies))
    return all(findings)


def _allowed(
    plan: Plan,
    check: NormCheck,
    shape: NormShape,
    energy: float,
    weight: tuple[ProbeShape, Rows] | None,
    key: NDArray[np.int64],
) -> float:
    """The largest estimate that is accepted of a segment's squared norm.

    A weighted update may be as long as the weight that it carries allows, and that weight lies
    between 0 and 1: it cannot claim little and push much, or push backwards by a negative weight.
    """
    layout = plan.upload_layouts[shape.segment]
    bound = layout.norm
    if weight is not None and isinstance(segment := plan.segments[shape.segment], FloatSegment):
        measured, spread = _component(layout, *weight, key, energy)
        claimed = (measured + _WEIGHT_SIGMAS * spread) * segment.step / segment.clip
        bound = honest_norm(segment, min(max(claimed, 0.0), 1.0))
    return (1 + check.margin) ** 2 * bound**2 + _NOISE_SIGMAS * noise_spread(layout, shape)


def _component(
    layout: Layout, shape: ProbeShape, rows: Rows, key: NDArray[np.int64], energy: float
) -> tuple[float, float]:
    """How far a segment's integers reach in a probe's direction, with its standard deviation.

    In quantisation steps, if all coordinates of the direction are of one size.
    """
    scale = math.sqrt(layout.values) / shape.coordinates
    noise = shape.rows * probe_noise_energy(layout, shape)
    sampling = shape.coordinates * max(energy, 0.0) / layout.values
    return scale * _probed(layout, shape, rows, key), scale * math.sqrt(sampling + noise)


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
    layout: Layout, shape: ProbeShape, rows: Rows, key: NDArray[np.int64], energy: float
) -> float:
    """An estimate of the cosine between an update and the direction of the signs."""
    reach, _ = _component(layout, shape, rows, key, energy)
    return reach / (SIGN_EFFICIENCY * math.sqrt(max(energy, 1.0)))


def _probed(layout: Layout, shape: ProbeShape, rows: Rows, key: NDArray[np.int64]) -> int:
    """The sum of all coordinates that a probe's rows look at, each with its sign."""
    digits = _digits(layout, rows, key)[:, :, 0]
    return sum(int(digits[row, row % shape.digits]) for row in range(shape.rows))


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
