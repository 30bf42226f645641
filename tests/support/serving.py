"""Runs grpc.aio services inside the test process: a loop in a thread, on free loopback ports."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import grpc.aio
from clocks import FakeTime

from secagg.certificates import Kit
from secagg.rpc import channels
from secagg.rpc.retry import RetryPolicy

__all__ = ["LoopThread", "loop_thread", "quick_retry", "serving", "soon"]

_T = TypeVar("_T")
TIMEOUT_S = 30.0
SOON_S = 30.0
PAUSE_S = 0.002

AddServices = Callable[[grpc.aio.Server], None]


class LoopThread:
    """An event loop of its own; :meth:`run` takes a coroutine there and waits for it."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """The coroutine's result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(TIMEOUT_S)

    def close(self) -> None:
        """Stop the loop and its threads."""
        self.run(self.loop.shutdown_default_executor())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(TIMEOUT_S)
        self.loop.close()


@contextlib.contextmanager
def loop_thread() -> Iterator[LoopThread]:
    """A running event loop in a thread."""
    thread = LoopThread()
    try:
        yield thread
    finally:
        thread.close()


@contextlib.contextmanager
def serving(
    thread: LoopThread,
    add: AddServices,
    kit: Kit | None = None,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
) -> Iterator[str]:
    """A server with these services, plaintext without a kit; its address."""

    async def start() -> tuple[grpc.aio.Server, str]:
        server = channels.server(interceptors)
        add(server)
        address = channels.add_listener(server, "127.0.0.1:0", kit)
        await server.start()
        return server, address

    server, address = thread.run(start())
    try:
        yield address
    finally:
        thread.run(server.stop(None))


async def soon(condition: Callable[[], bool]) -> None:
    """Let everything else run until the condition holds."""
    async with asyncio.timeout(SOON_S):
        while not condition():  # noqa: ASYNC110 - the condition has no event
            # Not at every turn of the loop: asking may cost more than what is waited for.
            await asyncio.sleep(PAUSE_S)


def quick_retry(total_s: float = 20.0) -> RetryPolicy:
    """Gives up on an unreachable server at once, in fake time; lets an in-process one run."""
    time = FakeTime()

    def nap(seconds: float) -> None:
        time.sleep(seconds)
        threading.Event().wait(0.002)

    return RetryPolicy(total_s=total_s, sleep=nap, clock=time.clock)
