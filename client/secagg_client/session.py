"""A client's conversation with the server: wait for a round, fetch the model, contribute.

Works with numpy alone::

    with ClientSession("server.example:7400", "my-task", ClientKit.load(folder)) as session:
        for current in session.rounds():
            update = train(current.model)
            current.contribute({"update": update}, samples=100)

A contribution is encrypted once; a lost answer only sends the same bytes again. A round counts only
if the pinned key holder has endorsed it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from secagg.certificates import Kit, Role
from secagg.context import NO_MODEL, RoundContext
from secagg.encryptor import encrypt_quantized
from secagg.endorsement import Endorsement, read_pins
from secagg.errors import (
    CertificateError,
    ClosedError,
    ConfigurationError,
    ContextError,
    MalformedError,
)
from secagg.parameters import CHUNK_BYTES, MAX_VALUES, FloatSegment, TensorSpec
from secagg.quantize import Contribution, quantize
from secagg.receipts import SigningKey
from secagg.rpc.channels import channel, is_loopback
from secagg.rpc.deadlines import deadline_s
from secagg.rpc.diagnosis import why_unreachable
from secagg.rpc.gatekeeper import metadata
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
from secagg_client.outbox import Outbox

__all__ = ["ClientKit", "ClientSession", "Cost", "CurrentRound", "Model"]

_T = TypeVar("_T")

RoundingSource = Callable[[RoundContext], Stream]


@dataclass(frozen=True, slots=True)
class ClientKit:
    """What the authority gave a client: its certificate, its signing key, and whom it trusts.

    Attributes:
        tls: certificate and key for the connection.
        identity: signs receipts.
    """

    tls: Kit
    identity: SigningKey

    @classmethod
    def load(cls, folder: Path | str) -> ClientKit:
        """Read a client's kit.

        Raises:
            IdentityError: see `Kit.load`; or the signing key or the pins cannot be read.
        """
        kit = cls(tls := Kit.load(Path(folder), Role.CLIENT), _signing_key(tls))
        kit.pins()
        return kit

    def pins(self) -> frozenset[bytes]:
        """Key holders that are trusted now; read each time, so that they can be rotated.

        Raises:
            CertificateError: the file is missing or damaged.
        """
        try:
            return read_pins(self.tls.file("key_holder.pub").read_text(encoding="utf-8"))
        except (OSError, MalformedError, UnicodeDecodeError):
            raise CertificateError(
                "expected key_holder.pub in the kit, one public key a line; it is missing or "
                "damaged; take it from the authority again"
            ) from None


def _signing_key(kit: Kit) -> SigningKey:
    try:
        return SigningKey.from_bytes(kit.file("signing.key").read_bytes())
    except (OSError, MalformedError):
        raise CertificateError(
            "expected signing.key in the kit, 32 bytes; it is missing or damaged; take the kit "
            "from the authority again"
        ) from None


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
        credentials: the client's kit; or, for plaintext on loopback, its signing key alone, the
            same one in every round.
        insecure: must be true for plaintext.
        outbox: folder in which uploads are kept until the next round, so that a crash never makes
            this client encrypt twice for one round; None keeps nothing.
        rounding: makes the stream of the stochastic rounding for a round; the operating system when
            omitted. Anything else is repeatable, and refused off loopback.
        retry: when to try again.

    Raises:
        ConfigurationError: an address that cannot be used, repeatable rounding off loopback, or
            plaintext without the explicit wish for it.
    """

    def __init__(
        self,
        address: str,
        task_id: str,
        credentials: ClientKit | SigningKey,
        *,
        insecure: bool = False,
        rounding: RoundingSource | None = None,
        retry: RetryPolicy | None = None,
        outbox: Path | None = None,
    ) -> None:
        self._kit = credentials if isinstance(credentials, ClientKit) else None
        if (self._kit is None) != insecure:
            raise ConfigurationError(
                "expected a ClientKit for TLS, or a signing key together with insecure=True for "
                "plaintext on loopback; got another combination"
            )
        if rounding is not None and not is_loopback(address):
            raise ConfigurationError(
                "expected rounding by the operating system's randomness off loopback; a repeatable "
                "stream is for demos and tests on one machine"
            )
        self._task_id = task_id
        self._identity = credentials.identity if isinstance(credentials, ClientKit) else credentials
        self._rounding = rounding or (lambda _context: Stream.from_os())
        tls = self._kit.tls if self._kit else None
        self._retry = replace(
            retry or RetryPolicy(),
            diagnose=lambda: why_unreachable(address, tls, (Role.SERVER,)),
        )
        self._outbox = Outbox(outbox, task_id) if outbox else None
        self._channel = channel(address, tls)
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
            UntrustedKeyError: a round that the pinned key holder has not endorsed.
            IdentityError: TLS, or the server, refuses this client; says why.
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
            earlier = self._outbox.newest() if self._outbox else (0, 0)
            if context.id.task_id != self._task_id or offered <= done or offered < earlier:
                raise ContextError(
                    "expected a later round of the task joined; got another one: this server "
                    "repeats itself, goes back, or mixes tasks up"
                )
            if self._kit is not None:
                signed = Endorsement(answer.key_holder_identity, answer.round_key_signature)
                signed.verify(context.id, self._kit.pins())
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
        if self._outbox and (kept := self._outbox.load(context.id)):
            self.send(context, kept)
            return Cost(0.0, 0.0, time.perf_counter() - started, len(kept.payload))
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
        if self._outbox:
            self._outbox.save(upload)
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
        name = type(request).__name__.removesuffix("Request")
        return self._retry.call(
            lambda: method(request, timeout=deadline_s(name), metadata=metadata())
        )


def _unflatten(data: bytes, tensors: tuple[TensorSpec, ...]) -> dict[str, NDArray[np.float32]]:
    flat = model_from_bytes(data, sum(tensor.size for tensor in tensors))
    parts = np.split(flat, np.cumsum([tensor.size for tensor in tensors])[:-1])
    return {
        tensor.name: part.reshape(tensor.shape) for tensor, part in zip(tensors, parts, strict=True)
    }
