"""The operator's side of the admin listener: a blocking client for command lines and tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc

from secagg.audit import Entry
from secagg.certificates import Kit
from secagg.errors import MalformedError, UnavailableError
from secagg.rpc.channels import channel
from secagg.rpc.deadlines import deadline_s
from secagg.rpc.diagnosis import why_unreachable
from secagg.rpc.gatekeeper import metadata
from secagg.rpc.status import from_rpc_error
from secagg.wire.codec import piece, piece_count
from secagg.wire.v1 import operator_service_pb2 as pb
from secagg.wire.v1 import operator_service_pb2_grpc
from secagg_server.tasks import TaskSpec

__all__ = ["Operator"]

_CONNECT_S = 10.0
_TIMEOUT_S = deadline_s("CreateTask")


class Operator:
    """Creates and watches the tasks of one server.

    Args:
        kit: an operator's; None for plaintext on loopback.

    Raises:
        IdentityError: TLS refuses the connection; says why.
        UnavailableError: no server answers at the address within some seconds.
    """

    def __init__(self, address: str, kit: Kit | None) -> None:
        self._channel = channel(address, kit)
        try:
            grpc.channel_ready_future(self._channel).result(_CONNECT_S)
        except grpc.FutureTimeoutError:
            self._channel.close()
            raise why_unreachable(address, kit) or UnavailableError(
                f"expected a server's admin listener at {address}; nothing answers there; start "
                "secagg-server run, or pass --admin"
            ) from None
        self._stub = operator_service_pb2_grpc.OperatorServiceStub(self._channel)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def create_task(self, spec: TaskSpec, model: bytes = b"") -> str:
        """Create a task; the model is float32 in canonical order, zeros when empty.

        Returns:
            What its operator should know of it; empty for nothing.

        Raises:
            SecaggError: what the server answered.
        """
        return str(self._ask(self._stub.CreateTask, _create_requests(spec, model)).note)

    def tasks(self) -> list[pb.TaskStatus]:
        """All tasks, oldest first.

        Raises:
            SecaggError: what the server answered.
        """
        found: list[pb.TaskStatus] = []
        request = pb.ListTasksRequest()
        while True:
            page = self._ask(self._stub.ListTasks, request)
            found += page.tasks
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    def task(self, task_id: str) -> pb.GetTaskResponse:
        """One task with its rounds.

        Raises:
            SecaggError: what the server answered.
        """
        request = pb.GetTaskRequest(task_id=task_id)
        answer: pb.GetTaskResponse = self._ask(self._stub.GetTask, request)
        while answer.next_page_token:
            request.page_token = answer.next_page_token
            page = self._ask(self._stub.GetTask, request)
            answer.rounds.extend(page.rounds)
            answer.next_page_token = page.next_page_token
        return answer

    def abort_task(self, task_id: str) -> None:
        """End a task.

        Raises:
            SecaggError: what the server answered.
        """
        self._ask(self._stub.AbortTask, pb.AbortTaskRequest(task_id=task_id))

    def sums(self, task_id: str, round_number: int) -> tuple[bytes, int]:
        """A round's exact sums as little-endian int64, and the number of contributors.

        Raises:
            MalformedError: the server answered with nothing.
            SecaggError: what else the server answered.
        """
        request = pb.GetSumsRequest(task_id=task_id, round_number=round_number)
        answers = self._ask(
            lambda *args, **kwargs: list(self._stub.GetSums(*args, **kwargs)), request
        )
        if not answers:
            raise MalformedError("expected the sums of a round; the server sent nothing; ask again")
        return b"".join(answer.data for answer in answers), answers[0].contributors

    def audit(self, after: int = 0) -> Iterator[Entry]:
        """The audit log from an entry on.

        Raises:
            SecaggError: what the server answered.
        """
        try:
            request = pb.ExportAuditRequest(after_sequence=after)
            for item in self._stub.ExportAudit(
                request, timeout=deadline_s("ExportAudit"), metadata=metadata()
            ):
                yield Entry(
                    item.sequence, item.time, item.event, item.details, item.previous, item.hash
                )
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    def _ask(self, method: Callable[..., Any], request: object) -> Any:  # noqa: ANN401 - any response
        try:
            return method(request, timeout=_TIMEOUT_S, metadata=metadata())
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None


def _create_requests(spec: TaskSpec, model: bytes) -> Iterator[pb.CreateTaskRequest]:
    yield pb.CreateTaskRequest(spec=spec.to_wire())
    if model:
        for index in range(piece_count(len(model))):
            yield pb.CreateTaskRequest(model_data=piece(model, index))
