"""What a server does not take from a key holder: another round, verdicts on other uploads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cohort
import grpc.aio
import pytest
from key_holders import durable_rounds
from serving import LoopThread, loop_thread, serving

from secagg.context import NO_MODEL
from secagg.errors import ContextError, MalformedError
from secagg.wire.v1 import key_holder_service_pb2 as pb
from secagg.wire.v1 import key_holder_service_pb2_grpc, round_pb2
from secagg_keyholder.service import KeyHolderService
from secagg_server.key_holder import KeyHolderClient

ASKED = {"task_id": "task", "round_number": 1, "attempt": 1, "model_digest": NO_MODEL}
OTHERS = {"task_id": "other", "round_number": 2, "attempt": 2, "model_digest": bytes([1]) * 32}


class Lying(KeyHolderService):
    """Asks and answers other than it was asked."""

    def __init__(self, folder: Path) -> None:
        super().__init__(durable_rounds(folder))
        self.change: Callable[[Any], None] = lambda _message: None

    async def OpenRound(self, request: pb.OpenRoundRequest, context: Any) -> Any:  # noqa: ANN401 - see the contract
        self.change(request)
        return await super().OpenRound(request, context)

    async def JudgeUploads(self, request: pb.JudgeUploadsRequest, context: Any) -> Any:  # noqa: ANN401 - as above
        answer = await super().JudgeUploads(request, context)
        self.change(answer)
        return answer


@contextmanager
def lying(folder: Path) -> Iterator[tuple[LoopThread, Lying, KeyHolderClient]]:
    def add(server: grpc.aio.Server) -> None:
        key_holder_service_pb2_grpc.add_KeyHolderServiceServicer_to_server(service, server)

    async def dial(address: str) -> KeyHolderClient:
        return KeyHolderClient(address, None)

    service = Lying(folder)
    with loop_thread() as thread, serving(thread, add) as address:
        client = thread.run(dial(address))
        yield thread, service, client
        thread.run(client.close())


@pytest.mark.parametrize("name", OTHERS)
def test_a_server_takes_no_other_round_than_it_has_asked_for(tmp_path: Path, name: str) -> None:
    with lying(tmp_path) as (thread, service, client):
        service.change = lambda request: setattr(request, name, OTHERS[name])
        with pytest.raises(ContextError, match=name):
            thread.run(client.open_round(cohort.mixed_plan(), **ASKED))  # type: ignore[arg-type]


def drop(answer: pb.JudgeUploadsResponse) -> None:
    del answer.verdicts[0]


def invent(answer: pb.JudgeUploadsResponse) -> None:
    answer.verdicts.add(upload_digest=bytes(32), state=round_pb2.VERDICT_STATE_ACCEPTED)


def swap(answer: pb.JudgeUploadsResponse) -> None:
    answer.verdicts[0].upload_digest = bytes(32)


@pytest.mark.parametrize("change", [drop, invent, swap])
def test_a_server_takes_a_verdict_on_each_upload_and_on_no_other(
    tmp_path: Path, change: Callable[[Any], None]
) -> None:
    with lying(tmp_path) as (thread, service, client):
        context, _ = thread.run(client.open_round(cohort.mixed_plan(), **ASKED))  # type: ignore[arg-type]
        admissions = [cohort.encrypted(context, index).admission for index in range(3)]
        assert thread.run(client.judge(context, admissions)) == {}
        service.change = change
        with pytest.raises(MalformedError, match=r"one verdict for each upload"):
            thread.run(client.judge(context, admissions))
