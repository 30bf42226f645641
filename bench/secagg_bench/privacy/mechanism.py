"""How clients' contributions become a noisy sum, and what that costs: what a round of secagg does.

Every contribution has an L2 norm of at most 1 (the clip norm, after scaling), the sum gets Gaussian
noise of z on each coordinate, and is divided by the public number of contributors. With ``bits``,
contributions go through `secagg.quantize`, are summed as integers, and `secagg.publication` adds
what noise the key holder would. Losses are in zCDP: a release with multiplier z costs
1/(2 z**2). Read `federated` next.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from secagg.accounting import noise_multiplier_for
from secagg.context import rotation_string
from secagg.parameters import FloatSegment, Plan, Privacy, TensorSpec
from secagg.planner import make_plan
from secagg.publication import published
from secagg.quantize import dequantize_update, quantize
from secagg.sampling import Stream

__all__ = ["Budget", "Channel", "Contributions", "Release"]


@dataclass(frozen=True, slots=True)
class Budget:
    """What all releases together may cost one client; an infinite epsilon adds no noise."""

    epsilon: float
    delta: float

    @property
    def rho(self) -> float:
        """The same as zCDP."""
        if math.isinf(self.epsilon):
            return math.inf
        return 0.5 / noise_multiplier_for(self.epsilon, self.delta, 1) ** 2

    def multiplier(self, share: float = 1.0, releases: int = 1) -> float:
        """z of each of so many releases that cost this share of the budget together."""
        if math.isinf(self.epsilon):
            return 0.0
        return math.sqrt(releases / (2 * share * self.rho))


class Contributions(Protocol):
    """One contribution a client, of L2 norm at most 1."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one contribution."""

    def __len__(self) -> int: ...

    def total(self) -> NDArray[np.float64]:
        """Their sum."""

    def rows(self) -> Iterator[NDArray[np.float32]]:
        """One after another."""

    def along(self, direction: NDArray[np.float64]) -> NDArray[np.float64]:
        """Inner product of each with a direction, float64 of shape (clients,)."""


@dataclass(frozen=True, slots=True, eq=False)
class Release:
    """What everybody sees of a round: the noisy sum, how many are in it, and z."""

    total: NDArray[np.float64] = field(repr=False)
    contributors: int
    multiplier: float

    @property
    def mean(self) -> NDArray[np.float64]:
        """The sum over the number of contributors."""
        return self.total / self.contributors


class Channel:
    """Sums contributions and adds noise; remembers what it released.

    Args:
        budget: of all releases together.
        rng: of the noise and the rounding. Reproducible, so fit for an experiment alone.
        bits: of a quantised coordinate; None leaves floats as they are.
        absent: further contributors, of zeros.
    """

    def __init__(
        self,
        budget: Budget,
        rng: np.random.Generator,
        bits: int | None = None,
        absent: int = 0,
    ) -> None:
        self.budget = budget
        self.releases: list[Release] = []
        self._rng, self._bits, self._absent = rng, bits, absent

    def release(self, contributions: Contributions, multiplier: float) -> Release:
        """The noisy sum of one round."""
        if self._bits is None:
            total = contributions.total()
            total = total + multiplier * self._rng.normal(size=total.shape)
        else:
            total = self._quantised(contributions, multiplier, self._bits)
        self.releases.append(Release(total, len(contributions) + self._absent, multiplier))
        return self.releases[-1]

    def _quantised(
        self, contributions: Contributions, multiplier: float, bits: int
    ) -> NDArray[np.float64]:
        plan = self._plan(contributions, multiplier, bits)
        segment, layout = plan.segments[0], plan.layouts[0]
        if not isinstance(segment, FloatSegment):
            raise TypeError("expected a plan of one segment of floats")
        stream = Stream(self._rng.bytes(32))
        rotation = rotation_string("privacy", len(self.releases) + 1, plan)
        total = np.zeros(layout.values, dtype=np.int64)
        for row in contributions.rows():
            (part,) = quantize(
                plan, {"update": row}, samples=1, rotation=rotation, randomness=stream
            )
            total += part.values
        (released,) = published(plan, rotation, (total,), stream)
        tensors, _ = dequantize_update(segment, released, rotation=rotation)
        return tensors["update"]

    def _plan(self, contributions: Contributions, multiplier: float, bits: int) -> Plan:
        tensor = TensorSpec("update", contributions.shape)
        privacy = None
        if multiplier > 0:
            privacy = Privacy("release", multiplier, self.budget.epsilon, self.budget.delta)
        return make_plan(
            [FloatSegment("update", (tensor,), clip=1.0, bits=bits)],
            max_clients=max(3, len(contributions)),
            privacy=privacy,
        )
