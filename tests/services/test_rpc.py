"""Errors, retries and limits at the edge between processes, over real in-process servers."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import federations
import grpc
import grpc.aio
import pytest
import structlog
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status
from rpc_errors import AnyError, tree
from serving import LoopThread, loop_thread, serving

from secagg.errors import (
    ClosedError,
    ConfigurationError,
    MalformedError,
    NotReadyError,
    OverloadedError,
    PlanError,
    SecaggError,
    UnavailableError,
    by_reason,
)
from secagg.rpc import channels
from secagg.rpc.status import DOMAIN, from_rpc_error, retry_delay_s, translated
from secagg.wire.v1 import aggregation_service_pb2 as pb
from secagg.wire.v1 import aggregation_service_pb2_grpc as aggregation
from secagg.wire.v1 import operator_service_pb2, operator_service_pb2_grpc


class Raising(aggregation.AggregationServiceServicer):
    """Raises what the test put into ``error``; else answers with what it put into ``answer``."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.answer = pb.GetModelResponse()

    @translated
    async def GetModel(self, request: pb.GetModelRequest, context: object) -> pb.GetModelResponse:
        if self.error:
            raise self.error
        return self.answer

    @translated
    async def PutChunk(self, request: pb.PutChunkRequest, context: object) -> pb.PutChunkResponse:
        return pb.PutChunkResponse()


class RaisingStreams(operator_service_pb2_grpc.OperatorServiceServicer):
    """Streams one piece, then raises."""

    error: BaseException | None = None

    @translated
    async def GetSums(
        self, request: operator_service_pb2.GetSumsRequest, context: object
    ) -> AsyncIterator[operator_service_pb2.GetSumsResponse]:
        yield operator_service_pb2.GetSumsResponse(data=b"first")
        if self.error:
            raise self.error


@pytest.fixture(scope="module")
def thread() -> Iterator[LoopThread]:
    with loop_thread() as running:
        yield running


@pytest.fixture
def servicers() -> tuple[Raising, RaisingStreams]:
    return Raising(), RaisingStreams()


@pytest.fixture
def connection(
    thread: LoopThread, servicers: tuple[Raising, RaisingStreams]
) -> Iterator[grpc.Channel]:
    def add(server: grpc.aio.Server) -> None:
        aggregation.add_AggregationServiceServicer_to_server(servicers[0], server)
        operator_service_pb2_grpc.add_OperatorServiceServicer_to_server(servicers[1], server)

    with serving(thread, add) as address, channels.channel(address, None) as channel:
        yield channel


@pytest.fixture
def stub(connection: grpc.Channel) -> aggregation.AggregationServiceStub:
    return aggregation.AggregationServiceStub(connection)


@pytest.fixture
def raising(servicers: tuple[Raising, RaisingStreams]) -> Raising:
    return servicers[0]


@pytest.fixture
def log() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs(
        processors=[structlog.processors.format_exc_info]
    ) as captured:
        yield captured


def failure(call: Callable[..., Any], request: object) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=20)
    return caught.value


def ask(stub: aggregation.AggregationServiceStub) -> grpc.RpcError:
    return failure(stub.GetModel, pb.GetModelRequest())


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tree(), ids=lambda kind: kind.reason)
def test_an_error_comes_back_as_the_class_and_text_it_was(
    kind: type[SecaggError], raising: Raising, stub: aggregation.AggregationServiceStub
) -> None:
    raising.error = kind("expected this; got that; do the other — ×2")
    rpc_error = ask(stub)
    back = from_rpc_error(rpc_error)
    assert type(back) is kind
    assert back.reason == kind.reason
    assert str(back) == "expected this; got that; do the other — ×2"
    assert rpc_error.code().name == kind.status


def test_every_reason_names_one_class() -> None:
    reasons = [kind.reason for kind in tree()]
    assert len(reasons) == len(set(reasons))
    assert all(re.fullmatch(r"[A-Z][A-Z_]*[A-Z]", reason) for reason in reasons)
    assert [by_reason(kind.reason) for kind in tree()] == tree()
    assert by_reason("INVENTED_LATER") is SecaggError


@pytest.mark.parametrize("kind", tree(), ids=lambda kind: kind.reason)
def test_only_what_passes_says_when_to_try_again(
    kind: type[SecaggError], raising: Raising, stub: aggregation.AggregationServiceStub
) -> None:
    raising.error = kind("text")
    passing = kind in (NotReadyError, OverloadedError)
    assert retry_delay_s(ask(stub)) == (0.2 if passing else None)


def test_the_reason_travels_in_an_error_info_of_this_project(
    raising: Raising, stub: aggregation.AggregationServiceStub
) -> None:
    raising.error = PlanError("text")
    status = rpc_status.from_call(ask(stub))
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.domain, info.reason) == (DOMAIN, "IMPOSSIBLE_PLAN") == ("secagg", info.reason)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("token=hunter2"),
        KeyError("hunter2"),
        AssertionError("hunter2"),
        OSError(5, "hunter2"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_unexpected_error_crosses_without_its_text(
    error: Exception, raising: Raising, stub: aggregation.AggregationServiceStub, log: list[Any]
) -> None:
    raising.error = error
    rpc_error = ask(stub)
    assert rpc_error.code() is grpc.StatusCode.INTERNAL
    assert "hunter2" not in f"{rpc_error!r}{rpc_error.details()}{rpc_error.trailing_metadata()}"
    assert type(from_rpc_error(rpc_error)) is SecaggError


def test_an_unexpected_error_is_logged_by_its_kind_and_without_its_text(
    raising: Raising, stub: aggregation.AggregationServiceStub, log: list[Any]
) -> None:
    raising.error = RuntimeError("token=hunter2")
    ask(stub)
    assert [(entry["event"], entry["method"], entry["error"]) for entry in log] == [
        ("unexpected_error", "GetModel", "RuntimeError")
    ]
    assert "hunter2" not in str(log)


def test_an_expected_error_is_not_logged_as_an_unexpected_one(
    raising: Raising, stub: aggregation.AggregationServiceStub, log: list[Any]
) -> None:
    raising.error = MalformedError("text")
    ask(stub)
    assert log == []


@pytest.mark.parametrize("size", [1_000, 20_000])
def test_a_long_message_does_not_cost_the_reason(
    size: int, raising: Raising, stub: aggregation.AggregationServiceStub
) -> None:
    """Texts quote what came in (names of tensors, say), so that a peer decides on their length."""
    raising.error = PlanError("x" * size)
    assert type(from_rpc_error(ask(stub))) is PlanError


def test_errors_in_the_middle_of_a_stream_come_back_too(
    connection: grpc.Channel, servicers: tuple[Raising, RaisingStreams]
) -> None:
    servicers[1].error = ClosedError("text")
    answers = operator_service_pb2_grpc.OperatorServiceStub(connection).GetSums(
        operator_service_pb2.GetSumsRequest(), timeout=20
    )
    assert next(answers).data == b"first"
    with pytest.raises(grpc.RpcError) as caught:
        next(answers)
    assert type(from_rpc_error(caught.value)) is ClosedError


def test_errors_reach_asyncio_clients_as_well(thread: LoopThread, raising: Raising) -> None:
    def add(server: grpc.aio.Server) -> None:
        aggregation.add_AggregationServiceServicer_to_server(raising, server)

    async def call(address: str) -> SecaggError:
        async with channels.aio_channel(address, None) as channel:
            stub = aggregation.AggregationServiceStub(channel)
            try:
                await stub.GetModel(pb.GetModelRequest(), timeout=20)
            except grpc.RpcError as error:
                return from_rpc_error(error)
        raise AssertionError

    raising.error = NotReadyError("soon")
    with serving(thread, add) as address:
        back = thread.run(call(address))
    assert (type(back), str(back)) == (NotReadyError, "soon")


def test_an_error_info_of_another_domain_is_not_taken_for_ours() -> None:
    status = status_pb2.Status(code=code_pb2.FAILED_PRECONDITION, message="text")
    status.details.add().Pack(
        error_details_pb2.ErrorInfo(reason="NOT_READY", domain="googleapis.com")
    )
    back = from_rpc_error(AnyError(grpc.StatusCode.FAILED_PRECONDITION, status))
    assert type(back) is SecaggError


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, UnavailableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, UnavailableError),
        # "Stream removed": a bit of a TLS record was wrong.
        (grpc.StatusCode.UNKNOWN, UnavailableError),
        (grpc.StatusCode.UNIMPLEMENTED, SecaggError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, SecaggError),
        (grpc.StatusCode.INTERNAL, SecaggError),
    ],
)
def test_a_failed_connection_is_unavailable_and_the_rest_is_not(
    code: grpc.StatusCode, kind: type[SecaggError]
) -> None:
    assert type(from_rpc_error(AnyError(code))) is kind


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff", b"\x08\x03\x12\x05other"])
def test_garbage_for_a_status_is_an_error_of_ours(garbage: bytes) -> None:
    """The trailer comes from the peer: bytes that are no status, or one that contradicts itself."""
    error = AnyError(grpc.StatusCode.FAILED_PRECONDITION)
    error._metadata = (("grpc-status-details-bin", garbage),)
    assert type(from_rpc_error(error)) is SecaggError
    assert retry_delay_s(error) is None


def test_nobody_listening_is_unavailable(free_address: str) -> None:
    with channels.channel(free_address, None) as channel:
        rpc_error = ask(aggregation.AggregationServiceStub(channel))
    assert type(from_rpc_error(rpc_error)) is UnavailableError


@pytest.fixture
def free_address(thread: LoopThread) -> str:
    """An address where a server was, and is no longer."""
    with serving(thread, lambda _server: None) as address:
        return address


# --- addresses --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:7400", "127.9.9.9:1", "localhost:0", "[::1]:7400", "::1:7400", "127.0.0.1:65535"],
)
def test_loopback_addresses_are_allowed(address: str) -> None:
    assert channels.check_address(address, encrypted=False) == address
    assert channels.is_loopback(address)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0:7400",
        "[::]:7400",
        "::7400",
        "8.8.8.8:443",
        "192.168.1.2:80",
        "10.0.0.1:80",
        "169.254.0.1:80",
        "[2001:db8::1]:80",
        "[fe80::1]:80",
        "[::ffff:8.8.8.8]:80",
        "example.com:7400",
        "localhost.example.com:7400",
        "127.0.0.1.example.com:80",
        "127.1:80",
        "2130706433:80",
        "0:80",
        "dns:///127.0.0.1:80",
        "ipv4:127.0.0.1:80",
        "127.0.0.1,8.8.8.8:80",
        " 127.0.0.1:80",
        "LOCALHOST%2f:80",
    ],
)
def test_any_other_address_is_refused_before_a_socket_is_opened(address: str) -> None:
    assert not channels.is_loopback(address)
    with pytest.raises(ConfigurationError):
        channels.check_address(address, encrypted=False)
    with pytest.raises(ConfigurationError):
        channels.channel(address, None)


@pytest.mark.parametrize(
    "address",
    [
        "",
        ":",
        "127.0.0.1",
        "127.0.0.1:",
        ":7400",
        "127.0.0.1:70000",
        "127.0.0.1:65536",
        "127.0.0.1:-1",
        "127.0.0.1:http",
        "127.0.0.1:80/path",
        "127.0.0.1:²",
        "127.0.0.1:٣",
        "127.0.0.1: 80",
        "unix:/tmp/socket",
        "7400",
    ],
)
def test_an_address_without_a_usable_port_is_refused_with_the_form(address: str) -> None:
    with pytest.raises(ConfigurationError, match="host:port"):
        channels.check_address(address, encrypted=False)


def test_the_refusal_says_why_and_what_works() -> None:
    with pytest.raises(ConfigurationError) as caught:
        channels.check_address("192.168.1.2:7400", encrypted=False)
    text = str(caught.value)
    assert "plaintext" in text
    assert "127.0.0.1:7400" in text
    assert "'192.168.1.2:7400'" in text


def test_listeners_and_asyncio_connections_obey_the_same_rule() -> None:
    async def attempt() -> None:
        server = channels.server()
        with pytest.raises(ConfigurationError, match="plaintext"):
            channels.add_listener(server, "0.0.0.0:0", None)
        with pytest.raises(ConfigurationError, match="plaintext"):
            channels.aio_channel("192.168.1.2:80", None)
        await server.stop(None)

    asyncio.run(attempt())


def test_a_port_that_is_taken_is_refused_by_its_name(thread: LoopThread) -> None:
    async def attempt(address: str) -> None:
        server = channels.server()
        try:
            with pytest.raises(ConfigurationError, match=f"free port; '{address}'"):
                channels.add_listener(server, address, None)
        finally:
            await server.stop(None)

    with serving(thread, lambda _server: None) as address:
        thread.run(attempt(address))


# --- addresses under TLS ------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["192.168.1.2:7400", "server.example:7400", "0.0.0.0:7400"])
def test_tls_may_go_anywhere(address: str) -> None:
    assert channels.check_address(address, encrypted=True) == address
    channels.channel(address, federations.kit(federations.shared(), "alice")).close()


@pytest.mark.parametrize("address", ["", "server.example", "server.example:http", "1.2.3.4:65536"])
def test_an_address_without_a_port_is_refused_under_tls_too(address: str) -> None:
    with pytest.raises(ConfigurationError, match="host:port"):
        channels.check_address(address, encrypted=True)


@pytest.mark.parametrize("encrypted", [False, True])
def test_whether_a_port_is_free_is_known_without_a_server(
    thread: LoopThread, encrypted: bool
) -> None:
    with (
        serving(thread, lambda _server: None) as address,
        pytest.raises(ConfigurationError, match=r"free port; .* cannot be bound"),
    ):
        channels.check_listenable(address, encrypted=encrypted)
    channels.check_listenable(address, encrypted=encrypted)


def test_listening_in_plaintext_off_loopback_is_refused_before_a_socket_exists() -> None:
    with pytest.raises(ConfigurationError, match="plaintext"):
        channels.check_listenable("0.0.0.0:0", encrypted=False)
    channels.check_listenable("0.0.0.0:0", encrypted=True)
