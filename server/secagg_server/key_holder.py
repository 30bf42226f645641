"""The server's view of the key holder: a stub with deadlines, in the library's own types.

The connection is made again when the kit's files have changed, so that certificates rotate without
a restart. A round key is taken from a pinned key holder only.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import NDArray

from secagg.certificates import Kit, Role
from secagg.context import RoundContext
from secagg.endorsement import Endorsement, read_pins
from secagg.errors import IdentityError, MalformedError, SecaggError, UnavailableError
from secagg.noise_audit import low_to_bytes
from secagg.parameters import CHUNK_BLOCKS, Plan
from secagg.residues import narrow
from secagg.rpc.channels import aio_channel
from secagg.rpc.deadlines import deadline_s
from secagg.rpc.diagnosis import why_unreachable
from secagg.rpc.gatekeeper import metadata
from secagg.rpc.status import from_rpc_error
from secagg.sketches import Sketch
from secagg.upload import Admission
from secagg.verdicts import Verdict
from secagg.wire.codec import (
    admission_to_wire,
    context_id_to_wire,
    piece,
    piece_count,
    plan_to_wire,
    round_context_from_wire,
    sums_from_bytes,
    sums_size,
    verdict_from_wire,
)
from secagg.wire.v1 import key_holder_service_pb2 as pb
from secagg.wire.v1 import key_holder_service_pb2_grpc, round_pb2

__all__ = [
    "KEY_HOLDER_ATTEMPTS",
    "KeyHolderClient",
    "KeyHolderStub",
    "Opened",
    "ReleasedSums",
    "patiently",
]

KEY_HOLDER_ATTEMPTS = 3
"""Times that the key holder is asked before an attempt at a round is given up."""

JUDGE_BATCH = 256
MANIFEST_BATCH = 16_384
_HEALTH_TIMEOUT_S = 2.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0

Opened = dict[bytes, str]
"""Reason of refusal by upload digest; uploads that are not in it are accepted."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ReleasedSums:
    """What the key holder released: exact sums, and the cohort's size."""

    sums: tuple[NDArray[np.int64], ...]
    contributors: int


class KeyHolderStub(Protocol):
    """What the coordinator needs of a key holder."""

    async def open_round(
        self, plan: Plan, *, task_id: str, round_number: int, attempt: int, model_digest: bytes
    ) -> tuple[RoundContext, Endorsement]:
        """A fresh round key, bound to its round, with the key holder's signature."""
        ...

    async def judge(self, context: RoundContext, admissions: Sequence[Admission]) -> Opened:
        """Which uploads must not be summed, and why."""
        ...

    async def submit_sketch(self, context: RoundContext, sketch: Sketch) -> None:
        """Have an admitted upload judged by its sketch; see `verdicts` for what comes of it."""
        ...

    async def verdicts(self, context: RoundContext) -> list[Verdict]:
        """What the key holder says are its signed verdicts on all sketches of an attempt."""
        ...

    async def check_sum(
        self, context: RoundContext, upload_digests: Sequence[bytes], low: NDArray[np.uint32]
    ) -> None:
        """Whether the sum over a manifest would open, as far as its noise shows."""
        ...

    async def release(
        self, context: RoundContext, upload_digests: Sequence[bytes], residues: NDArray[np.uint64]
    ) -> ReleasedSums:
        """The exact sums over a manifest."""
        ...

    async def audit(
        self, context: RoundContext, upload_digest: bytes, low: NDArray[np.uint32]
    ) -> str:
        """Why an upload fails the noise audit; empty where it passes."""
        ...

    async def close_round(self, context: RoundContext) -> None:
        """Erase the secrets of an attempt that came to nothing."""
        ...


async def patiently(ask: Callable[[], Awaitable[_T]]) -> _T:
    """Ask the key holder again while it cannot be reached; each time waits for its connection.

    Raises:
        UnavailableError: it could not be reached in `KEY_HOLDER_ATTEMPTS` times.
    """
    for _ in range(KEY_HOLDER_ATTEMPTS - 1):
        with contextlib.suppress(UnavailableError):
            return await ask()
    return await ask()


class KeyHolderClient:
    """The key holder at a gRPC address.

    Args:
        kit: for TLS; None for plaintext on loopback.
    """

    def __init__(self, address: str, kit: Kit | None) -> None:
        self._address = address
        self._kit = kit
        self._stamp = _stamp(kit)
        self._channel = aio_channel(address, kit)
        self._closing: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Close the connection."""
        for closing in self._closing:
            closing.cancel()
        await self._channel.close()

    async def _connected(self) -> grpc.aio.Channel:
        if self._kit is not None and (stamp := _stamp(self._kit)) != self._stamp:
            # Between the replacement of one file and the next the kit does not fit together.
            with contextlib.suppress(IdentityError):
                self._kit, self._stamp = Kit.load(self._kit.folder, Role.SERVER), stamp
                old, self._channel = self._channel, aio_channel(self._address, self._kit)
                # Calls under way end on the connection they began on.
                closing = asyncio.create_task(old.close(deadline_s("Release")))
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)
        return self._channel

    async def _stub(self) -> key_holder_service_pb2_grpc.KeyHolderServiceStub:
        return key_holder_service_pb2_grpc.KeyHolderServiceStub(await self._connected())

    async def check(self) -> None:
        """Whether the key holder is ready.

        Raises:
            UnavailableError: it is not, or cannot be reached.
            IdentityError: TLS refuses the connection; says why.
        """
        stub = health_pb2_grpc.HealthStub(await self._connected())
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=_HEALTH_TIMEOUT_S)
        except grpc.RpcError as error:
            found = await self._translated(error)
            if isinstance(found, IdentityError):
                raise found from None
            raise UnavailableError("expected a key holder; it cannot be reached") from None
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            raise UnavailableError("expected a key holder that is ready; it is not")

    async def open_round(
        self, plan: Plan, *, task_id: str, round_number: int, attempt: int, model_digest: bytes
    ) -> tuple[RoundContext, Endorsement]:
        """A fresh round key, bound to its round, with the key holder's signature.

        Raises:
            SecaggError: what the key holder answered, or `UnavailableError`.
            UntrustedKeyError: not endorsed by a key holder that the kit pins.
        """
        request = pb.OpenRoundRequest(
            task_id=task_id,
            round_number=round_number,
            attempt=attempt,
            plan=plan_to_wire(plan),
            model_digest=model_digest,
        )
        answer = await self._ask((await self._stub()).OpenRound, request, "OpenRound")
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
        endorsement = Endorsement(answer.identity, answer.signature)
        if self._kit is not None:
            pins = self._kit.file("key_holder.pub").read_text(encoding="utf-8")
            endorsement.verify(context.id, read_pins(pins))
        return context, endorsement

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
        answer = await self._ask((await self._stub()).JudgeUploads, request, "JudgeUploads")
        judged = {verdict.upload_digest: verdict for verdict in answer.verdicts}
        if judged.keys() != {admission.receipt.upload_digest for admission in batch}:
            raise MalformedError("expected one verdict for each upload; the key holder gave others")
        return {
            name: verdict.reason or "REFUSED"
            for name, verdict in judged.items()
            if verdict.state != round_pb2.VERDICT_STATE_ACCEPTED
        }

    async def submit_sketch(self, context: RoundContext, sketch: Sketch) -> None:
        """Have an admitted upload judged by its sketch; again with the same one: nothing changes.

        Raises:
            SecaggError: what the key holder answered, or `UnavailableError`.
        """

        async def requests() -> AsyncIterator[pb.SubmitSketchRequest]:
            yield pb.SubmitSketchRequest(upload=_named(context, sketch.upload_digest))
            data = sketch.to_bytes()
            for index in range(piece_count(len(data))):
                yield pb.SubmitSketchRequest(sketch=piece(data, index))

        await self._ask((await self._stub()).SubmitSketch, requests, "SubmitSketch")

    async def verdicts(self, context: RoundContext) -> list[Verdict]:
        """The verdicts on all sketches of an attempt; not yet verified.

        Raises:
            MalformedError: more than the plan has clients, or something that is no verdict.
            SecaggError: what the key holder answered, or `UnavailableError`.
        """
        request = pb.GetVerdictsRequest(context=context_id_to_wire(context.id))
        most = context.plan.max_clients

        async def collected(answers: AsyncIterator[Any]) -> list[Verdict]:
            verdicts: list[Verdict] = []
            async for answer in answers:
                # An empty message would keep a stream going for nothing.
                if not answer.verdicts or len(verdicts) + len(answer.verdicts) > most:
                    raise MalformedError(
                        f"expected up to {most} verdicts, and some in each message; the key "
                        "holder sent others"
                    )
                verdicts += [verdict_from_wire(verdict) for verdict in answer.verdicts]
            return verdicts

        stub = await self._stub()
        return await self._stream(stub.GetVerdicts, lambda: request, "GetVerdicts", collected)

    async def check_sum(
        self, context: RoundContext, upload_digests: Sequence[bytes], low: NDArray[np.uint32]
    ) -> None:
        """Whether the sum over a manifest would open, as far as its noise shows.

        Args:
            low: uint32 (plan.sum_blocks, 4096), see `noise_audit.dithered`.

        Raises:
            ReleaseError: it would not.
            SecaggError: what else the key holder answered, or `UnavailableError`.
        """

        async def requests() -> AsyncIterator[pb.CheckSumRequest]:
            for manifest in _manifests(context, upload_digests):
                yield pb.CheckSumRequest(manifest=manifest)
            data = low_to_bytes(low)
            for index in range(piece_count(len(data))):
                yield pb.CheckSumRequest(low_bits=piece(data, index))

        await self._ask((await self._stub()).CheckSum, requests, "CheckSum")

    async def release(
        self, context: RoundContext, upload_digests: Sequence[bytes], residues: NDArray[np.uint64]
    ) -> ReleasedSums:
        """What the key holder releases of the sum over a manifest.

        Args:
            residues: uint64 (plan.sum_blocks, 4096), see `residues.folded`.

        Raises:
            MalformedError: no such sums, or more bytes than the plan's sums have.
            SecaggError: what else the key holder answered, or `UnavailableError`.
        """
        size = sums_size(context.plan)

        async def collected(answers: AsyncIterator[Any]) -> tuple[bytes, int]:
            data, contributors = bytearray(), 0
            async for answer in answers:
                # An empty message would keep a stream going for nothing.
                if not answer.data or len(data) + len(answer.data) > size:
                    raise MalformedError(
                        f"expected sums of {size} bytes in all, and some in each message; the key "
                        "holder sent others"
                    )
                data += answer.data
                contributors = answer.contributors
            return bytes(data), contributors

        def requests() -> AsyncIterator[pb.ReleaseRequest]:
            return _release_requests(context, upload_digests, residues)

        stub = await self._stub()
        data, contributors = await self._stream(stub.Release, requests, "Release", collected)
        sums = sums_from_bytes(data, context.plan)
        if contributors != len(upload_digests):
            raise MalformedError("expected a sum over the manifest; it is over another number")
        return ReleasedSums(sums, contributors)

    async def audit(
        self, context: RoundContext, upload_digest: bytes, low: NDArray[np.uint32]
    ) -> str:
        """Why an upload fails the noise audit; empty where it passes.

        Args:
            low: uint32 (plan.blocks, 4096), see `noise_audit.dithered`.

        Raises:
            SecaggError: what the key holder answered, or `UnavailableError`.
        """

        async def requests() -> AsyncIterator[pb.AuditNoiseRequest]:
            yield pb.AuditNoiseRequest(upload=_named(context, upload_digest))
            data = low_to_bytes(low)
            for index in range(piece_count(len(data))):
                yield pb.AuditNoiseRequest(low_bits=piece(data, index))

        answer = await self._ask((await self._stub()).AuditNoise, requests, "AuditNoise")
        if answer.verdict.upload_digest != upload_digest:
            raise MalformedError("expected a verdict on this upload; the key holder gave another")
        if answer.verdict.state == round_pb2.VERDICT_STATE_ACCEPTED:
            return ""
        return str(answer.verdict.reason) or "REFUSED"

    async def close_round(self, context: RoundContext) -> None:
        """Erase the secrets of an attempt that came to nothing.

        Raises:
            SecaggError: what the key holder answered, or `UnavailableError`.
        """
        request = pb.CloseRoundRequest(context=context_id_to_wire(context.id))
        stub = await self._stub()
        await self._ask(stub.CloseRound, request, "CloseRound", wait_for_ready=False)

    async def _ask(
        self,
        method: Callable[..., Any],
        request: object,
        name: str,
        *,
        wait_for_ready: bool = True,
    ) -> Any:  # noqa: ANN401 - any response message
        """The answer to a message, or to a stream of them, which a function makes."""

        async def once(left_s: float) -> Any:  # noqa: ANN401
            # Waiting for the connection lets server and key holder start, and restart, in any
            # order.
            return await method(
                request() if callable(request) else request,
                timeout=left_s,
                wait_for_ready=wait_for_ready,
                metadata=metadata(),
            )

        return await self._persistently(once, name, again=wait_for_ready)

    async def _stream(
        self,
        method: Callable[..., Any],
        request: Callable[[], object],
        name: str,
        collected: Callable[[AsyncIterator[Any]], Awaitable[_T]],
    ) -> _T:
        async def once(left_s: float) -> _T:
            return await collected(
                method(request(), timeout=left_s, wait_for_ready=True, metadata=metadata())
            )

        return await self._persistently(once, name)

    async def _persistently(
        self, once: Callable[[float], Awaitable[_T]], name: str, *, again: bool = True
    ) -> _T:
        """Make a call, and make it again where its connection breaks, for as long as it may take.

        Every call gives the same answer the second time. A line that comes and goes must not use up
        the times that the key holder is asked: after those, a round is given up.
        """
        loop = asyncio.get_running_loop()
        give_up_at, pause_s = loop.time() + deadline_s(name), _FIRST_PAUSE_S
        while True:
            try:
                return await once(give_up_at - loop.time())
            except grpc.RpcError as error:
                broken = error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED
                found = await self._translated(error)
            broken = broken and type(found) is UnavailableError
            if not (again and broken and loop.time() + pause_s < give_up_at):
                raise found
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _translated(self, error: grpc.RpcError) -> SecaggError:
        """Why TLS refuses the connection, if it does; else what the key holder said."""
        found = from_rpc_error(error)
        if not isinstance(found, UnavailableError):
            return found
        roles = (Role.KEY_HOLDER,)
        return await asyncio.to_thread(why_unreachable, self._address, self._kit, roles) or found


def _named(context: RoundContext, upload_digest: bytes) -> pb.NamedUpload:
    return pb.NamedUpload(context=context_id_to_wire(context.id), upload_digest=upload_digest)


def _stamp(kit: Kit | None) -> tuple[int, int]:
    if kit is None:
        return 0, 0
    names = ("certificate.pem", "private.key")
    with contextlib.suppress(OSError):
        return tuple(kit.file(name).stat().st_mtime_ns for name in names)  # type: ignore[return-value]
    return 0, 0


async def _release_requests(
    context: RoundContext, upload_digests: Sequence[bytes], residues: NDArray[np.uint64]
) -> AsyncIterator[pb.ReleaseRequest]:
    for manifest in _manifests(context, upload_digests):
        yield pb.ReleaseRequest(manifest=manifest)
    for start in range(0, len(residues), CHUNK_BLOCKS):
        yield pb.ReleaseRequest(residues=narrow(residues[start : start + CHUNK_BLOCKS]))


def _manifests(context: RoundContext, upload_digests: Sequence[bytes]) -> Iterator[pb.Manifest]:
    name = context_id_to_wire(context.id)
    for start in range(0, len(upload_digests), MANIFEST_BATCH):
        part = upload_digests[start : start + MANIFEST_BATCH]
        yield pb.Manifest(context=name, upload_digests=part)
