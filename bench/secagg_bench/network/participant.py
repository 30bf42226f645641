"""A client that contributes numbers which name it, to one task after another.

What a service manager does is part of it: a client that has given up begins anew, with what it has
kept in its outbox.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from secagg.errors import ClosedError, UnavailableError
from secagg.logs import configure
from secagg.parameters import IntegerSegment, NormCheck, Plan
from secagg.planner import make_plan
from secagg_client.session import ClientKit, ClientSession

__all__ = ["CLIENTS", "MIN_CLIENTS", "SEGMENT", "contribution", "plan", "voices"]

CLIENTS = 4
MIN_CLIENTS = 3
SEGMENT = "voices"
_BASE = 8
_SIZE = 160 * 4096
_CYCLE = 3
_POLL_S = 0.05
_REST_S = 1.0


def plan() -> Plan:
    """80 polynomials an upload, in chunks of 32, 32 and 16; checked for their norm."""
    largest = _CYCLE * _BASE ** (CLIENTS - 1)
    segment = IntegerSegment(SEGMENT, _SIZE, largest, math.sqrt(_SIZE) * largest)
    return make_plan(
        [segment], min_clients=MIN_CLIENTS, max_clients=CLIENTS, norm_check=NormCheck()
    )


def contribution(index: int) -> NDArray[np.int64]:
    """What client i contributes, int64 (size,): its digit of base 8, times 1, 2 or 3 by place."""
    places = np.arange(_SIZE, dtype=np.int64)
    return np.asarray(_BASE**index * (1 + places % _CYCLE))


def voices(total: NDArray[np.int64]) -> list[int] | None:
    """How often each client is in a total, by its digits; None if it is none of contributions."""
    found = [int(total[0]) // _BASE**index % _BASE for index in range(CLIENTS)]
    clear = sum(times * contribution(index) for index, times in enumerate(found))
    return found if np.array_equal(total, clear) else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Take part in one task after another, for ever."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("server", help="host:port")
    parser.add_argument("tasks", type=Path, help="file of tasks, a line each, which grows")
    parser.add_argument("index", type=int)
    parser.add_argument("kit", type=Path)
    parser.add_argument("outbox", type=Path, help="folder for an outbox for each task")
    options = parser.parse_args(arguments)
    configure()
    own = {SEGMENT: contribution(options.index)}
    _say("here")
    for task in _lines(options.tasks):
        outbox = options.outbox / task
        while not _take_part(options.server, task, options.kit, outbox, own):
            _say("gave up", task)
            time.sleep(_REST_S)
        _say("ended", task)
    return 0


def _take_part(
    server: str, task: str, kit: Path, outbox: Path, own: dict[str, NDArray[np.int64]]
) -> bool:
    """Whether the task has ended; else the server could not be reached."""
    with ClientSession(server, task, ClientKit.load(kit), outbox=outbox) as session:
        try:
            for current in session.rounds():
                with contextlib.suppress(ClosedError):
                    current.contribute(own)
            return True
        except UnavailableError:
            return False


def _lines(file: Path) -> Iterator[str]:
    """Each line, once it is there."""
    with file.open(encoding="utf-8") as lines:
        while True:
            if line := lines.readline():
                yield line.strip()
            else:
                time.sleep(_POLL_S)


def _say(event: str, task: str = "") -> None:
    sys.stdout.write(f"{event}: {task}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
