"""Connections that cost the server something and bring it nothing are cut; as documented."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from federations import kit, shared
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving import LoopThread, loop_thread, serving

from secagg.rpc import channels
from secagg.rpc.footprint import MAX_CONNECTIONS
from secagg.rpc.gatekeeper import AT_ONCE, CLIENT_IN_FLIGHT
from secagg.rpc.lifecycle import add_health

PAGE = Path(__file__).parents[2] / "docs" / "limits.md"
SHORT_MS = 200
PATIENCE_S = 15.0
READ_BUFFER = "grpc.experimental.tcp_max_read_buffer_size"


@pytest.fixture(scope="module")
def thread() -> Iterator[LoopThread]:
    with loop_thread() as running:
        yield running


def options(**changed: int) -> tuple[tuple[str, int], ...]:
    """The server's options with some of them shortened, so that nobody has to wait."""
    names = {f"grpc.{name}": value for name, value in changed.items()}
    assert names.keys() <= dict(channels._SERVER_OPTIONS).keys()
    return tuple((dict(channels._SERVER_OPTIONS) | names).items())


def add(server: grpc.aio.Server) -> None:
    add_health(server)


def ends(connection: socket.socket) -> bool:
    """Whether the other side closes the connection; everything it says before that is read."""
    connection.settimeout(PATIENCE_S)
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


def dial(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), PATIENCE_S)


def test_a_connection_that_never_speaks_is_cut(
    thread: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "_SERVER_OPTIONS", options(server_handshake_timeout_ms=SHORT_MS))
    ours = kit(shared(), "server")
    with serving(thread, add, ours) as address, dial(address) as silent:
        assert ends(silent)


def test_an_idle_connection_is_cut(thread: LoopThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "_SERVER_OPTIONS", options(max_connection_idle_ms=SHORT_MS))
    with serving(thread, add) as address:
        with dial(address) as idle:
            idle.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5))
            assert ends(idle)
        with channels.channel(address, None) as channel:
            request = health_pb2.HealthCheckRequest()
            assert health_pb2_grpc.HealthStub(channel).Check(request, timeout=PATIENCE_S)


def test_a_connection_carries_no_more_streams_than_it_may(
    thread: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "_SERVER_OPTIONS", options(max_concurrent_streams=2))
    request = health_pb2.HealthCheckRequest()
    with serving(thread, add) as address, channels.channel(address, None) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(request, timeout=PATIENCE_S) for _ in range(2)]
        for watch in watches:
            next(watch)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(request, timeout=0.5)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        watches[0].cancel()
        assert stub.Check(request, timeout=PATIENCE_S).status is not None
        watches[1].cancel()


def test_the_page_says_what_is_configured() -> None:
    page = PAGE.read_text(encoding="utf-8")
    section = page.partition("## Connections")[2].partition("## ")[0]
    rows = dict(re.findall(r"^\| ([a-z, ]+?) \| ([0-9]+(?: \w+)?)", section, re.MULTILINE))
    server, client = dict(channels._SERVER_OPTIONS), dict(channels._OPTIONS)
    mebibytes = f"{server['grpc.max_receive_message_length'] >> 20} MiB"
    assert client["grpc.max_receive_message_length"] == server["grpc.max_send_message_length"]
    assert rows == {
        "message, both directions": mebibytes,
        "metadata": f"{server['grpc.max_metadata_size'] >> 10} KiB",
        "streams on one connection": str(server["grpc.max_concurrent_streams"]),
        "handshake": f"{server['grpc.server_handshake_timeout_ms'] // 1000} s",
        "keepalive": f"{client['grpc.keepalive_time_ms'] // 1000} s",
        "idle connection": f"{server['grpc.max_connection_idle_ms'] // 60_000} min",
        "calls worked on at once": "64",
        "calls of one client at once": str(CLIENT_IN_FLIGHT),
        "messages read at once": str(AT_ONCE),
        "connections of one listener": str(MAX_CONNECTIONS),
        "read buffer of a connection": f"{server[READ_BUFFER] >> 10} KiB",
    }
    # A client that pings as often as ours must not be taken for an attacker.
    allowed = server["grpc.http2.min_recv_ping_interval_without_data_ms"]
    assert allowed < client["grpc.keepalive_time_ms"]
