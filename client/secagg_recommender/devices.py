"""Weak devices: what a task asks of a device that has not the time or the bytes for all of it.

A device that trains on a part r of its batches, in a part p of the rounds, would count for about
r·p of what it would otherwise, and sums would lean towards strong devices. It therefore weighs its
update by 1 / (r·p) on top of its samples:

* 1 / p for the rounds it misses (Horvitz and Thompson 1952, "A Generalization of Sampling Without
  Replacement From a Finite Universe"): unbiased exactly, whatever the local optimiser, because p
  is the probability of every single round and depends on no data;
* 1 / r for the batches it leaves out (normalised averaging: Wang et al. 2020, "Tackling the
  Objective Inconsistency Problem in Heterogeneous Federated Optimization", section 4): its update
  is divided by its progress. Batches are drawn uniformly, so this is unbiased to first order in the
  learning rate. Adam's first steps are no gradient steps; there it holds on the whole only.

The weight is both in the numerator and the denominator of the mean. That keeps its direction; where
batches were left out it is shorter (by the harmonic mean of r), which a larger learning rate of the
server makes up for. Weights travel encrypted, so nobody learns who trains less.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from secagg_recommender.factorisation import Silo, derived_seed
from secagg_recommender.interactions import DataError

__all__ = ["Budget", "Workload", "seconds_per_step"]

_TIMED_STEPS: Final = 8


@dataclass(frozen=True, slots=True)
class Budget:
    """What a device may spend; None for as much as it takes.

    Attributes:
        train_seconds: of training, in a round.
        upload_bytes: of uploads, in all rounds of a task.

    Raises:
        DataError: a limit that is not positive and finite.
    """

    train_seconds: float | None = None
    upload_bytes: int | None = None

    def __post_init__(self) -> None:
        """Refuse limits under which a device could never take part."""
        for name in ("train_seconds", "upload_bytes"):
            limit = getattr(self, name)
            if limit is not None and not 0 < limit < math.inf:
                raise DataError(f"expected a finite {name} > 0, got {limit}; or leave it out")

    def workload(
        self,
        *,
        full_steps: int,
        step_s: float,
        rounds: int,
        round_bytes: int,
        seed: int,
        device: int,
    ) -> Workload:
        """As many steps and rounds of a task as the limits allow.

        Args:
            full_steps: steps of a round that nothing cuts short (`Silo.full_steps`).
            step_s: what a step takes on this device (`seconds_per_step`). Measured once, and kept:
                the number of steps must not depend on how busy a device is, or a round could not
                be repeated.
            rounds: of the task.
            round_bytes: of one upload.
            seed: of the task; with ``device`` it says which rounds those are.

        Raises:
            DataError: there is not enough for one step, or one upload.
        """
        steps, uploads = full_steps, rounds
        if self.train_seconds is not None:
            steps = min(full_steps, math.floor(self.train_seconds / step_s))
        if self.upload_bytes is not None:
            uploads = min(rounds, self.upload_bytes // round_bytes)
        if steps < 1 or uploads < 1:
            raise DataError(
                f"expected a budget for one step of {step_s:.3g} s and one upload of {round_bytes} "
                f"bytes, got {self}; raise it, or stay out of the task"
            )
        return Workload(steps, full_steps, uploads, rounds, seed, device)


@dataclass(frozen=True)
class Workload:
    """What a device does of a task: plain numbers, to be fixed at its start and kept.

    Attributes:
        steps: in each round it takes part in, of ``full_steps``.
        uploads: rounds it takes part in, of ``rounds``.
        seed, device: choose which rounds those are.

    Raises:
        DataError: more than there is, or less than one.
    """

    steps: int
    full_steps: int
    uploads: int
    rounds: int
    seed: int
    device: int

    def __post_init__(self) -> None:
        """Refuse what no budget gives."""
        if not (1 <= self.steps <= self.full_steps and 1 <= self.uploads <= self.rounds):
            raise DataError(
                f"expected 1 <= steps <= full_steps and 1 <= uploads <= rounds, got {self}; "
                "work it out anew from the budget"
            )

    def takes_part(self, round_number: int) -> bool:
        """Whether this is one of its rounds, counted from 1; the same for all attempts at it.

        Exactly ``uploads`` of the rounds, each with the same probability. Nothing that a device
        has or learns plays a part, so missing a round tells nothing.

        Raises:
            DataError: no round of the task.
        """
        if not 1 <= round_number <= self.rounds:
            raise DataError(
                f"expected a round in [1, {self.rounds}], got round={round_number}; "
                "the task has become another: work the workload out anew"
            )
        return round_number in self._rounds

    @property
    def correction(self) -> float:
        """1 / (r·p): by how much an update weighs more for what was left out; 1 or more."""
        return self.full_steps / self.steps * self.rounds / self.uploads

    def weight(self, samples: int, cap: int) -> int:
        """Samples to report for an update of ``samples``, at most the plan's ``weight_cap``.

        Raises:
            DataError: beyond the cap, where it would be cut: sums would lean again.
        """
        weight = round(samples * self.correction)
        if weight > cap:
            raise DataError(
                f"expected a weight within the plan's weight_cap={cap}; got more after correction "
                f"by {self.correction:.3g}; plan a larger weight_cap, or train more"
            )
        return weight

    @cached_property
    def _rounds(self) -> frozenset[int]:
        rng = np.random.default_rng(derived_seed("rounds", self.seed, self.device))
        return frozenset((1 + rng.permutation(self.rounds)[: self.uploads]).tolist())


def seconds_per_step(
    silo: Silo,
    shared: Mapping[str, npt.NDArray[np.float32]],
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds that a step takes here, preparations included; the silo stays as it is.

    Raises:
        DataError: tensors do not fit the silo.
    """
    steps = min(_TIMED_STEPS, silo.full_steps)
    before = silo.state()
    try:
        silo.train(shared, 0, steps=1)  # Once for what is loaded and allocated at first use.
        started = clock()
        silo.train(shared, 0, steps=steps)
        return (clock() - started) / steps
    finally:
        silo.restore(before)
