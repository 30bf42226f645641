"""A client's conversation with the server: wait for a round, fetch the model, contribute.

Works with numpy alone::

    with ClientSession("127.0.0.1:7400", "my-task", identity) as session:
        for current in session.rounds():
            update = train(current.model)
            current.contribute({"update": update}, samples=100)

A contribution is encrypted once; a lost answer only sends the same bytes again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from secagg.context import NO_MODEL, RoundContext
from secagg.encryptor import encrypt_quantized
from secagg.errors import ClosedError, ConfigurationError, ContextError, MalformedError
from secagg.parameters import CHUNK_BYTES, MAX_VALUES, FloatSegment, TensorSpec
from secagg.quantize import Contribution, quantize
from secagg.receipts import SigningKey
from secagg.rpc.channels import channel, is_loopback
from secagg.rpc.retry import RetryPolicy
from secagg.sampling import Stream
from secagg.upload import Upload
from secagg.wire.codec import (
    MODEL_VALUE_BYTES,
    admission_to_wire,
    context_id_to_wire,
    exact,
    model_digest,
    model_from_bytes,
    piece_count,
    round_context_from_wire,
    tensors_from_wire,
)
from secagg.wire.v1 import aggregation_service_pb2 as pb
from secagg.wire.v1 import aggregation_service_pb2_grpc, round_pb2

__all__ = ["ClientSession", "Cost", "CurrentRound", "Model"]

_T = TypeVar("_T")
_CALL_TIMEOUT_S = 30.0

RoundingSource = Callable[[RoundContext], Stream]


@dataclass(frozen=True, slots=True)
class Model:
    """A model version as the server hands it out.

    Attributes:
        version: 0 is the initial model.
        tensors: float32 arrays by name.
    """

    version: int
    tensors: dict[str, NDArray[np.float32]] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Cost:
    """What one contribution cost, in seconds and bytes."""

    quantize_s: float
    encrypt_s: float
    upload_s: float
    upload_bytes: int


@dataclass(frozen=True)
class CurrentRound:
    """A round that this client can contribute to, once.

    Attributes:
        context: the round.
        model: what to start from; no tensors in a task without a model.
        rounds_total: rounds that the task will have.
    """

    context: RoundContext
    model: Model
    rounds_total: int
    _session: ClientSession = field(repr=False)

    @property
    def number(self) -> int:
        """The round's number, from 1."""
        return self.context.id.round_number

    def contribute(self, contributions: Mapping[str, Contribution], *, samples: int = 1) -> Cost:
        """Quantise, encrypt and upload one contribution for each segment of the plan.

        Raises:
            InputError: the data cannot be used; nothing was sent.
            ClosedError: too late; nothing of it is in the sum.
            UploadError: refused; the message says why.
            UnavailableError: the server could not be reached in time.
        """
        return self._session.contribute(self.context, contributions, samples=samples)


class ClientSession:
    """Takes part in one task of one server.

    Args:
        address: ``host:port`` of the server.
        task_id: the task to join.
        identity: the client's signing key; the same one in every round.
        rounding: makes the stream of the stochastic rounding for a round; the operating system when
            omitted. Anything else is repeatable, and refused off loopback.
        retry: when to try again.

    Raises:
        ConfigurationError: an address that cannot be used, or repeatable rounding off loopback.
    """

    def __init__(
        self,
        address: str,
        task_id: str,
        identity: SigningKey,
        *,
        rounding: RoundingSource | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        if rounding is not None and not is_loopback(address):
            raise ConfigurationError(
                "expected rounding by the operating system's randomness off loopback; a repeatable "
                "stream is for demos and tests on one machine"
            )
        self._task_id = task_id
        self._identity = identity
        self._rounding = rounding or (lambda _context: Stream.from_os())
        self._retry = retry or RetryPolicy()
        self._channel = channel(address)
        self._stub = aggregation_service_pb2_grpc.AggregationServiceStub(self._channel)

    def __enter__(self) -> ClientSession:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def rounds(self) -> Iterator[CurrentRound]:
        """Every round that this client can contribute to, until the task ends.

        Another attempt at an aborted round comes as a round of its own.

        Raises:
            RoundError: the task has failed; the message says why.
            UnavailableError: the server could not be reached in time.
            SecaggError: what else the server answered.
        """
        done = (0, 0)
        while True:
            try:
                answer = self._next_round(done)
            except ClosedError:
                return
            context = round_context_from_wire(answer.context, answer.plan, answer.round_key)
            offered = (context.id.round_number, context.id.attempt)
            if context.id.task_id != self._task_id or offered <= done:
                raise ContextError(
                    "expected a later round of the task joined; got another one: this server "
                    "repeats itself or mixes tasks up"
                )
            yield CurrentRound(
                context, self._starting_model(context, answer), answer.rounds_total, self
            )
            done = (context.id.round_number, context.id.attempt)

    def _next_round(self, done: tuple[int, int]) -> pb.GetRoundResponse:
        request = pb.GetRoundRequest(
            task_id=self._task_id, after_round=done[0], after_attempt=done[1]
        )
        answer: pb.GetRoundResponse = self._call(self._stub.GetRound, request)
        return answer

    def _starting_model(self, context: RoundContext, answer: pb.GetRoundResponse) -> Model:
        """The model that the context's digest names, or none."""
        if context.id.model_digest == NO_MODEL:
            return Model(0, {})
        floats = [s for s in context.plan.segments if isinstance(s, FloatSegment)]
        if not floats:
            raise ContextError("expected no model in a task without floats; the round names one")
        request = pb.GetModelRequest(task_id=self._task_id, version=answer.model_version)
        first: pb.GetModelResponse = self._call(self._stub.GetModel, request)
        if tensors_from_wire(first.tensors) != floats[0].tensors:
            raise ContextError("expected the model's tensors to be the plan's; they differ")
        data = self._download(request, first, floats[0].tensors)
        if {model_digest(data), first.model_digest} != {context.id.model_digest}:
            raise ContextError("expected the model that the round names; its SHA-256 differs")
        return Model(answer.model_version, _unflatten(data, floats[0].tensors))

    def latest_model(self) -> Model:
        """The task's newest model version.

        Raises:
            ConfigurationError: unknown task, or one without a model.
            UnavailableError: the server could not be reached in time.
        """
        request = pb.GetModelRequest(task_id=self._task_id, latest=True)
        first: pb.GetModelResponse = self._call(self._stub.GetModel, request)
        tensors = tensors_from_wire(first.tensors)
        pinned = pb.GetModelRequest(task_id=self._task_id, version=first.version)
        data = self._download(pinned, first, tensors)
        if model_digest(data) != first.model_digest:
            raise MalformedError("expected the model that the server announced; it differs")
        return Model(first.version, _unflatten(data, tensors))

    def _download(
        self,
        request: pb.GetModelRequest,
        first: pb.GetModelResponse,
        tensors: tuple[TensorSpec, ...],
    ) -> bytes:
        """A model whose size the tensors fix before its second piece is asked for."""
        total = sum(tensor.size for tensor in tensors) * MODEL_VALUE_BYTES
        announced = (first.total_bytes, first.chunk_count)
        if announced != (total, piece_count(total)) or total > MAX_VALUES * MODEL_VALUE_BYTES:
            raise MalformedError(
                f"expected a model of {total} bytes in {piece_count(total)} pieces; the server "
                "announced another one"
            )
        pieces = [first.data]
        for index in range(1, first.chunk_count):
            request.chunk_index = index
            pieces.append(self._call(self._stub.GetModel, request).data)
        return exact("model", b"".join(pieces), total)

    def contribute(
        self, context: RoundContext, contributions: Mapping[str, Contribution], *, samples: int
    ) -> Cost:
        """See `CurrentRound.contribute`."""
        started = time.perf_counter()
        quantized = quantize(
            context.plan,
            contributions,
            samples=samples,
            rotation=context.rotation,
            rounding=self._rounding(context),
        )
        quantized_at = time.perf_counter()
        upload = encrypt_quantized(context, quantized, self._identity)
        encrypted_at = time.perf_counter()
        self.send(context, upload)
        uploaded_at = time.perf_counter()
        return Cost(
            quantized_at - started,
            encrypted_at - quantized_at,
            uploaded_at - encrypted_at,
            len(upload.payload),
        )

    def send(self, context: RoundContext, upload: Upload) -> None:
        """Upload what is encrypted: announce, send the missing chunks, commit.

        Sending the same upload again is harmless at any point.

        Raises:
            ClosedError, UploadError, UnavailableError: see `CurrentRound.contribute`.
        """
        announced = self._call(
            self._stub.OpenUpload,
            pb.OpenUploadRequest(admission=admission_to_wire(upload.admission)),
        )
        if announced.state == round_pb2.UPLOAD_STATE_ACCEPTED:
            return
        name: dict[str, Any] = {
            "context": context_id_to_wire(context.id),
            "client_key": upload.admission.receipt.client_key,
            "upload_digest": upload.admission.receipt.upload_digest,
        }
        for index in announced.missing_chunks:
            data = upload.payload[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
            chunk = pb.PutChunkRequest(**name, chunk_index=index, data=data)
            self._call(self._stub.PutChunk, chunk)
        self._call(self._stub.CommitUpload, pb.CommitUploadRequest(**name))

    def _call(self, method: Callable[..., _T], request: object) -> Any:  # noqa: ANN401 - any response
        return self._retry.call(lambda: method(request, timeout=_CALL_TIMEOUT_S))


def _unflatten(data: bytes, tensors: tuple[TensorSpec, ...]) -> dict[str, NDArray[np.float32]]:
    flat = model_from_bytes(data, sum(tensor.size for tensor in tensors))
    parts = np.split(flat, np.cumsum([tensor.size for tensor in tensors])[:-1])
    return {
        tensor.name: part.reshape(tensor.shape) for tensor, part in zip(tensors, parts, strict=True)
    }
