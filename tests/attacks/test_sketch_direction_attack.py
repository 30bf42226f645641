"""What a key holder learns of an update's direction: its cosine, where a plan asks for that.

With the direction check on it is meant to see the cosine to the last aggregate, and does. With the
check off it holds the aggregate and what the norm rows show, and has nothing to compare: their
multipliers are as likely as their opposites, and know no direction.
"""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
from attacker import Integers, named
from sketch_views import encrypted, fixed_context, multiplied, opened, public

from secagg.direction import Direction
from secagg.norm_check import _cosine, _energy
from secagg.onetime import secret
from secagg.parameters import MODULUS, RING_DEGREE, FloatSegment, NormCheck
from secagg.planner import plan_tensors
from secagg.quantize import rotated
from secagg.sketch_shape import direction_shape, sketch_bytes
from secagg.sketches import Sketch, sketch

SIZE = 6 * RING_DEGREE
OFF, ON = (
    plan_tensors(SIZE, max_clients=8, clip=1.0, norm_check=NormCheck(min_cosine=asked))
    for asked in (None, -0.2)
)
CONTEXT = fixed_context(ON)
SEED, UPLOAD = named("seed"), named("upload")
COSINES = np.linspace(-0.9, 0.9, 13)


def units(count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    drawn = np.random.default_rng(1).normal(size=(count, SIZE))
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


AGGREGATE, *REST = units(1 + COSINES.size)
DIRECTION = Direction.of(ON.segments[0], AGGREGATE.astype(np.float32), CONTEXT.rotation)  # type: ignore[arg-type]


def integers(vector: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Integers:
    (segment,) = ON.segments
    assert isinstance(segment, FloatSegment)
    steps = rotated(segment, vector.astype(np.float32), CONTEXT.rotation) / segment.step
    return np.rint(np.clip(steps, -segment.max_abs, segment.max_abs)).astype(np.int64)


def seen(number: int, cosine: float, *, on: bool) -> Sketch:
    """The sketch of an update with this cosine to the aggregate, at the bound."""
    aside = REST[number] - REST[number] @ AGGREGATE * AGGREGATE
    aside /= np.linalg.norm(aside)
    values = integers(cosine * AGGREGATE + sqrt(1 - cosine**2) * aside)
    context = CONTEXT if on else fixed_context(OFF)
    ciphertexts = encrypted(context, [values], SEED)
    return sketch(context, UPLOAD, [ciphertexts], named("challenge", number), DIRECTION)


def test_with_the_check_the_key_holder_sees_the_cosine() -> None:
    shape, (layout,) = direction_shape(ON), ON.layouts
    assert shape is not None
    for number, cosine in enumerate(COSINES):
        shows = seen(number, cosine, on=True)
        assert shows.direction is not None
        energy = _energy(layout, shows.norms[0], secret(SEED))
        estimate = _cosine(layout, shape, shows.direction, secret(SEED), energy)
        assert estimate == pytest.approx(cosine, abs=0.12)


def test_without_it_nothing_that_is_shown_follows_the_cosine() -> None:
    means, (layout,) = [], OFF.layouts
    for number, cosine in enumerate(COSINES):
        shows = seen(number, cosine, on=False)
        assert shows.direction is None
        assert len(shows.to_bytes()) == sketch_bytes(OFF, direction=False)
        digits = opened(layout, shows.norms[0], SEED).astype(float)
        means.append((digits / np.sqrt((digits**2).mean())).mean(axis=(1, 2)) * sqrt(48))
    # Of 13 updates with 16 rows each, whose means are one in a million unless they are unit
    # Gaussians: neither they nor their sizes go with the cosine.
    drawn = np.array(means)
    for told in (drawn, np.abs(drawn)):
        cosines = np.repeat(COSINES, 16)
        assert abs(np.corrcoef(cosines, told.reshape(-1))[0, 1]) < 5.3 / sqrt(cosines.size)


def test_of_a_tiny_model_it_can_guess_which_coordinates_were_compared() -> None:
    """Known limit: signs are public, and 16 coordinates are few. It then has exact sums of some.

    A mask hides a multiplier as long as it has thousands of unknown coefficients.
    """
    plan = plan_tensors(16, max_clients=8, clip=1.0, norm_check=NormCheck(min_cosine=-0.2))
    context, (segment,) = fixed_context(plan), plan.segments
    assert isinstance(segment, FloatSegment)
    known = np.random.default_rng(2).normal(size=16).astype(np.float32)
    direction = Direction.of(segment, known, context.rotation)
    assert direction is not None
    ciphertexts = encrypted(context, [np.arange(-8, 8)], SEED)
    rows = sketch(context, UPLOAD, [ciphertexts], named("challenge"), direction).direction
    assert rows is not None
    # The multiplier w_0 - sum_i w_i X**(4096 - i), times a: four coefficients by each w_i.
    monomials = -np.eye(RING_DEGREE, dtype=np.int64)[-np.arange(16) % RING_DEGREE]
    monomials[0] *= -1
    parts = multiplied(monomials, public(context))[:, :4] % MODULUS
    guesses = (np.arange(1 << 16)[:, None] >> np.arange(16) & 1) * direction.signs[:16]
    shift = np.uint64(8 * rows.shape.dropped)
    for row in range(rows.shape.rows):
        mask = (rows.masks[row, :4] << shift).astype(np.int64)
        off = (guesses @ parts - mask + MODULUS // 2) % MODULUS - MODULUS // 2
        assert np.count_nonzero((np.abs(off) < 2 << int(shift)).all(axis=1)) == 1
