"""The server's view of the key holder: a stub with deadlines, in the library's own types."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import grpc
import grpc.aio
import numpy as np
from numpy.typing import NDArray

from secagg.context import RoundContext
from secagg.errors import MalformedError
from secagg.parameters import Plan
from secagg.residues import narrow
from secagg.rpc.channels import aio_channel
from secagg.rpc.status import from_rpc_error
from secagg.upload import Admission
from secagg.wire.codec import (
    admission_to_wire,
    context_id_to_wire,
    plan_to_wire,
    round_context_from_wire,
    sums_from_bytes,
)
from secagg.wire.v1 import key_holder_service_pb2 as pb
from secagg.wire.v1 import key_holder_service_pb2_grpc, round_pb2

__all__ = ["KeyHolderClient", "KeyHolderStub", "Opened", "ReleasedSums"]

JUDGE_BATCH = 256
MANIFEST_BATCH = 16_384
_CALL_TIMEOUT_S = 30.0
_RELEASE_TIMEOUT_S = 600.0

Opened = dict[bytes, str]
"""Reason of refusal by upload digest; uploads that are not in it are accepted."""


@dataclass(frozen=True, slots=True)
class ReleasedSums:
    """What the key holder released: exact sums, and the cohort's size."""

    sums: tuple[NDArray[np.int64], ...]
    contributors: int


class KeyHolderStub(Protocol):
    """What the coordinator needs of a key holder."""

    async def open_round(
        self, plan: Plan, *, task_id: str, round_number: int, attempt: int, model_digest: bytes
    ) -> RoundContext:
        """A fresh round key, bound to its round."""
        ...

    async def judge(self, context: RoundContext, admissions: Sequence[Admission]) -> Opened:
        """Which uploads must not be summed, and why."""
        ...

    async def release(
        self, context: RoundContext, upload_digests: Sequence[bytes], residues: NDArray[np.uint64]
    ) -> ReleasedSums:
        """The exact sums over a manifest."""
        ...

    async def close_round(self, context: RoundContext) -> None:
        """Erase the secrets of an attempt that came to nothing."""
        ...


class KeyHolderClient:
    """The key holder at a gRPC address."""

    def __init__(self, address: str) -> None:
        self._channel = aio_channel(address)
        self._stub = key_holder_service_pb2_grpc.KeyHolderServiceStub(self._channel)

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()

    async def open_round(
        self, plan: Plan, *, task_id: str, round_number: int, attempt: int, model_digest: bytes
    ) -> RoundContext:
        """A fresh round key, bound to its round.

        Raises:
            SecaggError: what the key holder answered, or `UnavailableError`.
        """
        request = pb.OpenRoundRequest(
            task_id=task_id,
            round_number=round_number,
            attempt=attempt,
            plan=plan_to_wire(plan),
            model_digest=model_digest,
        )
        # Waiting for the connection lets server and key holder start in any order.
        answer = await _ask(self._stub.OpenRound, request, wait_for_ready=True)
        context = round_context_from_wire(answer.context, request.plan, answer.round_key)
        context.id.require(
            replace(
                context.id,
                task_id=task_id,
                round_number=round_number,
                attempt=attempt,
                model_digest=model_digest,
            )
        )
        return context

    async def judge(self, context: RoundContext, admissions: Sequence[Admission]) -> Opened:
        """Which uploads must not be summed, and why.

        Raises:
            SecaggError: what the key holder answered, or `UnavailableError`.
        """
        refused: Opened = {}
        for start in range(0, len(admissions), JUDGE_BATCH):
            batch = admissions[start : start + JUDGE_BATCH]
            refused |= await self._judge_batch(context, batch)
        return refused

    async def _judge_batch(self, context: RoundContext, batch: Sequence[Admission]) -> Opened:
        request = pb.JudgeUploadsRequest(
            context=context_id_to_wire(context.id),
            admissions=[admission_to_wire(admission) for admission in batch],
        )
        answer = await _ask(self._stub.JudgeUploads, request)
        judged = {verdict.upload_digest: verdict for verdict in answer.verdicts}
        if judged.keys() != {admission.receipt.upload_digest for admission in batch}:
            raise MalformedError("expected one verdict for each upload; the key holder gave others")
        return {
            name: verdict.reason or "REFUSED"
            for name, verdict in judged.items()
            if verdict.state != round_pb2.VERDICT_STATE_ACCEPTED
        }

    async def release(
        self, context: RoundContext, upload_digests: Sequence[bytes], residues: NDArray[np.uint64]
    ) -> ReleasedSums:
        """The exact sums over a manifest.

        Raises:
            SecaggError: what the key holder answered, or `UnavailableError`.
        """
        pieces, contributors = [], 0
        requests = _release_requests(context, upload_digests, residues)
        try:
            async for answer in self._stub.Release(requests, timeout=_RELEASE_TIMEOUT_S):
                pieces.append(answer.data)
                contributors = answer.contributors
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        sums = sums_from_bytes(b"".join(pieces), context.plan)
        if contributors != len(upload_digests):
            raise MalformedError("expected a sum over the manifest; it is over another number")
        return ReleasedSums(sums, contributors)

    async def close_round(self, context: RoundContext) -> None:
        """Erase the secrets of an attempt that came to nothing.

        Raises:
            SecaggError: what the key holder answered, or `UnavailableError`.
        """
        request = pb.CloseRoundRequest(context=context_id_to_wire(context.id))
        await _ask(self._stub.CloseRound, request)


async def _ask(
    method: Callable[..., Awaitable[Any]], request: object, *, wait_for_ready: bool = False
) -> Any:  # noqa: ANN401 - any response message
    try:
        return await method(request, timeout=_CALL_TIMEOUT_S, wait_for_ready=wait_for_ready)
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None


async def _release_requests(
    context: RoundContext, upload_digests: Sequence[bytes], residues: NDArray[np.uint64]
) -> AsyncIterator[pb.ReleaseRequest]:
    name = context_id_to_wire(context.id)
    for start in range(0, len(upload_digests), MANIFEST_BATCH):
        part = upload_digests[start : start + MANIFEST_BATCH]
        yield pb.ReleaseRequest(manifest=pb.Manifest(context=name, upload_digests=part))
    start = 0
    for index in range(context.plan.chunks):
        blocks = context.plan.chunk_blocks(index)
        yield pb.ReleaseRequest(residues=narrow(residues[start : start + blocks]))
        start += blocks
