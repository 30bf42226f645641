"""A key holder that looks for more in a sketch than a norm.

It holds the client's key, so it opens every value that a sketch shows: inner products of the update
with multipliers that it does not know. Those have the update's norm for their spread. What is left
is how they hang together: two values of one row, k coefficients apart, correlate as the update does
with itself turned by k, and whoever has two candidates for the *whole* update can ask which of them
fits better. Over p values, correlations are of the order of 1/sqrt(p), and a few values are few
pairs.

Broken: all 4096 coefficients of a row, which is what a product of ciphertexts has; and as many
values as ours, all of one row. Both tell candidates apart.

The last tests are what remains in ours, in nats: the mean of the logarithm by which one candidate
becomes more likely than the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt
from typing import Any

import numpy as np
import pytest
from attacker import Integers, named
from scipy import stats
from sketch_views import (
    Floats,
    encrypted,
    fixed_context,
    likelihoods,
    multipliers,
    nats,
    opened,
    reordered,
    shown,
)

from secagg import quantize
from secagg.errors import PlanError
from secagg.parameters import (
    RING_DEGREE,
    FloatSegment,
    IntegerSegment,
    NormCheck,
    Plan,
    Segment,
    TensorSpec,
)
from secagg.planner import make_plan, plan_integers, plan_tensors
from secagg.quantize import rotated
from secagg.sketch_shape import Shape, noise_energy, norm_shapes
from secagg.sketches import Rows, Sketch, sketch

CHECK = NormCheck()
PLAN = plan_tensors(3 * RING_DEGREE, max_clients=8, clip=1.0, norm_check=CHECK)
(LAYOUT,) = PLAN.layouts
CONTEXT = fixed_context(PLAN)
SEED, UPLOAD = named("seed"), named("upload")

# Two updates of one norm, in each digit and all together, that have nothing else in common.
ONE = np.rint(np.random.default_rng(1).normal(0, 32, LAYOUT.values)).astype(np.int64)
OTHER = reordered(LAYOUT, ONE, 2)

FALSE_ALARM = 5.3  # standard deviations: 1e-7


def views(
    values: Integers, count: int, shape: Shape | None = None
) -> Iterator[tuple[Rows, Integers]]:
    """Sketches of one update under so many challenges: what they show, and what that says."""
    ciphertexts = encrypted(CONTEXT, [values], SEED)
    for number in range(count):
        (rows,) = shown(CONTEXT, ciphertexts, named("challenge", number), UPLOAD, shape)
        yield rows, opened(LAYOUT, rows, SEED)


def test_the_blocks_fill_all_digits() -> None:
    assert (LAYOUT.blocks, LAYOUT.digits) == (1, 3)


# --- broken: too many values of one row -----------------------------------------------------------


def spectral(values: Integers, seen: Integers) -> float:
    """Log-likelihood of all coefficients of a row of one block.

    A product of polynomials is one of complex numbers at each root of X**4096 + 1.
    """
    roots = np.exp(-1j * np.pi * np.arange(RING_DEGREE) / RING_DEGREE)
    power, got = (np.abs(np.fft.fft(each * roots)) ** 2 for each in (values, seen))
    return float(-(np.log(power) + got / (power * RING_DEGREE)).sum() / 2)


def test_all_coefficients_of_a_row_tell_candidates_apart() -> None:
    shape = Shape(1, RING_DEGREE, 1)
    one, other = (values[:RING_DEGREE] for values in (ONE, OTHER))
    for true, false, values in ((one, other, ONE), (other, one, OTHER)):
        for _, digits in views(values, 12, shape):
            first = digits[0, 0]  # of the digits, and that is plenty
            # 24 times right, and never by a little.
            assert spectral(true, first) > spectral(false, first) + 100


def gains(count: int, shape: Shape | None = None) -> tuple[float, float]:
    """Nats by which the true candidate came out more likely, and by which it should have; means."""
    got, predicted = [], []
    for rows, digits in views(ONE, count, shape):
        one, other = (likelihoods(LAYOUT, v, rows, digits) for v in (ONE, OTHER))
        got.append(float((one - other).sum()))
        predicted.append(nats(LAYOUT, ONE, OTHER, rows.positions))
    return float(np.mean(got)), float(np.mean(predicted))


def as_predicted(got: float, predicted: float, count: int) -> bool:
    """Of a log-likelihood ratio the variance is twice its mean, or a little more."""
    return abs(got - predicted) < FALSE_ALARM * sqrt(3 * predicted / count)


def test_as_many_values_as_ours_but_of_one_row_tell_them_apart() -> None:
    ours = norm_shapes(PLAN)[0]
    got, predicted = gains(6, Shape(1, ours.rows * ours.values, 1))
    assert as_predicted(got, predicted, 6)
    assert predicted > 60


# --- ours -----------------------------------------------------------------------------------------


def test_ours_tells_as_little_as_predicted() -> None:
    got, predicted = gains(40)
    assert as_predicted(got, predicted, 40)
    assert predicted == pytest.approx(bound(PLAN), rel=0.15)
    assert predicted < 5


def test_a_value_has_the_norm_for_its_spread_and_no_other_parameter() -> None:
    """One value of each row, of an update at random and of one where all integers are as large."""
    even = np.where(ONE < 0, -32, 32)
    for values in (ONE, even):
        held = np.concatenate([digits[:, 0, 3] for _, digits in views(values, 40)])
        spread = np.linalg.norm(values[:RING_DEGREE])
        assert stats.kstest(held / spread, "norm").pvalue > 1e-7
        assert stats.kstest(held / spread / 1.6, "norm").pvalue < 1e-7


def test_rows_of_one_sketch_have_nothing_in_common() -> None:
    drawn = multipliers(PLAN, named("challenge"), UPLOAD).reshape(16, -1)
    apart = np.corrcoef(drawn)[~np.eye(16, dtype=bool)]
    assert np.abs(apart).max() < 6 / sqrt(RING_DEGREE)


def test_an_update_and_its_opposite_look_alike() -> None:
    """Multipliers are as likely as their opposites: not even all coefficients tell a sign."""
    for (_, one), (_, other) in zip(views(ONE, 2), views(-ONE, 2), strict=True):
        # Up to the noise, which is the same while values are not.
        assert np.abs(one + other).max() < LAYOUT.norm / 10


# --- what remains ---------------------------------------------------------------------------------


def bound(plan: Plan) -> float:
    """Nats between two updates that have nothing in common, of a sketch of one dense segment.

    One half of the square of a difference of correlations a pair; 2 / 4096 / blocks is its mean.
    """
    assert plan.norm_check is not None
    (layout,), (shape,) = plan.layouts, norm_shapes(plan)
    pairs = shape.rows * (shape.values * layout.digits) ** 2 / 2
    return pairs / (RING_DEGREE * layout.blocks)


def positions_of(plan: Plan) -> np.ndarray[tuple[int, ...], np.dtype[np.uint16]]:
    (shape,) = norm_shapes(plan)
    width = RING_DEGREE // shape.values
    drawn = np.random.default_rng(3).integers(0, width, (shape.rows, shape.values))
    return (drawn + np.arange(shape.values) * width).astype(np.uint16)


@pytest.mark.parametrize(
    ("clients", "parameters", "sketches", "expected"),
    [
        (8, 1_000, 16, 1.7),  # one digit, twice the values
        (8, 12_288, 16, 4.5),
        (8, 12_288, 64, 1.1),
        (8, 27_000, 16, 1.8),
        (100, 27_000, 16, 0.57),
        (100, 1_048_576, 16, 0.016),
    ],
)
def test_nats_between_two_updates_by_size_of_the_model(
    clients: int, parameters: int, sketches: int, expected: float
) -> None:
    check = NormCheck(sketches=sketches)
    plan = plan_tensors(parameters, max_clients=clients, clip=1.0, norm_check=check)
    (layout,) = plan.layouts
    drawn = np.random.default_rng(4)
    one = np.rint(drawn.normal(0, 32, layout.values)).astype(np.int64)
    got = nats(layout, one, reordered(layout, one, 5), positions_of(plan))
    assert got == pytest.approx(expected, rel=0.3)


def sparse(size: int, entries: int, number: int) -> Integers:
    drawn = np.random.default_rng(number)
    values = np.zeros(size, dtype=np.int64)
    values[drawn.choice(size, entries, replace=False)] = drawn.choice([-1, 1], entries)
    return values


@pytest.mark.parametrize(("size", "entries"), [(1_000, 10), (4_096, 2), (100_000, 100)])
def test_counts_of_few_items_tell_as_little_as_dense_ones(size: int, entries: int) -> None:
    """Their few correlations are large, and seldom hit: it comes to the same, on average."""
    plan = plan_integers(size, max_clients=100, max_abs=1, max_norm=10, norm_check=CHECK)
    (layout,) = plan.layouts
    positions = positions_of(plan)
    each = []
    for number in range(20):
        one = sparse(size, entries, number)
        each.append(nats(layout, one, reordered(layout, one, number), positions))
    assert np.mean(each) < 2 * bound(plan)


def test_two_items_show_how_far_apart_they_are_where_all_coefficients_are_shown() -> None:
    values = np.zeros(LAYOUT.values, dtype=np.int64)
    values[[100, 1100]] = 1000
    total = np.zeros(RING_DEGREE)
    for _, digits in views(values, 1, Shape(1, RING_DEGREE, 1)):
        row = digits[0, 0].astype(float)
        power = np.abs(np.fft.rfft(np.concatenate([row, -row]))) ** 2
        total += np.fft.irfft(power)[:RING_DEGREE]
    # 64 standard deviations times one half, against the largest of 4096.
    assert 1 + np.argmax(np.abs(total[1:])) in (1000, RING_DEGREE - 1000)


def on_coordinates(plan: Plan, count: int, number: int) -> Integers:
    """An update of so many parameters, as its integers lie in an upload."""
    (segment,) = plan.segments
    assert isinstance(segment, FloatSegment)
    drawn = np.random.default_rng(number)
    vector = np.zeros(segment.parameters, dtype=np.float32)
    vector[drawn.choice(vector.size, count, replace=False)] = segment.clip / sqrt(count)
    steps = rotated(segment, vector, CONTEXT.rotation) / segment.step
    return np.rint(np.clip(steps, -segment.max_abs, segment.max_abs)).astype(np.int64)


def worth(plan: Plan, values: Integers, number: int) -> float:
    (layout,) = plan.layouts
    return nats(layout, values, reordered(layout, values, number), positions_of(plan))


def of_few(count: int) -> Floats:
    """Nats of ten updates of so many parameters, each against a reordering of itself."""
    return np.array([worth(PLAN, on_coordinates(PLAN, count, n), n) for n in range(10)])


def test_updates_of_few_parameters_stand_out_without_signs_after_the_rotation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rotated coordinate is a Walsh function: turned by a power of two, it is itself again."""
    ours = quantize._flip_signs

    def only_before(blocks: Any, rotation: bytes, segment: FloatSegment, label: str) -> None:  # noqa: ANN401
        if label == "rotation":
            ours(blocks, rotation, segment, label)

    monkeypatch.setattr(quantize, "_flip_signs", only_before)
    assert of_few(16).mean() > 3 * bound(PLAN)
    assert of_few(2_000).mean() < 1.2 * bound(PLAN)


@pytest.mark.parametrize("count", [1, 4, 16, 300, 2_000])
def test_with_them_updates_of_few_parameters_are_like_any_other(count: int) -> None:
    """Although everybody knows the signs. Those of one parameter, in one digit, tell even less."""
    nats_of_each = of_few(count)
    assert nats_of_each.mean() < 1.2 * bound(PLAN)
    assert nats_of_each.max() < 1.5 * bound(PLAN)


def digits_of(plan: Plan, values: Integers) -> Integers:
    """What the key holder reads of one sketch of a plan of one segment."""
    context, (layout,) = fixed_context(plan), plan.layouts
    ciphertexts = encrypted(context, [values], SEED)
    (rows,) = shown(context, ciphertexts, named("challenge"), UPLOAD)
    return opened(layout, rows, SEED)


@pytest.mark.parametrize("number", [0, 1, -7, 97])
def test_the_norm_of_one_number_is_that_number_but_for_its_sign(number: int) -> None:
    """Whoever counts one thing, or votes on it, has no norm to hide behind; so mind `max_norm`."""
    plan = plan_integers(1, max_clients=8, max_abs=100, max_norm=100, norm_check=CHECK)
    seen = digits_of(plan, np.array([number]))[:, 0]
    energy = np.square(seen, dtype=float).mean() - noise_energy(
        plan.layouts[0], norm_shapes(plan)[0]
    )
    assert sqrt(max(energy, 0)) == pytest.approx(abs(number), rel=0.15, abs=2)


def test_of_integers_without_a_max_norm_nothing_is_shown() -> None:
    """A clip bit beside an update: no rows for it, and none of the update's depend on it."""
    update = FloatSegment("update", (TensorSpec("vector", (1_000,)),), 1.0)
    vector = np.random.default_rng(6).normal(0, 10, 1_024).round().astype(np.int64)

    def sketched(max_norm: float | None, number: int) -> Sketch:
        segments: list[Segment] = [update, IntegerSegment("clipped", 1, 1, max_norm)]
        context = fixed_context(make_plan(segments, max_clients=8, norm_check=CHECK))
        ciphertexts = encrypted(context, [vector, np.array([number])], SEED)
        return sketch(context, UPLOAD, [ciphertexts], named("challenge"))

    assert sketched(None, 0).to_bytes() == sketched(None, 1).to_bytes()
    assert len(sketched(None, 0).norms) == 1
    # What would be there if it were asked for.
    assert len(sketched(1.0, 0).norms) == 2
    assert sketched(1.0, 0).to_bytes() != sketched(1.0, 1).to_bytes()
    # And where there is nothing else to look at, there is no check.
    with pytest.raises(PlanError):
        plan_integers(1, max_clients=8, max_abs=1, norm_check=CHECK)


def test_each_digit_shows_a_norm_of_its_own() -> None:
    """A vote for one of 12 000 items shows in which third of the items it is, and no more."""
    plan = plan_integers(12_000, max_clients=8, max_abs=1, max_norm=1, norm_check=CHECK)
    (layout,) = plan.layouts
    for item in (17, 4_100, 9_000):
        seen = digits_of(plan, np.eye(1, 12_000, item, dtype=np.int64)[0])
        energies = np.square(seen).sum(axis=(0, 2))
        assert np.flatnonzero(energies).tolist() == [item // RING_DEGREE]
    assert layout.digits >= 3
    one, other = (digits_of(plan, np.eye(1, 12_000, i, dtype=np.int64)[0]) for i in (17, 3_000))
    assert stats.ks_2samp(one[:, 0].reshape(-1), other[:, 0].reshape(-1)).pvalue > 1e-7
