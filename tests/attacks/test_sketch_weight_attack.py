"""What a key holder learns from the rows that measure a weight: the weight, to a few percent.

These rows have no random signs of their own: whoever knows the round knows with which sign a
coordinate is looked at. Random is which coordinates are, one in twenty or so.

Broken, one by one: rows with nothing beside those coordinates, of a small model, whose masks give
way to a search for the coordinates; rows that look at nearly all coordinates, which tell candidates
for the update apart.
"""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
from attacker import Integers, Residues, named
from sketch_views import Floats, encrypted, fixed_context, multiplied, opened, public

from secagg import sketches
from secagg.context import RoundContext
from secagg.direction import Direction
from secagg.norm_check import _component, _energy
from secagg.onetime import secret
from secagg.parameters import MODULUS, RING_DEGREE, FloatSegment, NormCheck, Plan
from secagg.planner import plan_tensors
from secagg.quantize import quantize_update
from secagg.sampling import Stream
from secagg.sketch_shape import ProbeShape, probe_noise_energy, sketch_bytes, weight_shapes
from secagg.sketches import Rows, Sketch, sketch

CHECK = NormCheck()
CAP = 100
SEED, UPLOAD = named("seed"), named("upload")


def weighted(parameters: int, clients: int = 8) -> Plan:
    return plan_tensors(
        parameters,
        max_clients=clients,
        clip=1.0,
        weighting="samples",
        weight_cap=CAP,
        norm_check=CHECK,
    )


PLAN = weighted(3 * (RING_DEGREE - 1))
(LAYOUT,) = PLAN.layouts
CONTEXT = fixed_context(PLAN)


def floats(plan: Plan) -> FloatSegment:
    (segment,) = plan.segments
    assert isinstance(segment, FloatSegment)
    return segment


def update(context: RoundContext, samples: int, number: int) -> Integers:
    """An update of the clip norm as a client quantises it, with the weight of so many samples."""
    segment = floats(context.plan)
    vector = np.random.default_rng(number).normal(size=segment.parameters)
    vector /= np.linalg.norm(vector)
    rounding = Stream.derive("rounding", number)
    tensors = {"vector": vector}
    return quantize_update(
        segment, tensors, samples=samples, rotation=context.rotation, randomness=rounding
    ).values


def sketched(context: RoundContext, values: Integers, number: int) -> Sketch:
    ciphertexts = encrypted(context, [values], SEED)
    return sketch(context, UPLOAD, [ciphertexts], named("challenge", number))


# --- the weight -----------------------------------------------------------------------------------


def reading(context: RoundContext, shows: Sketch) -> tuple[float, float]:
    """The weight as the key holder reads it, and how far that may be off (one sigma)."""
    plan, segment, key = context.plan, floats(context.plan), secret(SEED)
    (shape,), (layout,), (rows,) = weight_shapes(plan), plan.layouts, shows.weights
    energy = _energy(layout, shows.norms[0], key)
    measured, spread = _component(layout, shape, rows, key, energy)
    return measured * segment.step / segment.clip, spread * segment.step / segment.clip


@pytest.mark.parametrize(
    ("parameters", "clients", "percent"), [(12_285, 8, 3.1), (27_000, 1_000, 3.1), (31, 3, 9.8)]
)
def test_the_weight_is_seen_to_a_few_percent(parameters: int, clients: int, percent: float) -> None:
    context = fixed_context(weighted(parameters, clients))
    off = []
    for number, samples in enumerate([5, 10, 30, 50, 100] * 2):
        weight = samples / CAP
        read, spread = reading(context, sketched(context, update(context, samples, number), number))
        off.append((read - weight) / spread)
        if samples == CAP:
            assert spread == pytest.approx(percent / 100, rel=0.15)
        # In proportion to the weight, as the update is; and rounding and noise.
        assert spread < 1.15 * percent / 100 * weight + 0.01
    assert np.abs(off).max() < 5.3  # false alarm 2e-6
    assert np.std(off) > 0.2  # nor is it seen much better than that


def test_with_equal_weights_nothing_of_it_is_sent() -> None:
    plan = plan_tensors(3 * RING_DEGREE, max_clients=8, clip=1.0, norm_check=CHECK)
    context = fixed_context(plan)
    one, other = (sketched(context, update(context, samples, 1), 1) for samples in (1, 100))
    assert one.weights == ()
    assert one.to_bytes() == other.to_bytes()
    norms = sum(len(rows.to_bytes()) for rows in one.norms)
    assert len(one.to_bytes()) == norms == sketch_bytes(plan, direction=False)


# --- which coordinates are looked at --------------------------------------------------------------

FEW = 32
SMALL = weighted(FEW - 1, clients=3)


def sums_of_subsets(parts: Integers) -> Residues:
    """Of all subsets of 16 residues: bit i of the index says whether part i is in it."""
    totals = np.zeros(1, dtype=np.uint64)
    for part in parts.astype(np.uint64):
        totals = np.concatenate([totals, (totals + part) % np.uint64(MODULUS)])
    return totals


def guessed(context: RoundContext, signs: Integers, rows: Rows, row: int) -> list[Integers]:
    """Subsets of 32 coordinates whose signs a row's mask may hold: 2**32, met in the middle."""
    # The multiplier w_0 - sum_i w_i X**(4096 - i), times a: its first coefficient by each w_i.
    monomials = -np.eye(RING_DEGREE, dtype=np.int64)[-np.arange(FEW) % RING_DEGREE]
    monomials[0] *= -1
    products = multiplied(monomials * signs[:, None], public(context))[:, :4] % MODULUS
    shift = 8 * rows.shape.dropped
    masks = (rows.masks[row, :4] << np.uint64(shift)).astype(np.int64)
    lower, upper = (sums_of_subsets(half) for half in (products[:16, 0], products[16:, 0]))
    order = np.argsort(upper)
    wanted = (int(masks[0]) - lower.astype(np.int64)) % MODULUS
    first, last = (
        np.searchsorted(upper[order].astype(np.int64), wanted + side * (1 << shift))
        for side in (-1, 1)
    )
    found = []
    for low in np.flatnonzero(last > first):
        for high in order[first[low] : last[low]]:
            subset = (np.array([low, high])[:, None] >> np.arange(16) & 1).reshape(-1)
            off = (subset @ products - masks + MODULUS // 2) % MODULUS - MODULUS // 2
            if (np.abs(off) < 1 << shift).all():
                found.append(subset)
    return found


def unfilled(signs: Integers, shape: ProbeShape, stream: Stream) -> Integers:
    """The coordinates that are looked at, and nothing where there are none."""
    return np.where(signs == 0, 0, thinned(signs, shape, stream))


thinned = sketches._thinned


@pytest.mark.parametrize("filled", [False, True])
def test_coordinates_of_a_small_model_are_found_unless_the_rest_is_filled(
    filled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signs are public and 32 coordinates few: without 4064 random weights beside them, it finds
    which ones are summed up, and has exact sums of some."""
    if not filled:
        monkeypatch.setattr(sketches, "_thinned", unfilled)
    context = fixed_context(SMALL)
    values = update(context, 50, 1)
    (rows,) = sketched(context, values, 1).weights
    (shape,) = weight_shapes(SMALL)
    assert shape.sampled < FEW
    signs = Direction.of_weight(floats(SMALL), context.rotation).signs.astype(np.int64)
    sums = opened(SMALL.layouts[0], rows, SEED)[:, 0, 0]
    for row in range(shape.rows):
        found = guessed(context, signs, rows, row)
        assert len(found) == (0 if filled else 1)
        for subset in found:
            noise = sqrt(probe_noise_energy(SMALL.layouts[0], shape))
            assert abs(subset @ (signs * values) - sums[row]) < 5.3 * noise + 1


# --- what else they tell --------------------------------------------------------------------------


def moments(shape: ProbeShape, values: Integers, row: int) -> tuple[Floats, Floats]:
    """Means and covariances of the digits that a row shows of a candidate, of one full block."""
    parts = values.reshape(LAYOUT.digits, RING_DEGREE).astype(np.float64)
    direction = Direction.of_weight(floats(PLAN), CONTEXT.rotation)
    signs = direction.of_digit(LAYOUT, row % shape.digits)[0]
    kept = shape.sampled / RING_DEGREE
    noise = np.eye(LAYOUT.digits)  # a carry into the next digit, for one
    noise[0, 0] += probe_noise_energy(LAYOUT, shape)
    return kept * parts @ signs, kept * (1 - kept) * parts @ parts.T + noise


def gains(sampled: int | None, samples: int, count: int) -> tuple[float, float, float]:
    """Nats by which the true candidate came out ahead, and by which it should; and the formula.

    The candidates have nothing in common but their norm and weight.
    """
    (shape,) = weight_shapes(PLAN)
    shape = replace(shape, sampled=sampled or shape.sampled)
    got, predicted = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sketches, "weight_shapes", lambda _: [shape])
        for number in range(count):
            one, other = (update(CONTEXT, samples, 2 * number + which) for which in (0, 1))
            digits = opened(LAYOUT, sketched(CONTEXT, one, number).weights[0], SEED)[:, :, 0]
            ahead = 0.0
            for row, seen in enumerate(digits):
                (mean, covariance), (wrong, false) = (
                    moments(shape, values, row) for values in (one, other)
                )
                quotient = np.linalg.solve(false, covariance)
                logs = np.linalg.slogdet(quotient)[1]
                right = (seen - mean) @ np.linalg.solve(covariance, seen - mean)
                left = (seen - wrong) @ np.linalg.solve(false, seen - wrong)
                ahead += (left - right - logs) / 2
                apart = (mean - wrong) @ np.linalg.solve(false, mean - wrong)
                predicted.append((np.trace(quotient) - len(seen) - logs + apart) / 2)
            got.append(ahead)
    kept = shape.sampled / RING_DEGREE
    others = shape.rows * (LAYOUT.digits - 1)
    # Half of the energy is the weight's, and the same in both.
    return float(np.mean(got)), sum(predicted) / count, others * kept / (1 - kept) / 2


def as_predicted(got: float, predicted: float, count: int) -> bool:
    """Of a log-likelihood ratio the variance is twice its mean, or a little more; 1e-7."""
    return abs(got - predicted) < 5.3 * sqrt(3 * predicted / count)


def test_of_nearly_all_coordinates_they_would_tell_candidates_apart() -> None:
    # A small weight, that its sum stays within a digit.
    got, predicted, _ = gains(RING_DEGREE * 19 // 20, 10, 6)
    assert as_predicted(got, predicted, 6)
    assert predicted > 60


def test_of_one_in_twenty_they_tell_little() -> None:
    """In the digit that a row is about, nothing: an update is orthogonal to its weight. The others
    it shows through signs that everybody knows, up to which coordinates are taken."""
    got, predicted, expected = gains(None, CAP, 25)
    assert as_predicted(got, predicted, 25)
    assert predicted == pytest.approx(expected, rel=0.3)
    assert predicted < 0.8


def test_an_update_is_orthogonal_to_its_weight() -> None:
    signs = Direction.of_weight(floats(PLAN), CONTEXT.rotation).signs.astype(np.int64)
    sums = [
        (update(CONTEXT, 50, number) * signs).reshape(-1, RING_DEGREE).sum(axis=1)
        for number in range(4)
    ]
    # In each block, of whatever update, the weight and the rounding of 4096 coordinates.
    weight = 0.5 * floats(PLAN).clip / floats(PLAN).step * sqrt(RING_DEGREE / 3)
    assert np.abs(np.array(sums) - weight).max() < 5.3 * sqrt(RING_DEGREE / 4)
