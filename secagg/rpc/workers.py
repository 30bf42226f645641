"""Heavy calculations in processes of their own, off the event loop.

TenSEAL holds the interpreter's lock in every call: threads would stop the service, processes do
not. They end with the process that started them, even if that one is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Generic, TypeVar

from secagg.errors import UnavailableError
from secagg.instruments import SILENT, Meter
from secagg.rpc.metrics import OPERATIONS, QUEUE_DEPTH, QUEUE_WAIT

__all__ = ["Workers"]

_T = TypeVar("_T")


class Workers:
    """A few processes that calculate; blocking, for use from threads.

    Args:
        count: processes, 1 or more.
        meter: counts what waits, and times calculations by the names of their functions.
    """

    def __init__(self, count: int, *, meter: Meter = SILENT) -> None:
        self._count = count
        self._meter = meter
        self._lock = threading.Lock()
        self._depth = 0
        meter.watch(QUEUE_DEPTH, lambda: self._depth)
        self._pool = self._start()

    def _start(self) -> ProcessPoolExecutor:
        # Not forked: gRPC's threads must not be copied.
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self._count, mp_context=context, initializer=_settle_in)

    def run(self, work: Callable[..., _T], *arguments: object) -> _T:
        """The result of ``work(*arguments)``, which must be importable by name.

        Raises:
            UnavailableError: the processes died twice, for want of memory perhaps.
            what ``work`` raises.
        """
        asked = time.monotonic()
        self._add_to_depth(1)
        try:
            done: _Done[_T] = self._done(_timed, work, *arguments)
        finally:
            self._add_to_depth(-1)
        # The monotonic clock is one for all processes of a machine.
        self._meter.record(QUEUE_WAIT, max(0.0, done.started - asked))
        self._meter.record(OPERATIONS, done.seconds, operation=work.__name__.removeprefix("_"))
        return done.result

    def _add_to_depth(self, number: int) -> None:
        with self._lock:
            self._depth += number

    def _done(self, work: Callable[..., _T], *arguments: object) -> _T:
        for _ in range(2):
            pool = self._pool
            try:
                return pool.submit(work, *arguments).result()
            except BrokenProcessPool:
                self._replace(pool)
        raise UnavailableError(
            "expected the calculation to finish; its process was killed; give the service more "
            "memory and try again"
        )

    def _replace(self, broken: ProcessPoolExecutor) -> None:
        with self._lock:
            if self._pool is broken:
                self._pool = self._start()
        broken.shutdown(wait=False)

    def warm(self) -> None:
        """Start a process now, so that the first calculation does not wait for it."""
        self._done(os.getpid)

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True, slots=True)
class _Done(Generic[_T]):
    result: _T
    started: float
    seconds: float


def _timed(work: Callable[..., _T], *arguments: object) -> _Done[_T]:
    """In each process: the work, and when it began, on the monotonic clock."""
    started = time.monotonic()
    result = work(*arguments)
    return _Done(result, started, time.monotonic() - started)


def _settle_in() -> None:
    """In each process: leave signals to the parent, and leave with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
