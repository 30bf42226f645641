"""Sums of a round's contributions: in the clear, and encrypted, which opens the very same."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from secagg.aggregator import Aggregator
from secagg.context import rotation_string
from secagg.encryptor import Encryptor
from secagg.keyholder import KeyHolder
from secagg.parameters import Plan
from secagg.quantize import quantize
from secagg.release import Release
from secagg_client.repeatable import repeatable_rounding

__all__ = ["TASK", "Adder", "Encrypting", "Sent", "Update", "add_in_the_clear"]

TASK: Final = "recommender"
"""Id of the task that all sums are of."""

Update = Mapping[str, NDArray[np.float32]]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Sent:
    """What one silo contributes to a round, and the stream that it rounds with."""

    silo: int
    update: Update
    samples: int


Adder = Callable[[Plan, int, Sequence[Sent], int], Release]
"""Sums a round: plan, round, contributions, seed of the rounding."""


def add_in_the_clear(plan: Plan, number: int, sent: Sequence[Sent], seed: int) -> Release:
    """The exact sum of the integers that would be encrypted."""
    rotation = rotation_string(TASK, number, plan)
    total = np.zeros(plan.segments[0].values, dtype=np.int64)
    for each in sent:
        (quantized,) = quantize(
            plan,
            {"update": each.update},
            samples=each.samples,
            rotation=rotation,
            randomness=repeatable_rounding(seed, each.silo, number),
        )
        total += quantized.values
    return Release(plan, rotation, len(sent), (total,))


class Encrypting:
    """Sums under encryption, compared with those in the clear; notes what each step took.

    Attributes:
        rounds: that were summed, all of them bit for bit as in the clear.
        seconds: of each call, by step.
    """

    def __init__(self) -> None:
        self.rounds = 0
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def __call__(self, plan: Plan, number: int, sent: Sequence[Sent], seed: int) -> Release:
        """The sum that the key holder opens.

        Raises:
            RuntimeError: it is not the one in the clear.
        """
        release = self._opened(plan, number, sent, seed)
        if release.sha256 != add_in_the_clear(plan, number, sent, seed).sha256:
            raise RuntimeError(f"round {number}: the sum opened is not the sum in the clear")
        self.rounds += 1
        return release

    def _opened(self, plan: Plan, number: int, sent: Sequence[Sent], seed: int) -> Release:
        holder = KeyHolder(plan, task_id=TASK, round_number=number)
        server = Aggregator(holder.context)
        for each in sent:
            stream = repeatable_rounding(seed, each.silo, number)
            client = Encryptor(holder.context, randomness=stream)
            upload = self._timed("encrypt", client.encrypt, each.update, samples=each.samples)
            holder.admit(upload.admission)
            self._timed("add", server.add, upload)
        return self._timed("open", holder.release, server.aggregate())

    def _timed(self, step: str, do: Callable[..., _T], *given: Any, **named: Any) -> _T:  # noqa: ANN401
        started = time.perf_counter()
        try:
            return do(*given, **named)
        finally:
            self.seconds[step].append(time.perf_counter() - started)
