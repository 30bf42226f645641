"""Whole rounds: the released sums are the sums of the quantised integers, bit for bit."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from round_support import exact_sums, raw_upload, run_round

from secagg import ckks, onetime, ring
from secagg.aggregator import Aggregator
from secagg.encryptor import Encryptor
from secagg.errors import PlanError, ReleaseError, SchemaError
from secagg.keyholder import KeyHolder
from secagg.packing import pack, unpack
from secagg.parameters import MODULUS, FloatSegment, IntegerSegment, Plan, TensorSpec
from secagg.planner import make_plan, plan_integers, plan_tensors
from secagg.quantize import quantize
from secagg.release import sums_sha256
from secagg.residues import widen
from secagg.sampling import Stream


def random_parts(plan: Plan, clients: int, seed: int) -> list[list[NDArray[np.int64]]]:
    drawn = np.random.default_rng(seed)
    return [
        [
            drawn.integers(-segment.max_abs, segment.max_abs, segment.values, endpoint=True)
            for segment in plan.segments
        ]
        for _ in range(clients)
    ]


def same(plan: Plan, clients: list[list[NDArray[np.int64]]]) -> None:
    release = run_round(plan, clients)
    expected = exact_sums(clients)
    assert release.contributors == len(clients)
    assert len(release.sums) == len(expected)
    for released, exact in zip(release.sums, expected, strict=True):
        assert released.dtype == np.int64
        assert np.array_equal(released, exact)
    assert release.sha256 == sums_sha256(tuple(expected))


def capacity(bits: int, clients: int) -> int:
    layout = plan_integers(1, max_clients=clients, max_abs=2 ** (bits - 1) - 1).layouts[0]
    return layout.digits * 4096


@settings(deadline=None, max_examples=100)
@given(
    clients=st.integers(3, 8),
    bits=st.integers(2, 16),
    length=st.sampled_from(["one", "less", "equal", "more"]),
    seed=st.integers(0, 2**32),
)
def test_sums_are_exact_at_every_border_of_a_ciphertext(
    clients: int, bits: int, length: str, seed: int
) -> None:
    full = capacity(bits, clients)
    size = {"one": 1, "less": full - 1, "equal": full, "more": full + 1}[length]
    plan = plan_integers(size, max_clients=clients, max_abs=2 ** (bits - 1) - 1)
    assert plan.blocks == (2 if length == "more" else 1)
    same(plan, random_parts(plan, clients, seed))


@settings(deadline=None, max_examples=60)
@given(
    clients=st.integers(3, 8),
    sizes=st.lists(st.integers(1, 9000), min_size=1, max_size=4),
    magnitudes=st.lists(st.integers(1, 1 << 40), min_size=4, max_size=4),
    parameters=st.integers(1, 9000),
    bits=st.integers(2, 16),
    seed=st.integers(0, 2**32),
)
def test_sums_are_exact_over_several_segments(
    clients: int, sizes: list[int], magnitudes: list[int], parameters: int, bits: int, seed: int
) -> None:
    weighting, cap = ("samples", 9) if bits >= 8 else ("equal", 1)
    floats = FloatSegment("f", (TensorSpec("w", (parameters,)),), 1.0, bits, weighting, cap)
    integers = [
        IntegerSegment(f"i{k}", size, magnitude)
        for k, (size, magnitude) in enumerate(zip(sizes, magnitudes, strict=False))
    ]
    plan = make_plan([*integers[:1], floats, *integers[1:]], max_clients=clients)
    same(plan, random_parts(plan, clients, seed))


@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize("pattern", ["max", "min", "alternating", "digitwise", "clientwise"])
def test_extreme_values_in_every_coordinate_are_summed_exactly(bits: int, pattern: str) -> None:
    clients, size = 5, capacity(bits, 5) + 1
    plan = plan_integers(size, max_clients=clients, max_abs=2 ** (bits - 1) - 1)
    index = np.arange(size)
    parts = []
    for client in range(clients):
        sign = {
            "max": np.ones_like(index),
            "min": -np.ones_like(index),
            "alternating": 1 - 2 * (index % 2),
            "digitwise": 1 - 2 * (index // 4096 % 2),
            "clientwise": np.full_like(index, 1 - 2 * (client % 2)),
        }[pattern]
        parts.append([sign * (2 ** (bits - 1) - 1)])
    same(plan, parts)


def test_every_sign_pattern_of_all_digits_is_summed_exactly() -> None:
    plan = plan_integers(4096 * 12, max_clients=3, max_abs=1)
    assert plan.layouts[0].digits == 12
    patterns = np.array(list(itertools.product((-1, 1), repeat=12))).T.reshape(-1)
    same(plan, [[patterns]] * 3)


def test_who_contributed_can_be_read_off_the_sum() -> None:
    # Client i contributes 2**i: a lost, doubled or mixed upload would show by name.
    plan = plan_integers(100, max_clients=8, max_abs=128)
    release = run_round(plan, [[np.full(100, 1 << i)] for i in range(8)])
    assert (release.sums[0] == 255).all()


def test_fewer_clients_than_planned_are_summed_exactly() -> None:
    plan = plan_integers(5000, max_clients=100_000, max_abs=1000)
    same(plan, random_parts(plan, 3, 1))


def test_300_clients_cross_the_lazy_reduction() -> None:
    plan = plan_integers(10, max_clients=300, max_abs=7)
    same(plan, random_parts(plan, 300, 1))


# --- the planned maximum ------------------------------------------------------------------------


def test_the_largest_cohort_at_the_extreme_opens() -> None:
    # 1000 clients at +-V in every coordinate, each coefficient's summed error at the guard. The
    # sum of their ciphertexts is a ciphertext of the sum of plaintexts under the sum of keys, so
    # one encryption of that sum under a sum of 1000 real secrets stands for the 1000 uploads.
    clients = 1000
    plan = plan_tensors(4096 * 4, max_clients=clients, clip=1.0, bits=8)
    layout = plan.layouts[0]
    assert layout.digits == 2
    drawn = np.random.default_rng(1)
    values = drawn.choice([-1, 1], plan.segments[0].values) * layout.max_abs
    key = sum(onetime.secret(i.to_bytes(32, "big")) for i in range(clients))
    ntt_key = ring.to_ntt(np.asarray(key)[None])[0]
    public = KeyHolder(plan).context.public_polynomials()
    for noise in (layout.guard, -layout.guard):
        coefficients = clients * pack(layout, values) + noise
        assert int(np.abs(coefficients).max()) < MODULUS // 2
        opened = ckks.decrypt(ckks.encrypt(coefficients, public, ntt_key), public, ntt_key)
        assert np.array_equal(
            unpack(layout, opened, layout.sum_abs // layout.max_abs), clients * values
        )
    beyond = ckks.encrypt(clients * pack(layout, values) + layout.guard + 1, public, ntt_key)
    with pytest.raises(ReleaseError):
        unpack(layout, ckks.decrypt(beyond, public, ntt_key), layout.sum_abs // layout.max_abs)


def test_a_thousand_real_clients_at_the_extreme() -> None:
    plan = plan_tensors(4096 * 2, max_clients=1000, clip=1.0, bits=8)
    size = plan.segments[0].values
    values = np.random.default_rng(2).choice([-127, 127], size)
    same(plan, [[values]] * 1000)


@pytest.mark.slow
def test_a_million_parameters() -> None:
    plan = plan_tensors(1_000_000, max_clients=1000, clip=1.0, bits=8)
    same(plan, random_parts(plan, 5, 3))


# --- through the roles' own interface -----------------------------------------------------------


def test_named_tensors_and_weights_make_the_weighted_mean() -> None:
    shapes = {"items": (300, 16), "bias": (300,), "mu": ()}
    plan = plan_tensors(
        shapes, max_clients=8, clip=2.0, bits=12, weighting="samples", weight_cap=50
    )
    holder = KeyHolder(plan)
    server = Aggregator(holder.context)
    drawn = np.random.default_rng(4)
    samples = [1, 10, 50, 500]
    expected: dict[str, NDArray[np.float64]] = {name: np.zeros(s) for name, s in shapes.items()}
    for count in samples:
        update = {
            name: np.asarray(drawn.standard_normal(shape) * 0.02, np.float32)
            for name, shape in shapes.items()
        }
        for name in shapes:
            expected[name] += min(count, 50) / 50 * update[name]
        server.add(Encryptor(holder.context).encrypt(update, samples=count))
    release = holder.release(server.aggregate())
    weight = sum(min(count, 50) / 50 for count in samples)
    segment = plan.segments[0]
    assert isinstance(segment, FloatSegment)
    # Eight standard deviations of the summed rounding errors, per coordinate (Hoeffding: 1e-13).
    slack = 8 * 0.5 * segment.step * math.sqrt(len(samples))
    assert abs(release.weight() - weight) <= slack / segment.clip
    mean = release.mean()
    for name, shape in shapes.items():
        assert mean[name].shape == shape
        bound = (slack + np.abs(mean[name]) * slack / segment.clip) / weight
        assert (np.abs(mean[name] - expected[name] / weight) <= bound).all()


def test_the_mean_is_that_of_the_reference_in_the_clear() -> None:
    # The same seeded roundings, once through the cipher and once in plain integers.
    plan = make_plan(
        [FloatSegment("f", (TensorSpec("w", (70, 70)),), 1.0), IntegerSegment("n", 30, 9)],
        max_clients=5,
    )
    holder = KeyHolder(plan)
    server = Aggregator(holder.context)
    drawn = np.random.default_rng(5)
    sums = [np.zeros(segment.values, np.int64) for segment in plan.segments]
    counts = np.zeros(30, np.int64)
    for client in range(4):
        contribution = {
            "f": drawn.standard_normal((70, 70)).astype(np.float32) * 0.1,
            "n": drawn.integers(-9, 10, 30),
        }
        seed = client.to_bytes(32, "big")
        encryptor = Encryptor(holder.context, randomness=Stream(seed))
        server.add(encryptor.encrypt_segments(contribution, samples=3))
        parts = quantize(
            plan,
            contribution,
            samples=3,
            rotation=holder.context.rotation,
            randomness=Stream(seed),
        )
        sums = [total + part.values for total, part in zip(sums, parts, strict=True)]
        counts += contribution["n"]
    release = holder.release(server.aggregate())
    assert release.sha256 == sums_sha256(tuple(sums))
    assert np.array_equal(release.total(), counts)
    assert release.weight() == 4.0
    assert release.mean("f")["w"].shape == (70, 70)
    for wrong in ("g", "f"):
        with pytest.raises(SchemaError):
            release.total(wrong)
    with pytest.raises(SchemaError):
        release.mean("n")


def test_a_plan_of_several_segments_wants_them_by_name() -> None:
    plan = make_plan([IntegerSegment("a", 1, 1), IntegerSegment("b", 1, 1)], max_clients=3)
    encryptor = Encryptor(KeyHolder(plan).context)
    with pytest.raises(SchemaError, match="encrypt_segments"):
        encryptor.encrypt(np.ones(1, np.int64))
    with pytest.raises(SchemaError, match="segments"):
        encryptor.encrypt_segments({"a": np.ones(1, np.int64)})


def test_two_segments_of_a_kind_must_be_named() -> None:
    plan = make_plan([IntegerSegment("a", 2, 9), IntegerSegment("b", 2, 9)], max_clients=3)
    release = run_round(plan, [[np.ones(2, np.int64), np.ones(2, np.int64)]] * 3)
    with pytest.raises(SchemaError, match="IntegerSegment"):
        release.total()
    assert release.total("a").shape == (2,)


def test_uploads_have_exactly_the_planned_size() -> None:
    plan = plan_tensors(30_000, max_clients=10, clip=1.0)
    context = KeyHolder(plan).context
    upload = Encryptor(context).encrypt(np.zeros(30_000, np.float32))
    assert len(upload.payload) == plan.payload_bytes


def test_encryptions_of_the_same_update_have_nothing_in_common() -> None:
    plan = plan_integers(4096, max_clients=10, max_abs=3)
    context = KeyHolder(plan).context
    first, second = (raw_upload(context, [np.ones(4096, np.int64)]) for _ in range(2))
    mine, other = widen(first.payload, 1), widen(second.payload, 1)
    assert not (mine == other).any()


# --- what a forged or tiny weight does ----------------------------------------------------------


@pytest.mark.parametrize("forged", [0, -1, 5])
def test_an_impossible_sum_of_weights_is_refused(forged: int) -> None:
    plan = plan_tensors(4000, max_clients=8, clip=1.0, weighting="samples", weight_cap=10)
    segment = plan.segments[0]
    assert isinstance(segment, FloatSegment)
    holder = KeyHolder(plan)
    honest = [
        quantize(
            plan,
            {"update": np.zeros(4000)},
            samples=10,
            rotation=holder.context.rotation,
            randomness=Stream(bytes([i]) * 32),
        )[0].values
        for i in range(3)
    ]
    # The client scales its weight coordinate: 0, -1 or 5 for all three.
    release = run_round(plan, [[values * forged] for values in honest])
    with pytest.raises(ReleaseError, match=r"impossible|too small"):
        release.weight()
    with pytest.raises(ReleaseError, match=r"impossible|too small"):
        release.mean()


def test_weights_that_rounding_would_drown_are_refused_by_the_planner() -> None:
    with pytest.raises(PlanError, match="more bits, or equal weights"):
        plan_tensors(10, max_clients=8, clip=1.0, bits=2, weighting="samples")
    plan_tensors(10, max_clients=8, clip=1.0, bits=2, weighting="equal")
    plan_tensors(10, max_clients=8, clip=1.0, bits=8, weighting="samples")


def test_small_honest_weights_are_not_called_forged() -> None:
    plan = plan_tensors(10, max_clients=3, clip=1.0, weighting="samples", weight_cap=1_000_000)
    holder = KeyHolder(plan)
    server = Aggregator(holder.context)
    for i in range(3):
        encryptor = Encryptor(holder.context, randomness=Stream(bytes([i]) * 32))
        server.add(encryptor.encrypt(np.full(10, 0.1), samples=1))
    release = holder.release(server.aggregate())
    with pytest.raises(ReleaseError, match="too small to divide by"):
        release.mean()
