"""Time as a dependency, so that tests move it instead of waiting for it."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import time
from typing import Protocol

__all__ = ["Clock", "SystemClock"]


class Clock(Protocol):
    """Monotonic time in seconds, and the time of day for what outlives the process."""

    def now(self) -> float:
        """Seconds since some fixed moment."""
        ...

    def utc(self) -> datetime.datetime:
        """The time of day, in UTC."""
        ...

    async def wait(self, event: asyncio.Event, until: float) -> None:
        """Return when the event is set or the moment has come, whichever is first."""
        ...


class SystemClock:
    """The machine's clocks."""

    def now(self) -> float:
        """Seconds since some fixed moment."""
        return time.monotonic()

    def utc(self) -> datetime.datetime:
        """The time of day, in UTC."""
        return datetime.datetime.now(datetime.UTC)

    async def wait(self, event: asyncio.Event, until: float) -> None:
        """Return when the event is set or the moment has come, whichever is first."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, until - self.now())):
                await event.wait()
