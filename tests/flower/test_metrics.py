"""Metrics as bounded integers: means of sums, exact to a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from secagg.context import rotation_string
from secagg.errors import NonFiniteError, ReleaseError, SchemaError
from secagg.flower.metrics import STEPS, Metrics
from secagg.parameters import IntegerSegment
from secagg.planner import make_plan
from secagg.quantize import quantize_integers
from secagg.release import Release

BOUNDS = {"loss": 8.0, "accuracy": 1.0}


def released(metrics: Metrics, parts: Sequence[np.ndarray]) -> Release:  # type: ignore[type-arg]
    """The sum of some clients' contributions, as a release holds it."""
    segment = metrics.segment(10)
    plan = make_plan([segment], max_clients=10)
    rotation = rotation_string("task", 1, plan)
    summed = [quantize_integers(segment, part, rotation=rotation).values for part in parts]
    return Release(plan, rotation, len(parts), (np.sum(summed, axis=0),))


def test_weighted_means_are_those_of_the_parts() -> None:
    metrics = Metrics(BOUNDS, weighted=True)
    values = [(0.5, 0.9), (7.25, 0.1), (-3.0, 0.4)]
    shares = [1.0, 0.25, 0.001]
    parts = [
        metrics.encode({"loss": loss, "accuracy": accuracy}, share, metrics.segment(10))
        for (loss, accuracy), share in zip(values, shares, strict=True)
    ]
    release = released(metrics, parts)
    found = metrics.means(release)
    wanted = np.average(values, axis=0, weights=shares)
    assert found["loss"] == pytest.approx(wanted[0], abs=8 * 3 / STEPS)
    assert found["accuracy"] == pytest.approx(wanted[1], abs=3 / STEPS)
    assert metrics.weight(release) == pytest.approx(sum(shares), abs=2 / STEPS)


def test_equal_means_count_every_client_once() -> None:
    metrics = Metrics({"loss": 2.0}, weighted=False)
    segment = metrics.segment(10)
    assert segment.size == 1
    parts = [metrics.encode({"loss": loss, "other": [1]}, 1.0, segment) for loss in (0, 1, 2)]
    release = released(metrics, parts)
    assert metrics.means(release) == {"loss": pytest.approx(1.0, abs=1e-6)}
    assert metrics.weight(release) == 3.0


def test_a_value_beyond_its_bound_is_the_bound() -> None:
    metrics = Metrics({"loss": 2.0}, weighted=False)
    segment = metrics.segment(10)
    assert metrics.encode({"loss": -100.0}, 1.0, segment).tolist() == [-STEPS]
    assert metrics.encode({"loss": 1e308}, 1.0, segment).tolist() == [STEPS]


def test_the_largest_cohorts_have_a_plan() -> None:
    for clients in (1 << 16, 1_000_000):
        make_plan([Metrics(BOUNDS, weighted=True).segment(clients)], max_clients=clients)


@pytest.mark.parametrize("value", [None, "1", True, [1.0]])
def test_what_is_not_one_number_is_refused(value: object) -> None:
    metrics = Metrics({"loss": 2.0}, weighted=False)
    with pytest.raises(SchemaError, match="to be one number"):
        metrics.encode({"loss": value}, 1.0, metrics.segment(10))


def test_what_is_not_finite_and_a_segment_for_others_are_refused() -> None:
    metrics = Metrics({"loss": 2.0}, weighted=False)
    with pytest.raises(NonFiniteError):
        metrics.encode({"loss": float("inf")}, 1.0, metrics.segment(10))
    with pytest.raises(SchemaError, match="a segment of 1 integers"):
        metrics.encode({"loss": 1.0}, 1.0, IntegerSegment("metrics", 2, STEPS))


@pytest.mark.parametrize("forged", [0, -5 * STEPS, 5 * STEPS])
def test_weights_that_cannot_be_void_the_metrics(forged: int) -> None:
    metrics = Metrics({"loss": 2.0}, weighted=True)
    segment = metrics.segment(10)
    plan = make_plan([segment], max_clients=10)
    rotation = rotation_string("task", 1, plan)
    signs = quantize_integers(segment, np.ones(2, dtype=np.int64), rotation=rotation).values
    release = Release(plan, rotation, 3, (signs * np.array([STEPS, forged]),))
    with pytest.raises(ReleaseError, match="weights of metrics"):
        metrics.means(release)


def test_no_metrics_have_no_means() -> None:
    metrics = Metrics({}, weighted=True)
    assert metrics.size == 0
    plan = make_plan([IntegerSegment("counts", 1, 1)], max_clients=3)
    assert metrics.means(Release(plan, bytes(32), 3, (np.zeros(1, dtype=np.int64),))) == {}
