"""How large the sketches of a plan are, and how noisy: numbers that all parties derive alike.

Nothing here is secret or random. See `sketches` for what is sent and docs/checks.md for why.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from secagg.parameters import RESIDUE_BYTES, RING_DEGREE, FloatSegment, Layout, NormCheck, Plan

__all__ = [
    "BLINDS",
    "SKETCH_SIGMAS",
    "SMALLEST_DIRECTION",
    "DirectionShape",
    "NormShape",
    "Shape",
    "direction_shape",
    "noise_energy",
    "norm_shapes",
    "quietest_shift",
    "sketch_bytes",
]

BLINDS = 2
"""Short random polynomials in one sketch; each block is multiplied by a random mix of them."""

SKETCH_SIGMAS = 4.0
"""Standard deviations of an accepted update's sketch that fit into half a digit."""

# Values that an estimate averages over, at the least: over all digits, and in each by itself, where
# an update may have all its energy. Its standard deviation is 3 to 4.5 % of the norm.
_VALUES = 512
_VALUES_OF_A_DIGIT = 256

# Noise may add this much to an honest energy; its mean is subtracted, so that only its spread
# counts.
_NOISE_SHARE = 1e-3

_ERROR_VARIANCE = 10.5  # of an upload's errors, see `sampling`
_KEY_ENERGY = RING_DEGREE * 2 / 3  # of a uniform ternary key

_SAMPLED = 6144  # coordinates of a direction that are looked at, at the most
_LONGEST_PROBE = 4096
_MAX_PROBES = 8

SMALLEST_DIRECTION = 2 * RING_DEGREE
"""Values of the smallest model that a direction check is planned for: which of them a row sums up
must be beyond guessing."""

_POSITION_BYTES = 2


@dataclass(frozen=True, slots=True)
class Shape:
    """A run of equally made rows: masked values of an upload under random multipliers.

    Attributes:
        rows: how many; each has a mask of its own.
        values: coefficients shown of each row.
        dropped: low bytes of each of the mask's coefficients that stay with the server.
    """

    rows: int
    values: int
    dropped: int

    @property
    def mask_bytes(self) -> int:
        """Bytes of one coefficient of a mask."""
        return RESIDUE_BYTES - self.dropped

    @property
    def bytes(self) -> int:
        """Bytes on the wire."""
        shown = self.values * (_POSITION_BYTES + RESIDUE_BYTES)
        return self.rows * (shown + RING_DEGREE * self.mask_bytes)


def _noise_energy(dropped: int, blocks: int) -> float:
    """Mean square of a sketch's noise, in plaintext units.

    The errors of all blocks under multipliers whose coefficients have a variance of 1; and the
    key times the mask's error, which is the difference of two numbers uniform in 256**dropped.
    """
    uploads: float = _ERROR_VARIANCE * RING_DEGREE * blocks
    masks = float(1 << 16 * dropped) / 6 * _KEY_ENERGY
    return uploads + masks


def noise_energy(layout: Layout, shape: Shape) -> float:
    """Mean square that noise adds to a shown value, in squared quantisation steps."""
    return float(_noise_energy(shape.dropped, layout.blocks)) / (1 << 2 * layout.shift)


def _quiet(norm: int, shift: int, dropped: int, blocks: int) -> bool:
    limit = _NOISE_SHARE * 4.0**shift * norm**2
    return _noise_energy(dropped, blocks) <= limit


def quietest_shift(norm: int, values: int) -> int:
    """The smallest grid, as a power of two, in which a mask can do without its lowest byte."""
    blocks, shift = -(-values // RING_DEGREE), 0
    while not _quiet(norm, shift, 1, blocks):
        shift += 1
    return shift


@dataclass(frozen=True, slots=True)
class NormShape(Shape):
    """Rows that estimate the norm of one segment.

    Attributes:
        segment: its index.
    """

    segment: int


def norm_shapes(plan: Plan) -> list[NormShape]:
    """The rows for each segment whose norm is checked, in the plan's order."""
    check = plan.norm_check
    if check is None:
        return []
    return [
        _norm_shape(index, layout, check)
        for index, layout in enumerate(plan.layouts)
        if layout.norm
    ]


def _norm_shape(segment: int, layout: Layout, check: NormCheck) -> NormShape:
    wanted = math.ceil(max(_VALUES / layout.digits, _VALUES_OF_A_DIGIT) / check.sketches)
    dropped = 2 if _quiet(layout.norm, layout.shift, 2, layout.blocks) else 1
    return NormShape(check.sketches, 1 << (wanted - 1).bit_length(), dropped, segment)


@dataclass(frozen=True, slots=True)
class DirectionShape(Shape):
    """Rows that compare an update with a known direction, a few for each digit.

    Attributes:
        segment: index of the float segment.
        digits: that rows take turns with; those that some block fills.
        sampled: coordinates in one row, on average.
    """

    segment: int
    digits: int
    sampled: int


def direction_shape(plan: Plan) -> DirectionShape | None:
    """How a plan's direction check looks; None without one."""
    if plan.norm_check is None or plan.norm_check.min_cosine is None:
        return None
    index = [isinstance(segment, FloatSegment) for segment in plan.segments].index(True)
    layout = plan.layouts[index]
    # Coordinates that all point one way must not overflow a digit.
    longest = int(layout.base / (4 * layout.norm / math.sqrt(layout.values)))
    # A short segment leaves digits empty, or nearly so: a row would find too little there.
    digits = min(layout.digits, layout.values // RING_DEGREE)
    sampled = max(1, min(longest, _LONGEST_PROBE))
    probes = min(_MAX_PROBES, math.ceil(_SAMPLED / (sampled * digits)))
    return DirectionShape(digits * probes, 1, 1, index, digits, sampled)


def sketch_bytes(plan: Plan, *, direction: bool) -> int:
    """Exact bytes of one upload's sketch; with the rows of the direction check or without."""
    extra = direction_shape(plan) if direction else None
    return sum(shape.bytes for shape in norm_shapes(plan)) + (extra.bytes if extra else 0)
