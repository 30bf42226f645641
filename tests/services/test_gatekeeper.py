"""What comes before every call: its version, who makes it, is there room, and for how long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import grpc.aio
import pytest
import structlog
from federations import AGGREGATION, gatekeeper, kit, shared
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving import LoopThread, loop_thread, quick_retry, serving, soon

from secagg.certificates import Kit
from secagg.enrolment import EnrolmentFile, OpenEnrolment
from secagg.errors import (
    ClosedError,
    OverloadedError,
    RevokedError,
    SecaggError,
    UnavailableError,
    VersionError,
    WrongRoleError,
)
from secagg.rpc import channels, deadlines
from secagg.rpc.deadlines import DEADLINES_S, deadline_s
from secagg.rpc.gatekeeper import VERSION_KEY, Gatekeeper, caller, metadata
from secagg.rpc.lifecycle import add_health
from secagg.rpc.status import from_rpc_error, retry_delay_s, translated
from secagg.wire.v1 import (
    aggregation_service_pb2,
    aggregation_service_pb2_grpc,
    key_holder_service_pb2,
    operator_service_pb2,
    operator_service_pb2_grpc,
)
from secagg.wire.v1 import aggregation_service_pb2 as pb

# What gRPC generates has no types.
Stub = Any

CUT_S = 1.0
"""A deadline that a message makes, on a busy machine too, and a handler that hangs does not."""


class Doors:
    """Calls wait inside until they are let out; all on one event loop."""

    def __init__(self, thread: LoopThread) -> None:
        self.thread = thread
        self.inside = 0
        self.entered = 0
        self.cancelled = 0
        self.callers: list[str | None] = []
        self.out = thread.run(self._event())

    async def _event(self) -> asyncio.Event:
        return asyncio.Event()

    async def pass_through(self) -> None:
        identity = caller()
        self.callers.append(identity.name if identity else None)
        self.inside += 1
        self.entered += 1
        try:
            await self.out.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.inside -= 1

    def until(self, inside: int | None = None, entered: int | None = None) -> None:
        """Wait until so many calls are inside, or have been."""
        self.thread.run(
            soon(lambda: inside in (None, self.inside) and entered in (None, self.entered))
        )

    def open(self) -> None:
        self.thread.loop.call_soon_threadsafe(self.out.set)


class Waiting(aggregation_service_pb2_grpc.AggregationServiceServicer):
    def __init__(self, doors: Doors) -> None:
        self.doors = doors

    @translated
    async def GetRound(self, request: pb.GetRoundRequest, context: object) -> pb.GetRoundResponse:
        await self.doors.pass_through()
        return pb.GetRoundResponse(model_version=7)

    @translated
    async def PutChunk(self, request: pb.PutChunkRequest, context: object) -> pb.PutChunkResponse:
        raise ClosedError("text")


class WaitingStreams(operator_service_pb2_grpc.OperatorServiceServicer):
    def __init__(self, doors: Doors) -> None:
        self.doors = doors

    @translated
    async def GetSums(
        self, request: object, context: object
    ) -> AsyncIterator[operator_service_pb2.GetSumsResponse]:
        yield operator_service_pb2.GetSumsResponse(data=b"first")
        await self.doors.pass_through()
        yield operator_service_pb2.GetSumsResponse(data=b"last")

    @translated
    async def ExportAudit(
        self, request: object, context: object
    ) -> AsyncIterator[operator_service_pb2.ExportAuditResponse]:
        self.doors.inside += 1
        try:
            while True:
                yield operator_service_pb2.ExportAuditResponse(details="x" * 100_000)
        finally:
            self.doors.inside -= 1


@pytest.fixture(scope="module")
def thread() -> Iterator[LoopThread]:
    with loop_thread() as running:
        yield running


@pytest.fixture
def doors(thread: LoopThread) -> Iterator[Doors]:
    made = Doors(thread)
    yield made
    made.open()
    made.until(inside=0)


def open_to_all(in_flight: int = 64) -> Gatekeeper:
    return gatekeeper(OpenEnrolment(), encrypted=False, in_flight=in_flight)


def guarded(thread: LoopThread, doors: Doors, keeper: Gatekeeper, own: Kit | None = None) -> Any:  # noqa: ANN401
    def add(server: grpc.aio.Server) -> None:
        aggregation_service_pb2_grpc.add_AggregationServiceServicer_to_server(
            Waiting(doors), server
        )
        operator_service_pb2_grpc.add_OperatorServiceServicer_to_server(
            WaitingStreams(doors), server
        )
        add_health(server)

    return serving(thread, add, own, [keeper])


@pytest.fixture
def stub(
    thread: LoopThread, doors: Doors
) -> Iterator[aggregation_service_pb2_grpc.AggregationServiceStub]:
    with (
        guarded(thread, doors, open_to_all(2)) as address,
        channels.channel(address, None) as channel,
    ):
        yield aggregation_service_pb2_grpc.AggregationServiceStub(channel)


@pytest.fixture
def streams(
    thread: LoopThread, doors: Doors
) -> Iterator[operator_service_pb2_grpc.OperatorServiceStub]:
    with (
        guarded(thread, doors, open_to_all(1)) as address,
        channels.channel(address, None) as channel,
    ):
        yield operator_service_pb2_grpc.OperatorServiceStub(channel)


def failure(work: Any, request: Any, **how: Any) -> grpc.RpcError:  # noqa: ANN401
    def call() -> None:
        answer = work(request, **{"timeout": 20, "metadata": metadata()} | how)
        if hasattr(answer, "__next__"):
            list(answer)

    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def round_(stub: Stub, **how: Any) -> grpc.RpcError:  # noqa: ANN401
    return failure(stub.GetRound, pb.GetRoundRequest(), **how)


# --- versions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [None, "0", "2", "1.0", "", "01", " 1", "x" * 500])
def test_any_other_wire_version_is_refused_with_both_named(
    version: str | None, stub: Stub, doors: Doors
) -> None:
    sent = () if version is None else ((VERSION_KEY, version),)
    error = from_rpc_error(round_(stub, metadata=sent))
    assert type(error) is VersionError
    shown = repr("none" if not version else version.strip()[:20])
    assert "expected wire version 1; got" in str(error)
    assert shown.strip("'") in str(error)
    assert len(str(error)) < 200
    assert doors.entered == 0


def test_every_method_asks_for_the_version(thread: LoopThread, doors: Doors) -> None:
    with (
        guarded(thread, doors, open_to_all()) as address,
        channels.channel(address, None) as channel,
    ):
        for service in ("AggregationService", "OperatorService"):
            for name in METHODS[service]:
                rpc = channel.stream_stream(f"/secagg.wire.v1.{service}/{name}")
                with pytest.raises(grpc.RpcError) as caught:
                    list(rpc(iter([b""]), timeout=20))
                assert type(from_rpc_error(caught.value)) is VersionError, name


def test_health_needs_no_version(thread: LoopThread, doors: Doors) -> None:
    with (
        guarded(thread, doors, open_to_all(0)) as address,
        channels.channel(address, None) as channel,
    ):
        answer = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=20
        )
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_a_method_that_does_not_exist_is_unimplemented(thread: LoopThread, doors: Doors) -> None:
    with (
        guarded(thread, doors, open_to_all()) as address,
        channels.channel(address, None) as channel,
    ):
        rpc = channel.unary_unary(f"/{AGGREGATION}/Invented")
        error = failure(rpc, b"")
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


# --- who ----------------------------------------------------------------------------------------


class Lists(OpenEnrolment):
    """A roster that says what it is asked, and refuses what the test wants."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.refusal: SecaggError | None = None

    def check_certificate(self, serial_number: int) -> None:
        self.asked.append("certificate")
        if self.refusal:
            raise self.refusal

    def require(self, name: str) -> Any:  # noqa: ANN401
        self.asked.append("member")


def test_handlers_learn_the_name_in_the_certificate_of_each_call(
    thread: LoopThread, doors: Doors
) -> None:
    own = kit(shared(), "server")
    roster = EnrolmentFile(own.file("enrolment.json"), own.ca)
    doors.open()
    with guarded(thread, doors, gatekeeper(roster), own) as address:
        for name in ("alice", "bob", "alice"):
            with channels.channel(address, kit(shared(), name)) as channel:
                rpc = aggregation_service_pb2_grpc.AggregationServiceStub(channel).GetRound
                rpc(pb.GetRoundRequest(), timeout=20, metadata=metadata())
    assert doors.callers == ["alice", "bob", "alice"]
    assert caller() is None


def test_in_plaintext_nobody_has_a_name(stub: Stub, doors: Doors) -> None:
    doors.open()
    stub.GetRound(pb.GetRoundRequest(), timeout=20, metadata=metadata())
    assert doors.callers == [None]


@pytest.mark.parametrize(
    ("version", "name", "revoked", "kind"),
    [
        ("2", "admin", True, VersionError),
        ("1", "admin", True, WrongRoleError),
        ("1", "alice", True, RevokedError),
        ("1", "alice", False, OverloadedError),
    ],
)
def test_what_can_be_said_first_is_said_first(
    version: str, name: str, revoked: bool, kind: type, thread: LoopThread, doors: Doors
) -> None:
    """No room at all here: whoever may not call is told that, and not to come again."""
    roster = Lists()
    roster.refusal = RevokedError("text") if revoked else None
    keeper = gatekeeper(roster, in_flight=0)
    with (
        guarded(thread, doors, keeper, kit(shared(), "server")) as address,
        channels.channel(address, kit(shared(), name)) as channel,
    ):
        stub = aggregation_service_pb2_grpc.AggregationServiceStub(channel)
        error = from_rpc_error(round_(stub, metadata=((VERSION_KEY, version),)))
    assert type(error) is kind
    assert roster.asked == {
        VersionError: [],
        WrongRoleError: [],
        RevokedError: ["certificate"],
        OverloadedError: ["certificate", "member"],
    }[kind]  # fmt: skip


def test_the_log_has_one_line_a_call_and_no_name(thread: LoopThread, doors: Doors) -> None:
    own = kit(shared(), "server")
    roster = EnrolmentFile(own.file("enrolment.json"), own.ca)
    keeper = gatekeeper(roster, hashed=lambda name: f"hash-of-{len(name)}")
    doors.open()
    with (
        structlog.testing.capture_logs() as log,
        guarded(thread, doors, keeper, own) as address,
        channels.channel(address, kit(shared(), "alice")) as channel,
    ):
        stub = aggregation_service_pb2_grpc.AggregationServiceStub(channel)
        stub.GetRound(pb.GetRoundRequest(), timeout=20, metadata=metadata())
        failure(stub.PutChunk, pb.PutChunkRequest())
        round_(stub, metadata=())
    lines = [(line["method"], line["reason"], line["caller"]) for line in log]
    assert lines == [
        ("GetRound", "OK", "hash-of-5"),
        ("PutChunk", "ROUND_CLOSED", "hash-of-5"),
        ("GetRound", "WIRE_VERSION", "-"),
    ]
    assert "alice" not in str(log)


# --- room ----------------------------------------------------------------------------------------


def start(stub: Stub, doors: Doors, count: int) -> list[Any]:
    """So many calls that wait inside."""
    calls = [
        stub.GetRound.future(pb.GetRoundRequest(), timeout=60, metadata=metadata())
        for _ in range(count)
    ]
    doors.until(inside=count)
    return calls


def test_more_than_there_is_room_for_are_told_to_come_again(stub: Stub, doors: Doors) -> None:
    calls = start(stub, doors, 2)
    for _ in range(5):
        error = round_(stub)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert type(from_rpc_error(error)) is OverloadedError
        assert retry_delay_s(error) == 0.2
    assert doors.entered == 2
    doors.open()
    assert [call.result(20).model_version for call in calls] == [7, 7]
    assert stub.GetRound(pb.GetRoundRequest(), timeout=20, metadata=metadata()).model_version == 7


def test_the_retry_policy_comes_back_until_there_is_room(stub: Stub, doors: Doors) -> None:
    calls = start(stub, doors, 2)
    refused: list[float] = []
    patient = quick_retry(60)
    nap = patient.sleep

    def sleep(seconds: float) -> None:
        refused.append(seconds)
        if len(refused) == 3:
            doors.open()
        nap(seconds)

    object.__setattr__(patient, "sleep", sleep)
    answer = patient.call(
        lambda: stub.GetRound(pb.GetRoundRequest(), timeout=20, metadata=metadata())
    )
    assert answer.model_version == 7
    assert len(refused) >= 3
    for call in calls:
        call.result(20)


def test_a_client_that_goes_away_frees_its_room(stub: Stub, doors: Doors) -> None:
    calls = start(stub, doors, 2)
    for call in calls:
        call.cancel()
    doors.until(inside=0)
    assert doors.cancelled == 2
    later = start(stub, doors, 2)
    doors.open()
    assert [call.result(20).model_version for call in later] == [7, 7]


def test_failures_of_every_kind_free_the_room(stub: Stub, doors: Doors) -> None:
    for _ in range(5):
        assert type(from_rpc_error(failure(stub.PutChunk, pb.PutChunkRequest()))) is ClosedError
        assert type(from_rpc_error(round_(stub, metadata=()))) is VersionError
    calls = start(stub, doors, 2)
    doors.open()
    assert [call.result(20).model_version for call in calls] == [7, 7]


def test_a_stream_takes_room_until_it_ends_or_is_dropped(streams: Stub, doors: Doors) -> None:
    request = operator_service_pb2.GetSumsRequest()
    first = streams.GetSums(request, timeout=60, metadata=metadata())
    assert next(first).data == b"first"
    doors.until(inside=1)
    assert type(from_rpc_error(failure(streams.GetSums, request))) is OverloadedError
    first.cancel()
    doors.until(inside=0)
    doors.open()
    again = streams.GetSums(request, timeout=60, metadata=metadata())
    assert [answer.data for answer in again] == [b"first", b"last"]


def test_a_stream_that_nobody_reads_is_dropped_with_its_client(streams: Stub, doors: Doors) -> None:
    """The server is stuck in sending, not in the handler."""
    request = operator_service_pb2.ExportAuditRequest()
    endless = streams.ExportAudit(request, timeout=60, metadata=metadata())
    next(endless)
    doors.until(inside=1)
    endless.cancel()
    doors.until(inside=0)
    doors.open()
    sums = operator_service_pb2.GetSumsRequest()
    assert len(list(streams.GetSums(sums, timeout=60, metadata=metadata()))) == 2


# --- time ----------------------------------------------------------------------------------------

CONTRACT = (
    aggregation_service_pb2.DESCRIPTOR,
    operator_service_pb2.DESCRIPTOR,
    key_holder_service_pb2.DESCRIPTOR,
)
METHODS = {
    service.name: [method.name for method in service.methods]
    for file in CONTRACT
    for service in file.services_by_name.values()
}
SERVICE_OF = {name: service for service, names in METHODS.items() for name in names}


def test_the_table_of_deadlines_names_methods_of_the_contract_only() -> None:
    assert DEADLINES_S.keys() <= SERVICE_OF.keys()
    assert len(SERVICE_OF) == sum(map(len, METHODS.values())), "one name, one method"


@pytest.mark.parametrize("method", SERVICE_OF)
def test_every_method_of_the_contract_has_a_deadline(method: str) -> None:
    full = f"/secagg.wire.v1.{SERVICE_OF[method]}/{method}"
    assert 5 <= deadline_s(method) == deadline_s(full) <= 600
    assert deadline_s(method) == DEADLINES_S.get(method, 30.0)


def test_a_method_that_is_not_in_the_table_has_the_default() -> None:
    assert deadline_s("Invented") == deadlines._DEFAULT_S == 30.0


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_a_handler_that_hangs_is_cut_whatever_the_caller_allows(
    timeout: float | None, stub: Stub, doors: Doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DEADLINES_S, "GetRound", CUT_S)
    error = round_(stub, timeout=timeout)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert error.details() == "the call took longer than it may"
    assert type(from_rpc_error(error)) is UnavailableError
    doors.until(inside=0)
    assert (doors.entered, doors.cancelled) == (1, 1)


def test_a_caller_that_allows_less_is_served_no_longer(stub: Stub, doors: Doors) -> None:
    error = round_(stub, timeout=0.05)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    doors.until(inside=0)
    assert doors.cancelled == doors.entered


def test_calls_that_are_cut_free_their_room(
    stub: Stub, doors: Doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DEADLINES_S, "GetRound", 0.02)
    for _ in range(6):
        assert round_(stub).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    monkeypatch.undo()
    calls = start(stub, doors, 2)
    doors.open()
    assert [call.result(20).model_version for call in calls] == [7, 7]


def test_a_stream_that_hangs_is_cut_after_what_it_has_sent(
    streams: Stub, doors: Doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DEADLINES_S, "GetSums", CUT_S)
    answers = streams.GetSums(operator_service_pb2.GetSumsRequest(), metadata=metadata())
    assert next(answers).data == b"first"
    with pytest.raises(grpc.RpcError) as caught:
        next(answers)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    doors.until(inside=0)
    assert doors.cancelled == 1


def test_a_stream_that_nobody_reads_frees_its_room_in_time_as_well(
    streams: Stub, doors: Doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DEADLINES_S, "ExportAudit", CUT_S)
    with structlog.testing.capture_logs() as log:
        request = operator_service_pb2.ExportAuditRequest()
        endless = streams.ExportAudit(request, metadata=metadata())
        next(endless)
        doors.until(inside=0)
    assert [line["reason"] for line in log] == ["DEADLINE_OR_CANCELLED"]
    endless.cancel()
    doors.open()
    sums = operator_service_pb2.GetSumsRequest()
    assert len(list(streams.GetSums(sums, timeout=60, metadata=metadata()))) == 2
