"""Asks a server for its health, every so many milliseconds, and writes down how long it took.

A program of its own, so that nothing else it does delays its clock. It never waits for an answer
before it asks again: a server that stops for a second is seen to by every question of that second.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

import grpc
import grpc.aio
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from secagg.certificates import Kit
from secagg.rpc.channels import aio_channel
from secagg_bench.processes import Services

__all__ = ["Answer", "Prober", "probing", "summary"]

INTERVAL_S = 0.05
TIMEOUT_S = 5.0

Answer = tuple[float, str, float, bool]
"""When it was asked for, on the monotonic clock; how; milliseconds; whether the server is ready."""


class Prober:
    """Questions by gRPC over mutual TLS, and by HTTP in plaintext on loopback.

    Args:
        server, monitor: addresses, ``host:port``.
    """

    def __init__(self, server: str, monitor: str, kit: Kit) -> None:
        self._monitor = monitor
        self._channel = aio_channel(server, kit)
        self.answers: list[Answer] = []
        self._asked: set[asyncio.Task[None]] = set()

    async def run(self, until: asyncio.Event) -> None:
        """Ask until told to stop."""
        while not until.is_set():
            for way, ask in (("grpc", self._by_grpc), ("http", self._by_http)):
                task = asyncio.create_task(self._timed(way, ask))
                self._asked.add(task)
                task.add_done_callback(self._asked.discard)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(until.wait(), INTERVAL_S)
        await asyncio.gather(*self._asked, return_exceptions=True)
        await self._channel.close()

    async def _timed(self, way: str, ask: Any) -> None:  # noqa: ANN401 - a coroutine function
        started, ready = time.monotonic(), False
        with contextlib.suppress(OSError, TimeoutError, grpc.RpcError):
            async with asyncio.timeout(TIMEOUT_S):
                ready = await ask()
        self.answers.append((started, way, 1000 * (time.monotonic() - started), ready))

    async def _by_grpc(self) -> bool:
        stub = health_pb2_grpc.HealthStub(self._channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def _by_http(self) -> bool:
        host, _, port = self._monitor.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(f"GET /readyz HTTP/1.1\r\nHost: {self._monitor}\r\n\r\n".encode())
            await writer.drain()
            return b" 200 " in await reader.readline()
        finally:
            writer.close()


@contextlib.contextmanager
def probing(services: Services, answers: list[Answer]) -> Iterator[None]:
    """Ask the server for its health meanwhile; the answers are appended in the end."""
    arguments = [services.server, services.monitor, str(services.client_kit(0))]
    prober = subprocess.Popen(  # noqa: S603 - our own module
        [sys.executable, "-m", __name__, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    cast(TextIO, prober.stdout).readline()  # it has begun
    try:
        yield
    finally:
        found, _ = prober.communicate()
    answers += [(at, way, ms, ready) for at, way, ms, ready in json.loads(found)]


def summary(answers: Sequence[Answer], begin: float, end: float) -> dict[str, dict[str, float]]:
    """Milliseconds of the answers to what was asked in a span of time, by the way it was asked."""
    found = {}
    for way in ("grpc", "http"):
        asked = [each for each in answers if each[1] == way and begin <= each[0] < end]
        ms = [each[2] for each in asked]
        if ms:
            p50, p99 = np.percentile(ms, (50, 99))
            found[way] = {
                "answers": len(ms),
                "p50_ms": round(float(p50), 2),
                "p99_ms": round(float(p99), 2),
                "max_ms": round(max(ms), 2),
                "not_ready": sum(not each[3] for each in asked),
            }
    return found


async def _main(server: str, monitor: str, folder: str) -> None:
    until = asyncio.Event()
    prober = Prober(server, monitor, Kit.load(Path(folder)))
    print(flush=True)
    asking = asyncio.create_task(prober.run(until))
    await asyncio.to_thread(sys.stdin.read)
    until.set()
    await asking
    json.dump(prober.answers, sys.stdout)


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
