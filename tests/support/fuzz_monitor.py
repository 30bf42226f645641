"""Fuzz target: requests to the monitor, as bytes on a connection."""

from __future__ import annotations

import asyncio
import atexit
import re
from functools import cache
from random import Random

from fuzz_inputs import Target, altered
from fuzz_server import Loop

from secagg.enrolment import OpenEnrolment
from secagg.instruments import SILENT
from secagg.monitor import Monitor, common_routes
from secagg.rpc.lifecycle import Readiness

__all__ = ["MONITOR"]

_PATIENCE_S = 10.0
_TURNS = 60
_ANSWERED = re.compile(rb"HTTP/\d\.\d (\d{3}) ")
_HERE = re.compile(rb"localhost|127\.|::1", re.IGNORECASE)
_FAILED = {b"500", b"501", b"502", b"503", b"504"}


@cache
def _running() -> tuple[Loop, int]:
    loop = Loop()
    readiness = Readiness()
    readiness.ready = True
    monitor = Monitor(common_routes(SILENT, readiness), OpenEnrolment())

    async def start() -> int:
        address = await monitor.start("127.0.0.1:0")
        return int(address.rpartition(":")[2])

    port = loop.run_once(start())
    atexit.register(lambda: loop.run_once(monitor.stop()))
    return loop, port


async def _asked(port: int, data: bytes) -> bytes:
    """The whole answer; empty where there is none within some turns of the loop."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(_PATIENCE_S):
            writer.write(data)
            first = asyncio.ensure_future(reader.read(1))
            for _ in range(_TURNS):
                await asyncio.sleep(0)
                if first.done():
                    break
            writer.write_eof()  # whoever has not answered now waits for more
            return await first + await reader.read()
    except ConnectionError:
        return b""  # it may hang up on whoever says nothing sensible
    finally:
        writer.close()


def _one(data: bytes) -> None:
    loop, port = _running()
    answer = loop.run_once(_asked(port, data))
    found = _ANSWERED.match(answer)
    assert found is not None or not answer, answer[:100]
    if found:
        assert found[1] not in _FAILED, answer[:100]
        # Pages are for those who know where they are: DNS rebinding.
        assert found[1] != b"200" or _HERE.search(data), answer[:100]


_PARTS = (
    *(b"GET", b"HEAD", b"POST", b"\0", b" ", b"\r\n", b"\n", b"\r\n\r\n", b":", b"/healthz", b"/"),
    *(b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"Host: localhost", b"Host: evil.example", b"Host:"),
    *(b"Content-Length: 5", b"Content-Length: -1", b"Content-Length: 99999999999999999999"),
    *(b"Transfer-Encoding: chunked", b"5\r\nhello\r\n0\r\n\r\n", b"ffffffffffffffff\r\n"),
    *(
        b"Expect: 100-continue",
        b"Upgrade: websocket",
        b"Connection: keep-alive",
        b"%2e%2e",
        b"?a=b",
    ),
    *(b"A" * 9000, b"http://localhost/metrics", b"[::1", b"\xff\xfe", b"Content-Encoding: gzip"),
)


def _mutate(data: bytes, random: Random) -> bytes:
    at = random.randrange(len(data) + 1)
    kind = random.randrange(4)
    if kind == 0:
        return altered(data, random)
    part = random.choice(_PARTS)
    if kind == 1:
        return data[:at] + part + data[at:]
    lines = data.split(b"\r\n")
    place = random.randrange(len(lines))
    if kind == 2:
        lines.insert(place, part)
    else:
        lines[place] = part
    return b"\r\n".join(lines)


def _seeds() -> dict[str, bytes]:
    def request(line: bytes, *headers: bytes, body: bytes = b"") -> bytes:
        return b"\r\n".join([line, b"Host: localhost", *headers, b"", body])

    return {
        "alive": request(b"GET /healthz HTTP/1.1"),
        "ready": request(b"GET /readyz HTTP/1.0"),
        "metrics": request(b"GET /metrics HTTP/1.1", b"Accept: text/plain"),
        "nothing there": request(b"HEAD /x HTTP/1.1"),
        "another method": request(b"POST /healthz HTTP/1.1", b"Content-Length: 2", body=b"ab"),
        "in chunks": request(
            b"GET /healthz HTTP/1.1", b"Transfer-Encoding: chunked", body=b"2\r\nab\r\n0\r\n\r\n"
        ),
        "a stranger's name": b"GET /metrics HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        "no end": b"GET /healthz HTT",
        "two at once": request(b"GET /healthz HTTP/1.1") + request(b"GET /readyz HTTP/1.1"),
    }


MONITOR = Target(
    "monitor",
    "HTTP requests to the monitor, as bytes",
    ("Monitor",),
    _one,
    _seeds,
    _mutate,
    _running,
)
