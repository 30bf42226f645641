"""The key holder's service as the server sees it: over gRPC, its errors as the library's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import cohort
import grpc
import grpc.aio
import numpy as np
from numpy.typing import NDArray
from serving import LoopThread, serving

from secagg.context import RoundContext
from secagg.parameters import CHUNK_BYTES, RESIDUE_BYTES, Plan
from secagg.residues import ResidueSum, folded, narrow, widen
from secagg.rpc import channels
from secagg.rpc.status import from_rpc_error
from secagg.upload import Upload
from secagg.wire import codec
from secagg.wire.v1 import key_holder_service_pb2 as pb
from secagg.wire.v1 import key_holder_service_pb2_grpc
from secagg_keyholder.rounds import Rounds
from secagg_keyholder.service import KeyHolderService

__all__ = [
    "Holder",
    "Judged",
    "digests_of",
    "flipped",
    "holding",
    "manifest",
    "numbers",
    "pieces",
    "summed",
]


@dataclass
class Holder:
    """A key holder's service as the server sees it."""

    stub: key_holder_service_pb2_grpc.KeyHolderServiceStub
    said: list[str] = field(default_factory=list)

    def open(
        self,
        plan: Plan | None = None,
        *,
        task_id: str = "task",
        number: int = 1,
        attempt: int = 1,
        model_digest: bytes = bytes(32),
    ) -> RoundContext:
        plan = plan or cohort.mixed_plan()
        request = pb.OpenRoundRequest(
            task_id=task_id,
            round_number=number,
            attempt=attempt,
            plan=codec.plan_to_wire(plan),
            model_digest=model_digest,
        )
        answer = self._call(lambda: self.stub.OpenRound(request, timeout=20))
        return codec.round_context_from_wire(answer.context, request.plan, answer.round_key)

    def judge(self, context: RoundContext, uploads: Iterable[Upload]) -> list[tuple[int, str]]:
        request = pb.JudgeUploadsRequest(
            context=codec.context_id_to_wire(context.id),
            admissions=[codec.admission_to_wire(upload.admission) for upload in uploads],
        )
        answer = self._call(lambda: self.stub.JudgeUploads(request, timeout=20))
        named = [message.receipt.upload_digest for message in request.admissions]
        assert [verdict.upload_digest for verdict in answer.verdicts] == named
        return [(verdict.state, verdict.reason) for verdict in answer.verdicts]

    def stream(self, requests: Iterable[pb.ReleaseRequest]) -> tuple[bytes, int]:
        answers = self._call(lambda: list(self.stub.Release(iter(requests), timeout=20)))
        assert len({answer.contributors for answer in answers}) == 1
        return b"".join(answer.data for answer in answers), answers[0].contributors

    def release(
        self, context: RoundContext, digests: Iterable[bytes], data: bytes
    ) -> tuple[bytes, int]:
        return self.stream([manifest(context, digests), *pieces(data)])

    def audit(self, requests: Iterable[pb.AuditNoiseRequest]) -> tuple[int, str]:
        answer = self._call(lambda: self.stub.AuditNoise(iter(requests), timeout=20))
        return answer.verdict.state, answer.verdict.reason

    def close(self, context: RoundContext) -> None:
        request = pb.CloseRoundRequest(context=codec.context_id_to_wire(context.id))
        self._call(lambda: self.stub.CloseRound(request, timeout=20))

    def _call(self, call):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202 - any answer
        try:
            return call()
        except grpc.RpcError as error:
            back = from_rpc_error(error)
            self.said.append(f"{back} {error!r}")
            raise back from None


def manifest(context: RoundContext, digests: Iterable[bytes]) -> pb.ReleaseRequest:
    name = codec.context_id_to_wire(context.id)
    return pb.ReleaseRequest(manifest=pb.Manifest(context=name, upload_digests=list(digests)))


def pieces(data: bytes) -> list[pb.ReleaseRequest]:
    starts = range(0, len(data), CHUNK_BYTES)
    return [pb.ReleaseRequest(residues=data[at : at + CHUNK_BYTES]) for at in starts]


def digests_of(uploads: Iterable[Upload]) -> list[bytes]:
    return [upload.admission.receipt.upload_digest for upload in uploads]


def summed(context: RoundContext, uploads: Iterable[Upload]) -> bytes:
    total = ResidueSum(context.plan.blocks)
    for upload in uploads:
        total.add(widen(upload.payload, context.plan.blocks))
    return narrow(folded(total.value(), context.plan.sum_blocks))


def flipped(data: bytes, place: int = 0) -> bytes:
    """The same residues but one, which is off by one."""
    changed = bytearray(data)
    changed[RESIDUE_BYTES * place] ^= 1
    return bytes(changed)


def numbers(data: bytes, plan: Plan) -> tuple[NDArray[np.int64], ...]:
    return codec.sums_from_bytes(data, plan)


@contextmanager
def holding(thread: LoopThread, rounds: Rounds) -> Iterator[Holder]:
    """The service over some rounds, until it is stopped."""

    def add(server: grpc.aio.Server) -> None:
        key_holder_service_pb2_grpc.add_KeyHolderServiceServicer_to_server(
            KeyHolderService(rounds), server
        )

    with serving(thread, add) as address, channels.channel(address, None) as channel:
        yield Holder(key_holder_service_pb2_grpc.KeyHolderServiceStub(channel))


@dataclass
class Judged:
    """A round whose uploads of clients 0 to 3 are accepted."""

    context: RoundContext
    uploads: list[Upload]

    @property
    def digests(self) -> list[bytes]:
        return digests_of(self.uploads)

    @property
    def data(self) -> bytes:
        return summed(self.context, self.uploads)
