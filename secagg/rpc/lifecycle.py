"""How a service lives: listen, say so, serve until told to stop, drain, leave.

Health tells the truth: the service ``""`` is SERVING only while everything the program depends on
works, and ``liveness`` as long as the program runs. SIGTERM and SIGINT stop it: health turns
NOT_SERVING, open calls get a grace period, and the process ends with 0.

Who may ask for it: whoever has a certificate, at every gRPC listener; whoever reaches the probe
listener, where there is one, which serves health alone and in plaintext.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from secagg.certificates import Kit
from secagg.errors import ConfigurationError, SecaggError, UnavailableError
from secagg.rpc import channels
from secagg.rpc.diagnosis import why_unreachable

__all__ = [
    "LIVENESS",
    "OFF",
    "Health",
    "Readiness",
    "add_health",
    "check_health",
    "check_listeners",
    "check_ready_file",
    "probe_server",
    "serve_until_stopped",
    "write_ready_file",
]

GRACE_S = 5.0
LIVENESS = "liveness"
OFF = "off"
"""In place of an address: no such listener."""

_ANY = ("0.0.0.0", "[::]")  # noqa: S104 - compared with, not bound
_WATCH_S = 0.5
_HEALTH_TIMEOUT_S = 5.0

Check = Callable[[], Awaitable[None]]
"""Raises a `SecaggError` that says what does not work."""

_LOG = structlog.get_logger(__name__)


class Health(Protocol):
    """What the health service lets its owner say."""

    async def set(self, service: str, status: int) -> None:
        """Change what is answered about a service."""
        ...

    async def enter_graceful_shutdown(self) -> None:
        """Answer NOT_SERVING from now on."""
        ...


def add_health(server: grpc.aio.Server) -> Health:
    """Serve the standard health protocol (grpc.health.v1)."""
    servicer: Health = health.aio.HealthServicer()  # type: ignore[attr-defined]
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    return servicer


class Readiness:
    """What health says, for those who ask in other ways than by gRPC; a `Health`."""

    ready = False

    async def set(self, service: str, status: int) -> None:
        """See `Health`."""
        if not service:
            self.ready = status == health_pb2.HealthCheckResponse.SERVING

    async def enter_graceful_shutdown(self) -> None:
        """See `Health`."""
        self.ready = False


class _ChecksAlone(health.aio.HealthServicer):  # type: ignore[misc, name-defined]
    """Without streams, which whoever reaches a listener could open and keep."""

    async def Watch(self, request: object, context: grpc.aio.ServicerContext) -> None:  # type: ignore[type-arg]
        """See the contract."""
        await context.abort(
            grpc.StatusCode.UNIMPLEMENTED, "expected Check; nobody is watched for here; ask again"
        )


def probe_server(address: str) -> tuple[grpc.aio.Server, Health, str]:
    """A server of the health protocol alone, in plaintext, on whatever address.

    Returns:
        The server, not started; its health; the address with the port that was really bound.

    Raises:
        ConfigurationError: the port is taken.
    """
    server = channels.server()
    servicer: Health = _ChecksAlone()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError:
        raise ConfigurationError(
            f"expected a free port; {address!r} cannot be bound; stop what listens there or choose "
            "another"
        ) from None
    return server, servicer, f"{address.rpartition(':')[0]}:{port}"


def check_listeners(
    kit: Path | None,
    listeners: Mapping[str, str],
    *,
    monitor_listen: str,
    monitor_open: bool,
    probe_listen: str,
) -> None:
    """Refuse addresses that a service cannot listen on, alone or together.

    Args:
        kit: None for plaintext.
        listeners: those for gRPC, by the setting that names them.

    Raises:
        ConfigurationError: not ``host:port``; plaintext that others could reach, and nobody asked
            for it; or one port for two.
    """
    for address in listeners.values():
        channels.check_address(address, encrypted=kit is not None)
    used = dict(listeners)
    if monitor_listen != OFF:
        channels.check_address(monitor_listen, encrypted=True)
        if not (kit or monitor_open or channels.is_loopback(monitor_listen)):
            raise ConfigurationError(
                "expected monitor_listen on loopback, or a kit for TLS; got "
                f"{monitor_listen!r} and no kit; listen on 127.0.0.1, or say monitor_open: then "
                "whoever reaches it may look"
            )
        used["monitor_listen"] = monitor_listen
    if monitor_open and (monitor_listen == OFF or channels.is_loopback(monitor_listen)):
        raise ConfigurationError(
            "expected monitor_open beside a monitor_listen that other machines can reach; got "
            f"{monitor_listen!r}, which it does nothing for; drop it, or listen elsewhere"
        )
    if probe_listen != OFF:
        used["probe_listen"] = channels.check_address(probe_listen, encrypted=True)
    for (one, here), (other, there) in itertools.combinations(used.items(), 2):
        if _overlap(here, there):
            raise ConfigurationError(
                f"expected a port of its own for each listener; {one} and {other} have the same, "
                f"{here!r} and {there!r}; choose another for one of them"
            )


def _overlap(one: str, other: str) -> bool:
    """Whether two addresses cannot both be listened on."""
    (host, _, port), (other_host, _, other_port) = (
        address.replace("localhost:", "127.0.0.1:").rpartition(":") for address in (one, other)
    )
    if int(port) != int(other_port) or not int(port):
        return False
    return host == other_host or host in _ANY or other_host in _ANY


def check_ready_file(path: Path | None) -> None:
    """Refuse a ready file that could not be written, before anything is started.

    Raises:
        ConfigurationError: its folder does not exist.
    """
    if path is not None and not path.parent.is_dir():
        raise ConfigurationError(f"expected ready_file in an existing folder; got {str(path)!r}")


def write_ready_file(path: Path, addresses: dict[str, str]) -> None:
    """Tell whoever started the process, by one atomic file, where it listens."""
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(addresses), encoding="utf-8")
    draft.replace(path)


async def serve_until_stopped(
    servers: list[grpc.aio.Server],
    healths: list[Health],
    on_stop: Callable[[], Awaitable[None]],
    checks: Sequence[Check] = (),
    announce: Callable[[], None] = lambda: None,
) -> None:
    """Serve started servers until a signal comes, then drain them and clean up.

    Args:
        checks: what must work for the program to be ready.
        announce: called once signals are heeded.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    announce()
    for servicer in healths:
        await servicer.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)
        # Until it has been looked at.
        await servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    watch = asyncio.create_task(_watch(healths, checks))
    await stop.wait()
    _LOG.info("stopping", pid=os.getpid())
    watch.cancel()
    for servicer in healths:
        await servicer.enter_graceful_shutdown()
    await on_stop()
    for server in servers:
        await server.stop(GRACE_S)


async def _watch(healths: list[Health], checks: Sequence[Check]) -> None:
    """Let health follow what the program depends on; a line in the log for each change."""
    said: str | None = "starting"
    while True:
        problem = await _problem(checks)
        if problem != said:
            serving = health_pb2.HealthCheckResponse.SERVING
            status = health_pb2.HealthCheckResponse.NOT_SERVING if problem else serving
            for servicer in healths:
                await servicer.set("", status)
            _LOG.info("ready") if problem is None else _LOG.warning("not_ready", why=problem)
            said = problem
        await asyncio.sleep(_WATCH_S)


async def _problem(checks: Sequence[Check]) -> str | None:
    for check in checks:
        try:
            await check()
        except SecaggError as error:
            return str(error)
        except Exception as error:  # of whatever kind: the watch must go on
            return f"expected every check to work; one failed with {type(error).__name__}"
    return None


def check_health(address: str, kit: Kit | None) -> None:
    """Ask a running service whether it is ready.

    Raises:
        UnavailableError: it is not, or does not answer.
        IdentityError: TLS refuses the connection; says why.
    """
    with channels.channel(address, kit) as connection:
        try:
            answer = health_pb2_grpc.HealthStub(connection).Check(
                health_pb2.HealthCheckRequest(), timeout=_HEALTH_TIMEOUT_S
            )
        except grpc.RpcError:
            raise why_unreachable(address, kit) or UnavailableError(
                f"expected a service at {address}; nothing answers there; start it first"
            ) from None
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise UnavailableError("expected a service that is ready; it is not; its log says why")
