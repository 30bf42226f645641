"""The gRPC faces of the server: messages in, checked values to `intake` and `store`, messages out.

File and database work runs in threads, so that the event loop stays free.
"""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import structlog

from secagg.enrolment import Roster
from secagg.errors import ClosedError, ConfigurationError, MalformedError, RoundError
from secagg.instruments import SILENT, Meter
from secagg.parameters import MIN_COHORT
from secagg.receipts import CLIENT_KEY_BYTES
from secagg.rpc.gatekeeper import caller
from secagg.rpc.status import translated
from secagg.transcript import DIGEST_BYTES
from secagg.wire.codec import (
    MODEL_VALUE_BYTES,
    PIECE_BYTES,
    admission_from_wire,
    context_id_from_wire,
    context_id_to_wire,
    exact,
    model_digest,
    model_from_bytes,
    piece,
    piece_count,
    plan_to_wire,
    tensors_to_wire,
    verdict_to_wire,
)
from secagg.wire.v1 import (
    aggregation_service_pb2,
    aggregation_service_pb2_grpc,
    operator_service_pb2,
    operator_service_pb2_grpc,
    round_pb2,
)
from secagg_server.blobs import BlobStore
from secagg_server.coordinator import Coordinator
from secagg_server.intake import Intake
from secagg_server.metrics import BYTES_OUT
from secagg_server.rounds import OpenRound, OpenRounds
from secagg_server.spending import standing
from secagg_server.states import RoundState, TaskState, UploadState
from secagg_server.store import RoundRow, Store, TaskRow, UploadCounts
from secagg_server.tasks import TaskSpec
from secagg_server.verdicts import VerdictDesk

__all__ = ["AggregationService", "OperatorService"]

MAX_TASKS = 200
MAX_ROUNDS = 1000
_DIGESTS = 256
_LAST_SEQUENCE = (1 << 63) - 1  # that a database can number
_LOG = structlog.get_logger(__name__)
_Context = grpc.aio.ServicerContext[Any, Any]


class AggregationService(aggregation_service_pb2_grpc.AggregationServiceServicer):
    """Rounds, models and uploads, for clients.

    Args:
        meter: counts bytes of models.
    """

    def __init__(
        self,
        store: Store,
        blobs: BlobStore,
        rounds: OpenRounds,
        intake: Intake,
        verdicts: VerdictDesk,
        *,
        meter: Meter = SILENT,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._rounds = rounds
        self._intake = intake
        self._verdicts = verdicts
        self._meter = meter
        # A stored version never changes. Few are asked for at a time, and versions never end.
        self._model_digest = functools.lru_cache(maxsize=_DIGESTS)(self._digest_of)

    @translated
    async def GetRound(
        self, request: aggregation_service_pb2.GetRoundRequest, context: _Context
    ) -> aggregation_service_pb2.GetRoundResponse:
        """See the contract."""
        task = await asyncio.to_thread(self._store.task, request.task_id)
        if task.state is TaskState.FAILED:
            raise RoundError(f"expected a running task; it failed: {task.reason}")
        if task.state is TaskState.FINISHED:
            raise ClosedError("expected a running task; it has finished; its model can be fetched")
        after = (request.after_round, request.after_attempt)
        current = self._rounds.newest(request.task_id, after, _caller_name())
        return aggregation_service_pb2.GetRoundResponse(
            context=context_id_to_wire(current.context.id),
            plan=plan_to_wire(current.context.plan),
            round_key=current.context.round_key,
            model_version=current.model_version,
            remaining_ms=self._rounds.remaining_ms(current),
            rounds_total=current.spec.rounds,
            key_holder_identity=current.endorsement.identity,
            round_key_signature=current.endorsement.signature,
            challenge_commitment=_commitment(current, request.client_key),
        )

    @translated
    async def GetModel(
        self, request: aggregation_service_pb2.GetModelRequest, context: _Context
    ) -> aggregation_service_pb2.GetModelResponse:
        """See the contract."""
        return await asyncio.to_thread(self._model, request)

    def _model(
        self, request: aggregation_service_pb2.GetModelRequest
    ) -> aggregation_service_pb2.GetModelResponse:
        task = self._store.task(request.task_id)
        segment = task.task_spec().model
        version = task.model_version if request.latest else request.version
        if segment is None or version > task.model_version:
            raise ConfigurationError(
                f"expected a model version up to {task.model_version} of a task with a model; "
                f"got {version=}"
            )
        total = segment.parameters * MODEL_VALUE_BYTES
        if request.chunk_index >= piece_count(total):
            raise MalformedError(
                f"expected a chunk below {piece_count(total)}; got index={request.chunk_index}"
            )
        start = request.chunk_index * PIECE_BYTES
        try:
            digest = self._model_digest(request.task_id, version)
            data = self._blobs.model_piece(request.task_id, version, start, PIECE_BYTES)
        except FileNotFoundError:
            raise ClosedError(
                f"expected a model version that is still kept; {version=} is not; take a newer one"
            ) from None
        self._meter.add(BYTES_OUT, len(data))
        return aggregation_service_pb2.GetModelResponse(
            version=version,
            model_digest=digest,
            total_bytes=total,
            chunk_count=piece_count(total),
            data=data,
            tensors=tensors_to_wire(segment.tensors),
        )

    def _digest_of(self, task_id: str, version: int) -> bytes:
        return model_digest(self._blobs.model(task_id, version))

    @translated
    async def OpenUpload(
        self, request: aggregation_service_pb2.OpenUploadRequest, context: _Context
    ) -> aggregation_service_pb2.OpenUploadResponse:
        """See the contract."""
        admission = admission_from_wire(request.admission)
        state, missing = await asyncio.to_thread(self._intake.open, admission, _caller_name())
        return aggregation_service_pb2.OpenUploadResponse(
            state=_upload_state(state), missing_chunks=missing
        )

    @translated
    async def PutChunk(
        self, request: aggregation_service_pb2.PutChunkRequest, context: _Context
    ) -> aggregation_service_pb2.PutChunkResponse:
        """See the contract."""
        await asyncio.to_thread(
            self._intake.put_chunk,
            context_id_from_wire(request.context),
            exact("client_key", request.client_key, CLIENT_KEY_BYTES),
            exact("upload_digest", request.upload_digest, DIGEST_BYTES),
            request.chunk_index,
            request.data,
            _caller_name(),
        )
        return aggregation_service_pb2.PutChunkResponse()

    @translated
    async def CommitUpload(
        self, request: aggregation_service_pb2.CommitUploadRequest, context: _Context
    ) -> aggregation_service_pb2.CommitUploadResponse:
        """See the contract."""
        round_context = context_id_from_wire(request.context)
        await asyncio.to_thread(
            self._intake.commit,
            round_context,
            exact("client_key", request.client_key, CLIENT_KEY_BYTES),
            exact("upload_digest", request.upload_digest, DIGEST_BYTES),
            _caller_name(),
        )
        self._rounds.note_upload(round_context, await asyncio.to_thread(self._accepted, request))
        return aggregation_service_pb2.CommitUploadResponse(state=round_pb2.UPLOAD_STATE_ACCEPTED)

    @translated
    async def GetVerdict(
        self, request: aggregation_service_pb2.GetVerdictRequest, context: _Context
    ) -> aggregation_service_pb2.GetVerdictResponse:
        """See the contract."""
        shown = await asyncio.to_thread(
            self._verdicts.show,
            context_id_from_wire(request.context),
            exact("client_key", request.client_key, CLIENT_KEY_BYTES),
            _caller_name(),
        )
        return aggregation_service_pb2.GetVerdictResponse(
            verdict=verdict_to_wire(shown.verdict),
            challenge_key=shown.challenge_key,
            direction=shown.direction,
            model_version=shown.model_version,
        )

    @translated
    async def WithdrawUpload(
        self, request: aggregation_service_pb2.WithdrawUploadRequest, context: _Context
    ) -> aggregation_service_pb2.WithdrawUploadResponse:
        """See the contract."""
        await asyncio.to_thread(
            self._intake.withdraw,
            context_id_from_wire(request.context),
            exact("client_key", request.client_key, CLIENT_KEY_BYTES),
            exact("upload_digest", request.upload_digest, DIGEST_BYTES),
            _caller_name(),
        )
        return aggregation_service_pb2.WithdrawUploadResponse(
            state=_upload_state(UploadState.REJECTED)
        )

    def _accepted(self, request: aggregation_service_pb2.CommitUploadRequest) -> int:
        context = request.context
        return self._store.counts((context.task_id, context.round_number, context.attempt)).accepted


class OperatorService(operator_service_pb2_grpc.OperatorServiceServicer):
    """Tasks and results, for operators."""

    def __init__(
        self,
        store: Store,
        blobs: BlobStore,
        coordinator: Coordinator,
        roster: Roster,
        min_clients: int = MIN_COHORT,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._coordinator = coordinator
        self._roster = roster
        self._min_clients = min_clients

    @translated
    async def CreateTask(
        self,
        request_iterator: AsyncIterator[operator_service_pb2.CreateTaskRequest],
        context: _Context,
    ) -> operator_service_pb2.CreateTaskResponse:
        """See the contract."""
        spec = await _first_spec(request_iterator)
        self._check(spec)
        note = await asyncio.to_thread(_budget_note, spec)
        model = await _model_bytes(request_iterator, spec)
        row = await asyncio.to_thread(self._create, spec, model)
        if row.state is TaskState.RUNNING:
            self._coordinator.start(spec)
        return operator_service_pb2.CreateTaskResponse(state=_task_state(row.state), note=note)

    def _check(self, spec: TaskSpec) -> None:
        if spec.plan.min_clients < self._min_clients:
            raise ConfigurationError(
                f"expected a plan of at least min_clients={self._min_clients}, this server's "
                f"floor; got min_clients={spec.plan.min_clients}"
            )
        enrolled = len(self._roster.active())
        if spec.selected_clients and enrolled < spec.plan.min_clients:
            raise ConfigurationError(
                f"expected at least {spec.plan.min_clients} enrolled clients to draw from; got "
                f"{enrolled}; enrol more, or leave selected_clients out"
            )

    def _create(self, spec: TaskSpec, model: bytes) -> TaskRow:
        # The model first: a task that is recorded always has one.
        if spec.model and not self._store.task_exists(spec.task_id):
            self._blobs.put_model(spec.task_id, 0, model)
        return self._store.create_task(spec, model_digest(model))

    @translated
    async def ListTasks(
        self, request: operator_service_pb2.ListTasksRequest, context: _Context
    ) -> operator_service_pb2.ListTasksResponse:
        """See the contract."""
        size = _page_size(request.page_size, MAX_TASKS)
        rows = await asyncio.to_thread(self._store.tasks, request.page_token, size + 1)
        return operator_service_pb2.ListTasksResponse(
            tasks=[await asyncio.to_thread(_task_status, row) for row in rows[:size]],
            next_page_token=rows[size - 1].task_id if len(rows) > size else "",
        )

    @translated
    async def GetTask(
        self, request: operator_service_pb2.GetTaskRequest, context: _Context
    ) -> operator_service_pb2.GetTaskResponse:
        """See the contract."""
        return await asyncio.to_thread(self._task, request)

    def _task(
        self, request: operator_service_pb2.GetTaskRequest
    ) -> operator_service_pb2.GetTaskResponse:
        row = self._store.task(request.task_id)
        spec = row.task_spec()
        size = _page_size(request.page_size, MAX_ROUNDS)
        rounds = self._store.rounds(request.task_id, _after(request.page_token), size + 1)
        counts = self._store.all_counts(request.task_id)
        nobody = UploadCounts(0, 0)
        return operator_service_pb2.GetTaskResponse(
            task=_task_status(row),
            rounds=[
                self._round_record(spec, item, counts.get(item.key, nobody))
                for item in rounds[:size]
            ],
            next_page_token=_token(rounds[size - 1]) if len(rounds) > size else "",
        )

    def _round_record(
        self, spec: TaskSpec, row: RoundRow, counts: UploadCounts
    ) -> operator_service_pb2.RoundRecord:
        record = operator_service_pb2.RoundRecord(
            round_number=row.round_number,
            attempt=row.attempt,
            state=_round_state(row.state),
            reason=row.reason,
            uploads=counts.accepted,
            rejected=counts.rejected,
            contributors=row.contributors,
            sums_sha256=row.sums_sha256,
            model_version=row.model_version,
            upload_bytes=counts.accepted * spec.plan.payload_bytes,
            aggregate_ms=row.aggregate_ms,
            release_ms=row.release_ms,
            clip=_clip(spec, row.clip),
            figure=row.figure,
            change=row.model_change,
        )
        record.created_at.FromDatetime(row.created_at)
        if row.ended_at:
            record.ended_at.FromDatetime(row.ended_at)
        return record

    @translated
    async def AbortTask(
        self, request: operator_service_pb2.AbortTaskRequest, context: _Context
    ) -> operator_service_pb2.AbortTaskResponse:
        """See the contract."""
        await asyncio.to_thread(self._store.task, request.task_id)
        await self._coordinator.abort(request.task_id)
        row = await asyncio.to_thread(self._store.task, request.task_id)
        return operator_service_pb2.AbortTaskResponse(state=_task_state(row.state))

    @translated
    async def GetSums(
        self, request: operator_service_pb2.GetSumsRequest, context: _Context
    ) -> AsyncIterator[operator_service_pb2.GetSumsResponse]:
        """See the contract."""
        row, data = await asyncio.to_thread(self._sums, request)
        for index in range(piece_count(len(data))):
            yield operator_service_pb2.GetSumsResponse(
                data=piece(data, index), contributors=row.contributors
            )

    def _sums(self, request: operator_service_pb2.GetSumsRequest) -> tuple[RoundRow, bytes]:
        rounds = self._store.rounds(self._store.task(request.task_id).task_id)
        for row in rounds:
            if row.round_number == request.round_number and row.state is RoundState.DONE:
                _require_readable(row)
                try:
                    return row, self._blobs.sums(request.task_id, request.round_number)
                except FileNotFoundError:
                    raise ClosedError(
                        "expected sums that are still kept; these have been removed"
                    ) from None
        raise ClosedError("expected a finished round; this one has no result")

    @translated
    async def ExportAudit(
        self, request: operator_service_pb2.ExportAuditRequest, context: _Context
    ) -> AsyncIterator[operator_service_pb2.ExportAuditResponse]:
        """See the contract."""
        after = min(request.after_sequence, _LAST_SEQUENCE)
        while entries := await asyncio.to_thread(self._store.audit, after):
            for entry in entries:
                yield operator_service_pb2.ExportAuditResponse(
                    sequence=entry.sequence,
                    time=entry.time,
                    event=entry.event,
                    details=entry.details,
                    previous=entry.previous,
                    hash=entry.hash,
                )
            after = entries[-1].sequence


def _commitment(current: OpenRound, client_key: bytes) -> bytes:
    """What the caller's receipt must hold of its challenge; empty without a norm check."""
    if current.challenger is None:
        return b""
    if len(client_key) != CLIENT_KEY_BYTES:
        raise MalformedError(
            f"expected the client_key of {CLIENT_KEY_BYTES} bytes that the receipt will be signed "
            f"with, because the plan has a norm check; got bytes={len(client_key)}; send it, with "
            "a client of this version"
        )
    return current.challenger.commitment(client_key)


def _require_readable(row: RoundRow) -> None:
    """Refuse sums whose signs follow from the digest that version 0.1 gave the plan."""
    if not row.endorsed:
        raise ClosedError(
            "expected sums of a round since version 0.2; this one is of 0.1, whose plans had other "
            "digests, from which the signs of its sums follow; read them with 0.1"
        )


async def _first_spec(
    requests: AsyncIterator[operator_service_pb2.CreateTaskRequest],
) -> TaskSpec:
    async for request in requests:
        if request.WhichOneof("part") == "spec":
            return TaskSpec.from_wire(request.spec)
        break
    raise MalformedError("expected the task's specification in the first message")


async def _model_bytes(
    requests: AsyncIterator[operator_service_pb2.CreateTaskRequest], spec: TaskSpec
) -> bytes:
    """The initial model: exactly the plan's parameters, or zeros when none is sent."""
    received = bytearray()
    async for request in requests:
        if request.WhichOneof("part") != "model_data":
            raise MalformedError("expected the initial model after the specification")
        if not request.model_data:  # would keep a stream going for nothing
            raise MalformedError("expected some bytes in every message; got an empty one")
        if len(received) + len(request.model_data) > spec.model_bytes:
            raise MalformedError(f"expected an initial model of {spec.model_bytes} bytes; got more")
        received += request.model_data
    if not received:
        return bytes(spec.model_bytes)
    model_from_bytes(bytes(received), spec.model.parameters if spec.model else 0)
    return bytes(received)


def _caller_name() -> str | None:
    identity = caller()
    return identity.name if identity else None


def _page_size(asked: int, largest: int) -> int:
    return min(asked or largest, largest)


def _after(token: str) -> tuple[int, int]:
    """The round and attempt that a page follows."""
    if not token:
        return 0, 0
    match = re.fullmatch(r"([0-9]{1,9})\.([0-9]{1,9})", token)
    if match is None:
        raise MalformedError("expected the next_page_token of the page before; got something else")
    return int(match[1]), int(match[2])


def _token(row: RoundRow) -> str:
    return f"{row.round_number}.{row.attempt}"


def _budget_note(spec: TaskSpec) -> str:
    """What the operator should know of a task's privacy budget; empty for nothing.

    Raises:
        ConfigurationError: it has no room for a single release.
    """
    fit = spec.check_budget()
    if fit is None or fit >= spec.rounds:
        return ""
    _LOG.warning("budget_short", rounds=spec.rounds, releases=fit)
    return (
        f"the privacy budget has room for {fit} of {spec.rounds} rounds; the task will finish "
        "after them"
    )


def _clip(spec: TaskSpec, clip: float | None) -> float:
    return (clip or spec.model.clip) if spec.model else 0.0


def _task_privacy(spec: TaskSpec, row: TaskRow) -> operator_service_pb2.TaskPrivacy | None:
    found, privacy = standing(spec, row), plan_to_wire(spec.plan).privacy
    if found is None:
        return None
    return operator_service_pb2.TaskPrivacy(
        mode=privacy.mode,
        noise_multiplier=privacy.noise_multiplier,
        epsilon_spent=found.epsilon_spent,
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        releases_left=found.releases_left,
    )


def _task_status(row: TaskRow) -> operator_service_pb2.TaskStatus:
    spec = row.task_spec()
    status = operator_service_pb2.TaskStatus(
        spec=spec.to_wire(),
        state=_task_state(row.state),
        rounds_done=row.rounds_done,
        model_version=row.model_version,
        reason=row.reason,
        privacy=_task_privacy(spec, row),
        clip=_clip(spec, row.clip),
    )
    status.created_at.FromDatetime(row.created_at)
    return status


# Protobuf takes an enum's value by its name.


def _task_state(state: TaskState) -> str:
    return f"TASK_STATE_{state}"


def _round_state(state: RoundState) -> str:
    return f"ROUND_STATE_{state}"


def _upload_state(state: UploadState) -> str:
    return f"UPLOAD_STATE_{state}"
