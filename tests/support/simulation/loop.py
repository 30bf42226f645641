"""Virtual time, and threads that are greenlets: everything happens in one thread, in one order.

Time passes only when nothing else can be done, and then at once. A thread gives way where it says
so, with `pause`, and nowhere else, so that the order of things is chosen by whoever chooses how
long it pauses.
"""

# ruff: noqa: ANN401 - stands in for functions of any kind

from __future__ import annotations

import asyncio
import contextvars
import functools
import selectors
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

from greenlet import greenlet

__all__ = ["Owner", "VirtualLoop", "begin", "in_thread", "threaded", "waits", "within"]

_T = TypeVar("_T")


class _Selector(selectors.DefaultSelector):
    """Never waits: tells how long it would have."""

    def __init__(self, slept: Callable[[float], None]) -> None:
        super().__init__()
        self._slept = slept

    def select(self, timeout: float | None = None) -> list[Any]:
        """What is ready, which is nothing."""
        if timeout is None:
            raise RuntimeError("expected something to happen; everybody waits for somebody else")
        if timeout > 0:
            self._slept(timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer; it knows who owns each task."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_Selector(self._sleep))
        self.set_task_factory(self._task)

    def time(self) -> float:
        """Virtual seconds."""
        return self._now

    def _sleep(self, seconds: float) -> None:
        self._now += seconds

    @staticmethod
    def _task(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> Any:
        task = asyncio.Task(work, loop=loop, **options)
        if (owner := _OWNER.get()) is not None:
            owner.tasks.add(task)
            task.add_done_callback(owner.tasks.discard)
        return task


class Owner:
    """Something whose tasks end together: a process.

    Attributes:
        tasks: what runs in it now.
    """

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[Any]] = set()

    def cancel(self) -> Iterable[asyncio.Task[Any]]:
        """End everything that runs; what was cancelled."""
        # In the order in which they were begun: a set has none.
        ended = sorted(self.tasks, key=lambda task: int(task.get_name().rpartition("-")[2]))
        for task in ended:
            task.cancel()
        return ended


_OWNER: contextvars.ContextVar[Owner | None] = contextvars.ContextVar("owner", default=None)


def begin(work: Coroutine[Any, Any, _T], owner: Owner) -> asyncio.Task[_T]:
    """Run something that belongs to this process, with all that it begins in its turn."""
    return within(owner, lambda: asyncio.ensure_future(work))


def within(owner: Owner, work: Callable[[], _T]) -> _T:
    """Do something; what it begins belongs to this process."""
    token = _OWNER.set(owner)
    try:
        return work()
    finally:
        _OWNER.reset(token)


async def threaded(work: Callable[..., _T], /, *arguments: Any, **options: Any) -> _T:
    """Stands for `asyncio.to_thread`: like a thread, the work goes on if its caller does not."""
    return await asyncio.shield(asyncio.ensure_future(_driven(work, *arguments, **options)))


async def _driven(work: Callable[..., _T], *arguments: Any, **options: Any) -> _T:
    thread = greenlet(work)
    thread.gr_context = contextvars.copy_context()
    step: Callable[[], Any] = functools.partial(thread.switch, *arguments, **options)
    while True:
        awaited = step()
        if thread.dead:
            result: _T = awaited
            return result
        try:
            value = await awaited
        except BaseException as error:  # the thread's, whatever it is
            step = functools.partial(thread.throw, error)
        else:
            step = functools.partial(thread.switch, value)


def in_thread() -> bool:
    """Whether a simulated thread asks, not the loop."""
    return greenlet.getcurrent().parent is not None


def waits(awaited: Awaitable[_T]) -> _T:
    """In a simulated thread: wait for something of the loop's."""
    parent = greenlet.getcurrent().parent
    assert parent is not None, "only a simulated thread can wait"
    result: _T = parent.switch(awaited)
    return result
