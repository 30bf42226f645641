"""How large the sketches of a plan are, and how noisy: numbers that all parties derive alike.

Nothing here is secret or random. See `sketches` for what is sent and docs/checks.md for why.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from secagg.parameters import (
    RESIDUE_BYTES,
    RING_DEGREE,
    FloatSegment,
    IntegerSegment,
    Layout,
    NormCheck,
    Plan,
    Segment,
)

__all__ = [
    "BLINDS",
    "PROBED_BLOCKS",
    "SKETCH_SIGMAS",
    "SMALLEST_DIRECTION",
    "NormShape",
    "ProbeShape",
    "Shape",
    "direction_shape",
    "honest_norm",
    "noise_energy",
    "noise_spread",
    "norm_shapes",
    "probe_noise_energy",
    "quietest_shift",
    "sketch_bytes",
    "weight_shapes",
]

PROBED_BLOCKS = 8
"""Random blocks that a row of a probe looks at, at the most; each costs a transform."""

BLINDS = 2
"""Short random polynomials in one sketch; each block is multiplied by a random mix of them."""

SKETCH_SIGMAS = 4.5
"""Standard deviations of an accepted update's sketch that fit into half a digit.

With 16 sketches, a shift by half a digit that a single row sees is then more than is accepted.
"""

# Values that an estimate averages over, at the least: over all digits, and in each by itself, where
# an update may have all its energy. Its standard deviation is 3 to 4.5 % of the norm.
_VALUES = 512
_VALUES_OF_A_DIGIT = 256

# Noise may add this much to an honest energy; its mean is subtracted, so that only its spread
# counts.
_NOISE_SHARE = 1e-3

_ERROR_VARIANCE = 10.5  # of an upload's errors, see `sampling`
_KEY_ENERGY = RING_DEGREE * 2 / 3  # of a uniform ternary key

_SAMPLED = 6144  # coordinates of a direction that are looked at, at the least if there are so many
_SAMPLED_OF_A_WEIGHT = 2048
_LONGEST_PROBE = 4096
_PROBE_ROOM = 2.5  # of a digit, over the largest sum; it has two halves, and sums stray
_ROUNDING_SIGMAS = 6.0
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


def noise_spread(layout: Layout, shape: Shape) -> float:
    """Standard deviation of what noise adds to an estimate of the squared norm."""
    return noise_energy(layout, shape) * math.sqrt(2 / (shape.rows * shape.values))


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
    """Rows that estimate the norm of one segment, or of the noise that goes with it.

    Attributes:
        segment: its index among the plan's upload_layouts.
    """

    segment: int


def norm_shapes(plan: Plan) -> list[NormShape]:
    """The rows for each segment whose norm is checked, and its noise, in the upload's order."""
    check = plan.norm_check
    if check is None:
        return []
    return [
        _norm_shape(index, layout, check)
        for index, layout in enumerate(plan.upload_layouts)
        if layout.norm
    ]


def _norm_shape(segment: int, layout: Layout, check: NormCheck) -> NormShape:
    filled = min(layout.digits, -(-layout.values // RING_DEGREE))
    wanted = math.ceil(max(_VALUES / filled, _VALUES_OF_A_DIGIT) / check.sketches)
    dropped = 2 if _quiet(layout.norm, layout.shift, 2, layout.blocks) else 1
    return NormShape(check.sketches, 1 << (wanted - 1).bit_length(), dropped, segment)


@dataclass(frozen=True, slots=True)
class ProbeShape(Shape):
    """Rows that compare one segment with a known direction, as many for each digit that is used.

    Attributes:
        segment: its index.
        digits: that hold coordinates; row i is about digit i % digits.
        sampled: coordinates in one row, on average.
    """

    segment: int
    digits: int
    sampled: int

    @property
    def coordinates(self) -> int:
        """Coordinates in all rows, on average."""
        return self.rows * self.sampled


def _probe_shape(segment: int, layout: Layout, check: NormCheck, wanted: int) -> ProbeShape:
    # A short segment leaves digits empty, or nearly so: a row would find too little there.
    digits = max(1, min(layout.digits, layout.values // RING_DEGREE))
    # All that the norm check lets through, in one digit and in line with the direction, must not
    # overflow that digit: it would point the other way.
    densest = (1 + check.margin) * layout.norm * math.sqrt(digits / layout.values)
    longest = int(layout.base / (_PROBE_ROOM * densest))
    most = min(layout.values, wanted) // digits  # more would tell more of the other digits
    sampled = max(1, min(longest, _LONGEST_PROBE, most))
    probes = min(_MAX_PROBES, math.ceil(wanted / (sampled * digits)))
    return ProbeShape(digits * probes, 1, 1, segment, digits, sampled)


def probe_noise_energy(layout: Layout, shape: ProbeShape) -> float:
    """Mean square that noise adds to a shown value of a probe, in squared quantisation steps."""
    # Places without a coordinate are filled: at most eight blocks' worth.
    energy = _noise_energy(shape.dropped, PROBED_BLOCKS)
    return energy / (1 << 2 * layout.shift)


def weight_shapes(plan: Plan) -> list[ProbeShape]:
    """The rows that measure the weight of each weighted segment whose norm is checked."""
    check = plan.norm_check
    return [
        _probe_shape(shape.segment, plan.layouts[shape.segment], check, _SAMPLED_OF_A_WEIGHT)
        for shape in norm_shapes(plan)
        if check is not None
        and shape.segment < len(plan.segments)
        and isinstance(segment := plan.segments[shape.segment], FloatSegment)
        and segment.weighted
    ]


def direction_shape(plan: Plan) -> ProbeShape | None:
    """How a plan's direction check looks; None without one."""
    if plan.norm_check is None or plan.norm_check.min_cosine is None:
        return None
    index = [isinstance(segment, FloatSegment) for segment in plan.segments].index(True)
    return _probe_shape(index, plan.layouts[index], plan.norm_check, _SAMPLED)


def sketch_bytes(plan: Plan, *, direction: bool) -> int:
    """Exact bytes of one upload's sketch; with the rows of the direction check or without."""
    shapes: list[Shape] = [*norm_shapes(plan), *weight_shapes(plan)]
    if direction and (extra := direction_shape(plan)):
        shapes.append(extra)
    return sum(shape.bytes for shape in shapes)


def honest_norm(segment: Segment, weight: float = 1.0) -> int:
    """T: L2 norm, in quantisation steps, that an honest client's integers do not exceed.

    Stochastic rounding of x adds p (1 - p) <= 1/4 to its square, p its fractional part; for
    magnitudes below one the square becomes |x|. Over n coordinates with a mean square of t, that
    is at most n sqrt(t) for t <= 1/4 and n (t + 1/4) beyond (the concave envelope). The sum strays
    from that by a standard deviation of at most sqrt(2 n t + n / 2).

    Args:
        weight: of the client, in [0, 1], where the segment is weighted.
    """
    if isinstance(segment, IntegerSegment):
        return math.ceil(segment.norm_bound)
    count, energy = segment.values, (weight * segment.norm_bound / segment.step) ** 2
    mean = energy / count
    expected = count * (math.sqrt(mean) if mean <= 0.25 else mean + 0.25)
    stray = _ROUNDING_SIGMAS * math.sqrt(2 * energy + count / 2)
    most = count * segment.max_abs**2
    return math.ceil(math.sqrt(min(expected + stray, most)))
