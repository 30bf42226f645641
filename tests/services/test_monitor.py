"""What a service shows of itself over HTTP, to whom, and that nobody there can hurt it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import http.client
import json
import os
import shutil
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import structlog
from clocks import FakeTime
from federations import (
    expired,
    forged,
    from_the_future,
    kit,
    new_federation,
    shared,
    shared_other,
    swap_in,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc
from programs import KEY_HOLDER, SERVER, Machine
from prometheus_client.parser import text_string_to_metric_families
from serving import LoopThread, loop_thread, soon

from secagg import monitor
from secagg.certificates import Kit, Role
from secagg.enrolment import EnrolmentFile, OpenEnrolment, Roster
from secagg.errors import ConfigurationError, StorageError
from secagg.instruments import CONTENT_TYPE, Instrument, Kind, Meter
from secagg.monitor import Answer, Lookout, Monitor, Route, common_routes, text
from secagg.rpc.lifecycle import Readiness, check_listeners, probe_server
from secagg.rpc.metrics import READY

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
THINGS = Instrument("secagg.things", Kind.COUNTER, "{thing}", "Things.")
PAGE = "/page"


@pytest.fixture(scope="module")
def thread() -> Iterator[LoopThread]:
    with loop_thread() as running:
        yield running


@contextlib.contextmanager
def monitoring(
    thread: LoopThread,
    more: dict[str, Route] | None = None,
    *,
    roster: Roster | None = None,
    own: Kit | None = None,
    address: str = "127.0.0.1:0",
    meter: Meter | None = None,
    readiness: Readiness | None = None,
) -> Iterator[str]:
    """A monitor with what every service shows, and more; its address."""

    async def start() -> tuple[Monitor, str]:
        routes = common_routes(meter or Meter([THINGS]), readiness or Readiness())
        made = Monitor(routes | (more or {}), roster or OpenEnrolment(), own)
        return made, await made.start(address)

    made, bound = thread.run(start())
    try:
        yield bound
    finally:
        thread.run(made.stop())


class Got:
    """An answer."""

    def __init__(self, answer: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.body = answer.status, answer.headers, answer.read()

    def __eq__(self, other: object) -> bool:
        return (self.status, self.body.decode()) == other

    def __repr__(self) -> str:
        return f"{self.status} {self.body[:300]!r}"


def get(
    address: str,
    path: str = "/healthz",
    *,
    method: str = "GET",
    context: ssl.SSLContext | None = None,
    headers: dict[str, str] | None = None,
) -> Got:
    """Ask once, over TLS where there is a context."""
    host, _, port = address.rpartition(":")
    made: http.client.HTTPConnection
    if context:
        made = http.client.HTTPSConnection("localhost", int(port), timeout=20, context=context)
    else:
        made = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=20)
    with contextlib.closing(made):
        made.request(method, path, headers=headers or {})
        return Got(made.getresponse())


def raw(address: str, data: bytes) -> bytes:
    """Everything that comes back until the connection is closed."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(data)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                received += part
        return received


# --- what is shown -------------------------------------------------------------------------------


def test_health_follows_what_grpc_says(thread: LoopThread) -> None:
    readiness = Readiness()
    with monitoring(thread, readiness=readiness) as address:
        assert get(address, "/readyz").status == 503
        for status in (SERVING, NOT_SERVING, SERVING):
            thread.run(readiness.set("", status))
            thread.run(readiness.set("liveness", SERVING))
            assert get(address, "/readyz").status == (200 if status == SERVING else 503)
            assert get(address, "/healthz") == (200, "alive\n")
        thread.run(readiness.enter_graceful_shutdown())
        assert get(address, "/readyz").status == 503
        assert get(address, "/healthz").status == 200


def test_metrics_are_what_the_meter_says(thread: LoopThread) -> None:
    meter = Meter([THINGS])
    with monitoring(thread, meter=meter) as address:
        meter.add(THINGS, 3)
        got = get(address, "/metrics")
        meter.add(THINGS)
        again = get(address, "/metrics")
    assert got.headers["Content-Type"] == CONTENT_TYPE
    for answer, value in ((got, 3), (again, 4)):
        (family,) = text_string_to_metric_families(answer.body.decode())
        assert [(sample.name, sample.value) for sample in family.samples] == [
            ("secagg_things_total", value)
        ]


def test_a_head_has_the_length_and_no_body(thread: LoopThread) -> None:
    with monitoring(thread) as address:
        got = get(address, method="HEAD")
    assert (got.status, got.body, got.headers["Content-Length"]) == (200, b"", "6")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
def test_nothing_but_reading_is_allowed(thread: LoopThread, method: str) -> None:
    with monitoring(thread) as address:
        data = f"{method} /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        status, _, rest = raw(address, data).partition(b"\r\n")
    assert status.split()[1] in (b"405", b"400"), rest
    assert method == "BREW" or b"Allow: GET, HEAD" in rest


@pytest.mark.parametrize(
    "path", ["/nothing", "//healthz", "/metrics/", "/../healthz", "/healthz/x", "/page.css", "/*"]
)
def test_what_is_not_there_is_not_found(thread: LoopThread, path: str) -> None:
    with monitoring(thread) as address:
        assert get(address, path).status == 404


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/nothing", "/broken"])
def test_every_answer_tells_browsers_to_be_careful(thread: LoopThread, path: str) -> None:
    with monitoring(thread, {"/broken": Route(lambda: 1 / 0)}) as address:  # type: ignore[arg-type, return-value]
        headers = get(address, path).headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-store"
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert "Access-Control-Allow-Origin" not in headers
    # What serves it is nobody's business.
    assert headers["Server"] == "secagg"


# --- what breaks ---------------------------------------------------------------------------------


class Pages:
    """A route that a test lets through, or lets fail."""

    def __init__(self) -> None:
        self.made = 0
        self.entered, self.go = threading.Event(), threading.Event()
        self.error: Exception | None = None

    def __call__(self) -> Answer:
        self.entered.set()
        assert self.go.wait(20)
        self.made += 1
        if self.error:
            raise self.error
        return text(f"page {self.made}")


@pytest.fixture
def pages() -> Iterator[Pages]:
    made = Pages()
    yield made
    made.go.set()  # no thread may hang


@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize(
    ("error", "status"),
    [(StorageError("expected a database; hunter2"), 503), (ValueError("hunter2"), 500)],
)
def test_a_page_that_fails_takes_nothing_with_it_and_tells_no_stranger_why(
    thread: LoopThread, pages: Pages, error: Exception, status: int, in_thread: bool
) -> None:
    pages.error = error
    pages.go.set()
    with (
        structlog.testing.capture_logs() as log,
        monitoring(thread, {PAGE: Route(pages, in_thread)}) as address,
    ):
        for _ in range(2):
            got = get(address, PAGE)
            assert got.status == status
            assert b"hunter2" not in got.body
            assert get(address, "/healthz").status == 200
            assert get(address, "/metrics").status == 200
        pages.error = None
        assert get(address, PAGE).status == 200
    assert "hunter2" not in str(log)
    kinds = [line["kind"] for line in log]
    assert kinds == (["ValueError"] * 2 if status == 500 else [])


def test_one_who_waits_holds_nobody_else_up(thread: LoopThread, pages: Pages) -> None:
    with monitoring(thread, {PAGE: Route(pages, in_thread=True)}) as address:
        asking = threading.Thread(target=get, args=(address, PAGE))
        asking.start()
        assert pages.entered.wait(20)
        assert get(address, "/healthz").status == 200
        assert get(address, "/metrics").status == 200
        pages.go.set()
        asking.join(20)
    assert pages.made == 1


def test_those_who_ask_at_once_cost_one_calculation(
    thread: LoopThread, pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Got] = []
    asked: list[object] = []
    now = monitor._Shown.now

    async def noted(shown: monitor._Shown) -> Answer:
        asked.append(shown)
        return await now(shown)

    monkeypatch.setattr(monitor._Shown, "now", noted)
    with monitoring(thread, {PAGE: Route(pages, in_thread=True)}) as address:
        asking = [
            threading.Thread(target=lambda: found.append(get(address, PAGE))) for _ in range(8)
        ]
        for each in asking:
            each.start()
        thread.run(soon(lambda: len(asked) == 8))
        pages.go.set()
        for each in asking:
            each.join(20)
        assert [got.body for got in found] == [b"page 1\n"] * 8
        assert get(address, PAGE).body == b"page 2\n"


def test_an_answer_is_good_for_as_long_as_its_route_says(
    thread: LoopThread, pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages.go.set()
    now = FakeTime()
    monkeypatch.setattr(monitor, "_now", now.clock)
    with monitoring(thread, {PAGE: Route(pages, in_thread=True, fresh_s=1.0)}) as address:
        assert get(address, PAGE).body == b"page 1\n"
        now.sleep(0.9)
        assert get(address, PAGE).body == b"page 1\n"
        now.sleep(0.2)
        assert get(address, PAGE).body == b"page 2\n"
        pages.error = StorageError("expected a database")
        now.sleep(1.1)
        assert get(address, PAGE).status == get(address, PAGE).status == 503
        assert pages.made == 3, "failures are shared as well"


# --- who hurts it --------------------------------------------------------------------------------

TOO_MUCH = {
    "a request line without end": b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
    "a header without end": b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000,
    "headers without end": b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 100_000,
    "not HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) * 8,
    "nonsense": b"hello\r\n\r\n",
    "two hosts": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    "no host": b"GET /healthz HTTP/1.1\r\n\r\n",
    "a body that never comes": b"GET /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n",
    "lengths that disagree": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
}  # fmt: skip


@pytest.mark.parametrize("case", TOO_MUCH)
def test_what_is_no_request_is_refused_and_nobody_notices(thread: LoopThread, case: str) -> None:
    with structlog.testing.capture_logs() as log, monitoring(thread) as address:
        answer = raw(address, TOO_MUCH[case])
        assert get(address).status == 200
    assert b" 200 " not in answer.split(b"\r\n")[0], answer
    assert b"Traceback" not in answer
    assert log == []


def test_a_connection_is_for_one_request(thread: LoopThread) -> None:
    request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: keep-alive\r\n\r\n"
    with monitoring(thread) as address:
        assert raw(address, request * 3).count(b"HTTP/1.1 200") == 1


def test_who_says_nothing_is_cut(thread: LoopThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "CONNECTION_S", 0.2)
    with monitoring(thread) as address:
        for said in (b"", b"GET /heal", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"):
            assert raw(address, said) == b""


def test_who_does_not_listen_is_cut(thread: LoopThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "CONNECTION_S", 0.2)
    large = Route(lambda: Answer(bytes(64 << 20), "application/octet-stream"))
    with monitoring(thread, {PAGE: large}) as address:
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(b"GET /page HTTP/1.1\r\nHost: localhost\r\n\r\n")
            thread.run(soon(lambda: serving_tasks(thread) == 1))
            thread.run(soon(lambda: serving_tasks(thread) == 0))
        monkeypatch.undo()
        assert get(address).status == 200


def serving_tasks(thread: LoopThread) -> int:
    tasks = asyncio.all_tasks(thread.loop)
    return sum("Monitor._serve" in str(task.get_coro()) for task in tasks)


def test_there_are_so_many_connections_and_no_more(
    thread: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "MAX_CONNECTIONS", 2)
    with monitoring(thread) as address, contextlib.ExitStack() as stack:
        host, _, port = address.rpartition(":")
        idle = [
            stack.enter_context(socket.create_connection((host, int(port)), timeout=20))
            for _ in range(4)
        ]
        thread.run(soon(lambda: serving_tasks(thread) == 2))
        for _ in range(20):
            thread.run(asyncio.sleep(0))
            assert serving_tasks(thread) == 2
        for connection in idle:
            connection.close()
        assert get(address).status == 200


def test_a_machine_without_room_for_connections_is_waited_for(
    thread: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "_PAUSE_S", 0.0)
    readable, failures = monitor._readable, [OSError(24, os.strerror(24))] * 3

    async def failing(listener: socket.socket) -> None:
        if failures:
            raise failures.pop()
        await readable(listener)

    monkeypatch.setattr(monitor, "_readable", failing)
    with structlog.testing.capture_logs() as log, monitoring(thread) as address:
        assert get(address).status == 200
    assert [line["event"] for line in log] == ["monitor_waits"] * 3


def test_a_listener_that_dies_says_so_and_that_is_all(
    thread: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(_listener: socket.socket) -> None:
        raise ValueError("hunter2")

    monkeypatch.setattr(monitor, "_readable", broken)
    with structlog.testing.capture_logs() as log, monitoring(thread):
        thread.run(soon(lambda: bool(log)))
    assert [(line["event"], line["kind"]) for line in log] == [("monitor_failed", "ValueError")]


def test_after_it_has_stopped_nobody_listens_and_another_may(
    thread: LoopThread, pages: Pages
) -> None:
    with monitoring(thread, {PAGE: Route(pages, in_thread=True)}) as address:
        host, _, port = address.rpartition(":")
        waiting = socket.create_connection((host, int(port)), timeout=20)
        waiting.sendall(b"GET /page HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert pages.entered.wait(20)
    with waiting, contextlib.suppress(ConnectionResetError):
        assert waiting.recv(1) == b"", "an answer that takes too long is cut"
    with pytest.raises(ConnectionRefusedError):
        get(address)
    with monitoring(thread, address=address) as again:
        assert again == address
        assert get(address).status == 200
    assert serving_tasks(thread) == 0


@pytest.mark.parametrize("steps", range(6))
@pytest.mark.parametrize("before", [0, 4])
def test_who_comes_while_it_stops_is_let_go(
    thread: LoopThread, monkeypatch: pytest.MonkeyPatch, before: int, steps: int
) -> None:
    monkeypatch.setattr(monitor, "_STOP_S", 0.01)

    async def stopped() -> socket.socket:
        made = Monitor({}, OpenEnrolment())
        host, _, port = (await made.start("127.0.0.1:0")).rpartition(":")
        for _ in range(before):
            await asyncio.sleep(0)
        came = socket.create_connection((host, int(port)), timeout=20)
        for _ in range(steps):
            await asyncio.sleep(0)
        await made.stop()
        return came

    complaints: list[Any] = []
    thread.loop.set_exception_handler(lambda _loop, about: complaints.append(about))
    try:
        with thread.run(stopped()) as came, contextlib.suppress(ConnectionResetError):
            assert came.recv(1) == b""
    finally:
        thread.loop.set_exception_handler(None)
    gc.collect()
    assert complaints == []


def test_a_port_that_is_taken_is_said(thread: LoopThread) -> None:
    with monitoring(thread) as address, pytest.raises(ConfigurationError, match="a free port"):  # noqa: SIM117
        with monitoring(thread, address=address):
            pytest.fail("it listens")


# --- by which name -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "host", "fine"),
    [
        ("127.0.0.1:0", "127.0.0.1:7403", True),
        ("127.0.0.1:0", "127.0.0.1", True),
        ("127.0.0.1:0", "localhost:9", True),
        ("127.0.0.1:0", "LocalHost", True),
        ("127.0.0.1:0", "[::1]:7403", True),
        ("127.0.0.1:0", "evil.example:7403", False),
        ("127.0.0.1:0", "127.0.0.1.evil.example", False),
        ("127.0.0.1:0", "localhost.evil.example", False),
        ("127.0.0.1:0", "10.0.0.1", False),
        ("127.0.0.1:0", "server", False),
        ("127.0.0.1:0", "", False),
        ("127.0.0.1:0", "[", False),
        ("127.0.0.1:0", "localhos\tt", False),
        ("127.0.0.1:0", "localhost@evil.example", False),
        ("0.0.0.0:0", "10.1.2.3:7403", True),
        ("0.0.0.0:0", "localhost", True),
        ("0.0.0.0:0", "server:7403", True),
        ("0.0.0.0:0", "secagg-server.secagg.svc:7403", True),
        ("0.0.0.0:0", "secagg-server.secagg.svc.cluster.local:7403", True),
        ("0.0.0.0:0", "evil.example:7403", False),
        ("0.0.0.0:0", "local.evil.example", False),
        ("0.0.0.0:0", "", False),
        ("server.host:0", "server.host:7403", True),
        ("server.host:0", "evil.host:7403", False),
    ],
)
def test_a_page_of_a_stranger_cannot_read_it_by_a_name_of_its_own(
    address: str, host: str, fine: bool
) -> None:
    assert monitor._is_here([host], address) is fine


def test_a_name_of_a_stranger_is_refused(thread: LoopThread) -> None:
    with monitoring(thread) as address:
        for path in ("/healthz", "/metrics", "/nothing"):
            got = get(address, path, headers={"Host": "evil.example"})
            assert got.status == 421
            assert b"secagg_" not in got.body


# --- certificates --------------------------------------------------------------------------------


@pytest.fixture
def shown(tmp_path: Path) -> Callable[[Kit | None], ssl.SSLContext]:
    """What somebody's side of TLS is made of."""

    def context(theirs: Kit | None, ca: bytes = b"") -> ssl.SSLContext:
        trusted = ca or kit(shared(), "server").ca
        made = ssl.create_default_context(cadata=trusted.decode())
        if theirs:
            chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
            chain.write_bytes(theirs.certificate)
            key.write_bytes(theirs.private_key)
            made.load_cert_chain(chain, key)
        return made

    return context


@pytest.fixture(scope="module")
def secured(thread: LoopThread) -> Iterator[str]:
    """The monitor of the shared federation's server, with a page for operators."""
    own = kit(shared(), "server")
    roster = EnrolmentFile(own.file("enrolment.json"), own.ca)
    page = Route(lambda: text("page"), readers=(Role.OPERATOR,))
    with monitoring(thread, {PAGE: page}, roster=roster, own=own) as address:
        yield address


Shown = Callable[..., ssl.SSLContext]
CUT = (ssl.SSLError, ConnectionError, http.client.RemoteDisconnected)


def test_monitors_and_operators_are_let_in(secured: str, shown: Shown) -> None:
    for name in ("prometheus", "admin"):
        context = shown(kit(shared(), name))
        assert get(secured, "/healthz", context=context) == (200, "alive\n")
        assert get(secured, "/metrics", context=context).status == 200
        # Whoever has a certificate is no page of a stranger, under whatever name.
        headers = {"Host": "secagg.example.org"}
        assert get(secured, "/healthz", context=context, headers=headers).status == 200


def test_the_page_is_for_operators(secured: str, shown: Shown) -> None:
    assert get(secured, PAGE, context=shown(kit(shared(), "admin"))) == (200, "page\n")
    refused = get(secured, PAGE, context=shown(kit(shared(), "prometheus")))
    assert refused.status == 403
    assert refused.body.startswith(b"WRONG_ROLE: expected a certificate of the role operator; ")


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", PAGE, "/nothing"])
@pytest.mark.parametrize("name", ["alice", "server", "key-holder"])
def test_no_other_role_sees_anything(secured: str, shown: Shown, name: str, path: str) -> None:
    refused = get(secured, path, context=shown(kit(shared(), name)))
    assert refused.status == 403
    assert refused.body.startswith(b"WRONG_ROLE: expected")
    assert name not in ("alice",) or b"alice" not in refused.body


STRANGERS: dict[str, Callable[[], Kit | None]] = {
    "nobody": lambda: None,
    "a monitor whose time is over": lambda: expired(shared(), Role.MONITOR, "prometheus"),
    "a monitor of tomorrow": lambda: from_the_future(shared(), Role.MONITOR, "prometheus"),
    "a monitor of another authority": lambda: kit(shared_other(), "prometheus"),
    "an operator whose time is over": lambda: expired(shared(), Role.OPERATOR, "admin"),
}


@pytest.mark.parametrize("case", STRANGERS)
def test_without_a_certificate_that_counts_there_is_no_connection(
    secured: str, shown: Shown, case: str
) -> None:
    with pytest.raises(CUT):
        get(secured, context=shown(STRANGERS[case]()))
    assert get(secured, context=shown(kit(shared(), "prometheus"))).status == 200


def test_plaintext_gets_no_answer(secured: str) -> None:
    assert raw(secured, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n") == b""


def test_old_tls_gets_no_answer(secured: str, shown: Shown) -> None:
    context = shown(kit(shared(), "prometheus"))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(CUT):
        get(secured, context=context)


def test_a_monitor_of_a_name_that_never_was_enrolled_may_look(secured: str, shown: Shown) -> None:
    """As with operators: the authority's signature is what counts, and revocation."""
    assert get(secured, context=shown(forged(shared(), Role.MONITOR, "other"))).status == 200


def test_what_is_revoked_and_rotated_counts_at_the_next_request(
    thread: LoopThread, tmp_path: Path, shown: Shown
) -> None:
    federation = new_federation(tmp_path / "federation")
    own = kit(federation, "server")
    roster = EnrolmentFile(own.file("enrolment.json"), own.ca)
    old, admin = kit(federation, "prometheus"), kit(federation, "admin")
    with monitoring(thread, roster=roster, own=own) as address:

        def status(of: Kit) -> int:
            return get(address, context=shown(of, own.ca)).status

        assert status(old) == status(admin) == 200
        federation.rotate_monitor("prometheus", revoke_old=True)
        refused = get(address, context=shown(old, own.ca))
        assert (refused.status, refused.body[:7]) == (403, b"REVOKED")
        assert status(kit(federation, "prometheus")) == status(admin) == 200
        federation.revoke("admin")
        assert status(admin) == 403
        federation.revoke("prometheus")
        assert status(kit(federation, "prometheus")) == 403


def certificate_of(address: str, context: ssl.SSLContext) -> bytes:
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=20) as connection,
        context.wrap_socket(connection, server_hostname="localhost") as secure,
    ):
        return secure.getpeercert(binary_form=True) or b""


def test_a_kit_that_is_replaced_is_shown_to_the_next_who_asks(
    thread: LoopThread, tmp_path: Path, shown: Shown
) -> None:
    """Half a replacement changes nothing; another authority's kit changes whom to trust as well."""
    folder = Path(shutil.copytree(shared().kit("server"), tmp_path / "kit"))
    own, other = Kit.load(folder), kit(shared_other(), "server")
    mine = shown(kit(shared(), "prometheus"), own.ca)
    with monitoring(thread, own=own) as address:
        first = certificate_of(address, mine)
        renewed = forged(shared(), Role.SERVER, "server")
        swap_in(folder / "private.key", renewed.private_key)
        assert certificate_of(address, mine) == first
        swap_in(folder / "certificate.pem", renewed.certificate)
        second = certificate_of(address, mine)
        assert second == ssl.PEM_cert_to_DER_cert(renewed.certificate.decode()) != first
        assert get(address, context=mine).status == 200
        for name in ("ca.pem", "certificate.pem", "private.key"):
            swap_in(folder / name, other.file(name).read_bytes())
        theirs = shown(kit(shared_other(), "prometheus"), other.ca)
        assert get(address, context=theirs).status == 200
        with pytest.raises(CUT):
            get(address, context=shown(kit(shared(), "prometheus"), other.ca))


def test_nobody_who_looks_is_in_a_log(secured: str, shown: Shown) -> None:
    with structlog.testing.capture_logs() as log:
        get(secured, "/metrics", context=shown(kit(shared(), "prometheus")))
        get(secured, "/metrics", context=shown(kit(shared(), "alice")))
        raw(secured, b"nonsense")
        with pytest.raises(CUT):
            get(secured, context=shown(None))
    assert log == []


# --- probes --------------------------------------------------------------------------------------


@contextlib.contextmanager
def probing(thread: LoopThread) -> Iterator[tuple[str, Any]]:
    async def start() -> Any:  # noqa: ANN401
        server, health, address = probe_server("127.0.0.1:0")
        await server.start()
        return server, health, address

    server, health, address = thread.run(start())
    try:
        yield address, health
    finally:
        thread.run(server.stop(None))


def test_probes_are_told_what_everybody_is_told_and_nothing_else(thread: LoopThread) -> None:
    with probing(thread) as (address, health), grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        def said(service: str) -> int:
            request = health_pb2.HealthCheckRequest(service=service)
            return int(stub.Check(request, timeout=20, wait_for_ready=True).status)

        for status in (NOT_SERVING, SERVING):
            thread.run(health.set("", status))
            thread.run(health.set("liveness", SERVING))
            assert (said(""), said("liveness")) == (status, SERVING)
        with pytest.raises(grpc.RpcError) as unknown:
            said("secagg.wire.v1.AggregationService")
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        thread.run(health.enter_graceful_shutdown())
        assert said("") == NOT_SERVING


def test_probes_can_keep_nothing_open_and_call_nothing_else(thread: LoopThread) -> None:
    with probing(thread) as (address, _), grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.RpcError) as watched:
            list(stub.Watch(health_pb2.HealthCheckRequest(), timeout=20, wait_for_ready=True))
        assert watched.value.code() is grpc.StatusCode.UNIMPLEMENTED
        for method in ("AggregationService/GetRound", "OperatorService/ListTasks"):
            with pytest.raises(grpc.RpcError) as refused:
                channel.unary_unary(f"/secagg.wire.v1.{method}")(b"", timeout=20)
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


# --- settings ------------------------------------------------------------------------------------

FINE: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "off": {"monitor_listen": "off"},
    "TLS for everybody": {"monitor_listen": "0.0.0.0:7403"},
    "open": {"monitor_listen": "0.0.0.0:7403", "monitor_open": True},
    "open, by a name": {"monitor_listen": "server.host:7403", "monitor_open": True},
    "open in plaintext": {"monitor_listen": "[::]:1", "monitor_open": True, "kit": None},
    "probes from everywhere": {"probe_listen": "0.0.0.0:7405"},
    "one port on two addresses": {"probe_listen": "10.0.0.1:7403"},
    "any port, twice": {"monitor_listen": "127.0.0.1:0", "probe_listen": "127.0.0.1:0"},
}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "plaintext": ({"monitor_listen": "0.0.0.0:7403", "kit": None}, "monitor_open"),
    "plaintext by a name": ({"monitor_listen": "server:7403", "kit": None}, "monitor_open"),
    "open and off": ({"monitor_listen": "off", "monitor_open": True}, "does nothing"),
    "open on loopback": ({"monitor_open": True}, "does nothing"),
    "no port": ({"monitor_listen": "127.0.0.1"}, "host:port"),
    "no host": ({"probe_listen": ":7405"}, "host:port"),
    "nearly off": ({"monitor_listen": "Off"}, "host:port"),
    "the clients' port": ({"monitor_listen": "127.0.0.1:7400"}, "listen and monitor_listen"),
    "by another name": ({"monitor_listen": "localhost:7400"}, "listen and monitor_listen"),
    "the clients' port everywhere": ({"monitor_listen": "0.0.0.0:7400"}, "have the same"),
    "the monitor's port": ({"probe_listen": "0.0.0.0:7403"}, "monitor_listen and probe_listen"),
}


def check(changes: dict[str, Any]) -> None:
    settings: dict[str, Any] = {
        "monitor_listen": "127.0.0.1:7403",
        "monitor_open": False,
        "probe_listen": "off",
    }
    given = {"kit": Path("kit")} | changes
    own = given.pop("kit")
    check_listeners(own, {"listen": "127.0.0.1:7400"}, **settings | given)


@pytest.mark.parametrize("case", FINE)
def test_these_listeners_can_be(case: str) -> None:
    check(FINE[case])


@pytest.mark.parametrize("case", WRONG)
def test_these_listeners_cannot_be(case: str) -> None:
    changes, message = WRONG[case]
    with pytest.raises(ConfigurationError, match=message):
        check(changes)


@pytest.mark.parametrize(
    ("listen", "is_open", "with_kit", "tls"),
    [
        ("127.0.0.1:0", False, True, False),
        ("127.0.0.1:0", False, False, False),
        ("0.0.0.0:0", False, True, True),
        ("0.0.0.0:0", True, True, False),
        ("0.0.0.0:0", True, False, False),
    ],
)
def test_it_speaks_tls_where_strangers_could_come_and_nobody_said_that_they_may(
    thread: LoopThread, shown: Shown, listen: str, is_open: bool, with_kit: bool, tls: bool
) -> None:
    settings = SimpleNamespace(monitor_listen=listen, monitor_open=is_open, probe_listen="off")
    own = kit(shared(), "server") if with_kit else None

    async def start() -> tuple[Lookout, dict[str, str]]:
        made = Lookout(settings, own, OpenEnrolment(), Meter([READY]))
        return made, await made.start()

    lookout, bound = thread.run(start())
    try:
        assert bound.keys() == {"monitor_listen"}
        assert lookout.servers == []
        address = bound["monitor_listen"].replace("0.0.0.0", "127.0.0.1")  # noqa: S104
        context = shown(kit(shared(), "prometheus")) if tls else None
        assert b"secagg_ready 0.0" in get(address, "/metrics", context=context).body
        if tls:
            assert raw(address, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n") == b""
    finally:
        thread.run(lookout.stop())


def test_what_is_off_is_not_there(thread: LoopThread) -> None:
    settings = SimpleNamespace(monitor_listen="off", monitor_open=False, probe_listen="off")

    async def start() -> dict[str, str]:
        lookout = Lookout(settings, None, OpenEnrolment(), Meter([READY]))
        Lookout.check(settings)
        bound = await lookout.start()
        await lookout.stop()
        return bound

    assert thread.run(start()) == {}


# --- the programs --------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_programs_say_how_they_are_and_stop_as_they_did(tmp_path: Path) -> None:
    with Machine(tmp_path) as machine:
        machine.start(SERVER)
        server = json.loads((tmp_path / "server.ready").read_text("utf-8"))["monitor_listen"]
        assert get(server, "/healthz").status == 200
        assert get(server, "/readyz").status == 503, "it has no key holder"
        assert b"secagg_ready 0.0" in get(server, "/metrics").body
        machine.start(KEY_HOLDER)
        ready = json.loads((tmp_path / "keyholder.ready").read_text("utf-8"))
        machine.program(SERVER).wait_for(lambda: get(server, "/readyz").status == 200)
        for address in (server, ready["monitor_listen"]):
            machine.program(KEY_HOLDER).wait_for(
                lambda address=address: get(address, "/readyz").status == 200  # type: ignore[misc]
            )
            families = text_string_to_metric_families(get(address, "/metrics").body.decode())
            found = {family.name: family.samples for family in families}
            assert found["secagg_ready"][0].value == 1.0
            assert found["secagg_build_info"][0].value == 1.0
            assert "client-" not in str(found)
        assert get(ready["monitor_listen"], "/overview.json").status == 404
        assert get(server, "/").status == 200
        # Whoever looks at it while it stops is no reason to stay.
        host, _, port = server.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=20):
            assert machine.stop() == [0, 0]
