"""A known direction, as an upload's coordinates see it: what a sketch's probes compare it with.

That of the weight, by which a weighted update is measured; and, for the direction check of round r,
that of the aggregate of the round before, which everybody has seen. An update is compared with it
where both are rotated, by the round's own rotation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from secagg.errors import SchemaError
from secagg.parameters import RING_DEGREE, FloatSegment, Layout
from secagg.quantize import rotated, rotated_weight

__all__ = ["SIGN_EFFICIENCY", "Direction"]

SIGN_EFFICIENCY: float = math.sqrt(2 / math.pi)
"""Mean of x sign(y) for unit Gaussians x, y of correlation 1; times the correlation otherwise."""


@dataclass(frozen=True, slots=True)
class Direction:
    """Signs of a known direction's rotated coordinates: int8 of shape (segment.values,), +-1."""

    signs: NDArray[np.int8] = field(repr=False)

    @classmethod
    def of(
        cls, segment: FloatSegment, vector: NDArray[np.float32], rotation: bytes
    ) -> Direction | None:
        """The direction of a vector; None of one that is zero.

        Args:
            vector: float32 of shape (segment.parameters,), in canonical order, of any length.
            rotation: public string of the round whose uploads are compared with it.

        Raises:
            SchemaError: another shape, or not finite.
        """
        if vector.shape != (segment.parameters,) or not np.isfinite(vector).all():
            raise SchemaError(
                f"expected a finite direction of shape=({segment.parameters},); got "
                f"shape={vector.shape}"
            )
        largest = float(np.abs(vector).max())
        if largest == 0.0:
            return None
        coordinates = rotated(segment, vector / np.float32(largest), rotation)
        return cls(np.where(coordinates < 0, -1, 1).astype(np.int8))

    @classmethod
    def of_weight(cls, segment: FloatSegment, rotation: bytes) -> Direction:
        """The direction in which a weight lies; all its coordinates are of one size."""
        return _of_weight(segment, rotation)

    def of_digit(self, layout: Layout, digit: int) -> NDArray[np.int64]:
        """The signs as they lie in one digit: int64 (layout.blocks, 4096), 0 in padding."""
        slots = np.zeros(layout.blocks * layout.digits * RING_DEGREE, dtype=np.int64)
        slots[: self.signs.size] = self.signs
        return slots.reshape(layout.blocks, layout.digits, RING_DEGREE)[:, digit]


@lru_cache(maxsize=4)  # the same for all uploads of a round
def _of_weight(segment: FloatSegment, rotation: bytes) -> Direction:
    coordinates = rotated_weight(segment, rotation)
    return Direction(np.where(coordinates < 0, -1, 1).astype(np.int8))
