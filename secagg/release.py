"""What leaves the key holder: exact integer sums, and how to read them as models or counts.

Reading a release takes no secret: server, clients and auditors all can.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from secagg.errors import ReleaseError, SchemaError
from secagg.parameters import FloatSegment, IntegerSegment, Plan
from secagg.quantize import dequantize_integers, dequantize_update

__all__ = ["Release", "sums_sha256"]

_S = TypeVar("_S", FloatSegment, IntegerSegment)


def sums_sha256(sums: tuple[NDArray[np.int64], ...]) -> str:
    """SHA-256, in hexadecimal, of the sums as little-endian int64 in the plan's order."""
    running = hashlib.sha256()
    for part in sums:
        running.update(np.ascontiguousarray(part, dtype="<i8").tobytes())
    return running.hexdigest()


@dataclass(frozen=True, slots=True)
class Release:
    """The opened sum of one round.

    Attributes:
        plan: what was summed.
        rotation: the round's public string (see `context.rotation_string`).
        contributors: distinct clients in the sum.
        sums: int64 of shape (segment.values,) for each segment: exactly the sum of the clients'
            integers, still rotated or signed; with noise where the plan has privacy, and zeros
            where its threshold withholds something.
    """

    plan: Plan = field(repr=False)
    rotation: bytes = field(repr=False)
    contributors: int
    sums: tuple[NDArray[np.int64], ...] = field(repr=False)

    def __post_init__(self) -> None:
        # What was released once must read the same for everybody, ever after.
        for part in self.sums:
            part.setflags(write=False)

    @property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the exact sums."""
        return sums_sha256(self.sums)

    def mean(self, name: str | None = None) -> dict[str, NDArray[np.float64]]:
        """The weighted mean update of a float segment, in model units, by tensor name.

        Args:
            name: the segment; may be omitted when there is only one of the kind.

        Raises:
            SchemaError: no such float segment.
            ReleaseError: the summed weight is impossible; a client did not follow the plan.
        """
        segment, total = self._segment(FloatSegment, name)
        tensors, weight = dequantize_update(segment, total, rotation=self.rotation)
        divisor = self._checked_weight(segment, weight)
        return {key: value / divisor for key, value in tensors.items()}

    def flat_mean(self) -> NDArray[np.float64]:
        """The mean update of the plan's one float segment, float64 of shape (parameters,).

        In canonical order.

        Raises:
            SchemaError, ReleaseError: see :meth:`mean`.
        """
        segment, _ = self._segment(FloatSegment, None)
        mean = self.mean()
        return np.concatenate([mean[tensor.name].reshape(-1) for tensor in segment.tensors])

    def applied_to(self, model: NDArray[np.float32]) -> NDArray[np.float32]:
        """The next model: this one plus the mean update (FedAvg, McMahan et al. 2017).

        Args:
            model: float32 of shape (segment.parameters,), in the canonical order of the plan's one
                float segment.

        Raises:
            SchemaError, ReleaseError: see :meth:`mean`.
        """
        return model + self.flat_mean().astype(np.float32)

    def weight(self, name: str | None = None) -> float:
        """Sum of the weights, each in (0, 1]; the number of contributors when equal.

        Raises:
            SchemaError, ReleaseError: see :meth:`mean`.
        """
        segment, total = self._segment(FloatSegment, name)
        _, weight = dequantize_update(segment, total, rotation=self.rotation)
        return self._checked_weight(segment, weight)

    def clip_fraction(self, name: str | None = None) -> float:
        """Share of the contributors whose update was within the clip norm, in [0, 1].

        As exact as rounding, and the noise of privacy, leave it.

        Raises:
            SchemaError: no such float segment, or one without a clip bit.
        """
        segment, total = self._segment(FloatSegment, name)
        if not segment.clip_bit:
            raise SchemaError(f"expected a segment with a clip bit; {segment.name!r} has none")
        _, bits = dequantize_update(segment, total, rotation=self.rotation)
        return min(max((bits / self.contributors + 1) / 2, 0.0), 1.0)

    def _checked_weight(self, segment: FloatSegment, weight: float) -> float:
        if not segment.weighted:
            return float(self.contributors)
        slack = segment.weight_slack(self.contributors)
        # Whoever gets past a norm check may claim a weight of up to 1.7.
        check = self.plan.norm_check
        most = self.contributors + (check.tolerated if check else 0)
        if not -slack <= weight <= most + slack:
            raise ReleaseError(
                f"expected a sum of weights in (0, {most}]; got an impossible one: a "
                "client forged its weight; the round is void"
            )
        if weight <= slack:
            raise ReleaseError(
                "expected a sum of weights that stands out from its rounding errors; it is too "
                "small to divide by; plan a smaller weight_cap, more bits, or equal weights"
            )
        return weight

    def total(self, name: str | None = None) -> NDArray[np.int64]:
        """The exact sum of an integer segment, int64 of shape (segment.size,).

        Raises:
            SchemaError: no such integer segment, or one whose counts the threshold withholds.
        """
        segment, total = self._segment(IntegerSegment, name)
        threshold = self.plan.threshold
        if threshold is not None and threshold.counts == segment.name:
            raise SchemaError(
                f"expected a segment that is released; {segment.name!r} counts contributors for "
                "the plan's threshold, and never leaves the key holder"
            )
        return dequantize_integers(segment, total, rotation=self.rotation)

    def _segment(self, kind: type[_S], name: str | None) -> tuple[_S, NDArray[np.int64]]:
        found = [
            (segment, total)
            for segment, total in zip(self.plan.segments, self.sums, strict=True)
            if isinstance(segment, kind) and name in (None, segment.name)
        ]
        if len(found) != 1:
            raise SchemaError(
                f"expected the name of one {kind.__name__}; got {name!r} for segments "
                f"{[segment.name for segment in self.plan.segments]}"
            )
        return found[0]
