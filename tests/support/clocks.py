"""Clocks that tests move, instead of waiting for real ones."""

from __future__ import annotations

import asyncio
import datetime

__all__ = ["EPOCH", "FakeTime", "ManualClock"]

EPOCH = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)


class ManualClock:
    """Implements the server's `Clock`; moves only by :meth:`advance`. For one event loop."""

    def __init__(self, started: datetime.datetime = EPOCH) -> None:
        self._now = 0.0
        self._started = started
        self._timers: list[tuple[float, asyncio.Event]] = []
        self._changed = asyncio.Event()

    def now(self) -> float:
        """Seconds since the clock was made."""
        return self._now

    def utc(self) -> datetime.datetime:
        """The time of day: when the clock was made, and what has passed since."""
        return self._started + datetime.timedelta(seconds=self._now)

    async def wait(self, event: asyncio.Event, until: float) -> None:
        """Return when the event is set or the moment has come, whichever is first."""
        if event.is_set() or until <= self._now:
            return
        rung = asyncio.Event()
        timer = (until, rung)
        self._timers.append(timer)
        self._changed.set()
        waits = [asyncio.ensure_future(e.wait()) for e in (event, rung)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            self._timers.remove(timer)
            self._changed.set()

    def advance(self, seconds: float) -> None:
        """Let time pass, and wake whoever waited for it."""
        self._now += seconds
        for until, rung in self._timers:
            if until <= self._now:
                rung.set()

    async def watched(self) -> None:
        """Return once somebody waits for a moment that has not come."""
        while not any(until > self._now for until, _ in self._timers):
            self._changed.clear()
            await self._changed.wait()


class FakeTime:
    """A blocking clock whose sleeps take no time; remembers them."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sleeps: list[float] = []

    def clock(self) -> float:
        """Seconds so far."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.sleeps.append(seconds)
        self.now += seconds
