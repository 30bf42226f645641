"""A server with an in-process key holder, over gRPC without TLS; and clients that talk to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cohort
import grpc
import grpc.aio
import numpy as np
from key_holders import LocalKeyHolder
from serving import LoopThread, loop_thread, quick_retry, serving
from stores import migrated

from secagg.enrolment import OpenEnrolment
from secagg.parameters import Plan
from secagg.wire import codec
from secagg.wire.v1 import aggregation_service_pb2_grpc
from secagg_client.session import ClientSession, CurrentRound
from secagg_server.blobs import BlobStore
from secagg_server.clock import SystemClock
from secagg_server.coordinator import Coordinator
from secagg_server.intake import Intake
from secagg_server.rounds import OpenRounds
from secagg_server.services import AggregationService
from secagg_server.store import Store
from secagg_server.tasks import TaskSpec
from secagg_server.verdicts import VerdictDesk

__all__ = [
    "METHODS",
    "Gate",
    "Site",
    "contribute",
    "exact",
    "others_take_part",
    "session_at",
    "site_at",
    "take_part",
    "task",
    "wait_for_end",
]

Abort = grpc.aio.ServicerContext[Any, Any]
METHODS = ("GetRound", "GetModel", "OpenUpload", "PutChunk", "CommitUpload")
"""What every contribution needs; a verdict is asked for where the plan has a norm check."""

SECRET = b"a secret that outlives a server."


class Gate(AggregationService):
    """The real service; tests change its answers on their way out, or lose them."""

    def __init__(self, *parts: Any) -> None:  # noqa: ANN401 - what the service takes
        super().__init__(*parts)
        self.calls: Counter[str] = Counter()
        self.lost: set[tuple[str, int]] = set()
        self.change: Callable[[Any], None] = lambda _answer: None


def _guarded(method: str) -> Callable[..., Any]:
    real = getattr(AggregationService, method)

    async def guarded(self: Gate, request: Any, context: Abort) -> Any:  # noqa: ANN401
        answer = await real(self, request, context)
        self.calls[method] += 1
        if (method, self.calls[method]) in self.lost:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the answer is lost")
        self.change(answer)
        return answer

    return guarded


for _method in (*METHODS, "GetVerdict", "WithdrawUpload"):
    setattr(Gate, _method, _guarded(_method))


@dataclass
class Site:
    """A server with an in-process key holder, over gRPC."""

    address: str
    thread: LoopThread
    store: Store
    blobs: BlobStore
    coordinator: Coordinator
    gate: Gate
    key_holder: LocalKeyHolder

    def create(self, spec: TaskSpec, model: bytes | None = None) -> None:
        data = bytes(spec.model_bytes) if model is None else model
        if spec.model:
            self.blobs.put_model(spec.task_id, 0, data)
        self.store.create_task(spec, codec.model_digest(data))
        self.thread.run(self._start(spec))

    async def _start(self, spec: TaskSpec) -> None:
        self.coordinator.start(spec)

    def session(self, index: int, **changes: Any) -> ClientSession:  # noqa: ANN401
        return session_at(self.address, index, **changes)

    def sums(self, plan: Plan, number: int = 1) -> tuple[np.ndarray[Any, Any], ...]:
        return codec.sums_from_bytes(self.blobs.sums("task", number), plan)


def session_at(address: str, index: int, **changes: Any) -> ClientSession:  # noqa: ANN401
    defaults = {
        "insecure": True,
        "rounding": lambda context: cohort.rounding(context, index),
        "retry": quick_retry(),
    }
    return ClientSession(address, "task", cohort.identity(index), **defaults | changes)


@contextmanager
def site_at(folder: Path) -> Iterator[Site]:
    store = Store(migrated(folder / "store.sqlite3"))
    blobs, clock = BlobStore(folder / "blobs"), SystemClock()
    rounds, key_holder, roster = OpenRounds(clock), LocalKeyHolder(), OpenEnrolment()
    coordinator = Coordinator(store, blobs, rounds, key_holder, clock, roster, secret=SECRET)
    intake = Intake(store, blobs, rounds, roster)
    gate = Gate(store, blobs, rounds, intake, VerdictDesk(store, roster, SECRET))

    def add(server: grpc.aio.Server) -> None:
        aggregation_service_pb2_grpc.add_AggregationServiceServicer_to_server(gate, server)

    with loop_thread() as thread, serving(thread, add) as address:
        yield Site(address, thread, store, blobs, coordinator, gate, key_holder)
        thread.run(coordinator.stop())
    store.close()


def task(plan: Plan | None = None, **changes: int) -> TaskSpec:
    """A task that waits long for its clients, and closes once three have come."""
    spec = TaskSpec("task", plan or cohort.mixed_plan(), 1, 600_000, 2, 3)
    return replace(spec, **changes)


def contribute(current: CurrentRound, index: int) -> None:
    values = cohort.contribution(current.context.plan, index)
    current.contribute(values, samples=cohort.samples(index))


def take_part(session: ClientSession, index: int, rounds: int = 1) -> CurrentRound:
    """Contribute to the next rounds; the last of them."""
    for current in session.rounds():
        contribute(current, index)
        if current.number == rounds:
            return current
    raise AssertionError("the task ended early")


def others_take_part(site: Site, *indexes: int) -> None:
    for index in indexes:
        with site.session(index) as session:
            take_part(session, index)


def wait_for_end(site: Site, index: int) -> None:
    """Returns once the task has finished."""
    with site.session(index) as session:
        list(session.rounds())


def exact(site: Site, current: CurrentRound, indexes: list[int]) -> None:
    found = site.sums(current.context.plan)
    for one, other in zip(found, cohort.clear_sums(current.context, indexes), strict=True):
        np.testing.assert_array_equal(one, other)
