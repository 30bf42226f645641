"""How a service lives: listen, say so, serve until told to stop, drain, leave.

Health tells the truth: the service ``""`` is SERVING only while everything the program depends on
works, and ``liveness`` as long as the program runs. SIGTERM and SIGINT stop it: health turns
NOT_SERVING, open calls get a grace period, and the process ends with 0.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
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
    "Health",
    "add_health",
    "check_health",
    "check_ready_file",
    "serve_until_stopped",
    "write_ready_file",
]

GRACE_S = 5.0
LIVENESS = "liveness"
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
