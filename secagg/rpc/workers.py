"""Heavy calculations in processes of their own, off the event loop.

TenSEAL holds the interpreter's lock in every call: threads would stop the service, processes do
not. They end with the process that started them, even if that one is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

from secagg.errors import UnavailableError

__all__ = ["Workers"]

_T = TypeVar("_T")


class Workers:
    """A few processes that calculate; blocking, for use from threads.

    Args:
        count: processes, 1 or more.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._lock = threading.Lock()
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
        self.run(os.getpid)

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(wait=True, cancel_futures=True)


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
