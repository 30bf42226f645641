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
from sketch_views import encrypted, fixed_context, opened

from secagg.direction import Direction
from secagg.errors import PlanError
from secagg.norm_check import _cosine, _energy
from secagg.onetime import secret
from secagg.parameters import RING_DEGREE, FloatSegment, NormCheck
from secagg.planner import plan_tensors
from secagg.quantize import rotated
from secagg.sketch_shape import SMALLEST_DIRECTION, direction_shape, sketch_bytes
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


def test_small_models_whose_coordinates_could_be_guessed_get_no_such_check() -> None:
    """See test_sketch_weight_attack for how that is done."""
    for parameters in (16, SMALLEST_DIRECTION // 2):
        with pytest.raises(PlanError):
            plan_tensors(parameters, max_clients=8, clip=1.0, norm_check=NormCheck(min_cosine=0.0))
