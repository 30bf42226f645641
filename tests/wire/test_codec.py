"""Messages to values and back: what goes in comes out, and nothing else gets in."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import cohort
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secagg.context import ContextId
from secagg.errors import ConfigurationError, ContextError, MalformedError, PlanError
from secagg.keyholder import KeyHolder
from secagg.optimisers import LEARNING_RATES, Optimiser
from secagg.parameters import (
    Compression,
    FloatSegment,
    IntegerSegment,
    LowRank,
    NormCheck,
    Plan,
    Privacy,
    RandomSubset,
    RowThreshold,
    TensorSpec,
)
from secagg.planner import PRIVATE_MARGIN, make_plan
from secagg.receipts import Receipt
from secagg.sealing import SEALED_SEED_BYTES
from secagg.upload import Admission, Upload
from secagg.verdicts import Verdict
from secagg.wire import codec
from secagg.wire.v1 import operator_service_pb2, plan_pb2, round_pb2

NAMES = st.from_regex(r"[A-Za-z0-9_./-]{1,16}", fullmatch=True)
TASK_IDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", fullmatch=True)
DIGESTS = st.binary(min_size=32, max_size=32)
NUMBERS = st.integers(1, (1 << 32) - 1)

TENSORS = st.lists(
    st.builds(TensorSpec, NAMES, st.lists(st.integers(1, 9), max_size=4).map(tuple)),
    min_size=1,
    max_size=5,
    unique_by=lambda tensor: tensor.name,
).map(tuple)


@st.composite
def float_segments(draw: st.DrawFn) -> FloatSegment:
    weighting = draw(st.sampled_from(["equal", "samples"]))
    cap = draw(st.integers(1, 1 << 40)) if weighting == "samples" else 1
    clip = draw(st.floats(1e-20, 1e20))
    return FloatSegment(draw(NAMES), draw(TENSORS), clip, draw(st.integers(12, 16)), weighting, cap)


SEGMENTS = st.lists(
    st.one_of(
        float_segments(),
        st.builds(
            IntegerSegment,
            NAMES,
            st.integers(1, 5000),
            st.integers(1, 1000),
            st.one_of(st.none(), st.just(1.0)),
        ),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda segment: segment.name,
)


CHECKS = st.builds(
    NormCheck,
    st.floats(0.15, 1.0),
    st.integers(8, 64),
    st.integers(0, 20),
)


PRIVACY = st.builds(
    Privacy,
    st.sampled_from(["release", "distributed", "local"]),
    st.floats(0.1, 2.0),
    st.floats(0.1, 100.0),
    st.floats(1e-12, 1e-2),
    integer_share=st.floats(0.01, 0.99),
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    fewest = draw(st.integers(3, 50))
    most = draw(st.integers(fewest, 200))
    segments = draw(SEGMENTS)
    check = draw(CHECKS) if any(segment.norm_bound for segment in segments) else None
    check = draw(st.sampled_from([None, check]))
    weighted = any(isinstance(s, FloatSegment) and s.weighted for s in segments)
    narrow = check is not None and check.margin < PRIVATE_MARGIN
    privacy = None if weighted or narrow else draw(st.none() | PRIVACY)
    return make_plan(
        segments, min_clients=fewest, max_clients=most, norm_check=check, privacy=privacy
    )


CONTEXTS = st.builds(ContextId, TASK_IDS, NUMBERS, NUMBERS, DIGESTS, DIGESTS, DIGESTS)
RECEIPTS = st.builds(
    Receipt, CONTEXTS, DIGESTS, DIGESTS, DIGESTS, DIGESTS, st.binary(min_size=64, max_size=64)
)
ADMISSIONS = st.builds(
    Admission, RECEIPTS, st.binary(min_size=SEALED_SEED_BYTES, max_size=SEALED_SEED_BYTES)
)

VERDICTS = st.builds(
    Verdict, RECEIPTS, DIGESTS, st.booleans(), DIGESTS, st.binary(min_size=64, max_size=64)
)

# What the server keeps on its disk as messages, and reads again.
STORED = [operator_service_pb2.TaskSpec, round_pb2.Admission, plan_pb2.Plan]


# --- there and back ---------------------------------------------------------------------------


@given(plans())
def test_a_plan_comes_back_equal_and_with_the_digest_of_the_one_sent(plan: Plan) -> None:
    data = codec.plan_to_wire(plan).SerializeToString()
    back = codec.plan_from_wire(codec.parse(plan_pb2.Plan, data))
    assert back == plan
    assert back.digest == plan.digest


@given(CONTEXTS)
def test_a_context_comes_back_equal(context: ContextId) -> None:
    data = codec.context_id_to_wire(context).SerializeToString()
    back = codec.context_id_from_wire(codec.parse(round_pb2.ContextId, data))
    assert (back, back.digest) == (context, context.digest)


@given(ADMISSIONS)
def test_an_admission_comes_back_equal(admission: Admission) -> None:
    data = codec.admission_to_wire(admission).SerializeToString()
    assert codec.admission_from_wire(codec.parse(round_pb2.Admission, data)) == admission


@given(VERDICTS)
def test_a_verdict_comes_back_equal(verdict: Verdict) -> None:
    data = codec.verdict_to_wire(verdict).SerializeToString()
    assert codec.verdict_from_wire(codec.parse(round_pb2.NormVerdict, data)) == verdict


@pytest.mark.parametrize("cosine", [None, -1.0, 0.0, 0.5])
def test_a_direction_check_comes_back_with_its_cosine_or_without_one(cosine: float | None) -> None:
    segment = FloatSegment("update", (TensorSpec("w", (20_000,)),), 1.0)
    plan = make_plan([segment], max_clients=5, norm_check=NormCheck(min_cosine=cosine))
    back = codec.plan_from_wire(codec.plan_to_wire(plan))
    assert back == plan
    assert back.digest == plan.digest


def test_rows_a_clip_bit_and_a_threshold_come_back() -> None:
    table = FloatSegment("t", (TensorSpec("w", (30, 3)),), 1.0, 12, rows=30, clip_bit=True)
    counts = IntegerSegment("contributors", 30, 1)
    threshold = RowThreshold("contributors", 4)
    privacy = Privacy("distributed", 1.0, 8.0, 1e-5, honest_clients=2)
    plan = make_plan([table, counts], max_clients=9, threshold=threshold, privacy=privacy)
    back = codec.plan_from_wire(codec.plan_to_wire(plan))
    assert back == plan
    assert back.digest == plan.digest


@pytest.mark.parametrize("compression", [LowRank(2), RandomSubset(0.3), None])
def test_compression_comes_back_and_is_part_of_the_digest(
    compression: Compression | None,
) -> None:
    tensors = (TensorSpec("w", (30, 3)),)
    segment = FloatSegment("t", tensors, 1.0, compression=compression)
    plan = make_plan([segment], max_clients=9)
    back = codec.plan_from_wire(codec.plan_to_wire(plan))
    assert back == plan
    assert back.digest == plan.digest
    others = [c for c in (LowRank(2), RandomSubset(0.3), None) if c != compression]
    for other in others:
        digest = make_plan([replace(segment, compression=other)], max_clients=9).digest
        assert digest != plan.digest


OPTIMISERS = [Optimiser(name) for name in LEARNING_RATES]


@pytest.mark.parametrize("optimiser", [*OPTIMISERS, Optimiser("adam", 0.3, 0.8, 0.95, 1e-4)])
def test_an_optimiser_comes_back(optimiser: Optimiser) -> None:
    message = codec.optimiser_to_wire(optimiser)
    again = codec.parse(type(message), message.SerializeToString())
    assert codec.optimiser_from_wire(again) == optimiser


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("name", 0, MalformedError),
        ("name", 77, MalformedError),
        ("learning_rate", 0.0, ConfigurationError),
        ("learning_rate", float("nan"), ConfigurationError),
        ("beta1", 1.0, ConfigurationError),
        ("beta2", -1.0, ConfigurationError),
        ("tau", 0.0, ConfigurationError),
    ],
)
def test_an_optimiser_out_of_its_range_is_refused(
    name: str, value: float, kind: type[Exception]
) -> None:
    message = codec.optimiser_to_wire(Optimiser("adam"))
    setattr(message, name, value)
    with pytest.raises(kind, match="optimiser" if name == "name" else name):
        codec.optimiser_from_wire(message)


@given(TENSORS)
def test_tensors_come_back_equal_and_in_order(tensors: tuple[TensorSpec, ...]) -> None:
    assert codec.tensors_from_wire(codec.tensors_to_wire(tensors)) == tensors


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=50))
def test_a_model_comes_back_equal_to_the_bit(values: list[float]) -> None:
    model = np.array(values, dtype=np.float32)
    back = codec.model_from_bytes(codec.model_to_bytes(model), model.size)
    assert back.dtype == np.float32
    assert back.tobytes() == model.tobytes()


@given(st.integers(0, (1 << 32) - 1))
def test_sums_come_back_equal(seed: int) -> None:
    plan = cohort.mixed_plan()
    drawn = np.random.default_rng(seed)
    sums = tuple(
        drawn.integers(-lay.sum_abs, lay.sum_abs, lay.values, endpoint=True) for lay in plan.layouts
    )
    back = codec.sums_from_bytes(codec.sums_to_bytes(sums), plan)
    assert all(np.array_equal(a, b) for a, b in zip(back, sums, strict=True))
    assert all(part.dtype == np.int64 for part in back)


def test_values_are_little_endian_whatever_the_array_was() -> None:
    assert codec.model_to_bytes(np.array([1.0], dtype=">f4")) == bytes.fromhex("0000803f")
    assert codec.sums_to_bytes([np.array([-2], dtype=">i8")]) == b"\xfe" + b"\xff" * 7


def test_a_model_that_was_decoded_can_be_changed_without_touching_the_bytes() -> None:
    data = codec.model_to_bytes(np.zeros(3, dtype=np.float32))
    codec.model_from_bytes(data, 3)[0] = 5.0
    assert codec.model_from_bytes(data, 3)[0] == 0.0


def test_the_model_digest_is_sha256_of_its_bytes() -> None:
    assert codec.model_digest(b"abc") == hashlib.sha256(b"abc").digest()


# --- contexts ---------------------------------------------------------------------------------


def good_context() -> round_pb2.ContextId:
    return codec.context_id_to_wire(cohort.round_context(cohort.counts_plan()).id)


@pytest.mark.parametrize("name", ["plan_digest", "model_digest", "round_key_id"])
@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_digest_of_the_wrong_size_is_refused_by_its_name(name: str, size: int) -> None:
    message = good_context()
    setattr(message, name, bytes(size))
    with pytest.raises(MalformedError, match=f"{name} of 32 bytes; got {size}"):
        codec.context_id_from_wire(message)


@pytest.mark.parametrize("name", ["round_number", "attempt"])
def test_rounds_and_attempts_are_counted_from_one(name: str) -> None:
    message = good_context()
    setattr(message, name, 0)
    with pytest.raises(MalformedError, match=f"{name} from 1"):
        codec.context_id_from_wire(message)


@pytest.mark.parametrize(
    "task_id", ["", "x" * 65, "../up", "a/b", "a b", "a\0", "é", "a\n", "/etc/passwd", "a\\b"]
)
def test_a_task_id_of_other_characters_or_lengths_is_refused(task_id: str) -> None:
    message = good_context()
    message.task_id = task_id
    with pytest.raises(MalformedError, match="task id of 1 to 64 letters"):
        codec.context_id_from_wire(message)


@pytest.mark.parametrize("task_id", [".", ".."])
def test_a_task_id_that_is_a_folder_of_every_file_system_is_refused(task_id: str) -> None:
    message = good_context()
    message.task_id = task_id
    with pytest.raises(MalformedError, match="task id"):
        codec.context_id_from_wire(message)


def test_a_context_with_another_plan_is_refused() -> None:
    context = cohort.round_context(cohort.counts_plan())
    other = codec.plan_to_wire(cohort.counts_plan(max_clients=7))
    with pytest.raises(ContextError, match=r"plan .* digest differs"):
        codec.round_context_from_wire(good_context(), other, context.round_key)


def test_a_context_with_another_round_key_is_refused() -> None:
    context = cohort.round_context(cohort.counts_plan())
    foreign = cohort.round_context(cohort.counts_plan()).round_key
    name, plan = codec.context_id_to_wire(context.id), codec.plan_to_wire(context.plan)
    assert codec.round_context_from_wire(name, plan, context.round_key) == context
    with pytest.raises(ContextError, match="round key"):
        codec.round_context_from_wire(name, plan, foreign)


@pytest.mark.parametrize("change", [-1, 1, -1216])
def test_a_round_key_of_the_wrong_size_is_refused(change: int) -> None:
    context = cohort.round_context(cohort.counts_plan())
    name, plan = codec.context_id_to_wire(context.id), codec.plan_to_wire(context.plan)
    with pytest.raises(MalformedError, match="round_key of 1216 bytes"):
        codec.round_context_from_wire(name, plan, (context.round_key + b"x")[: 1216 + change])


# --- admissions -------------------------------------------------------------------------------


def good_admission() -> round_pb2.Admission:
    context = cohort.round_context(cohort.counts_plan())
    return codec.admission_to_wire(cohort.noise_upload(context, 0).admission)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("client_key", 32),
        ("upload_digest", 32),
        ("sealed_seed_sha256", 32),
        ("challenge_commitment", 32),
        ("signature", 64),
    ],
)
@pytest.mark.parametrize("change", [-1, 1, -32])
def test_a_field_of_a_receipt_of_the_wrong_size_is_refused_by_its_name(
    name: str, size: int, change: int
) -> None:
    message = good_admission()
    setattr(message.receipt, name, bytes(size + change))
    with pytest.raises(MalformedError, match=f"{name} of {size} bytes; got bytes={size + change}"):
        codec.admission_from_wire(message)


@pytest.mark.parametrize("size", [0, SEALED_SEED_BYTES - 1, SEALED_SEED_BYTES + 1])
def test_a_sealed_seed_of_the_wrong_size_is_refused(size: int) -> None:
    message = good_admission()
    message.sealed_seed = bytes(size)
    with pytest.raises(MalformedError, match=f"sealed_seed of {SEALED_SEED_BYTES} bytes"):
        codec.admission_from_wire(message)


def test_an_empty_admission_is_refused() -> None:
    with pytest.raises(MalformedError):
        codec.admission_from_wire(round_pb2.Admission())


# --- verdicts ---------------------------------------------------------------------------------


def good_verdict() -> round_pb2.NormVerdict:
    receipt = codec.receipt_from_wire(good_admission().receipt)
    return codec.verdict_to_wire(
        Verdict.sign(cohort.identity(9), receipt, bytes(32), accepted=True)
    )


@pytest.mark.parametrize(
    ("name", "size"), [("sketch_digest", 32), ("identity", 32), ("signature", 64)]
)
@pytest.mark.parametrize("change", [-1, 1, -32])
def test_a_field_of_a_verdict_of_the_wrong_size_is_refused_by_its_name(
    name: str, size: int, change: int
) -> None:
    message = good_verdict()
    setattr(message, name, bytes(size + change))
    with pytest.raises(MalformedError, match=f"{name} of {size} bytes; got bytes={size + change}"):
        codec.verdict_from_wire(message)


@pytest.mark.parametrize("state", [0, 77])
def test_a_verdict_that_says_neither_is_refused(state: int) -> None:
    message = good_verdict()
    message.state = state  # type: ignore[assignment]
    with pytest.raises(MalformedError, match="accepts or rejects"):
        codec.verdict_from_wire(message)


def test_a_verdict_on_a_damaged_receipt_is_refused() -> None:
    message = good_verdict()
    message.receipt.challenge_commitment = b""
    with pytest.raises(MalformedError, match="challenge_commitment"):
        codec.verdict_from_wire(message)
    with pytest.raises(MalformedError):
        codec.verdict_from_wire(round_pb2.NormVerdict())


# --- plans ------------------------------------------------------------------------------------


def checked(message: plan_pb2.Plan, **fields: float) -> None:
    """Ask for a norm check; its own defaults where nothing else is said."""
    wanted = {"margin": 0.2, "sketches": 16, "tolerated": 1} | fields
    message.norm_check.CopyFrom(plan_pb2.NormCheck(**wanted))  # type: ignore[arg-type]


def good_plan() -> plan_pb2.Plan:
    return codec.plan_to_wire(cohort.mixed_plan())


def floats(message: plan_pb2.Plan) -> plan_pb2.FloatSegment:
    return message.segments[0].floats


def integers(message: plan_pb2.Plan) -> plan_pb2.IntegerSegment:
    return message.segments[1].integers


def private(message: plan_pb2.Plan, **fields: float) -> None:
    """Ask for noise; of equal weights, as it must be."""
    floats(message).weighting = plan_pb2.WEIGHTING_EQUAL
    floats(message).weight_cap = 1
    wanted = {
        "mode": plan_pb2.PRIVACY_MODE_RELEASE,
        "noise_multiplier": 1.0,
        "epsilon": 8.0,
        "delta": 1e-5,
        "integer_share": 0.1,
    }
    message.privacy.CopyFrom(plan_pb2.Privacy(**wanted | fields))  # type: ignore[arg-type]


def rename(message: plan_pb2.Plan, name: str) -> None:
    message.segments[1].name = name


def shape(message: plan_pb2.Plan, *sides: int) -> None:
    del floats(message).tensors[0].shape[:]
    floats(message).tensors[0].shape.extend(sides)


BAD_PLANS: dict[str, tuple[Callable[[plan_pb2.Plan], object], type[Exception], str]] = {
    "no segments": (lambda m: m.ClearField("segments"), PlanError, "1 to 16 .*segments"),
    "17 segments": (
        lambda m: m.segments.extend(
            plan_pb2.Segment(name=f"s{i}", integers=plan_pb2.IntegerSegment(size=1, max_abs=1))
            for i in range(15)
        ),
        PlanError,
        "1 to 16 .*segments",
    ),
    "a segment of no kind": (
        lambda m: m.segments[1].ClearField("kind"),
        MalformedError,
        "floats or integers; got neither",
    ),
    "two segments of one name": (lambda m: rename(m, "update"), PlanError, "distinctly named"),
    "a segment without a name": (lambda m: rename(m, ""), PlanError, "segment name of 1 to 128"),
    "a name too long": (lambda m: rename(m, "x" * 129), PlanError, "segment name of 1 to 128"),
    "a name with spaces": (lambda m: rename(m, "a b"), PlanError, "segment name"),
    "no weighting": (lambda m: floats(m).ClearField("weighting"), MalformedError, "weighting"),
    "an unknown weighting": (
        lambda m: setattr(floats(m), "weighting", 77),
        MalformedError,
        "known weighting; got number 77",
    ),
    "privacy without a mode": (lambda m: private(m, mode=0), MalformedError, "known privacy mode"),
    "an unknown mode": (lambda m: private(m, mode=9), MalformedError, "mode; got number 9"),
    "no noise": (lambda m: private(m, noise_multiplier=0.0), PlanError, "noise_multiplier from"),
    "NaN noise": (lambda m: private(m, noise_multiplier=math.nan), PlanError, "noise_multiplier"),
    "no epsilon": (lambda m: private(m, epsilon=0.0), PlanError, "epsilon above 0"),
    "all of delta": (lambda m: private(m, delta=1.0), PlanError, "delta from"),
    "no share for integers": (lambda m: private(m, integer_share=0.0), PlanError, "integer_share"),
    "honest clients of a release": (lambda m: private(m, honest_clients=1), PlanError, "from 0 to"),
    "more honest clients than there may be": (
        lambda m: private(m, mode=plan_pb2.PRIVACY_MODE_DISTRIBUTED, honest_clients=1_000_001),
        PlanError,
        "honest_clients from 0",
    ),
    "more honest clients than the smallest cohort has": (
        lambda m: private(m, mode=plan_pb2.PRIVACY_MODE_DISTRIBUTED, honest_clients=1_000_000),
        PlanError,
        "would work",
    ),
    "noise that no modulus holds": (
        lambda m: private(m, mode=plan_pb2.PRIVACY_MODE_DISTRIBUTED, noise_multiplier=1e6),
        PlanError,
        "would work",
    ),
    "privacy of weighted updates": (
        lambda m: m.privacy.CopyFrom(
            plan_pb2.Privacy(
                mode=plan_pb2.PRIVACY_MODE_RELEASE,
                noise_multiplier=1.0,
                epsilon=8.0,
                delta=1e-5,
                integer_share=0.1,
            )
        ),
        PlanError,
        "equal weights",
    ),
    "a rank of zero": (lambda m: setattr(floats(m).low_rank, "rank", 0), PlanError, "rank of 1"),
    "a low rank that says none": (lambda m: floats(m).low_rank.SetInParent(), PlanError, "rank"),
    "a subset of nothing": (
        lambda m: setattr(floats(m).random_subset, "fraction", 0.0),
        PlanError,
        "between 0 and 1",
    ),
    "a subset of everything": (
        lambda m: setattr(floats(m).random_subset, "fraction", 1.0),
        PlanError,
        "between 0 and 1",
    ),
    "a subset of NaN": (
        lambda m: setattr(floats(m).random_subset, "fraction", float("nan")),
        PlanError,
        "between 0 and 1",
    ),
    "a model of which next to nothing travels": (
        lambda m: (
            shape(m, *[(1 << 64) - 1] * 8),
            setattr(floats(m).random_subset, "fraction", 1e-160),
        ),
        PlanError,
        "however few of them travel",
    ),
    "rows that no tensor has": (lambda m: setattr(floats(m), "rows", 1 << 62), PlanError, "rows"),
    "a clip bit beside a weight": (
        lambda m: setattr(floats(m), "clip_bit", True),
        PlanError,
        "equal weights",
    ),
    "a threshold without rows": (
        lambda m: m.threshold.CopyFrom(plan_pb2.RowThreshold(counts="counts", least=3)),
        PlanError,
        "rows that stay apart",
    ),
    "a threshold of nobody": (
        lambda m: m.threshold.CopyFrom(plan_pb2.RowThreshold(counts="counts", least=1)),
        PlanError,
        "least from 2",
    ),
    "no tensors": (lambda m: floats(m).ClearField("tensors"), PlanError, "one or more"),
    "tensors out of order": (
        lambda m: floats(m).tensors.reverse(),
        MalformedError,
        "tensors sorted by name",
    ),
    "a tensor twice": (
        lambda m: floats(m).tensors.append(floats(m).tensors[0]),
        PlanError,
        "distinctly named tensors",
    ),
    "a tensor without a name": (
        lambda m: setattr(floats(m).tensors[0], "name", ""),
        PlanError,
        "tensor name",
    ),
    "a tensor side of zero": (lambda m: shape(m, 3, 0), PlanError, "positive sides"),
    "nine dimensions": (lambda m: shape(m, *[1] * 9), MalformedError, "8 dimensions"),
    "4097 tensors": (
        lambda m: floats(m).tensors.extend(
            plan_pb2.TensorSpec(name=f"t{i:05}") for i in range(4094)
        ),
        MalformedError,
        "at most 4096 tensors",
    ),
    "a side of 2**64 - 1": (lambda m: shape(m, (1 << 64) - 1), PlanError, "at most 268435456"),
    "eight sides of 2**64 - 1": (
        lambda m: shape(m, *[(1 << 64) - 1] * 8),
        PlanError,
        "at most 268435456",
    ),
    "more integers than fit": (
        lambda m: setattr(integers(m), "size", (1 << 64) - 1),
        PlanError,
        "at most 268435456",
    ),
    "no integers": (lambda m: setattr(integers(m), "size", 0), PlanError, "size and max_abs"),
    "no magnitude": (lambda m: setattr(integers(m), "max_abs", 0), PlanError, "size and max_abs"),
    "sums beyond the modulus": (
        lambda m: setattr(integers(m), "max_abs", (1 << 64) - 1),
        PlanError,
        "would work",
    ),
    "clip zero": (lambda m: setattr(floats(m), "clip", 0.0), PlanError, "clip norm from"),
    "clip below zero": (lambda m: setattr(floats(m), "clip", -1.0), PlanError, "clip norm"),
    "clip NaN": (lambda m: setattr(floats(m), "clip", float("nan")), PlanError, "clip norm from"),
    "clip infinite": (lambda m: setattr(floats(m), "clip", float("inf")), PlanError, "clip norm"),
    "1 bit": (lambda m: setattr(floats(m), "bits", 1), PlanError, "2 to 16 bits"),
    "17 bits": (lambda m: setattr(floats(m), "bits", 17), PlanError, "2 to 16 bits"),
    "no weight cap": (lambda m: setattr(floats(m), "weight_cap", 0), PlanError, "weight_cap"),
    "a huge weight cap": (
        lambda m: setattr(floats(m), "weight_cap", (1 << 64) - 1),
        PlanError,
        "weight_cap",
    ),
    "a cap with equal weights": (
        lambda m: setattr(floats(m), "weighting", plan_pb2.WEIGHTING_EQUAL),
        PlanError,
        "exactly 1 with equal weights",
    ),
    "two clients suffice": (lambda m: setattr(m, "min_clients", 2), PlanError, "min_clients of 3"),
    "no margin": (lambda m: checked(m, margin=0.0), PlanError, "margin from 0.15"),
    "a margin beyond 1": (lambda m: checked(m, margin=1.01), PlanError, "margin from 0.15"),
    "margin NaN": (lambda m: checked(m, margin=float("nan")), PlanError, "margin from 0.15"),
    "no sketches": (lambda m: checked(m, sketches=0), PlanError, "8 to 64 sketches"),
    "65 sketches": (lambda m: checked(m, sketches=65), PlanError, "8 to 64 sketches"),
    "everybody tolerated": (lambda m: checked(m, tolerated=1_000_001), PlanError, "tolerated"),
    "a cosine above one half": (lambda m: checked(m, min_cosine=0.6), PlanError, "min_cosine"),
    "a cosine below -1": (lambda m: checked(m, min_cosine=-1.1), PlanError, "min_cosine"),
    "cosine NaN": (lambda m: checked(m, min_cosine=float("nan")), PlanError, "min_cosine"),
    "a norm below 1": (lambda m: setattr(integers(m), "max_norm", 0.5), PlanError, "max_norm"),
    "a negative norm": (lambda m: setattr(integers(m), "max_norm", -1.0), PlanError, "max_norm"),
    "norm NaN": (
        lambda m: setattr(integers(m), "max_norm", float("nan")),
        PlanError,
        "max_norm",
    ),
    "a norm beyond all integers": (
        lambda m: setattr(integers(m), "max_norm", 1e300),
        PlanError,
        "max_norm",
    ),
    "no cohort": (lambda m: m.ClearField("min_clients"), PlanError, "min_clients of 3"),
    "most below fewest": (lambda m: setattr(m, "max_clients", 2), PlanError, "max_clients from"),
    "a million and one": (
        lambda m: setattr(m, "max_clients", 1_000_001),
        PlanError,
        "max_clients from",
    ),
}


def test_the_plan_that_the_cases_below_damage_is_good() -> None:
    assert codec.plan_from_wire(good_plan()) == cohort.mixed_plan()


@pytest.mark.parametrize("case", BAD_PLANS)
def test_a_plan_is_refused_with(case: str) -> None:
    damage, error, text = BAD_PLANS[case]
    message = good_plan()
    damage(message)
    with pytest.raises(error, match=text):
        codec.plan_from_wire(message)


def test_huge_shapes_are_refused_without_allocating_them() -> None:
    message = good_plan()
    shape(message, 1 << 40, 1 << 40)
    tracemalloc.start()
    try:
        with pytest.raises(PlanError):
            codec.plan_from_wire(message)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_the_largest_allowed_plan_is_planned_without_allocating_it() -> None:
    message = good_plan()
    del message.segments[1]
    shape(message, (1 << 27) - 1)
    tracemalloc.start()
    try:
        assert codec.plan_from_wire(message).payload_bytes > 1 << 28
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_every_field_of_a_plan_is_part_of_its_digest() -> None:
    digests = {codec.plan_from_wire(good_plan()).digest}
    changes: list[Callable[[plan_pb2.Plan], object]] = [
        lambda m: setattr(m, "min_clients", 4),
        lambda m: setattr(m, "max_clients", 7),
        lambda m: rename(m, "other"),
        lambda m: setattr(integers(m), "size", 25),
        lambda m: setattr(integers(m), "max_abs", 77),
        lambda m: setattr(floats(m), "clip", 2.0000000000000004),
        lambda m: setattr(floats(m), "bits", 9),
        lambda m: setattr(floats(m), "weight_cap", 101),
        lambda m: setattr(floats(m).tensors[0], "name", "a/weights"),
        lambda m: shape(m, 2, 3),
        lambda m: setattr(m.segments[0], "name", "updates"),
        lambda m: setattr(integers(m), "max_norm", 5.0),
        lambda m: checked(m),
        lambda m: checked(m, margin=0.25),
        lambda m: checked(m, sketches=17),
        lambda m: checked(m, tolerated=2),
    ]
    for change in changes:
        message = good_plan()
        change(message)
        digests.add(codec.plan_from_wire(message).digest)
    assert len(digests) == 1 + len(changes)


# --- bytes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STORED)
@given(data=st.binary(max_size=300))
def test_arbitrary_bytes_are_a_message_or_malformed(kind: type, data: bytes) -> None:
    with contextlib.suppress(MalformedError):
        assert isinstance(codec.parse(kind, data), kind)


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_stored_message_that_was_cut_off_is_malformed(cut: int) -> None:
    data = good_plan().SerializeToString()
    with pytest.raises(MalformedError, match="expected a Plan message"):
        codec.parse(plan_pb2.Plan, data[:-cut])


def test_text_that_is_not_utf8_is_malformed() -> None:
    with pytest.raises(MalformedError):
        codec.parse(round_pb2.ContextId, b"\x0a\x02\xff\xfe")


@given(st.binary(max_size=400))
def test_arbitrary_bytes_as_a_stored_admission_are_refused_as_malformed(data: bytes) -> None:
    with pytest.raises(MalformedError):
        codec.admission_from_wire(codec.parse(round_pb2.Admission, data))


@pytest.mark.parametrize("size", [0, 3, 5])
def test_exact_names_what_was_expected_and_what_came(size: int) -> None:
    with pytest.raises(MalformedError, match=f"expected thing of 4 bytes; got bytes={size}"):
        codec.exact("thing", bytes(size), 4)


@pytest.mark.parametrize(
    ("size", "count"),
    [
        (0, 1),
        (1, 1),
        (codec.PIECE_BYTES - 1, 1),
        (codec.PIECE_BYTES, 1),
        (codec.PIECE_BYTES + 1, 2),
        (2 * codec.PIECE_BYTES, 2),
        (2 * codec.PIECE_BYTES + 1, 3),
    ],
)
def test_pieces_put_together_are_the_whole(size: int, count: int) -> None:
    data = np.arange(size, dtype=np.uint8).tobytes()
    assert codec.piece_count(size) == count
    pieces = [codec.piece(data, index) for index in range(count)]
    assert b"".join(pieces) == data
    assert all(len(part) == codec.PIECE_BYTES for part in pieces[:-1])
    for index in (-1, count, 1 << 32):
        with pytest.raises(MalformedError, match=f"piece below {count}"):
            codec.piece(data, index)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_model_with_a_value_that_is_not_finite_is_refused(value: float) -> None:
    model = np.zeros(5, dtype=np.float32)
    model[4] = value
    with pytest.raises(MalformedError, match="finite"):
        codec.model_from_bytes(codec.model_to_bytes(model), 5)


@pytest.mark.parametrize("size", [0, 1, 19, 21, 24])
def test_a_model_of_the_wrong_size_is_refused(size: int) -> None:
    with pytest.raises(MalformedError, match=f"model of 20 bytes; got bytes={size}"):
        codec.model_from_bytes(bytes(size), 5)


@pytest.mark.parametrize("segment", [0, 1])
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_sum_is_refused_just_beyond_the_planned_range(segment: int, sign: int) -> None:
    plan = cohort.mixed_plan()
    sums = [np.zeros(layout.values, dtype=np.int64) for layout in plan.layouts]
    sums[segment][-1] = sign * plan.layouts[segment].sum_abs
    codec.sums_from_bytes(codec.sums_to_bytes(sums), plan)
    sums[segment][-1] += sign
    with pytest.raises(MalformedError, match="planned range"):
        codec.sums_from_bytes(codec.sums_to_bytes(sums), plan)


def test_the_smallest_int64_is_beyond_the_range_and_does_not_wrap() -> None:
    plan = cohort.counts_plan()
    sums = [np.full(cohort.COUNTS, np.iinfo(np.int64).min)]
    with pytest.raises(MalformedError, match="planned range"):
        codec.sums_from_bytes(codec.sums_to_bytes(sums), plan)


@pytest.mark.parametrize("change", [-8, -1, 1, 8])
def test_sums_of_the_wrong_size_are_refused(change: int) -> None:
    size = 8 * cohort.COUNTS + change
    with pytest.raises(MalformedError, match=f"sums of {8 * cohort.COUNTS} bytes"):
        codec.sums_from_bytes(bytes(size), cohort.counts_plan())


def test_a_refused_sum_does_not_say_its_value() -> None:
    plan = cohort.counts_plan()
    sums = [np.full(cohort.COUNTS, 123_456_789_012)]
    with pytest.raises(MalformedError) as caught:
        codec.sums_from_bytes(codec.sums_to_bytes(sums), plan)
    assert "123456789" not in str(caught.value)


# --- whole uploads ------------------------------------------------------------------------------


@functools.cache
def whole() -> tuple[Plan, Upload, bytes]:
    context = KeyHolder(cohort.counts_plan()).context
    upload = cohort.encrypted(context, 0)
    return context.plan, upload, codec.upload_to_bytes(upload)


def test_a_whole_upload_is_the_message_that_protobuf_writes() -> None:
    plan, upload, data = whole()
    message = codec.parse(round_pb2.WholeUpload, data)
    assert message.SerializeToString(deterministic=True) == data
    assert (message.payload, len(message.payload)) == (upload.payload, plan.payload_bytes)
    assert codec.upload_from_bytes(data, plan) == upload


def test_the_payload_of_a_whole_upload_is_not_copied() -> None:
    plan, _, data = whole()
    payload = codec.upload_from_bytes(data, plan).payload
    assert isinstance(payload, memoryview)
    assert payload.obj is data


def test_a_whole_upload_whose_payload_does_not_come_last_is_refused() -> None:
    plan, upload, data = whole()
    admission = data[: -plan.payload_bytes - 4]
    assert codec.upload_from_bytes(data, plan) == upload
    with pytest.raises(MalformedError, match="ends with a payload"):
        codec.upload_from_bytes(data[len(admission) :] + admission, plan)


def test_a_whole_upload_with_two_payloads_is_refused() -> None:
    plan, _, data = whole()
    twice = round_pb2.WholeUpload(payload=b"another").SerializeToString() + data
    with pytest.raises(MalformedError, match="one payload"):
        codec.upload_from_bytes(twice, plan)


@given(st.data())
def test_a_byte_changed_before_the_payload_is_refused_or_read_as_it_stands(
    data: st.DataObject,
) -> None:
    plan, _, sent = whole()
    head = len(sent) - plan.payload_bytes
    place, value = data.draw(st.integers(0, head - 1)), data.draw(st.integers(0, 255))
    changed = sent[:place] + bytes([value]) + sent[place + 1 :]
    try:
        found = codec.upload_from_bytes(changed, plan)
    except MalformedError:
        return
    assert found.payload == sent[head:]
