"""No protection: float32 as numpy has it in memory. What everything else is measured against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ._flat import flatten, shaped

if TYPE_CHECKING:
    from secagg_bench.peers.worker import Clock


class System:
    """Adds float32 vectors; whoever opens divides."""

    DISTRIBUTIONS: ClassVar = ("numpy",)

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], clients: int, clock: Clock) -> None:
        self._shapes = shapes
        self._total: NDArray[np.float32] | None = None
        self._added = 0

    def round(self) -> None:
        """Forget the sum."""
        self._total, self._added = None, 0

    def client(self, number: int, update: Mapping[str, NDArray[np.float32]]) -> list[bytes]:
        """The values, and nothing else."""
        return [flatten(update).tobytes()]

    def add(self, number: int, messages: list[bytes]) -> None:
        """One pass of additions."""
        vector = np.frombuffer(messages[0], dtype=np.float32)
        self._total = vector.copy() if self._total is None else self._total
        if self._added:
            self._total += vector
        self._added += 1

    def hand_over(self) -> list[bytes]:
        """The sum, and nothing else."""
        assert self._total is not None  # noqa: S101 - the worker asks only when something was added
        return [self._total.tobytes()]

    def open(self, messages: list[bytes]) -> dict[str, NDArray[Any]]:
        """The mean, float32."""
        return shaped(np.frombuffer(messages[0], dtype=np.float32) / self._added, self._shapes)
