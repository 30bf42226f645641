"""A client's conversation with the server: wait for a round, fetch the model, contribute.

Works with numpy alone::

    with ClientSession("server.example:7400", "my-task", ClientKit.load(folder)) as session:
        for current in session.rounds():
            update = train(current.model)
            current.contribute({"update": update}, samples=100)

A contribution is encrypted once; a lost answer only sends the same bytes again. A round counts only
if the pinned key holder has endorsed it.

Where the plan has a norm check, `ClientSession.rounds` asks for the verdict on a contribution once
its round is over, before it goes on to the next one, and tells it to whoever wants to know::

    for current in session.rounds(on_judgement=lambda judgement: print(judgement.accepted)):

A refused contribution is a warning in the log, `update_refused`, and a verdict that cannot be had
another, `verdict_missing`. A server that had something else judged than it had committed to ends
the loop with `ForgedSketchError`, and what proves it stays in the outbox. Who leaves the loop early
asks with `CurrentRound.verdict`, which waits for the verdict.

With an outbox, the same folder has the ledger of what was contributed and what it may have cost in
privacy, which every upload enters before it is sent and no upload may overdraw (see `ledger`), and
the switch by which `secagg-client pause` keeps this client from contributing (see `switch`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import grpc
import numpy as np
import structlog
from numpy.typing import NDArray

from secagg.certificates import Role
from secagg.context import NO_MODEL, ContextId, RoundContext
from secagg.encryptor import encrypt_quantized
from secagg.errors import (
    ClosedError,
    ConfigurationError,
    ContextError,
    DuplicateError,
    ForgedSketchError,
    IdentityError,
    MalformedError,
    NormError,
    PausedError,
    RoundError,
    SecaggError,
    UploadError,
)
from secagg.parameters import CHUNK_BYTES, MAX_VALUES, FloatSegment, TensorSpec
from secagg.quantize import Contribution, quantize
from secagg.receipts import NO_COMMITMENT, SigningKey
from secagg.rpc.channels import channel, is_loopback
from secagg.rpc.deadlines import deadline_s
from secagg.rpc.diagnosis import why_unreachable
from secagg.rpc.gatekeeper import metadata
from secagg.rpc.retry import RetryPolicy
from secagg.rpc.status import from_rpc_error
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
    tensors_from_wire,
)
from secagg.wire.v1 import aggregation_service_pb2 as pb
from secagg.wire.v1 import aggregation_service_pb2_grpc, round_pb2
from secagg_client.judgement import Judgement, judged
from secagg_client.kits import ClientKit
from secagg_client.ledger import Fate, Ledger, Limits
from secagg_client.offers import commitment_of, offered_round
from secagg_client.outbox import Kept, Outbox
from secagg_client.switch import Switch

__all__ = ["ClientKit", "ClientSession", "Cost", "CurrentRound", "Judgement", "Limits", "Model"]

PAUSE_POLL_S = 1.0
"""Seconds between two looks at whether this client may go on."""

_LOG = structlog.get_logger(__name__)
_T = TypeVar("_T")

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
        commitment: the server's, to what it will ask about this client's upload; `NO_COMMITMENT`
            where the plan has no norm check.
        key_holder: identity that endorsed the round, 32 bytes; empty if none did, in plaintext.
    """

    context: RoundContext
    model: Model
    rounds_total: int
    commitment: bytes = field(repr=False)
    key_holder: bytes = field(repr=False)
    _session: ClientSession = field(repr=False)

    @property
    def number(self) -> int:
        """The round's number, from 1."""
        return self.context.id.round_number

    def contribute(self, contributions: Mapping[str, Contribution], *, samples: int = 1) -> Cost:
        """Quantise, encrypt and upload one contribution for each segment of the plan.

        Raises:
            InputError: the data cannot be used; nothing was sent.
            PrivacyError: it would cost more than allowed; nothing was sent.
            PausedError: this client has been paused; what is not complete is not in the sum.
            ClosedError: too late, or withdrawn; nothing of it is in the sum.
            ContextError: the server has changed its commitment since this was encrypted.
            UploadError: refused; the message says why.
            UnavailableError: the server could not be reached in time.
        """
        return self._session.contribute(
            self.context,
            contributions,
            samples=samples,
            commitment=self.commitment,
            key_holder=self.key_holder,
        )

    def verdict(self) -> Judgement:
        """What the norm check found of the contribution; see `ClientSession.verdict`."""
        return self._session.verdict(self.context)


class ClientSession:
    """Takes part in one task of one server.

    Args:
        address: ``host:port`` of the server.
        task_id: the task to join.
        credentials: the client's kit; or, for plaintext on loopback, its signing key alone, the
            same one in every round.
        insecure: must be true for plaintext.
        outbox: folder in which uploads are kept until the next round, so that a crash never makes
            this client encrypt twice for one round, and verdicts can be checked after one; and the
            ledger and the switch for good. None keeps nothing, and knows what was spent for as long
            as the session lasts.
        limits: what this client may spend, beyond what the plan allows; nothing is forbidden when
            omitted.
        rounding: makes the stream of the stochastic rounding for a round; the operating system when
            omitted. Anything else is repeatable, and refused off loopback.
        retry: when to try again.

    Raises:
        ConfigurationError: an address that cannot be used, repeatable rounding off loopback,
            plaintext without the explicit wish for it, or a limit without an outbox to count in.
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
        limits: Limits | None = None,
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
        self._limits = limits or Limits()
        if self._limits.max_epsilon is not None and outbox is None:
            raise ConfigurationError(
                "expected an outbox with max_epsilon; got none; what was spent before would not be "
                "known"
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
        self._ledger, self._switch = Ledger(outbox), Switch(outbox)
        self._sent: Kept | None = None
        self._settled = (0, 0)  # the newest upload about which nothing is left to ask
        self._models: dict[int, bytes] = {}  # digests by version, as rounds have named them
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

    def rounds(
        self, on_judgement: Callable[[Judgement], None] | None = None
    ) -> Iterator[CurrentRound]:
        """Every round that this client can contribute to, until the task ends.

        Another attempt at an aborted round comes as a round of its own. None comes while this
        client is paused.

        Args:
            on_judgement: told the verdict on the newest contribution, before the next round comes
                or the task ends; not where the plan has no norm check, or the verdict is missing.

        Raises:
            UntrustedKeyError: a round, or a verdict, that the pinned key holder has not signed.
            ForgedSketchError: the server had something else judged than it had committed to, now
                or before; says where the evidence is.
            IdentityError: TLS, or the server, refuses this client; says why.
            PrivacyError: a contribution to this round would cost more than allowed.
            RoundError: the task has failed; the message says why.
            UnavailableError: the server could not be reached in time.
            SecaggError: what else the server answered.
        """
        if self._outbox:
            self._outbox.require_no_evidence()
        done = (0, 0)
        while True:
            self._wait_while_paused()
            try:
                answer = self._next_round(done)
            except RoundError as error:
                self._settle(on_judgement)
                if isinstance(error, ClosedError):
                    return
                raise
            if self._switch.paused:
                continue  # the round was long in coming
            context = offered_round(
                answer,
                self._task_id,
                after=done,
                newest=self._outbox.newest() if self._outbox else (0, 0),
                pins=self._kit.pins() if self._kit else None,
            )
            commitment = commitment_of(context, answer)
            done = (context.id.round_number, context.id.attempt)
            self._settle(on_judgement, before=done)
            self._ledger.require(context, self._limits)
            model = self._starting_model(context, answer)
            self._models[model.version] = context.id.model_digest
            holder = answer.key_holder_identity
            yield CurrentRound(context, model, answer.rounds_total, commitment, holder, self)

    def _wait_while_paused(self) -> None:
        if self._switch.paused:
            _LOG.warning("paused", task=self._task_id)
        while self._switch.paused:
            self._retry.sleep(PAUSE_POLL_S)

    def _next_round(self, done: tuple[int, int]) -> pb.GetRoundResponse:
        request = pb.GetRoundRequest(
            task_id=self._task_id,
            after_round=done[0],
            after_attempt=done[1],
            client_key=self._identity.public,
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
        if not tensors:
            raise MalformedError("expected a model of some tensors; the server announced none")
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
        self,
        context: RoundContext,
        contributions: Mapping[str, Contribution],
        *,
        samples: int,
        commitment: bytes = NO_COMMITMENT,
        key_holder: bytes = b"",
    ) -> Cost:
        """See `CurrentRound.contribute`."""
        self._switch.require_on()
        started = time.perf_counter()
        if self._outbox and (kept := self._outbox.load(context.id)):
            receipt = kept.upload.admission.receipt
            # Commitments are made for one signing key; this client may have got another one since.
            same_key = receipt.client_key == self._identity.public
            if same_key and receipt.challenge_commitment != commitment:
                raise ContextError(
                    "expected the challenge commitment that this round's upload was signed with; "
                    "the server now gives another one; nothing was sent"
                )
            self._deliver(kept)
            return Cost(0.0, 0.0, time.perf_counter() - started, len(kept.upload.payload))
        quantized = quantize(
            context.plan,
            contributions,
            samples=samples,
            rotation=context.rotation,
            randomness=self._rounding(context),
        )
        quantized_at = time.perf_counter()
        upload = encrypt_quantized(context, quantized, self._identity, commitment)
        encrypted_at = time.perf_counter()
        kept = Kept(context, key_holder, upload)
        if self._outbox:
            self._outbox.save(kept)
        self._deliver(kept)
        uploaded_at = time.perf_counter()
        return Cost(
            quantized_at - started,
            encrypted_at - quantized_at,
            uploaded_at - encrypted_at,
            len(upload.payload),
        )

    def _deliver(self, kept: Kept) -> None:
        self._sent = kept
        try:
            self.send(kept.context, kept.upload)
        except ClosedError:
            self._settled = kept.number  # too late to be judged
            raise

    def send(self, context: RoundContext, upload: Upload) -> None:
        """Upload what is encrypted: announce, send the missing chunks, commit.

        Sending the same upload again is harmless at any point. It enters the ledger before the
        first message leaves.

        Raises:
            PrivacyError, PausedError, ClosedError, UploadError, UnavailableError: see
                `CurrentRound.contribute`.
        """
        self._switch.require_on()
        self._ledger.require(context, self._limits)
        unseen = self._ledger.sent(context, upload.admission.receipt.upload_digest)
        try:
            missing = self._announce(upload)
            unseen = unseen and not missing
            if missing is not None:
                self._complete(context, upload, missing)
        except DuplicateError:
            raise  # another upload of this client is there: something has left
        except SecaggError as error:
            fate = _fate(error) or (Fate.MISSED if unseen else None)
            if fate:
                self._ledger.ended(context.id, fate, certain=unseen)
            raise
        self._ledger.ended(context.id, Fate.ACCEPTED)

    def _announce(self, upload: Upload) -> Sequence[int] | None:
        """The chunks that are missing; None if the upload is complete already."""
        request = pb.OpenUploadRequest(admission=admission_to_wire(upload.admission))
        announced: pb.OpenUploadResponse = self._call(self._stub.OpenUpload, request)
        if announced.state == round_pb2.UPLOAD_STATE_REJECTED:
            raise ClosedError(
                "expected an upload that may still come in; the server has it as withdrawn or "
                "refused; join the next round"
            )
        if announced.state == round_pb2.UPLOAD_STATE_ACCEPTED:
            return None
        missing, count = announced.missing_chunks, -(-len(upload.payload) // CHUNK_BYTES)
        # Else a server could have a client send without end.
        if len(set(missing)) < len(missing) or any(index >= count for index in missing):
            raise MalformedError(
                f"expected missing chunks below {count}, each once; the server named others; "
                "nothing more is sent"
            )
        return missing

    def _complete(self, context: RoundContext, upload: Upload, missing: Sequence[int]) -> None:
        name: dict[str, Any] = {
            "context": context_id_to_wire(context.id),
            "client_key": upload.admission.receipt.client_key,
            "upload_digest": upload.admission.receipt.upload_digest,
        }
        for index in missing:
            self._switch.require_on()
            data = bytes(upload.payload[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES])
            chunk = pb.PutChunkRequest(**name, chunk_index=index, data=data)
            self._call(self._stub.PutChunk, chunk)
        self._switch.require_on()
        self._call(self._stub.CommitUpload, pb.CommitUploadRequest(**name))

    def withdraw(self) -> ContextId | None:
        """Take this client's newest contribution out of its round, before the round has closed.

        Pause first: a client that takes part at the same time goes on otherwise. Withdrawing again
        is harmless.

        Returns:
            The attempt that it was made for; None where nothing was kept to withdraw.

        Raises:
            ClosedError: too late, it is part of the sum; or the file of the upload is damaged.
            UnavailableError: the server could not be reached in time; try again at once.
            SecaggError: what else the server answered.
        """
        kept = self._sent or (self._outbox.latest() if self._outbox else None)
        if kept is None:
            return None
        request = pb.WithdrawUploadRequest(
            context=context_id_to_wire(kept.context.id),
            client_key=self._identity.public,
            upload_digest=kept.upload.admission.receipt.upload_digest,
        )
        self._call(self._stub.WithdrawUpload, request)
        self._ledger.ended(kept.context.id, Fate.WITHDRAWN)
        self._settled = max(self._settled, kept.number)
        return kept.context.id

    def verdict(self, context: RoundContext) -> Judgement:
        """What the norm check found of this client's contribution to a round, checked.

        Waits for the verdict. `rounds` then does not ask for it again.

        Raises:
            ConfigurationError: the plan has no norm check, or no upload for the round was kept.
            ClosedError: there will be no verdict, or it has been forgotten.
            UnavailableError: the server could not be reached in time.
            MalformedError, ContextError, UntrustedKeyError: the answer is not a verdict of the
                pinned key holder on this upload.
            ForgedSketchError: the server had something else judged than it had committed to; with
                an outbox, the evidence is kept there.
        """
        if context.plan.norm_check is None:
            raise ConfigurationError("expected a plan with a norm check; this one has none")
        kept = self._sent
        if kept is None or kept.context.id != context.id:
            kept = self._outbox.load(context.id) if self._outbox else None
        if kept is None:
            raise ConfigurationError(
                "expected a round with an upload that was kept; none is; contribute in this "
                "session, or keep an outbox"
            )
        judgement = self._judgement(kept, self._call(self._stub.GetVerdict, _verdict_of(kept)))
        self._settled = max(self._settled, kept.number)
        return judgement

    def _settle(
        self,
        on_judgement: Callable[[Judgement], None] | None,
        before: tuple[int, int] | None = None,
    ) -> None:
        """Ask once for the verdict on the newest upload; not if ``before`` is its own attempt."""
        newest = self._newest()
        if newest <= self._settled or newest == before:
            return
        self._settled = newest
        fate = None
        try:
            kept = self._sent or (self._outbox.latest() if self._outbox else None)
            if kept is None or kept.context.plan.norm_check is None:
                return
            fate = self._ledger.fate(kept.context.id)
            if fate is Fate.WITHDRAWN:
                return  # by a command, beside this session
            judgement = self._judgement(kept, _once(self._stub.GetVerdict, _verdict_of(kept)))
        except (grpc.RpcError, RoundError, ContextError) as error:
            # Of a client that has lost its disk, another upload may be there in the place of one
            # that was never accepted: then the verdict is on that.
            if isinstance(error, ContextError) and fate is Fate.ACCEPTED:
                raise
            # Training goes on: a server that hides a verdict could as well be unreachable.
            why = from_rpc_error(error) if isinstance(error, grpc.RpcError) else error
            _LOG.warning("verdict_missing", round=newest[0], attempt=newest[1], why=why.reason)
            return
        if not judgement.accepted:
            _LOG.warning("update_refused", round=newest[0], attempt=newest[1], why=NormError.reason)
        if on_judgement:
            on_judgement(judgement)

    def _newest(self) -> tuple[int, int]:
        """Round and attempt of the newest upload, of this session or kept by an earlier one."""
        if self._sent:
            return self._sent.number
        return self._outbox.newest() if self._outbox else (0, 0)

    def _judgement(self, kept: Kept, answer: pb.GetVerdictResponse) -> Judgement:
        # In plaintext there may be nobody's word but the server's; then any key holder will do.
        anybody = kept.key_holder or answer.verdict.identity
        pins = self._kit.pins() if self._kit else frozenset({anybody})
        try:
            judgement = judged(answer, kept, pins, self._model_version)
        except ForgedSketchError as error:
            raise ForgedSketchError(f"{error}; {self._keep_evidence(kept, answer)}") from None
        if not judgement.accepted:
            # The key holder opens no sum with it, and its signature is that of a pinned one.
            certain = self._kit is not None
            self._ledger.ended(judgement.context, Fate.REFUSED, certain=certain)
        return judgement

    def _keep_evidence(self, kept: Kept, answer: pb.GetVerdictResponse) -> str:
        """Where the answer has been put, in words."""
        if self._outbox is None:
            return "without an outbox, nothing was kept"
        return self._outbox.keep_evidence(kept.number, answer.SerializeToString())

    def _model_version(self, segment: FloatSegment, version: int) -> bytes:
        """A model version: the one that a round named by this number, if one did."""
        request = pb.GetModelRequest(task_id=self._task_id, version=version)
        first: pb.GetModelResponse = self._call(self._stub.GetModel, request)
        data = self._download(request, first, segment.tensors)
        if self._models.get(version, found := model_digest(data)) != found:
            raise ContextError(
                f"expected model version {version} to be the one that its round named; its SHA-256 "
                "differs; this server shows different models at different times"
            )
        return data

    def _call(self, method: Callable[..., _T], request: object) -> Any:  # noqa: ANN401 - any response
        return self._retry.call(lambda: _once(method, request))


def _fate(error: SecaggError) -> Fate | None:
    """What becomes of an upload that ended so, by the server's word; None if it has given none."""
    if isinstance(error, ClosedError | PausedError):
        return Fate.MISSED
    return Fate.REFUSED if isinstance(error, UploadError | IdentityError) else None


def _once(method: Callable[..., _T], request: object) -> _T:
    name = type(request).__name__.removesuffix("Request")
    return method(request, timeout=deadline_s(name), metadata=metadata())


def _verdict_of(kept: Kept) -> pb.GetVerdictRequest:
    return pb.GetVerdictRequest(
        context=context_id_to_wire(kept.context.id),
        client_key=kept.upload.admission.receipt.client_key,
    )


def _unflatten(data: bytes, tensors: tuple[TensorSpec, ...]) -> dict[str, NDArray[np.float32]]:
    flat = model_from_bytes(data, sum(tensor.size for tensor in tensors))
    parts = np.split(flat, np.cumsum([tensor.size for tensor in tensors])[:-1])
    return {
        tensor.name: part.reshape(tensor.shape) for tensor, part in zip(tensors, parts, strict=True)
    }
