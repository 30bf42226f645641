"""Updates in fewer floats: linear, a projection, the same for everybody, and exact in a sum."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from secagg.compression import basis, compress, expand, left_over, subset
from secagg.context import rotation_string
from secagg.errors import PlanError, SchemaError
from secagg.parameters import (
    Compression,
    FloatSegment,
    LowRank,
    NormCheck,
    Plan,
    RandomSubset,
    TensorSpec,
)
from secagg.planner import explain, make_plan
from secagg.quantize import flatten, quantize, unflatten
from secagg.release import Release
from secagg.sampling import Stream

TENSORS = (TensorSpec("bias", (30,)), TensorSpec("scale", ()), TensorSpec("table", (30, 8)))
ROUND = b"a round's public string"

compressions = st.one_of(st.integers(1, 10).map(LowRank), st.floats(0.01, 0.99).map(RandomSubset))
shapes = st.lists(st.lists(st.integers(1, 6), max_size=3).map(tuple), min_size=1, max_size=4).map(
    lambda found: tuple(TensorSpec(f"t{i}", shape) for i, shape in enumerate(found))
)


def segment(
    compression: Compression | None, tensors: tuple[TensorSpec, ...] = TENSORS
) -> FloatSegment:
    return FloatSegment("update", tensors, clip=1.0, compression=compression)


def drawn(size: int, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=size)


@settings(max_examples=60, deadline=None)
@given(compressions, shapes, st.integers(0, 100), st.floats(-3, 3))
def test_a_sum_of_what_is_compressed_is_the_compressed_sum(
    compression: Compression, tensors: tuple[TensorSpec, ...], seed: int, factor: float
) -> None:
    here = segment(compression, tensors)
    one, other = drawn(here.parameters, seed), drawn(here.parameters, seed + 1)
    together = compress(here, one + factor * other, ROUND)
    assert together.shape == (here.carried,) == (sum(t.size for t in here.sent),)
    apart = compress(here, one, ROUND) + factor * compress(here, other, ROUND)
    np.testing.assert_allclose(together, apart, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(compressions, shapes, st.integers(0, 100))
def test_expanding_what_was_compressed_projects(
    compression: Compression, tensors: tuple[TensorSpec, ...], seed: int
) -> None:
    here = segment(compression, tensors)
    vector, sent = drawn(here.parameters, seed), drawn(here.carried, seed)
    projected = expand(here, compress(here, vector, ROUND), ROUND)
    # What was sent is understood, a projection is none the second time, and it never lengthens.
    np.testing.assert_allclose(compress(here, expand(here, sent, ROUND), ROUND), sent, atol=1e-12)
    np.testing.assert_allclose(
        expand(here, compress(here, projected, ROUND), ROUND), projected, atol=1e-12
    )
    assert np.linalg.norm(projected) <= np.linalg.norm(vector) * (1 + 1e-12)
    # Orthogonal: nothing of what is left over is in what was sent.
    assert projected @ (vector - projected) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("compression", [LowRank(3), RandomSubset(0.25)])
def test_what_is_left_over_and_what_is_sent_are_the_update(compression: Compression) -> None:
    here = segment(compression)
    update = {
        name: value.astype(np.float32)
        for name, value in unflatten(here, drawn(here.parameters)).items()
    }
    rest = left_over(here, update, ROUND)
    flat = flatten(here, update)
    sent = expand(here, compress(here, flat, ROUND), ROUND)
    assert {name: (v.shape, v.dtype) for name, v in rest.items()} == {
        name: (v.shape, v.dtype) for name, v in update.items()
    }
    np.testing.assert_allclose(flatten(here, rest) + sent, flat, atol=1e-6)
    np.testing.assert_allclose(
        compress(here, flatten(here, rest), ROUND), np.zeros(here.carried), atol=1e-5
    )


def test_with_error_feedback_everything_gets_through_in_time() -> None:
    """The same update in each of many rounds: what arrives differs by a bounded rest."""
    here, arrived = segment(RandomSubset(0.2)), np.zeros(271)
    update = {n: v.astype(np.float32) for n, v in unflatten(here, drawn(271)).items()}
    rest = {name: np.zeros_like(value) for name, value in update.items()}
    for number in range(100):
        seed = bytes([number])
        carried = {name: update[name] + rest[name] for name in update}
        arrived += expand(here, compress(here, flatten(here, carried).astype(float), seed), seed)
        rest = left_over(here, carried, seed)
    np.testing.assert_allclose(
        arrived + flatten(here, rest), 100 * flatten(here, update), rtol=1e-4
    )
    assert np.linalg.norm(flatten(here, rest)) < 10 * np.linalg.norm(flatten(here, update))


def test_tensors_of_few_columns_or_one_side_travel_whole() -> None:
    here = segment(LowRank(8))
    assert here.carried == here.parameters == 271
    vector = drawn(271)
    np.testing.assert_array_equal(compress(here, vector, ROUND), vector)
    here = segment(LowRank(2))
    assert here.carried == 30 + 1 + 30 * 2
    np.testing.assert_array_equal(compress(here, vector, ROUND)[:31], vector[:31])


def test_nothing_is_compressed_where_the_plan_says_nothing_of_it() -> None:
    here, vector = segment(None), drawn(271)
    assert compress(here, vector, ROUND) is vector
    assert expand(here, vector, ROUND) is vector
    assert here.sent == here.tensors
    update = {n: v.astype(np.float32) for n, v in unflatten(here, vector).items()}
    assert not flatten(here, left_over(here, update, ROUND)).any()


def test_a_basis_is_orthonormal_and_another_one_in_each_round_and_table() -> None:
    here, table = segment(LowRank(5)), TENSORS[2]
    matrix = basis(here, table, ROUND)
    assert matrix is not None
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(5), atol=1e-14)
    others = [
        basis(here, table, b"another round"),
        basis(replace(here, name="other"), table, ROUND),
        basis(here, TensorSpec("other", (30, 8)), ROUND),
    ]
    for other in others:
        assert other is not None
        assert not np.allclose(matrix, other)
    assert basis(here, TENSORS[0], ROUND) is None
    assert basis(segment(RandomSubset(0.5)), table, ROUND) is None


def test_bases_point_everywhere_equally() -> None:
    here, table = segment(LowRank(2)), TENSORS[2]
    found = [basis(here, table, index.to_bytes(2, "big")) for index in range(2000)]
    projection = np.mean([m @ m.T for m in found if m is not None], axis=0)
    np.testing.assert_allclose(projection, np.eye(8) * 2 / 8, atol=0.03)


def test_subsets_reach_every_coordinate_equally() -> None:
    here = segment(RandomSubset(0.3))
    counts = np.zeros(271)
    for index in range(2000):
        chosen = subset(here, index.to_bytes(2, "big"))
        assert chosen.size == here.carried == 82
        assert (np.diff(chosen) > 0).all()
        counts[chosen] += 1
    mean, std = 2000 * 82 / 271, np.sqrt(2000 * 82 / 271 * (1 - 82 / 271))
    assert np.abs(counts - mean).max() < 5 * std


def test_the_maps_of_a_round_never_change() -> None:
    """A client and a server of different versions must agree on them."""
    here = FloatSegment("update", (TensorSpec("t", (3, 4)),), 1.0, compression=LowRank(2))
    matrix = basis(here, here.tensors[0], ROUND)
    assert matrix is not None
    assert [value.hex() for value in matrix[0]] == GOLDEN_ROW
    assert subset(replace(here, compression=RandomSubset(0.4)), ROUND).tolist() == GOLDEN_SUBSET


GOLDEN_ROW = ["-0x1.eb583300407f9p-1", "-0x1.dd87e45699680p-4"]
GOLDEN_SUBSET = [1, 2, 3, 8, 10]


@pytest.mark.parametrize("size", [270, 272, 1])
def test_a_vector_of_another_size_is_refused(size: int) -> None:
    here = segment(LowRank(2))
    with pytest.raises(SchemaError, match="flat vector of 271"):
        compress(here, drawn(size), ROUND)
    with pytest.raises(SchemaError, match="flat vector of 91"):
        expand(here, drawn(size), ROUND)


def test_left_over_of_other_tensors_is_refused() -> None:
    with pytest.raises(SchemaError, match="expected tensors"):
        left_over(segment(LowRank(2)), {"bias": np.zeros(30, np.float32)}, ROUND)


# --- in a plan ----------------------------------------------------------------------------------


def plan(compression: Compression | None, **options: object) -> Plan:
    return make_plan([segment(compression)], max_clients=5, norm_check=NormCheck(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("compression", [LowRank(3), RandomSubset(0.25), None])
def test_a_release_is_the_projection_of_the_mean(compression: Compression | None) -> None:
    planned = plan(compression)
    here = planned.segments[0]
    assert isinstance(here, FloatSegment)
    rotation = rotation_string("task", 1, planned)
    updates = [drawn(271, seed) / 40 for seed in range(3)]
    sums = sum(
        quantize(
            planned,
            {"update": unflatten(here, update)},
            samples=1,
            rotation=rotation,
            randomness=Stream(bytes([index] * 32)),
        )[0].values
        for index, update in enumerate(updates)
    )
    release = Release(planned, rotation, 3, (sums,))
    mean = np.mean(updates, axis=0)
    wanted = expand(here, compress(here, mean, rotation), rotation)
    np.testing.assert_allclose(release.flat_mean(), wanted, atol=3 * here.step)
    assert {name: v.shape for name, v in release.mean().items()} == {
        tensor.name: tensor.shape for tensor in TENSORS
    }


def test_the_clip_norm_is_that_of_what_travels() -> None:
    """An update that is longer than the clip norm is not clipped if what travels is not."""
    planned = plan(RandomSubset(0.1))
    here = planned.segments[0]
    assert isinstance(here, FloatSegment)
    rotation = rotation_string("task", 1, planned)
    vector = np.zeros(271)
    outside = np.setdiff1d(np.arange(271), subset(here, rotation))
    vector[outside] = 100.0
    vector[subset(here, rotation)[0]] = 0.5
    for scale, clipped in ((1.0, False), (3.0, True)):
        (found,) = quantize(
            planned,
            {"update": unflatten(here, scale * vector)},
            samples=1,
            rotation=rotation,
            randomness=Stream(bytes(32)),
        )
        assert found.clipped is clipped


def test_plans_of_different_compression_have_different_digests_and_fewer_bytes() -> None:
    plans = [plan(c) for c in (None, LowRank(2), LowRank(3), RandomSubset(0.2), RandomSubset(0.3))]
    assert len({each.digest for each in plans}) == 5
    large = (TensorSpec("table", (50_000, 16)),)
    whole, low, part = (
        make_plan([segment(c, large)], max_clients=5).payload_bytes
        for c in (None, LowRank(4), RandomSubset(0.1))
    )
    assert whole / low == pytest.approx(4, rel=0.2)
    assert whole / part == pytest.approx(10, rel=0.2)


def test_an_explained_plan_says_how_many_floats_travel() -> None:
    facts = {fact.topic: fact.value for fact in explain(plan(LowRank(2)))}
    assert facts["update: compression"] == "91 of 271 floats"
    assert "update: compression" not in {fact.topic for fact in explain(plan(None))}


def test_rows_that_stay_apart_can_be_of_low_rank() -> None:
    tensors = (TensorSpec("bias", (30,)), TensorSpec("table", (30, 8)))
    rows = FloatSegment("update", tensors, 1.0, bits=13, rows=30, compression=LowRank(3))
    assert rows.values == 30 * 4
    with pytest.raises(PlanError, match="tears them"):
        replace(rows, compression=RandomSubset(0.5))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LowRank(0), "rank of 1"),
        (lambda: LowRank(1.5), "integer"),  # type: ignore[arg-type]
        (lambda: LowRank(True), "integer"),
        (lambda: RandomSubset(0.0), "between 0 and 1"),
        (lambda: RandomSubset(1.0), "between 0 and 1"),
        (lambda: RandomSubset(float("nan")), "between 0 and 1"),
    ],
)
def test_compression_that_cannot_be_is_refused(make: object, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        make()  # type: ignore[operator]


def test_a_model_too_large_to_hold_is_refused_however_little_of_it_travels() -> None:
    huge = segment(RandomSubset(1e-6), (TensorSpec("table", (1 << 15, 1 << 15)),))
    with pytest.raises(PlanError, match="however few of them travel"):
        make_plan([huge], max_clients=5)
