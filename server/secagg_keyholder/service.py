"""The gRPC face of the key holder. Its errors and logs never say how far off a sum was."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any
from weakref import WeakValueDictionary

import grpc.aio
import structlog

from secagg.context import ContextId
from secagg.errors import ConfigurationError, MalformedError
from secagg.noise_audit import LOW_BYTES, low_from_bytes
from secagg.parameters import BLOCK_BYTES, RING_DEGREE, Plan
from secagg.residues import widen
from secagg.rpc.status import translated
from secagg.sketch_shape import sketch_bytes
from secagg.sketches import Sketch
from secagg.transcript import DIGEST_BYTES
from secagg.wire.codec import (
    admission_from_wire,
    context_id_from_wire,
    context_id_to_wire,
    exact,
    piece,
    piece_count,
    plan_from_wire,
    verdict_to_wire,
)
from secagg.wire.v1 import key_holder_service_pb2 as pb
from secagg.wire.v1 import key_holder_service_pb2_grpc, round_pb2
from secagg_keyholder.rounds import ReleasedBytes, Rounds

__all__ = ["KeyHolderService"]

MAX_JUDGED = 256
MAX_VERDICTS = 1024
_Context = grpc.aio.ServicerContext[Any, Any]
_LOG = structlog.get_logger(__name__)


class KeyHolderService(key_holder_service_pb2_grpc.KeyHolderServiceServicer):
    """Round keys, verdicts, audits and releases, for the server."""

    def __init__(self, rounds: Rounds) -> None:
        self._rounds = rounds
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def _one_at_a_time(self, task_id: str) -> asyncio.Lock:
        """A task's lock, which lasts while a call holds it or waits; tasks do not wait for others.

        Any name may be asked for: what is kept must not grow with the names.
        """
        return self._locks.setdefault(task_id, asyncio.Lock())

    @translated
    async def OpenRound(
        self, request: pb.OpenRoundRequest, context: _Context
    ) -> pb.OpenRoundResponse:
        """See the contract."""
        plan = plan_from_wire(request.plan)
        model_digest = exact("model_digest", request.model_digest, DIGEST_BYTES)
        async with self._one_at_a_time(request.task_id):
            opened, endorsement = await asyncio.to_thread(
                self._rounds.open,
                plan,
                request.task_id,
                request.round_number,
                request.attempt,
                model_digest,
            )
        _LOG.info("round_opened", round=request.round_number, attempt=request.attempt)
        return pb.OpenRoundResponse(
            context=context_id_to_wire(opened.id),
            round_key=opened.round_key,
            identity=endorsement.identity,
            signature=endorsement.signature,
        )

    @translated
    async def JudgeUploads(
        self, request: pb.JudgeUploadsRequest, context: _Context
    ) -> pb.JudgeUploadsResponse:
        """See the contract."""
        if len(request.admissions) > MAX_JUDGED:
            raise MalformedError(
                f"expected at most {MAX_JUDGED} uploads; got {len(request.admissions)}"
            )
        admissions = [admission_from_wire(message) for message in request.admissions]
        name = context_id_from_wire(request.context)
        async with self._one_at_a_time(name.task_id):
            reasons = await asyncio.to_thread(self._rounds.judge, name, admissions)
        verdicts = [
            _verdict(admission.receipt.upload_digest, reason)
            for admission, reason in zip(admissions, reasons, strict=True)
        ]
        return pb.JudgeUploadsResponse(verdicts=verdicts)

    @translated
    async def SubmitSketch(
        self, request_iterator: AsyncIterator[pb.SubmitSketchRequest], context: _Context
    ) -> pb.SubmitSketchResponse:
        """See the contract."""
        name, upload, plan, data = await self._upload_and("sketch", request_iterator, _sketch_size)
        sketch = await asyncio.to_thread(Sketch.from_bytes, plan, upload, data)
        async with self._one_at_a_time(name.task_id):
            await asyncio.to_thread(self._rounds.submit_sketch, name, sketch)
        return pb.SubmitSketchResponse()

    @translated
    async def GetVerdicts(
        self, request: pb.GetVerdictsRequest, context: _Context
    ) -> AsyncIterator[pb.GetVerdictsResponse]:
        """See the contract."""
        name = context_id_from_wire(request.context)
        async with self._one_at_a_time(name.task_id):
            verdicts = await asyncio.to_thread(self._rounds.verdicts, name)
        refused = sum(not verdict.accepted for verdict in verdicts)
        _LOG.info("norms_judged", round=name.round_number, uploads=len(verdicts), refused=refused)
        for start in range(0, len(verdicts), MAX_VERDICTS):
            part = verdicts[start : start + MAX_VERDICTS]
            yield pb.GetVerdictsResponse(verdicts=[verdict_to_wire(verdict) for verdict in part])

    @translated
    async def Release(
        self, request_iterator: AsyncIterator[pb.ReleaseRequest], context: _Context
    ) -> AsyncIterator[pb.ReleaseResponse]:
        """See the contract."""
        name, digests, plan, data = await self._manifest_and(
            "residues", request_iterator, lambda plan: plan.sum_blocks * BLOCK_BYTES
        )
        residues = await asyncio.to_thread(widen, data, plan.sum_blocks)
        async with self._one_at_a_time(name.task_id):
            release = await asyncio.to_thread(self._rounds.release, name, digests, residues)
        _LOG.info("round_released", round=name.round_number, contributors=release.contributors)
        for response in _pieces(release):
            yield response

    @translated
    async def CheckSum(
        self, request_iterator: AsyncIterator[pb.CheckSumRequest], context: _Context
    ) -> pb.CheckSumResponse:
        """See the contract."""
        name, digests, plan, data = await self._manifest_and(
            "low_bits", request_iterator, lambda plan: _low_size(plan.sum_blocks)
        )
        low = await asyncio.to_thread(low_from_bytes, plan, data, of_sum=True)
        async with self._one_at_a_time(name.task_id):
            await asyncio.to_thread(self._rounds.check, name, digests, low)
        return pb.CheckSumResponse()

    async def _manifest_and(
        self,
        kind: str,
        requests: AsyncIterator[Any],
        size: Callable[[Plan], int],
    ) -> tuple[ContextId, list[bytes], Plan, bytearray]:
        """A manifest and the bytes that follow; not one more than the plan prescribes is kept."""
        name: ContextId | None = None
        plan: Plan | None = None
        digests: list[bytes] = []
        data = bytearray()
        async for request in requests:
            part = request.WhichOneof("part")
            if part == "manifest" and not data:
                named = context_id_from_wire(request.manifest.context)
                name = name or named
                name.require(named)
                if plan is None:
                    plan = await asyncio.to_thread(self._rounds.plan, name)
                digests += [
                    exact("upload_digest", upload, DIGEST_BYTES)
                    for upload in request.manifest.upload_digests
                ]
                _check_count(digests, plan)
            elif part == kind and plan is not None:
                _append(data, getattr(request, kind), size(plan))
            else:
                raise MalformedError("expected the manifest first, then the sum; got another order")
        if name is None or plan is None:
            raise MalformedError("expected a manifest and a sum; got nothing")
        return name, digests, plan, data

    @translated
    async def AuditNoise(
        self, request_iterator: AsyncIterator[pb.AuditNoiseRequest], context: _Context
    ) -> pb.AuditNoiseResponse:
        """See the contract."""
        name, upload, plan, data = await self._upload_and(
            "low_bits", request_iterator, lambda plan: _low_size(plan.blocks)
        )
        low = await asyncio.to_thread(low_from_bytes, plan, data)
        async with self._one_at_a_time(name.task_id):
            reason = await asyncio.to_thread(self._rounds.audit, name, upload, low)
        return pb.AuditNoiseResponse(verdict=_verdict(upload, reason))

    async def _upload_and(
        self,
        kind: str,
        requests: AsyncIterator[Any],
        size: Callable[[Plan], int],
    ) -> tuple[ContextId, bytes, Plan, bytearray]:
        """An upload's name and the bytes that follow; not one more than ``size`` is kept."""
        name, upload, plan = await self._named(requests)
        limit, data = size(plan), bytearray()
        async for request in requests:
            if request.WhichOneof("part") != kind:
                raise MalformedError(f"expected the upload's name first, then {kind} alone")
            _append(data, getattr(request, kind), limit)
        return name, upload, plan, data

    async def _named(self, requests: AsyncIterator[Any]) -> tuple[ContextId, bytes, Plan]:
        async for request in requests:
            if request.WhichOneof("part") == "upload":
                name = context_id_from_wire(request.upload.context)
                upload = exact("upload_digest", request.upload.upload_digest, DIGEST_BYTES)
                return name, upload, await asyncio.to_thread(self._rounds.plan, name)
            break
        raise MalformedError("expected the upload's name in the first message")

    @translated
    async def CloseRound(
        self, request: pb.CloseRoundRequest, context: _Context
    ) -> pb.CloseRoundResponse:
        """See the contract."""
        name = context_id_from_wire(request.context)
        async with self._one_at_a_time(name.task_id):
            await asyncio.to_thread(self._rounds.close, name)
        return pb.CloseRoundResponse()


def _low_size(blocks: int) -> int:
    return blocks * RING_DEGREE * LOW_BYTES


def _sketch_size(plan: Plan) -> int:
    if plan.norm_check is None:
        raise ConfigurationError("expected a plan with a norm check; this one has none")
    return sketch_bytes(plan, direction=True)


def _check_count(digests: list[bytes], plan: Plan) -> None:
    if len(digests) > plan.max_clients:
        raise MalformedError(f"expected at most {plan.max_clients} uploads; got more")


def _append(data: bytearray, chunk: bytes, expected: int) -> None:
    if not chunk:  # would keep a stream going for nothing
        raise MalformedError("expected some bytes in every message; got an empty one")
    if len(data) + len(chunk) > expected:
        raise MalformedError(f"expected {expected} bytes in all; got more")
    data += chunk


def _verdict(upload_digest: bytes, reason: str) -> round_pb2.Verdict:
    """A verdict; an empty reason means accepted."""
    state = round_pb2.VERDICT_STATE_REJECTED if reason else round_pb2.VERDICT_STATE_ACCEPTED
    return round_pb2.Verdict(upload_digest=upload_digest, state=state, reason=reason)


def _pieces(release: ReleasedBytes) -> list[pb.ReleaseResponse]:
    return [
        pb.ReleaseResponse(data=piece(release.sums, index), contributors=release.contributors)
        for index in range(piece_count(len(release.sums)))
    ]
