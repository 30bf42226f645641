"""Fuzz target: what servers answer clients and operators, and key holders answer servers.

Each answer is a message, and a byte that says how much of it is made to fit once it was changed: a
false answer that is signed by the right party goes further than one that is not.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from functools import cache
from random import Random
from types import SimpleNamespace
from typing import Any

import cohort
import grpc
import numpy as np
from attacker import PuppetSession
from fuzz_inputs import Target, altered, refusable
from fuzz_protobuf import mutated
from fuzz_server import Loop
from fuzz_wire import PLANS, round_of
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from secagg.challenges import commitment
from secagg.context import NO_MODEL, RoundContext
from secagg.endorsement import Endorsement
from secagg.errors import (
    ConfigurationError,
    ForgedSketchError,
    IdentityError,
    InputError,
    MalformedError,
    PrivacyError,
    RoundError,
    SecaggError,
    UploadError,
)
from secagg.parameters import NormCheck, Plan
from secagg.receipts import Receipt
from secagg.residues import widen
from secagg.rpc.status import from_rpc_error, retry_delay_s
from secagg.sampling import Stream
from secagg.sketches import sketch
from secagg.upload import Admission, Upload
from secagg.verdicts import Verdict
from secagg.wire import codec
from secagg.wire.v1 import aggregation_service_pb2 as pb
from secagg.wire.v1 import key_holder_service_pb2 as holder_pb
from secagg.wire.v1 import operator_service_pb2 as operator_pb
from secagg.wire.v1 import round_pb2
from secagg_client.embedded import EmbeddedClient
from secagg_client.judgement import judged
from secagg_client.outbox import Kept
from secagg_server.key_holder import KeyHolderClient
from secagg_server.operator import Operator

__all__ = ["ANSWERS"]

_REFUSALS = (UploadError, IdentityError, RoundError, ConfigurationError, InputError, PrivacyError)
_FITTED, _REPEATED = 1, 2  # bits of the second byte
_MOST_POLYNOMIALS = 4
_CHALLENGE = bytes(range(32))
_HOLDER = cohort.identity(80)
_ME = 0


class _Failed(grpc.RpcError):
    """A failed call, with whatever a peer puts behind it."""

    def __init__(self, code: grpc.StatusCode, text: str, details: bytes) -> None:
        self._code, self._text, self._details = code, text, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._text

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return (("grpc-status-details-bin", self._details),)


@dataclass(frozen=True)
class _Kind:
    """One kind of answer, and whoever reads it."""

    message: type[Message]
    take: Callable[[Any, int], None]


@cache
def _loop() -> Loop:
    return Loop()


@cache
def _checked() -> tuple[Kept, bytes]:
    """An upload that this client has kept, and the digest of the sketch it should be judged by."""
    context = round_of(cohort.mixed_plan(norm_check=NormCheck()))
    made = cohort.noise_upload(context, _ME)
    digest, sealed = made.admission.receipt.upload_digest, made.admission.sealed_seed
    asked = commitment(_CHALLENGE)
    receipt = Receipt.sign(cohort.identity(_ME), context.id, digest, sealed, asked)
    upload = Upload(Admission(receipt, sealed), made.payload)
    chunks = [widen(upload.payload, context.plan.blocks)]
    shown = sketch(context, digest, chunks, _CHALLENGE)
    return Kept(context, _HOLDER.public, upload), shown.digest


@cache
def _plain() -> tuple[RoundContext, Upload]:
    context = round_of(cohort.counts_plan())
    return context, cohort.noise_upload(context, _ME)


def _kit() -> Any:  # noqa: ANN401 - the part of a kit that is asked for
    return SimpleNamespace(identity=cohort.identity(_ME), pins=lambda: frozenset([_HOLDER.public]))


# --- to a client --------------------------------------------------------------------------------


def _offer(answer: pb.GetRoundResponse, how: int) -> None:
    if how & _FITTED:
        _endorse(answer)
    model = None if answer.context.model_digest == NO_MODEL else {}
    joined = EmbeddedClient(_kit(), "task", rounding=_rounding).join(
        answer.SerializeToString(), model
    )
    plan = joined.context.plan
    if plan.blocks <= _MOST_POLYNOMIALS:
        sent = joined.encrypt(cohort.contribution(plan, _ME), samples=1 + how)
        codec.upload_from_bytes(sent, plan).validate(joined.context)


def _endorse(answer: pb.GetRoundResponse) -> None:
    """Sign an offer as the key holder, whatever it says."""
    plan = codec.plan_from_wire(answer.plan)
    name = answer.context
    made = RoundContext.create(
        plan,
        codec.exact("round_key", answer.round_key, 1216),
        task_id=name.task_id,
        round_number=name.round_number,
        attempt=name.attempt,
        model_digest=name.model_digest,
    )
    answer.context.CopyFrom(codec.context_id_to_wire(made.id))
    signed = Endorsement.sign(_HOLDER, made.id)
    answer.key_holder_identity, answer.round_key_signature = signed.identity, signed.signature


def _rounding(_context: RoundContext) -> Stream:
    return Stream.derive("fuzz")


def _notice(answer: pb.GetVerdictResponse, how: int) -> None:
    kept, _ = _checked()
    if how & _FITTED:
        said = codec.verdict_from_wire(answer.verdict)
        signed = Verdict.sign(_HOLDER, said.receipt, said.sketch_digest, accepted=said.accepted)
        answer.verdict.CopyFrom(codec.verdict_to_wire(signed))
    with refusable(ForgedSketchError):
        judgement = judged(answer, kept, [_HOLDER.public], lambda *_: b"")
        assert judgement.context == kept.context.id


def _session(**answers: Message) -> PuppetSession:
    return PuppetSession(cohort.identity(_ME), dict(answers))


def _model(answer: pb.GetModelResponse, how: int) -> None:
    if how & _FITTED:
        answer.model_digest = codec.model_digest(answer.data * max(answer.chunk_count % 4, 1))
    session = _session(GetModel=answer)
    with refusable(*_REFUSALS):
        model = session.latest_model()
        assert model.version == answer.version
        assert all(tensor.dtype == np.float32 for tensor in model.tensors.values())
    plan = PLANS()["mixed"]
    context = round_of(plan, model_digest=answer.model_digest)
    session._starting_model(context, pb.GetRoundResponse(model_version=1))


def _announced(answer: pb.OpenUploadResponse, _how: int) -> None:
    context, upload = _plain()
    session = _Counting(_session(OpenUpload=answer))
    PuppetSession.__mro__[1].send(session.inner, context, upload)  # type: ignore[attr-defined]
    assert session.sent <= context.plan.chunks, "a server had one chunk sent more than once"


class _Counting:
    """Counts the chunks that a session sends."""

    def __init__(self, inner: PuppetSession) -> None:
        self.inner, self.sent = inner, 0
        inner.answers |= {"CommitUpload": pb.CommitUploadResponse()}
        ask = inner._call

        def call(method: Callable[..., Any], request: object) -> Any:  # noqa: ANN401
            if isinstance(request, pb.PutChunkRequest):
                self.sent += 1
                return pb.PutChunkResponse()
            return ask(method, request)

        inner._call = call  # type: ignore[method-assign]


def _status(answer: status_pb2.Status, how: int) -> None:
    codes = list(grpc.StatusCode)
    code = codes[how % len(codes)]
    text = "details"
    if how & 64:  # else nothing behind the code is looked at
        answer.code, text = code.value[0], answer.message
    failed = _Failed(code, text, answer.SerializeToString())
    assert isinstance(from_rpc_error(failed), SecaggError)
    delay = retry_delay_s(failed)
    assert delay is None or np.isfinite(delay)


# --- to a server --------------------------------------------------------------------------------


class _Stub:
    """A key holder that answers every call with the same message, so many times."""

    def __init__(self, answer: Message, times: int) -> None:
        self._answer, self._times = answer, times
        self.taken = 0

    def __getattr__(self, method: str) -> Any:  # noqa: ANN401
        if method in ("GetVerdicts", "Release"):
            return lambda *_args, **_kwargs: self._stream()
        return lambda *_args, **_kwargs: self._once()

    async def _once(self) -> Message:
        return self._answer

    async def _stream(self) -> AsyncIterator[Message]:
        for _ in range(self._times):
            self.taken += 1
            yield self._answer


def _asked(answer: Message, how: int) -> tuple[KeyHolderClient, _Stub]:
    client = KeyHolderClient.__new__(KeyHolderClient)
    client._kit = None
    stub = _Stub(answer, 1000 if how & _REPEATED else 1)

    async def stubbed() -> Any:  # noqa: ANN401
        return stub

    client._stub = stubbed  # type: ignore[method-assign]
    return client, stub


def _opened(answer: holder_pb.OpenRoundResponse, how: int) -> None:
    client, _ = _asked(answer, how)
    plan = cohort.counts_plan()
    context, _ = _loop().run(
        client.open_round(plan, task_id="task", round_number=1, attempt=1, model_digest=bytes(32))
    )
    assert (context.plan, context.id.task_id) == (plan, "task")


def _judged(answer: holder_pb.JudgeUploadsResponse, how: int) -> None:
    context, upload = _plain()
    client, _ = _asked(answer, how)
    refused = _loop().run(client.judge(context, [upload.admission]))
    assert set(refused) <= {upload.admission.receipt.upload_digest}


def _verdicts(answer: holder_pb.GetVerdictsResponse, how: int) -> None:
    kept, _ = _checked()
    client, stub = _asked(answer, how)
    with refusable(MalformedError):
        found = _loop().run(client.verdicts(kept.context))
        assert len(found) <= kept.context.plan.max_clients
    assert stub.taken <= kept.context.plan.max_clients + 1


def _released(answer: holder_pb.ReleaseResponse, how: int) -> None:
    context, upload = _plain()
    client, stub = _asked(answer, how)
    most = 8 * sum(layout.values for layout in context.plan.layouts)
    names = [upload.admission.receipt.upload_digest]
    residues = np.zeros((context.plan.sum_blocks, 4096), np.uint64)
    with refusable(MalformedError):
        _loop().run(client.release(context, names, residues))
    assert stub.taken * len(answer.data) <= most + len(answer.data), "more was kept than a sum has"
    assert stub.taken <= most + 1, "a stream of nothing went on"


def _audited(answer: holder_pb.AuditNoiseResponse, how: int) -> None:
    context, upload = _plain()
    client, _ = _asked(answer, how)
    name = upload.admission.receipt.upload_digest
    low = np.zeros((context.plan.blocks, 4096), np.uint32)
    assert isinstance(_loop().run(client.audit(context, name, low)), str)


def _sums(answer: operator_pb.GetSumsResponse, how: int) -> None:
    operator = Operator.__new__(Operator)
    answers = [answer] * (how % 3)

    def stream(*_args: object, **_kwargs: object) -> Iterator[Message]:
        return iter(answers)

    operator._stub = SimpleNamespace(GetSums=stream)  # type: ignore[assignment]
    data, _ = operator.sums("task", 1)
    assert data == answer.data * len(answers)


# Inputs that are kept count on these places: new ones go to the end.
_KINDS = (
    _Kind(pb.GetRoundResponse, _offer),
    _Kind(pb.GetVerdictResponse, _notice),
    _Kind(pb.GetModelResponse, _model),
    _Kind(pb.OpenUploadResponse, _announced),
    _Kind(status_pb2.Status, _status),
    _Kind(holder_pb.OpenRoundResponse, _opened),
    _Kind(holder_pb.JudgeUploadsResponse, _judged),
    _Kind(holder_pb.GetVerdictsResponse, _verdicts),
    _Kind(holder_pb.ReleaseResponse, _released),
    _Kind(holder_pb.AuditNoiseResponse, _audited),
    _Kind(operator_pb.GetSumsResponse, _sums),
)


def _one(data: bytes) -> None:
    if len(data) < 2:
        return
    kind = _KINDS[data[0] % len(_KINDS)]
    with refusable(*_REFUSALS):
        kind.take(codec.parse(kind.message, data[2:]), data[1])


def _mutate(data: bytes, random: Random) -> bytes:
    if len(data) < 2:
        return bytes([random.randrange(len(_KINDS)), 0])
    head = bytes([data[0], random.randrange(256) if random.random() < 0.2 else data[1]])
    try:
        message = codec.parse(_KINDS[data[0] % len(_KINDS)].message, data[2:])
    except MalformedError:
        return head + altered(data[2:], random)
    return head + mutated(message, random).SerializeToString(deterministic=True)


def _offers() -> Iterator[tuple[str, Message]]:
    for name, plan in PLANS().items():
        yield f"an offer, {name}", _offer_of(plan)


def _offer_of(plan: Plan) -> pb.GetRoundResponse:
    context = round_of(plan)
    asked = b"" if plan.norm_check is None else commitment(_CHALLENGE)
    offer = pb.GetRoundResponse(
        context=codec.context_id_to_wire(context.id),
        plan=codec.plan_to_wire(plan),
        round_key=context.round_key,
        rounds_total=3,
        challenge_commitment=asked,
    )
    _endorse(offer)
    return offer


def _seeds() -> dict[str, bytes]:
    kept, sketch_digest = _checked()
    context, upload = _plain()
    name, receipt = upload.admission.receipt.upload_digest, kept.upload.admission.receipt
    verdict = Verdict.sign(_HOLDER, receipt, sketch_digest, accepted=True)
    wired, tensors = codec.verdict_to_wire(verdict), cohort.TENSORS
    model = np.zeros(sum(tensor.size for tensor in tensors), np.float32).tobytes()
    accepted = round_pb2.Verdict(upload_digest=name, state=round_pb2.VERDICT_STATE_ACCEPTED)
    error = status_pb2.Status(code=code_pb2.Code.Value("UNAVAILABLE"), message="ask again")
    error.details.add().Pack(error_details_pb2.ErrorInfo(reason="NOT_READY", domain="secagg"))
    error.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=Duration(nanos=200_000_000)))
    found: dict[str, Message] = dict(_offers()) | {
        "a verdict": pb.GetVerdictResponse(verdict=wired, challenge_key=_CHALLENGE),
        "a model": pb.GetModelResponse(
            version=1,
            model_digest=codec.model_digest(model),
            total_bytes=len(model),
            chunk_count=1,
            data=model,
            tensors=codec.tensors_to_wire(tensors),
        ),
        "an announced upload": pb.OpenUploadResponse(
            state=round_pb2.UPLOAD_STATE_RECEIVING, missing_chunks=[0]
        ),
        "an error": error,
        "a round key": holder_pb.OpenRoundResponse(
            context=codec.context_id_to_wire(context.id),
            round_key=context.round_key,
            identity=_HOLDER.public,
            signature=Endorsement.sign(_HOLDER, context.id).signature,
        ),
        "judged uploads": holder_pb.JudgeUploadsResponse(verdicts=[accepted]),
        "verdicts": holder_pb.GetVerdictsResponse(verdicts=[wired]),
        "sums": holder_pb.ReleaseResponse(data=bytes(8 * cohort.COUNTS), contributors=1),
        "an audit": holder_pb.AuditNoiseResponse(verdict=accepted),
        "an operator's sums": operator_pb.GetSumsResponse(data=bytes(16), contributors=3),
    }
    places = {kind.message: place for place, kind in enumerate(_KINDS)}
    return {
        name: bytes([places[type(message)], _FITTED])
        + message.SerializeToString(deterministic=True)
        for name, message in found.items()
    }


def _prepare() -> None:
    _loop()
    _checked()
    _plain()


ANSWERS = Target(
    "answers",
    "answers of servers to clients and operators, of key holders to servers; errors of either",
    ("EmbeddedClient.join", "judged", "ClientSession", "KeyHolderClient", "from_rpc_error"),
    _one,
    _seeds,
    _mutate,
    _prepare,
)
