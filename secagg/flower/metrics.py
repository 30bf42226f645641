"""Metrics as weighted means that nobody sees the parts of: sums of bounded integers.

A metric within its bound becomes a whole number of steps, the bound being `STEPS` of them; with
weights it is multiplied by the client's share of the weight cap, and the shares are summed beside.
Integers are summed exactly: a mean is as exact as the steps are fine.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from secagg.errors import ConfigurationError, NonFiniteError, ReleaseError, SchemaError
from secagg.parameters import IntegerSegment
from secagg.release import Release

__all__ = ["SEGMENT", "Metrics"]

SEGMENT = "metrics"
"""Name of the segment that metrics travel in."""

STEPS = 1 << 20
"""Steps from zero to a metric's bound; `_COARSE` of them for the largest cohorts."""

_COARSE = 1 << 16
_LARGE_COHORT = 1 << 16  # clients whose sum of fine steps still fits beside the cipher's noise

_LOG = logging.getLogger("flwr")


@dataclass(frozen=True)
class Metrics:
    """What is averaged, and how.

    Attributes:
        bounds: largest magnitude by name; a value beyond its bound counts as the bound.
        weighted: by number of examples, as the update is.
    """

    bounds: Mapping[str, float]
    weighted: bool

    def __post_init__(self) -> None:
        wrong = [
            name
            for name, bound in self.bounds.items()
            if isinstance(bound, bool)
            or not isinstance(bound, int | float)
            or not (math.isfinite(bound) and bound > 0)
        ]
        if wrong:
            raise ConfigurationError(
                f"expected a bound above 0 for each metric; got others for {wrong}; give the "
                'largest magnitude it may have, as in {"train_loss": 10.0}'
            )

    @property
    def size(self) -> int:
        """Integers that travel."""
        return len(self.bounds) + (self.weighted and bool(self.bounds))

    def segment(self, max_clients: int) -> IntegerSegment:
        """Where they lie in a plan.

        Not held to a norm by the norm check: a sketch of so few integers would tell the key holder
        what they are. A client can misstate its own, as it can its own training loss.
        """
        steps = STEPS if max_clients <= _LARGE_COHORT else _COARSE
        return IntegerSegment(SEGMENT, self.size, steps)

    def encode(
        self, values: Mapping[str, object], share: float, segment: IntegerSegment
    ) -> NDArray[np.int64]:
        """One client's contribution.

        Args:
            values: the client's metrics; those without a bound are ignored.
            share: the client's weight, in (0, 1].

        Returns:
            int64 of shape (segment.size,), magnitudes of at most ``segment.max_abs``.

        Raises:
            SchemaError: a metric is missing, or not one number; or the segment is for others.
            NonFiniteError: a metric is NaN or infinite.
        """
        if segment.size != self.size:
            raise SchemaError(
                f"expected a segment of {self.size} integers for these metrics; got {segment.size}"
            )
        parts = [self._scaled(name, values.get(name)) * share for name in sorted(self.bounds)]
        if self.weighted:
            parts.append(share)
        steps: NDArray[np.float64] = np.rint(np.array(parts) * segment.max_abs)
        return steps.astype(np.int64)

    def _scaled(self, name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            kind = "none" if value is None else type(value).__name__
            raise SchemaError(
                f"expected the metric {name!r} to be one number; got {kind}; reply with it in the "
                "MetricRecord, or do not name it in the strategy"
            )
        if not math.isfinite(value):
            raise NonFiniteError(f"expected the metric {name!r} to be finite; it is not")
        bound = self.bounds[name]
        if abs(value) > bound:
            _LOG.warning(
                "secagg: the metric %r is beyond its bound of %g and counts as that", name, bound
            )
        return min(max(value / bound, -1.0), 1.0)

    def means(self, release: Release) -> dict[str, float]:
        """The weighted means, by name.

        Raises:
            ReleaseError: the weights do not add up to anything above zero.
        """
        if not self.bounds:
            return {}
        total = release.total(SEGMENT)
        (segment,) = (part for part in release.plan.segments if part.name == SEGMENT)
        steps = release.contributors * segment.max_abs
        weight = int(total[-1]) if self.weighted else steps
        if not 0 < weight <= steps:
            raise ReleaseError(
                "expected weights of metrics that add up to more than 0, and no more than 1 a "
                "client; they do not: a client forged its own; the metrics are void"
            )
        return {
            name: float(total[place]) / weight * self.bounds[name]
            for place, name in enumerate(sorted(self.bounds))
        }

    def weight(self, release: Release) -> float:
        """Sum of the clients' shares; their number when they count the same."""
        if not self.weighted:
            return float(release.contributors)
        (segment,) = (part for part in release.plan.segments if part.name == SEGMENT)
        return float(release.total(SEGMENT)[-1]) / segment.max_abs
