"""How a service lives: listen, say so, serve until told to stop, drain, leave.

SIGTERM and SIGINT stop it: health turns NOT_SERVING, open calls get a grace period, and the process
ends with 0.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from secagg.errors import ConfigurationError

__all__ = ["Health", "add_health", "check_ready_file", "serve_until_stopped", "write_ready_file"]

GRACE_S = 5.0
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
) -> None:
    """Serve started servers until a signal comes, then drain them and clean up."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    for servicer in healths:
        await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    await stop.wait()
    _LOG.info("stopping", pid=os.getpid())
    for servicer in healths:
        await servicer.enter_graceful_shutdown()
    await on_stop()
    for server in servers:
        await server.stop(GRACE_S)
