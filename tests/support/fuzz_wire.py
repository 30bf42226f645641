"""Fuzz target: messages to values, and back to the same messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

import cohort
import numpy as np
from fuzz_inputs import Target, altered, refusable
from fuzz_protobuf import mutated
from google.protobuf.message import Message

from secagg.context import RoundContext
from secagg.errors import ConfigurationError, ContextError, MalformedError, PlanError
from secagg.optimisers import Optimiser
from secagg.parameters import (
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
from secagg.planner import make_plan
from secagg.privacy import release_rho
from secagg.receipts import Receipt
from secagg.sealing import SEALED_SEED_BYTES, RoundKeyPair
from secagg.sketch_shape import sketch_bytes
from secagg.upload import Admission, Upload
from secagg.verdicts import Verdict
from secagg.wire import codec
from secagg.wire.v1 import aggregation_service_pb2, operator_service_pb2, plan_pb2, round_pb2
from secagg_keyholder.policy import Policy
from secagg_server.stopping import Stop
from secagg_server.tasks import AdaptiveClip, TaskSpec

__all__ = ["PLANS", "WIRE", "round_of"]

_M = Any  # a message of the kind at hand


def _plans() -> dict[str, Plan]:
    tensors = (TensorSpec("items", (20, 6)), TensorSpec("bias", (20,)))
    update = FloatSegment("update", tensors, 1.0, 8)
    check = NormCheck(tolerated=2, min_cosine=-0.5)
    big = FloatSegment("update", (TensorSpec("table", (4096, 4)),), 1.0, 8)
    noisy = Privacy("distributed", 2.0, 8.0, 1e-6, 2)
    rows = FloatSegment("update", tensors, 1.0, 8, rows=20)
    counts = IntegerSegment("contributors", 20, 1, 3.0)
    return {
        "counts": cohort.counts_plan(),
        "mixed": cohort.mixed_plan(),
        "checked": cohort.mixed_plan(norm_check=NormCheck()),
        "direction": make_plan([big], max_clients=9, norm_check=check),
        "private": make_plan([update], max_clients=9, privacy=Privacy("release", 1.0, 8.0, 1e-6)),
        "distributed": make_plan(
            [update, IntegerSegment("seen", 4, 9, 9.0)], max_clients=9, privacy=noisy
        ),
        "rows": make_plan([rows, counts], max_clients=9, threshold=RowThreshold(counts.name, 3)),
        "low rank": make_plan(
            [FloatSegment("update", tensors, 1.0, 8, clip_bit=True, compression=LowRank(2))],
            max_clients=9,
        ),
        "subset": make_plan(
            [FloatSegment("update", tensors, 1.0, 8, compression=RandomSubset(0.25))], max_clients=9
        ),
    }


PLANS = cache(_plans)
"""One small plan of each kind, by name."""


def round_of(plan: Plan, **name: Any) -> RoundContext:  # noqa: ANN401 - names of a context
    """A round of task "task" whose key is the same in every run."""
    pair = RoundKeyPair.from_bytes(bytes(range(96)))
    return cohort.round_context(plan, task_id="task", pair=pair, **name)


@dataclass(frozen=True)
class _Kind:
    """One kind of message: how it is read, written, and used at once by whoever receives it."""

    message: type[Message]
    read: Callable[[_M], Any]
    write: Callable[[Any], Message]
    use: Callable[[Any], object] = lambda value: None
    exact: bool = True  # what is accepted is written as it came


def _use_plan(plan: Plan) -> None:
    assert plan.payload_bytes > 0
    assert len(plan.digest) == 32
    with refusable(ConfigurationError):
        Policy(min_clients=4).check(plan)
    if plan.norm_check is not None:
        assert sketch_bytes(plan, direction=True) > 0
    if plan.privacy is not None:
        assert release_rho(plan) > 0


def _use_receipt(receipt: Receipt) -> None:
    digests = (receipt.client_key, receipt.upload_digest, receipt.sealed_seed_sha256)
    assert {len(each) for each in (*digests, receipt.challenge_commitment)} == {32}
    assert len(receipt.signature) == 64


def _use_admission(admission: Admission) -> None:
    _use_receipt(admission.receipt)
    assert len(admission.sealed_seed) == SEALED_SEED_BYTES


def _use_verdict(verdict: Verdict) -> None:
    _use_receipt(verdict.receipt)
    assert (len(verdict.identity), len(verdict.signature)) == (32, 64)


def _use_task(spec: TaskSpec) -> None:
    assert 0 <= spec.model_bytes <= 4 << 28
    with refusable(ConfigurationError):
        spec.check_budget()


def _round(message: aggregation_service_pb2.GetRoundResponse) -> Any:  # noqa: ANN401
    return codec.round_context_from_wire(message.context, message.plan, message.round_key)


def _offer(context: Any) -> Message:  # noqa: ANN401
    return aggregation_service_pb2.GetRoundResponse(
        context=codec.context_id_to_wire(context.id),
        plan=codec.plan_to_wire(context.plan),
        round_key=context.round_key,
    )


# Inputs that are kept count on these places: new ones go to the end.
_KINDS = (
    _Kind(plan_pb2.Plan, codec.plan_from_wire, codec.plan_to_wire, _use_plan, exact=False),
    _Kind(round_pb2.ContextId, codec.context_id_from_wire, codec.context_id_to_wire),
    _Kind(round_pb2.Receipt, codec.receipt_from_wire, codec.receipt_to_wire, _use_receipt),
    _Kind(round_pb2.Admission, codec.admission_from_wire, codec.admission_to_wire, _use_admission),
    _Kind(round_pb2.NormVerdict, codec.verdict_from_wire, codec.verdict_to_wire, _use_verdict),
    _Kind(operator_service_pb2.Optimiser, codec.optimiser_from_wire, codec.optimiser_to_wire),
    _Kind(
        plan_pb2.FloatSegment,
        lambda message: codec.tensors_from_wire(message.tensors),
        lambda value: plan_pb2.FloatSegment(tensors=codec.tensors_to_wire(value)),
        exact=False,
    ),
    _Kind(
        operator_service_pb2.TaskSpec, TaskSpec.from_wire, TaskSpec.to_wire, _use_task, exact=False
    ),
    _Kind(aggregation_service_pb2.GetRoundResponse, _round, _offer, exact=False),
)
_MODEL, _SUMS = len(_KINDS), len(_KINDS) + 1
_MODEL_VALUES = 5


def _one(data: bytes) -> None:
    which, body = data[:1], data[1:]
    kind = which[0] % (len(_KINDS) + 2) if which else 0
    if kind == _MODEL:
        _model(body)
    elif kind == _SUMS:
        _sums(body)
    else:
        _message(_KINDS[kind], body)


def _message(kind: _Kind, body: bytes) -> None:
    with refusable(MalformedError, PlanError, ConfigurationError, ContextError):
        message = codec.parse(kind.message, body)
        value = kind.read(message)
        kind.use(value)
        written = kind.write(value)
        assert kind.read(written) == value
        assert kind.write(kind.read(written)) == written
        if kind.exact:
            message.DiscardUnknownFields()  # type: ignore[attr-defined]
            assert written == message


def _model(body: bytes) -> None:
    with refusable(MalformedError):
        vector = codec.model_from_bytes(body, _MODEL_VALUES)
        assert (vector.dtype, vector.shape) == (np.float32, (_MODEL_VALUES,))
        assert np.isfinite(vector).all()
        assert codec.model_to_bytes(vector) == body


def _sums(body: bytes) -> None:
    plan = PLANS()["counts"]
    with refusable(MalformedError):
        parts = codec.sums_from_bytes(body, plan)
        assert [part.size for part in parts] == [layout.values for layout in plan.layouts]
        assert codec.sums_to_bytes(parts) == body


def _mutate(data: bytes, random: Random) -> bytes:
    kind = data[0] % (len(_KINDS) + 2) if data else 0
    if kind >= len(_KINDS):
        return bytes([kind]) + altered(data[1:], random)
    try:
        message = codec.parse(_KINDS[kind].message, data[1:])
    except MalformedError:
        return bytes([kind]) + altered(data[1:], random)
    return bytes([kind]) + mutated(message, random).SerializeToString(deterministic=True)


def _seeds() -> dict[str, bytes]:
    found: dict[str, Message] = {
        f"plan {name}": codec.plan_to_wire(plan) for name, plan in PLANS().items()
    }
    context = round_of(PLANS()["counts"])
    upload: Upload = cohort.noise_upload(context, 0)
    admission: Admission = upload.admission
    verdict = Verdict.sign(cohort.identity(9), admission.receipt, bytes(32), accepted=True)
    segment = codec.plan_to_wire(PLANS()["mixed"]).segments[0].floats
    optimiser = Optimiser("adam", 0.1)
    stop = Stop(3, 0.0, "validation", 0.01)
    hits = IntegerSegment("validation", 2, 100)
    update = FloatSegment("update", (TensorSpec("items", (20, 6)),), 1.0, 8, clip_bit=True)
    learned = make_plan([update, hits], max_clients=9)
    task = TaskSpec("task", learned, 9, 60_000, 3, 9, 0, AdaptiveClip(), optimiser, stop).to_wire()
    found |= {
        "context": codec.context_id_to_wire(context.id),
        "receipt": codec.receipt_to_wire(admission.receipt),
        "admission": codec.admission_to_wire(admission),
        "verdict": codec.verdict_to_wire(verdict),
        "optimiser": codec.optimiser_to_wire(optimiser),
        "tensors": segment,
        "task": task,
        "offer": _offer(context),
    }
    kinds = {kind.message: index for index, kind in enumerate(_KINDS)}
    model = np.linspace(-1, 1, _MODEL_VALUES, dtype=np.float32)
    sums = np.arange(cohort.COUNTS, dtype=np.int64) - 3
    return {
        name: bytes([kinds[type(message)]]) + message.SerializeToString(deterministic=True)
        for name, message in found.items()
    } | {
        "model": bytes([_MODEL]) + codec.model_to_bytes(model),
        "sums": bytes([_SUMS]) + codec.sums_to_bytes([sums]),
    }


WIRE = Target(
    "wire",
    "messages: plans, contexts, receipts, verdicts, optimisers, tasks, offers; models and sums",
    ("wire.codec", "TaskSpec.from_wire", "make_plan"),
    _one,
    _seeds,
    _mutate,
    PLANS,
)
