"""A few calls at a time read their message and work on it; those of the others wait outside.

Outside is the connection, where flow control holds back what nobody reads. So the memory that
messages take is that of a few, however many callers there are. Whoever is slow to send keeps nobody
waiting for long: the next one goes first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

__all__ = ["PATIENCE_S", "Turns"]

PATIENCE_S = 2.0
"""Seconds for which a turn is kept for a message that does not come."""

_M = TypeVar("_M")
_R = TypeVar("_R")


class Turns:
    """Turns of calls, in the order in which they came.

    Args:
        at_once: how many have theirs at a time, 1 or more.
    """

    def __init__(self, at_once: int) -> None:
        self._free = asyncio.Semaphore(at_once)

    async def take(
        self, read: Callable[[], Awaitable[_M]], work: Callable[[_M], Awaitable[_R]]
    ) -> _R:
        """What comes of a message, read and worked on in one turn; if it is late, out of turn."""
        await self._free.acquire()
        mine = True

        def give_back() -> None:
            nonlocal mine
            if mine:
                mine = False
                self._free.release()

        late = asyncio.get_running_loop().call_later(PATIENCE_S, give_back)
        try:
            message = await read()
            late.cancel()
            return await work(message)
        finally:
            late.cancel()
            give_back()
