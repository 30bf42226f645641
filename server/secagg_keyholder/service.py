"""The gRPC face of the key holder. Its errors and logs never say how far off a sum was."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc.aio
import numpy as np
import structlog
from numpy.typing import NDArray

from secagg.context import ContextId
from secagg.errors import MalformedError
from secagg.release import Release
from secagg.residues import widen
from secagg.rpc.status import translated
from secagg.transcript import DIGEST_BYTES
from secagg.wire.codec import (
    admission_from_wire,
    context_id_from_wire,
    context_id_to_wire,
    exact,
    piece,
    piece_count,
    plan_from_wire,
    sums_to_bytes,
)
from secagg.wire.v1 import key_holder_service_pb2 as pb
from secagg.wire.v1 import key_holder_service_pb2_grpc, round_pb2
from secagg_keyholder.rounds import Rounds

__all__ = ["KeyHolderService"]

MAX_JUDGED = 256
_Context = grpc.aio.ServicerContext[Any, Any]
_LOG = structlog.get_logger(__name__)


class KeyHolderService(key_holder_service_pb2_grpc.KeyHolderServiceServicer):
    """Round keys, verdicts and releases, for the server."""

    def __init__(self, rounds: Rounds) -> None:
        self._rounds = rounds
        self._lock = asyncio.Lock()

    @translated
    async def OpenRound(
        self, request: pb.OpenRoundRequest, context: _Context
    ) -> pb.OpenRoundResponse:
        """See the contract."""
        plan = plan_from_wire(request.plan)
        model_digest = exact("model_digest", request.model_digest, DIGEST_BYTES)
        async with self._lock:
            holder = self._rounds.open(
                plan, request.task_id, request.round_number, request.attempt, model_digest
            )
        _LOG.info("round_opened", round=request.round_number, attempt=request.attempt)
        return pb.OpenRoundResponse(
            context=context_id_to_wire(holder.context.id), round_key=holder.context.round_key
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
        round_context = context_id_from_wire(request.context)
        async with self._lock:
            reasons = await asyncio.to_thread(self._rounds.judge, round_context, admissions)
        verdicts = [
            _verdict(admission.receipt.upload_digest, reason)
            for admission, reason in zip(admissions, reasons, strict=True)
        ]
        return pb.JudgeUploadsResponse(verdicts=verdicts)

    @translated
    async def Release(
        self, request_iterator: AsyncIterator[pb.ReleaseRequest], context: _Context
    ) -> AsyncIterator[pb.ReleaseResponse]:
        """See the contract."""
        received = await _received(request_iterator, self._rounds)
        round_context = received.context
        async with self._lock:
            release = await asyncio.to_thread(
                self._rounds.release, round_context, received.upload_digests, received.residues
            )
        _LOG.info(
            "round_released",
            round=round_context.round_number,
            contributors=release.contributors,
        )
        for response in _pieces(release):
            yield response

    @translated
    async def CloseRound(
        self, request: pb.CloseRoundRequest, context: _Context
    ) -> pb.CloseRoundResponse:
        """See the contract."""
        async with self._lock:
            self._rounds.close(context_id_from_wire(request.context))
        return pb.CloseRoundResponse()


def _verdict(upload_digest: bytes, reason: str) -> round_pb2.Verdict:
    """A verdict; an empty reason means accepted."""
    state = round_pb2.VERDICT_STATE_REJECTED if reason else round_pb2.VERDICT_STATE_ACCEPTED
    return round_pb2.Verdict(upload_digest=upload_digest, state=state, reason=reason)


@dataclass(frozen=True, slots=True)
class _Received:
    context: ContextId
    upload_digests: list[bytes]
    residues: NDArray[np.uint64]


async def _received(requests: AsyncIterator[pb.ReleaseRequest], rounds: Rounds) -> _Received:
    """A manifest and the sum over it: not a byte more than the plan prescribes is kept."""
    context: ContextId | None = None
    digests: list[bytes] = []
    data = bytearray()
    async for request in requests:
        part = request.WhichOneof("part")
        if part == "manifest" and not data:
            named = context_id_from_wire(request.manifest.context)
            context = context or named
            context.require(named)
            plan = rounds.plan(context)
            digests += [
                exact("upload_digest", name, DIGEST_BYTES)
                for name in request.manifest.upload_digests
            ]
            if len(digests) > plan.max_clients:
                raise MalformedError(f"expected at most {plan.max_clients} uploads; got more")
        elif part == "residues" and context is not None:
            if len(data) + len(request.residues) > plan.payload_bytes:
                raise MalformedError(f"expected a sum of {plan.payload_bytes} bytes; got more")
            data += request.residues
        else:
            raise MalformedError("expected the manifest first, then the sum; got another order")
    if context is None:
        raise MalformedError("expected a manifest and a sum; got nothing")
    return _Received(context, digests, widen(data, plan.blocks))


def _pieces(release: Release) -> list[pb.ReleaseResponse]:
    data = sums_to_bytes(release.sums)
    return [
        pb.ReleaseResponse(
            data=piece(data, index),
            contributors=release.contributors,
        )
        for index in range(piece_count(len(data)))
    ]
