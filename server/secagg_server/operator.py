"""The operator's side of the admin listener: a blocking client for command lines and tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc

from secagg.errors import UnavailableError
from secagg.rpc.channels import channel
from secagg.rpc.status import from_rpc_error
from secagg.wire.codec import piece, piece_count
from secagg.wire.v1 import operator_service_pb2 as pb
from secagg.wire.v1 import operator_service_pb2_grpc
from secagg_server.tasks import TaskSpec

__all__ = ["Operator"]

_TIMEOUT_S = 60.0
_CONNECT_S = 10.0


class Operator:
    """Creates and watches the tasks of one server.

    Raises:
        UnavailableError: no server answers at the address within some seconds.
    """

    def __init__(self, address: str) -> None:
        self._channel = channel(address)
        try:
            grpc.channel_ready_future(self._channel).result(_CONNECT_S)
        except grpc.FutureTimeoutError:
            self._channel.close()
            raise UnavailableError(
                f"expected a server's admin listener at {address}; nothing answers there; start "
                "secagg-server run, or pass --admin"
            ) from None
        self._stub = operator_service_pb2_grpc.OperatorServiceStub(self._channel)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def create_task(self, spec: TaskSpec, model: bytes = b"") -> None:
        """Create a task; the model is float32 in canonical order, zeros when empty.

        Raises:
            SecaggError: what the server answered.
        """
        self._ask(self._stub.CreateTask, _create_requests(spec, model))

    def tasks(self) -> list[pb.TaskStatus]:
        """All tasks, oldest first.

        Raises:
            SecaggError: what the server answered.
        """
        return list(self._ask(self._stub.ListTasks, pb.ListTasksRequest()).tasks)

    def task(self, task_id: str) -> pb.GetTaskResponse:
        """One task with its rounds.

        Raises:
            SecaggError: what the server answered.
        """
        answer: pb.GetTaskResponse = self._ask(
            self._stub.GetTask, pb.GetTaskRequest(task_id=task_id)
        )
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
            SecaggError: what the server answered.
        """
        request = pb.GetSumsRequest(task_id=task_id, round_number=round_number)
        answers = self._ask(
            lambda *args, **kwargs: list(self._stub.GetSums(*args, **kwargs)), request
        )
        return b"".join(answer.data for answer in answers), answers[0].contributors

    def _ask(self, method: Callable[..., Any], request: object) -> Any:  # noqa: ANN401 - any response
        try:
            return method(request, timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None


def _create_requests(spec: TaskSpec, model: bytes) -> Iterator[pb.CreateTaskRequest]:
    yield pb.CreateTaskRequest(spec=spec.to_wire())
    if model:
        for index in range(piece_count(len(model))):
            yield pb.CreateTaskRequest(model_data=piece(model, index))
