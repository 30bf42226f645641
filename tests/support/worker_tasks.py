"""Work for other processes, which import it by name."""

from __future__ import annotations

import os
import signal
import time
import uuid
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from secagg.errors import ReleaseError

__all__ = ["die_always", "die_at_first", "divide", "doubled", "refuse", "waits_for"]


def doubled(array: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Twice the array."""
    return array * 2


def divide(one: int, other: int) -> int:
    """The quotient."""
    return one // other


def refuse() -> None:
    """Fail as a release does."""
    raise ReleaseError("expected the sum of these uploads; it does not open")


def die_always(folder: str) -> None:
    """Be killed, and leave a file for each time."""
    (Path(folder) / uuid.uuid4().hex).touch()
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_first(folder: str) -> str:
    """Be killed the first time only."""
    if not any(Path(folder).iterdir()):
        die_always(folder)
    (Path(folder) / uuid.uuid4().hex).touch()
    return "done"


def waits_for(file: str) -> None:
    """Wait until a file is there."""
    until = time.monotonic() + 30
    while not Path(file).exists() and time.monotonic() < until:
        time.sleep(0.002)
