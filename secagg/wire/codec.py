"""Messages to values and back, strictly: exact sizes, known ranges, nothing left over.

Everything decoded here came from somewhere untrusted. Sizes are checked before anything is
allocated or computed, and a plan is planned again instead of believed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray

from secagg.context import NO_MODEL, ContextId, RoundContext
from secagg.errors import ConfigurationError, MalformedError, SchemaError
from secagg.optimisers import Optimiser
from secagg.parameters import (
    MAX_TENSORS,
    Compression,
    FloatSegment,
    IntegerSegment,
    LowRank,
    NormCheck,
    Plan,
    Privacy,
    RandomSubset,
    RowThreshold,
    Segment,
    TensorSpec,
)
from secagg.planner import make_plan
from secagg.quantize import Update, flatten
from secagg.receipts import CLIENT_KEY_BYTES, SIGNATURE_BYTES, Receipt
from secagg.sealing import ROUND_KEY_BYTES, SEALED_SEED_BYTES
from secagg.transcript import DIGEST_BYTES
from secagg.upload import Admission, Upload
from secagg.verdicts import Verdict
from secagg.wire.v1 import operator_service_pb2, plan_pb2, round_pb2

__all__ = [
    "MAX_MESSAGE_BYTES",
    "MODEL_VALUE_BYTES",
    "PIECE_BYTES",
    "admission_from_wire",
    "admission_to_wire",
    "context_id_from_wire",
    "context_id_to_wire",
    "exact",
    "model_digest",
    "model_digest_of",
    "model_from_bytes",
    "model_to_bytes",
    "optimiser_from_wire",
    "optimiser_to_wire",
    "parse",
    "piece",
    "piece_count",
    "plan_from_wire",
    "plan_to_wire",
    "receipt_from_wire",
    "receipt_to_wire",
    "round_context_from_wire",
    "sums_from_bytes",
    "sums_size",
    "sums_to_bytes",
    "tensors_from_wire",
    "tensors_to_wire",
    "upload_from_bytes",
    "upload_to_bytes",
    "verdict_from_wire",
    "verdict_to_wire",
]

MAX_MESSAGE_BYTES = 2 << 20
"""Largest message on the wire, set on both sides: 2 MiB."""

PIECE_BYTES = 1 << 20
"""Bytes of one piece of a model or of sums; as much is left for the message around it."""

MODEL_VALUE_BYTES = 4
_SUM_VALUE_BYTES = 8
_MAX_DIMENSIONS = 8
_MOST_ADMISSION_BYTES = 2048  # receipt and sealed seed are 1.6 kB

_WEIGHTINGS = {
    "equal": plan_pb2.WEIGHTING_EQUAL,
    "samples": plan_pb2.WEIGHTING_SAMPLES,
}
_WEIGHTING_NAMES = {number: name for name, number in _WEIGHTINGS.items()}

_MODES = {
    "release": plan_pb2.PRIVACY_MODE_RELEASE,
    "distributed": plan_pb2.PRIVACY_MODE_DISTRIBUTED,
    "local": plan_pb2.PRIVACY_MODE_LOCAL,
}
_MODE_NAMES = {number: name for name, number in _MODES.items()}

_OPTIMISERS = {
    "average": operator_service_pb2.OPTIMISER_NAME_AVERAGE,
    "momentum": operator_service_pb2.OPTIMISER_NAME_MOMENTUM,
    "adagrad": operator_service_pb2.OPTIMISER_NAME_ADAGRAD,
    "adam": operator_service_pb2.OPTIMISER_NAME_ADAM,
    "yogi": operator_service_pb2.OPTIMISER_NAME_YOGI,
}
_OPTIMISER_NAMES = {number: name for name, number in _OPTIMISERS.items()}

_M = TypeVar("_M", bound=Message)


def parse(kind: type[_M], data: bytes) -> _M:
    """Decode a stored message.

    Raises:
        MalformedError: the bytes are not one.
    """
    message = kind()
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise MalformedError(f"expected a {kind.__name__} message; the bytes are not one") from None
    return message


def exact(name: str, data: bytes, size: int) -> bytes:
    """The bytes themselves, if there are exactly ``size`` of them.

    Raises:
        MalformedError: there are not.
    """
    if len(data) != size:
        raise MalformedError(f"expected {name} of {size} bytes; got bytes={len(data)}")
    return data


def tensors_to_wire(tensors: Sequence[TensorSpec]) -> list[plan_pb2.TensorSpec]:
    """Names and shapes."""
    return [plan_pb2.TensorSpec(name=tensor.name, shape=tensor.shape) for tensor in tensors]


def tensors_from_wire(message: Sequence[plan_pb2.TensorSpec]) -> tuple[TensorSpec, ...]:
    """Names and shapes.

    Raises:
        MalformedError: too many tensors or dimensions.
        PlanError: a name or shape that no plan has.
    """
    if len(message) > MAX_TENSORS or any(len(t.shape) > _MAX_DIMENSIONS for t in message):
        raise MalformedError(
            f"expected at most {MAX_TENSORS} tensors of {_MAX_DIMENSIONS} dimensions"
        )
    return tuple(TensorSpec(tensor.name, tuple(tensor.shape)) for tensor in message)


def plan_to_wire(plan: Plan) -> plan_pb2.Plan:
    """A plan's specification."""
    return plan_pb2.Plan(
        min_clients=plan.min_clients,
        max_clients=plan.max_clients,
        segments=[_segment_to_wire(segment) for segment in plan.segments],
        norm_check=_norm_check_to_wire(plan.norm_check),
        privacy=_privacy_to_wire(plan.privacy),
        threshold=_threshold_to_wire(plan.threshold),
    )


def _norm_check_to_wire(check: NormCheck | None) -> plan_pb2.NormCheck | None:
    if check is None:
        return None
    return plan_pb2.NormCheck(
        margin=check.margin,
        sketches=check.sketches,
        tolerated=check.tolerated,
        min_cosine=check.min_cosine,
    )


def _norm_check_from_wire(message: plan_pb2.NormCheck) -> NormCheck:
    cosine = message.min_cosine if message.HasField("min_cosine") else None
    return NormCheck(message.margin, message.sketches, message.tolerated, cosine)


def _privacy_to_wire(privacy: Privacy | None) -> plan_pb2.Privacy | None:
    if privacy is None:
        return None
    return plan_pb2.Privacy(
        mode=_MODES[privacy.mode],
        noise_multiplier=privacy.noise_multiplier,
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        honest_clients=privacy.honest_clients,
        integer_share=privacy.integer_share,
    )


def _privacy_from_wire(message: plan_pb2.Privacy) -> Privacy:
    if message.mode not in _MODE_NAMES:
        raise MalformedError(f"expected a known privacy mode; got number {message.mode}")
    return Privacy(
        _MODE_NAMES[message.mode],
        message.noise_multiplier,
        message.epsilon,
        message.delta,
        message.honest_clients,
        message.integer_share,
    )


def _threshold_to_wire(threshold: RowThreshold | None) -> plan_pb2.RowThreshold | None:
    if threshold is None:
        return None
    return plan_pb2.RowThreshold(counts=threshold.counts, least=threshold.least)


def _threshold_from_wire(message: plan_pb2.RowThreshold) -> RowThreshold:
    return RowThreshold(message.counts, message.least)


def _segment_to_wire(segment: Segment) -> plan_pb2.Segment:
    if isinstance(segment, IntegerSegment):
        integers = plan_pb2.IntegerSegment(
            size=segment.size, max_abs=segment.max_abs, max_norm=segment.max_norm or 0.0
        )
        return plan_pb2.Segment(name=segment.name, integers=integers)
    floats = plan_pb2.FloatSegment(
        tensors=tensors_to_wire(segment.tensors),
        clip=segment.clip,
        bits=segment.bits,
        weighting=_WEIGHTINGS[segment.weighting],
        weight_cap=segment.weight_cap,
        rows=segment.rows,
        clip_bit=segment.clip_bit,
    )
    if isinstance(segment.compression, LowRank):
        floats.low_rank.rank = segment.compression.rank
    elif segment.compression is not None:
        floats.random_subset.fraction = segment.compression.fraction
    return plan_pb2.Segment(name=segment.name, floats=floats)


def plan_from_wire(message: plan_pb2.Plan) -> Plan:
    """Plan the received specification anew.

    Raises:
        MalformedError: a segment without a kind or weighting, tensors out of order, or privacy
            without a mode.
        PlanError: no exact plan exists for it.
    """
    segments = [_segment_from_wire(segment) for segment in message.segments]
    check = _norm_check_from_wire(message.norm_check) if message.HasField("norm_check") else None
    return make_plan(
        segments,
        min_clients=message.min_clients,
        max_clients=message.max_clients,
        norm_check=check,
        privacy=_privacy_from_wire(message.privacy) if message.HasField("privacy") else None,
        threshold=_threshold_from_wire(message.threshold)
        if message.HasField("threshold")
        else None,
    )


def _segment_from_wire(message: plan_pb2.Segment) -> Segment:
    kind = message.WhichOneof("kind")
    if kind == "integers":
        integers = message.integers
        max_norm = integers.max_norm or None
        return IntegerSegment(message.name, integers.size, integers.max_abs, max_norm)
    if kind != "floats":
        raise MalformedError("expected a segment of floats or integers; got neither")
    floats = message.floats
    if floats.weighting not in _WEIGHTING_NAMES:
        raise MalformedError(f"expected a known weighting; got number {floats.weighting}")
    tensors = tensors_from_wire(floats.tensors)
    weighting = _WEIGHTING_NAMES[floats.weighting]
    segment = FloatSegment(
        message.name,
        tensors,
        floats.clip,
        floats.bits,
        weighting,
        floats.weight_cap,
        floats.rows,
        floats.clip_bit,
        _compression_from_wire(floats),
    )
    if segment.tensors != tensors:
        raise MalformedError("expected tensors sorted by name; they are not")
    return segment


def _compression_from_wire(message: plan_pb2.FloatSegment) -> Compression | None:
    kind = message.WhichOneof("compression")
    if kind == "low_rank":
        return LowRank(message.low_rank.rank)
    return RandomSubset(message.random_subset.fraction) if kind else None


def optimiser_to_wire(optimiser: Optimiser) -> operator_service_pb2.Optimiser:
    """A server optimiser."""
    return operator_service_pb2.Optimiser(
        name=_OPTIMISERS[optimiser.name],
        learning_rate=optimiser.rate,
        beta1=optimiser.beta1,
        beta2=optimiser.beta2,
        tau=optimiser.tau,
    )


def optimiser_from_wire(message: operator_service_pb2.Optimiser) -> Optimiser:
    """A server optimiser.

    Raises:
        MalformedError: one that is not known.
        ConfigurationError: a number out of its range.
    """
    if message.name not in _OPTIMISER_NAMES:
        raise MalformedError(f"expected a known optimiser; got number {message.name}")
    return Optimiser(
        _OPTIMISER_NAMES[message.name],
        message.learning_rate,
        message.beta1,
        message.beta2,
        message.tau,
    )


def context_id_to_wire(context: ContextId) -> round_pb2.ContextId:
    """A context's name."""
    return round_pb2.ContextId(
        task_id=context.task_id,
        round_number=context.round_number,
        attempt=context.attempt,
        plan_digest=context.plan_digest,
        model_digest=context.model_digest,
        round_key_id=context.round_key_id,
    )


def context_id_from_wire(message: round_pb2.ContextId) -> ContextId:
    """A context's name.

    Raises:
        MalformedError: a field out of its range or size.
    """
    try:
        return ContextId(
            message.task_id,
            message.round_number,
            message.attempt,
            message.plan_digest,
            message.model_digest,
            message.round_key_id,
        )
    except ConfigurationError as error:
        raise MalformedError(str(error)) from None


def round_context_from_wire(
    context: round_pb2.ContextId, plan: plan_pb2.Plan, round_key: bytes
) -> RoundContext:
    """A context with its plan and key, all consistent.

    Raises:
        MalformedError, PlanError: see the parts.
        ContextError: the plan or the round key is not the one that the context names.
    """
    exact("round_key", round_key, ROUND_KEY_BYTES)
    return RoundContext(context_id_from_wire(context), plan_from_wire(plan), round_key)


def receipt_to_wire(receipt: Receipt) -> round_pb2.Receipt:
    """A receipt."""
    return round_pb2.Receipt(
        context=context_id_to_wire(receipt.context),
        client_key=receipt.client_key,
        upload_digest=receipt.upload_digest,
        sealed_seed_sha256=receipt.sealed_seed_sha256,
        challenge_commitment=receipt.challenge_commitment,
        signature=receipt.signature,
    )


def receipt_from_wire(message: round_pb2.Receipt) -> Receipt:
    """A receipt, its fields of the right sizes; not yet verified.

    Raises:
        MalformedError: a field of the wrong size.
    """
    return Receipt(
        context_id_from_wire(message.context),
        exact("client_key", message.client_key, CLIENT_KEY_BYTES),
        exact("upload_digest", message.upload_digest, DIGEST_BYTES),
        exact("sealed_seed_sha256", message.sealed_seed_sha256, DIGEST_BYTES),
        exact("challenge_commitment", message.challenge_commitment, DIGEST_BYTES),
        exact("signature", message.signature, SIGNATURE_BYTES),
    )


def admission_to_wire(admission: Admission) -> round_pb2.Admission:
    """Receipt and sealed seed."""
    return round_pb2.Admission(
        receipt=receipt_to_wire(admission.receipt), sealed_seed=admission.sealed_seed
    )


def admission_from_wire(message: round_pb2.Admission) -> Admission:
    """Receipt and sealed seed, of the right sizes; not yet verified.

    Raises:
        MalformedError: a field of the wrong size.
    """
    sealed = exact("sealed_seed", message.sealed_seed, SEALED_SEED_BYTES)
    return Admission(receipt_from_wire(message.receipt), sealed)


def upload_to_bytes(upload: Upload) -> bytes:
    """A whole upload as one message."""
    head = round_pb2.WholeUpload(admission=admission_to_wire(upload.admission))
    tag = _payload_tag(len(upload.payload))
    return b"".join((head.SerializeToString(), tag, upload.payload))


def upload_from_bytes(data: bytes, plan: Plan) -> Upload:
    """A whole upload of the sizes that a plan gives it; not yet verified.

    Of megabytes of ciphertext nothing is copied: the payload must come last, as every encoder
    writes it, and stays where it is.

    Returns:
        An upload whose payload is a view of ``data``.

    Raises:
        MalformedError: no such message, or one of other sizes.
    """
    most = plan.payload_bytes + _MOST_ADMISSION_BYTES
    if not plan.payload_bytes <= len(data) <= most:
        raise MalformedError(
            f"expected an upload of {plan.payload_bytes} bytes, and at most "
            f"{_MOST_ADMISSION_BYTES} more; got bytes={len(data)}; encrypt with the round's plan"
        )
    tag, start = _payload_tag(plan.payload_bytes), len(data) - plan.payload_bytes
    if data[max(start - len(tag), 0) : start] != tag:
        raise MalformedError(
            f"expected an upload that ends with a payload of {plan.payload_bytes} bytes; it does "
            "not; encrypt with the round's plan"
        )
    message = parse(round_pb2.WholeUpload, data[: start - len(tag)])
    if message.payload:
        raise MalformedError("expected one payload; got two; encrypt with the round's plan")
    return Upload(admission_from_wire(message.admission), memoryview(data)[start:])


@lru_cache(maxsize=64)
def _payload_tag(size: int) -> bytes:
    """What stands before a payload of so many bytes: the field's number, and its length."""
    return round_pb2.WholeUpload(payload=bytes(size)).SerializeToString()[: -size or None]


def verdict_to_wire(verdict: Verdict) -> round_pb2.NormVerdict:
    """A signed verdict."""
    state = (
        round_pb2.VERDICT_STATE_ACCEPTED if verdict.accepted else round_pb2.VERDICT_STATE_REJECTED
    )
    return round_pb2.NormVerdict(
        receipt=receipt_to_wire(verdict.receipt),
        sketch_digest=verdict.sketch_digest,
        state=state,
        identity=verdict.identity,
        signature=verdict.signature,
    )


def verdict_from_wire(message: round_pb2.NormVerdict) -> Verdict:
    """A signed verdict; not yet verified.

    Raises:
        MalformedError: a field of the wrong size, or neither accepted nor rejected.
    """
    known = (round_pb2.VERDICT_STATE_ACCEPTED, round_pb2.VERDICT_STATE_REJECTED)
    if message.state not in known:
        raise MalformedError("expected a verdict that accepts or rejects; got neither")
    return Verdict(
        receipt_from_wire(message.receipt),
        exact("sketch_digest", message.sketch_digest, DIGEST_BYTES),
        message.state == round_pb2.VERDICT_STATE_ACCEPTED,
        exact("identity", message.identity, CLIENT_KEY_BYTES),
        exact("signature", message.signature, SIGNATURE_BYTES),
    )


def piece_count(total_bytes: int) -> int:
    """Pieces that carry this many bytes; one for none."""
    return max(1, -(-total_bytes // PIECE_BYTES))


def piece(data: bytes, index: int) -> bytes:
    """Piece ``index`` of some bytes.

    Raises:
        MalformedError: there is no such piece.
    """
    if not 0 <= index < piece_count(len(data)):
        raise MalformedError(f"expected a piece below {piece_count(len(data))}; got {index=}")
    return data[index * PIECE_BYTES : (index + 1) * PIECE_BYTES]


def model_to_bytes(vector: NDArray[np.float32]) -> bytes:
    """A flat model as little-endian float32."""
    return np.ascontiguousarray(vector, dtype="<f4").tobytes()


def model_from_bytes(data: bytes, parameters: int) -> NDArray[np.float32]:
    """A flat model.

    Raises:
        MalformedError: not exactly ``parameters`` values, or not all finite.
    """
    vector = np.frombuffer(exact("model", data, parameters * MODEL_VALUE_BYTES), dtype="<f4")
    if not np.isfinite(vector).all():
        raise MalformedError("expected a model of finite values; one is NaN or infinite")
    return vector.astype(np.float32)


def model_digest(data: bytes) -> bytes:
    """SHA-256 of a model's bytes; 32 bytes."""
    return hashlib.sha256(data).digest()


def model_digest_of(plan: Plan, model: Update | None) -> bytes:
    """What a round's context says of the model that its clients start from.

    Args:
        model: float32 tensors by name; None for a round without a model.

    Raises:
        SchemaError: other tensors than those of the plan's one float segment, or no such segment.
        NonFiniteError: a value is NaN or infinite.
    """
    if model is None:
        return NO_MODEL
    floats = [segment for segment in plan.segments if isinstance(segment, FloatSegment)]
    if len(floats) != 1:
        raise SchemaError(
            f"expected a plan with one segment of floats, which a model is for; got {len(floats)}; "
            "leave the model out"
        )
    return model_digest(model_to_bytes(flatten(floats[0], model)))


def sums_to_bytes(sums: Sequence[NDArray[np.int64]]) -> bytes:
    """Exact sums as little-endian int64, in the plan's order."""
    return b"".join(np.ascontiguousarray(part, dtype="<i8").tobytes() for part in sums)


def sums_size(plan: Plan) -> int:
    """Bytes of what is released under a plan."""
    return sum(layout.values for layout in plan.layouts) * _SUM_VALUE_BYTES


def sums_from_bytes(data: bytes, plan: Plan) -> tuple[NDArray[np.int64], ...]:
    """What was released under a plan.

    Raises:
        MalformedError: not exactly the plan's values, or one beyond its planned range.
    """
    sizes = [layout.values for layout in plan.layouts]
    flat = np.frombuffer(exact("sums", data, sums_size(plan)), dtype="<i8")
    parts = np.split(flat.astype(np.int64), np.cumsum(sizes)[:-1])
    for most, part in zip(plan.released_abs, parts, strict=True):
        if max(int(part.max()), -int(part.min())) > most:
            raise MalformedError("expected sums within the planned range; one is beyond")
    return tuple(parts)
