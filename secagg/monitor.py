"""What a service shows of itself over HTTP: its metrics and its health, to those who may look.

On loopback in plaintext. On any other address by TLS, for who shows a certificate of a monitor or
an operator; or, where whoever starts the service says so, in plaintext for whoever reaches it.

Nothing here can hurt the service: one request a connection and few connections at once, each cut
after some seconds; threads of its own; and a listener that breaks is a line in the log. Who asks is
in no log. A leaf (extra ``server`` or ``keyholder``).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import logging
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple, Protocol, TypedDict
from urllib.parse import urlsplit

import grpc.aio
import structlog
from aiohttp import web

from secagg.certificates import Identity, Kit, KitOnDisk, Role, identity_of
from secagg.enrolment import Roster
from secagg.errors import (
    ConfigurationError,
    IdentityError,
    NoCertificateError,
    SecaggError,
    WrongRoleError,
)
from secagg.instruments import CONTENT_TYPE, Meter
from secagg.rpc import channels
from secagg.rpc.channels import is_loopback
from secagg.rpc.lifecycle import OFF, Health, Readiness, probe_server
from secagg.rpc.metrics import READY

__all__ = ["Answer", "Lookout", "Monitor", "Route", "common_routes", "file_route", "text"]

MAX_CONNECTIONS = 32
CONNECTION_S = 10.0
"""Time that a connection has for its handshake, its request and its answer."""

_HANDSHAKE_S = 5.0
_THREADS = 2
_PAUSE_S = 1.0
_STOP_S = 1.0
_MAX_LINE_BYTES = 2048
_MAX_HEADER_BYTES = 4096
_METHODS = ("GET", "HEAD")
_ALL = (Role.MONITOR, Role.OPERATOR)
# Endings of names that no stranger can register and let point to this machine: RFC 6761, 6762,
# ICANN's .internal, and the services of Kubernetes.
_PRIVATE = ("local", "localhost", "internal", "svc", "test")
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Server": "secagg",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

_now = time.monotonic
_LOG = structlog.get_logger(__name__)
# What the parser would say of strangers' requests.
_NOBODY = logging.getLogger(f"{__name__}.requests")
_NOBODY.addHandler(logging.NullHandler())
_NOBODY.propagate = False


class Answer(NamedTuple):
    """What is shown at a path."""

    body: bytes
    content_type: str
    status: int = HTTPStatus.OK


class Route(NamedTuple):
    """How an answer is made.

    Attributes:
        make: may raise a `SecaggError`: it is not available now, and the log says why.
        in_thread: whether making it takes a while. Those who ask meanwhile share one.
        fresh_s: seconds for which one that was made in a thread is good.
        readers: who may have it, where they show certificates.
    """

    make: Callable[[], Answer]
    in_thread: bool = False
    fresh_s: float = 0.0
    readers: Sequence[Role] = _ALL


def text(said: str, status: int = HTTPStatus.OK) -> Answer:
    """A line for people and probes."""
    return Answer(f"{said}\n".encode(), "text/plain; charset=utf-8", status)


def common_routes(meter: Meter, readiness: Readiness) -> dict[str, Route]:
    """What every service shows, by path."""

    def ready() -> Answer:
        # Why not is in the log, and nobody else's business.
        if not readiness.ready:
            return text("not ready; the log says why", HTTPStatus.SERVICE_UNAVAILABLE)
        return text("ready")

    return {
        "/healthz": Route(lambda: text("alive")),
        "/readyz": Route(ready),
        "/metrics": Route(lambda: Answer(meter.exposition(), CONTENT_TYPE), in_thread=True),
    }


def file_route(path: Path, content_type: str) -> Route:
    """A file that comes with the program, for operators."""
    answer = Answer(path.read_bytes(), content_type)
    return Route(lambda: answer, readers=(Role.OPERATOR,))


class Monitor:
    """A listener in the event loop that it is started in.

    Args:
        routes: what is shown, by path.
        roster: says which certificates count no longer.
        kit: for TLS; None for plaintext.
    """

    def __init__(self, routes: Mapping[str, Route], roster: Roster, kit: Kit | None = None) -> None:
        self._roster = roster
        self._tls = _Tls(kit) if kit else None
        # Of its own: those of the service must not wait for whoever looks at it.
        self._threads = ThreadPoolExecutor(_THREADS, "monitor")
        self._shown = {path: _Shown(route, self._threads) for path, route in routes.items()}
        self._room = asyncio.Semaphore(MAX_CONNECTIONS)
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, address: str) -> str:
        """Listen.

        Returns:
            The address with the port that was really bound.

        Raises:
            ConfigurationError: it cannot be bound.
        """
        host, _, port = address.rpartition(":")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server((host.strip("[]"), int(port)), family=family)
        except OSError as error:
            raise ConfigurationError(
                f"expected a free port; {address!r} cannot be bound: {error.strerror}; stop what "
                "listens there or choose another"
            ) from None
        listener.setblocking(False)
        self._address = address
        self._http = _Http(self._respond)
        self._listener = listener
        self._accepting = self._begin(self._accept())
        return f"{host}:{listener.getsockname()[1]}"

    async def stop(self) -> None:
        """Listen no more; answers that are being given have a moment."""
        self._accepting.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_S):
                await asyncio.gather(*self._tasks, return_exceptions=True)
        self._listener.close()
        await self._http.shutdown(_STOP_S)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _begin(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            _LOG.error("monitor_failed", kind=type(error).__name__)

    async def _accept(self) -> None:
        while True:
            await self._room.acquire()
            try:
                # Not sock_accept(): cancelled in the wrong moment, it loses who has just come.
                await _readable(self._listener)
                connection, _ = self._listener.accept()
            except BlockingIOError:  # who came has left again
                self._room.release()
            except OSError as error:  # too many open files, for one
                self._room.release()
                _LOG.warning("monitor_waits", why=error.strerror)
                await asyncio.sleep(_PAUSE_S)
            else:
                connection.setblocking(False)
                self._begin(self._serve(connection))

    async def _serve(self, connection: socket.socket) -> None:
        """One connection, from its handshake to its end."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        transport: asyncio.BaseTransport | None = None
        secured: _Secured = {}
        if self._tls:
            secured = {
                "ssl": self._tls.context(),
                "ssl_handshake_timeout": _HANDSHAKE_S,
                "ssl_shutdown_timeout": _STOP_S,
            }
        try:
            async with asyncio.timeout(CONNECTION_S):
                transport, _ = await loop.connect_accepted_socket(
                    lambda: self._http.connection(ended), connection, **secured
                )
                await ended
        except OSError:  # no handshake with this one, or it is too slow: TimeoutError is one too
            pass
        finally:
            if isinstance(transport, asyncio.Transport):
                transport.abort()
            self._room.release()

    async def _respond(self, request: web.BaseRequest) -> web.Response:
        try:
            answer = await self._answer(request)
        except IdentityError as error:
            answer = text(f"{error.reason}: {error}", HTTPStatus.FORBIDDEN)
        except SecaggError:  # a store that does not answer: health says so in the log
            answer = text("not available; the log says why", HTTPStatus.SERVICE_UNAVAILABLE)
        except Exception as error:  # of whatever kind: one page less is no reason to stop
            _LOG.error("monitor_failed", kind=type(error).__name__)
            answer = text("failed; the log says why", HTTPStatus.INTERNAL_SERVER_ERROR)
        headers = _HEADERS | {"Content-Type": answer.content_type}
        if answer.status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = ", ".join(_METHODS)
        response = web.Response(body=answer.body, status=answer.status, headers=headers)
        # What a certificate says is looked at each time, and nobody keeps a place.
        response.force_close()
        return response

    async def _answer(self, request: web.BaseRequest) -> Answer:
        shown = self._shown.get(request.path)
        if self._tls:
            self._identify(request.transport, shown.readers if shown else _ALL)
        elif not _is_here(request.headers.getall("Host", []), self._address):
            return text(
                "expected a request to an address or a name of this network; got another name; "
                "a proxy in between has to send its own",
                HTTPStatus.MISDIRECTED_REQUEST,
            )
        if request.method not in _METHODS:
            return text("expected GET or HEAD", HTTPStatus.METHOD_NOT_ALLOWED)
        if shown is None:
            return text("expected a page that there is", HTTPStatus.NOT_FOUND)
        return await shown.now()

    def _identify(self, transport: asyncio.Transport | None, readers: Sequence[Role]) -> None:
        connection = transport.get_extra_info("ssl_object") if transport else None
        certificate = connection.getpeercert(binary_form=True) if connection else None
        if not certificate:
            raise NoCertificateError("expected a client certificate; none was shown; use a kit")
        identity = _identity(certificate)
        if identity.role not in readers:
            raise WrongRoleError(
                f"expected a certificate of the role {' or '.join(readers)}; this one is a "
                f"{identity.role.value}'s; use the kit of another"
            )
        self._roster.check_certificate(identity.serial_number)


async def _readable(listener: socket.socket) -> None:
    """Until somebody waits to be accepted."""
    loop, waiting = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(listener, waiting.set)
    try:
        await waiting.wait()
    finally:
        loop.remove_reader(listener)


class _Secured(TypedDict, total=False):
    ssl: ssl.SSLContext
    ssl_handshake_timeout: float
    ssl_shutdown_timeout: float


class _Shown:
    """A route's answer, made once for all who ask for it at a time."""

    def __init__(self, route: Route, threads: Executor) -> None:
        self.readers = route.readers
        self._route = route
        self._threads = threads
        self._made: asyncio.Future[Answer] | None = None
        self._good_until = 0.0

    async def now(self) -> Answer:
        if not self._route.in_thread:
            return self._route.make()
        if self._made is None or (self._made.done() and _now() >= self._good_until):
            loop = asyncio.get_running_loop()
            self._made = loop.run_in_executor(self._threads, self._route.make)
            self._made.add_done_callback(self._note)
        # Whoever leaves takes nothing away from the others.
        return await asyncio.shield(self._made)

    def _note(self, made: asyncio.Future[Answer]) -> None:
        self._good_until = _now() + self._route.fresh_s
        if not made.cancelled():
            made.exception()  # perhaps nobody waits for it any more


class _Http(web.Server):
    """Says when a connection has ended."""

    def __init__(self, respond: Callable[[web.BaseRequest], Awaitable[web.Response]]) -> None:
        super().__init__(
            respond,
            handler_cancellation=True,
            access_log=None,
            logger=_NOBODY,
            tcp_keepalive=False,
            keepalive_timeout=CONNECTION_S,
            lingering_time=0.0,
            max_line_size=_MAX_LINE_BYTES,
            max_field_size=_MAX_HEADER_BYTES,
        )
        self._ends: dict[web.RequestHandler, asyncio.Future[None]] = {}

    def connection(self, ended: asyncio.Future[None]) -> web.RequestHandler:
        handler = self()
        self._ends[handler] = ended
        return handler

    def connection_lost(
        self, handler: web.RequestHandler, exc: BaseException | None = None
    ) -> None:
        super().connection_lost(handler, exc)
        ended = self._ends.pop(handler, None)
        if ended and not ended.done():
            ended.set_result(None)


class _Tls:
    """What the next handshake goes by."""

    def __init__(self, kit: Kit) -> None:
        self._disk = KitOnDisk(kit)
        self._kit, self._context = kit, _context(kit)

    def context(self) -> ssl.SSLContext:
        kit = self._disk.current()
        if kit is not self._kit:
            # OpenSSL reads the files anew, and they may be about to change again.
            with contextlib.suppress(OSError):
                self._context, self._kit = _context(kit), kit
        return self._context


def _context(kit: Kit) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    # Nobody resumes: each connection shows its certificate.
    context.num_tickets = 0
    context.load_cert_chain(kit.file("certificate.pem"), kit.file("private.key"))
    context.load_verify_locations(cadata=kit.ca.decode("ascii"))
    return context


@functools.lru_cache(maxsize=64)
def _identity(certificate: bytes) -> Identity:
    return identity_of(ssl.DER_cert_to_PEM_cert(certificate).encode("ascii"))


def _is_here(hosts: Sequence[str], address: str) -> bool:
    """Whether a request names this place in a way that no page of a stranger can.

    Otherwise a name that its owner lets point here would have a browser on this network read what
    is shown to that page: DNS rebinding.

    Args:
        hosts: of the request.
        address: that is listened on.
    """
    try:
        (host,) = hosts
        if not host.isprintable():  # urlsplit() would pass over tabs
            return False
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:  # none, several, or not a host
        return False
    if is_loopback(address):
        return is_loopback(f"{name}:0")
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    mine = address.rpartition(":")[0].lower()
    return bool(name) and ("." not in name or name == mine or name.rpartition(".")[2] in _PRIVATE)


class Settings(Protocol):
    """What a service's settings say of who may look at it."""

    monitor_listen: str
    monitor_open: bool
    probe_listen: str


class Lookout:
    """The listeners of a service for those who look at it, as its settings ask for them.

    Args:
        kit: the service's; None where it speaks plaintext.
        routes: what is shown beside `common_routes`, by path.

    Attributes:
        healths, servers: for `serve_until_stopped`.
    """

    def __init__(
        self,
        settings: Settings,
        kit: Kit | None,
        roster: Roster,
        meter: Meter,
        routes: Mapping[str, Route] | None = None,
    ) -> None:
        self._settings = settings
        readiness = Readiness()
        meter.watch(READY, lambda: float(readiness.ready))
        plain = settings.monitor_open or is_loopback(settings.monitor_listen)
        self._monitor: Monitor | None = None
        if settings.monitor_listen != OFF:
            shown = common_routes(meter, readiness) | dict(routes or {})
            self._monitor = Monitor(shown, roster, None if plain else kit)
        self.healths: list[Health] = [readiness]
        self.servers: list[grpc.aio.Server] = []

    @staticmethod
    def check(settings: Settings) -> None:
        """Refuse ports that are taken, before any server exists.

        Raises:
            ConfigurationError: one is.
        """
        for address in (settings.monitor_listen, settings.probe_listen):
            if address != OFF:
                channels.check_listenable(address, encrypted=True)

    async def start(self) -> dict[str, str]:
        """Listen.

        Returns:
            The addresses that were really bound, by setting.

        Raises:
            ConfigurationError: one cannot be bound.
        """
        bound = {}
        if self._monitor:
            bound["monitor_listen"] = await self._monitor.start(self._settings.monitor_listen)
        if self._settings.probe_listen != OFF:
            server, health, bound["probe_listen"] = probe_server(self._settings.probe_listen)
            await server.start()
            self.servers.append(server)
            self.healths.append(health)
        return bound

    async def stop(self) -> None:
        """Listen no more; the gRPC servers are stopped with the others."""
        if self._monitor:
            await self._monitor.stop()
