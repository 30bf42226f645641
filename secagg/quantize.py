"""Updates to integers and back: compress, clip, weigh, permute, rotate, round, and the inverse.

A float update becomes integers in public, deterministic steps and one random one (stochastic
rounding). The rotation (Suresh et al. 2017, "Distributed Mean Estimation with Limited
Communication"; Kairouz et al. 2021) spreads an update's energy over all coordinates, so that one
step size fits them all. Nothing here knows the cipher: the same code computes the reference sums
in the clear. Read `packing` next.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from secagg.compression import compress, expand
from secagg.discrete_gaussian import discrete_gaussian
from secagg.errors import InputError, NonFiniteError, SchemaError
from secagg.parameters import FloatSegment, IntegerSegment, Plan, Segment
from secagg.sampling import Stream, signs
from secagg.sketch_shape import honest_norm

__all__ = [
    "Contribution",
    "Quantized",
    "dequantize_integers",
    "dequantize_update",
    "flatten",
    "quantize",
    "quantize_integers",
    "quantize_update",
    "rotated",
    "rotated_weight",
    "row_places",
    "unflatten",
    "value_places",
]

Update = Mapping[str, ArrayLike]

Contribution = ArrayLike | Mapping[str, ArrayLike]
"""A float vector, float tensors by name, or a vector of integers, as the segment wants it."""

_Numbers = NDArray[np.float32] | NDArray[np.float64] | NDArray[np.int32]

_GOLDEN = (math.sqrt(5) - 1) / 2
_VALUES_PER_PASS = 1 << 16  # of rotation blocks that fit into a level-2 cache as float32
_ROUNDINGS = 100


@dataclass(frozen=True, slots=True)
class Quantized:
    """One segment's integers, ready to be packed.

    Attributes:
        values: int64 of shape (segment.values,), magnitudes of at most ``segment.max_abs``.
        noise: int64 of the same shape: the client's share of the privacy noise; None where clients
            add none.
        clipped: whether the update's norm exceeded the clip norm.
        saturated: coordinates that were cut to the range; a handful is harmless, many mean that
            the update sits on few coordinates.
    """

    values: NDArray[np.int64] = field(repr=False)
    clipped: bool = False
    saturated: int = 0
    noise: NDArray[np.int64] | None = field(repr=False, default=None)

    @property
    def summand(self) -> NDArray[np.int64]:
        """What this client adds to the sum: values and noise."""
        return self.values if self.noise is None else self.values + self.noise


def quantize(
    plan: Plan,
    contributions: Mapping[str, Contribution],
    *,
    samples: int,
    rotation: bytes,
    randomness: Stream,
) -> list[Quantized]:
    """The integers of every segment, in the plan's order.

    Args:
        contributions: one for each segment, by segment name.
        samples, rotation, randomness: see :func:`quantize_update`.

    Raises:
        SchemaError: segments, tensor names or shapes are not the plan's.
        NonFiniteError: NaN or infinity; names the tensor and the index.
        InputError: an integer beyond its planned range, or samples below 1.
    """
    expected = [segment.name for segment in plan.segments]
    if set(contributions) != set(expected):
        raise SchemaError(
            f"expected contributions to segments {expected}; got {sorted(contributions)}"
        )
    parts = [
        _quantize_segment(segment, contributions[segment.name], samples, rotation, randomness)
        for segment in plan.segments
    ]
    return [
        replace(part, noise=discrete_gaussian(randomness, layout.noise, layout.values))
        if layout.noise
        else part
        for part, layout in zip(parts, plan.layouts, strict=True)
    ]


def _quantize_segment(
    segment: Segment, value: Contribution, samples: int, rotation: bytes, randomness: Stream
) -> Quantized:
    if isinstance(segment, FloatSegment):
        update = value if isinstance(value, Mapping) else _single_tensor(segment, value)
        return quantize_update(
            segment, update, samples=samples, rotation=rotation, randomness=randomness
        )
    if isinstance(value, Mapping):
        raise SchemaError(f"segment {segment.name!r}: expected one vector of integers; got a dict")
    return quantize_integers(segment, value, rotation=rotation)


def _single_tensor(segment: FloatSegment, value: ArrayLike) -> dict[str, ArrayLike]:
    if len(segment.tensors) != 1:
        raise SchemaError(
            f"segment {segment.name!r}: expected tensors by name, "
            f"{[tensor.name for tensor in segment.tensors]}; got a single array"
        )
    return {segment.tensors[0].name: value}


def flatten(segment: FloatSegment, update: Update) -> NDArray[np.float32]:
    """The canonical flattening: tensors by name, each in C order, as float32.

    Raises:
        SchemaError: names or shapes are not the segment's.
        NonFiniteError: a value is NaN or infinite; names the tensor and the index.
    """
    expected = {tensor.name: tensor.shape for tensor in segment.tensors}
    if update.keys() != expected.keys():
        missing, extra = sorted(expected.keys() - update.keys()), sorted(update.keys() - expected)
        raise SchemaError(
            f"segment {segment.name!r}: expected tensors {sorted(expected)}; "
            f"got {missing=}, unexpected={extra}; rename or plan anew"
        )
    return np.concatenate([_flat(t.name, t.shape, update[t.name]) for t in segment.tensors])


def _flat(name: str, shape: tuple[int, ...], value: ArrayLike) -> NDArray[np.float32]:
    given = _numbers(name, value)
    with np.errstate(over="ignore"):  # a value beyond float32 becomes infinite, and is refused
        array = given.astype(np.float32)
    if array.shape != shape:
        raise SchemaError(
            f"tensor {name!r}: expected shape={shape}; got shape={array.shape}; reshape it or "
            "plan anew"
        )
    if not np.isfinite(array).all():
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise NonFiniteError(
            f"tensor {name!r}: expected finite float32 values; {index=} is NaN or infinite; skip "
            "this update or lower the learning rate"
        )
    return array.reshape(-1)


def unflatten(segment: FloatSegment, vector: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Inverse of :func:`flatten`: float64 tensors by name."""
    tensors, start = {}, 0
    for tensor in segment.tensors:
        tensors[tensor.name] = vector[start : start + tensor.size].reshape(tensor.shape)
        start += tensor.size
    return tensors


def _numbers(name: str, value: ArrayLike) -> NDArray[Any]:
    """An array of real numbers; the message never quotes what it holds."""
    try:
        given = np.asarray(value)
    except (TypeError, ValueError):
        given = np.empty(0, dtype=object)
    if given.dtype.kind not in "fiu":
        raise SchemaError(
            f"tensor {name!r}: expected numbers in one regular array; got dtype={given.dtype}; "
            "convert it"
        )
    return given


def quantize_update(
    segment: FloatSegment, update: Update, *, samples: int, rotation: bytes, randomness: Stream
) -> Quantized:
    """Compress, clip, weigh, permute, rotate and round one client's update.

    Args:
        segment: the plan's description of it.
        update: float tensors by name, in model units.
        samples: examples it was trained on, 1 or more; sets the weight, ignored when equal.
        rotation: public string of the round, which fixes the random signs.
        randomness: secret, of the stochastic rounding; one fresh stream an update.

    Raises:
        InputError: samples below 1.
        SchemaError, NonFiniteError: see :func:`flatten`.
    """
    vector = compress(segment, flatten(segment, update), rotation)
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    clipped = norm > segment.clip
    weight = _weight(segment, samples)
    scale = weight * (segment.clip / norm if clipped else 1.0) / segment.step
    steps = _spread(segment, vector, scale)
    _accompany(segment, steps, weight if segment.weighted else 1.0 - 2.0 * clipped)
    _mix(steps, rotation, segment)
    return _round(segment, steps, clipped, randomness)


def rotated(
    segment: FloatSegment, vector: NDArray[np.float32], rotation: bytes
) -> NDArray[np.float32]:
    """Where the coordinates of a flat vector without a companion come to lie, before rounding.

    Args:
        vector: float32 of shape (segment.parameters,), in canonical order.

    Returns:
        float32 of shape (segment.values,), of the same norm unless it is compressed.
    """
    steps = _spread(segment, compress(segment, vector, rotation), 1.0)
    _mix(steps, rotation, segment)
    return steps


def rotated_weight(segment: FloatSegment, rotation: bytes) -> NDArray[np.float32]:
    """Where a weight comes to lie: float32 of shape (segment.values,), equal but for its signs."""
    steps = np.zeros(segment.values, dtype=np.float32)
    steps[_companions(segment)] = 1.0
    _mix(steps, rotation, segment)
    return steps


def _mix(steps: NDArray[np.float32], rotation: bytes, segment: FloatSegment) -> None:
    """Signs, rotation, signs.

    The second ones take nothing away from a sum, but without them a coordinate becomes a Walsh
    function, which is itself again when it is turned: a sketch of it would show which one.
    """
    _flip_signs(steps, rotation, segment, "rotation")
    for blocks in _blocks(segment, steps):
        _rotate(blocks)
    _flip_signs(steps, rotation, segment, "rotated")


def _weight(segment: FloatSegment, samples: int) -> float:
    if samples < 1:
        raise InputError(f"expected an update trained on 1 or more samples; got {samples=}")
    return min(samples, segment.weight_cap) / segment.weight_cap if segment.weighted else 1.0


def _companions(segment: FloatSegment) -> slice:
    """The places of the companion: the last one of each block, or of all by rows."""
    if not segment.companion:
        return slice(0, 0)
    return slice(
        segment.values - 1 if segment.rows else segment.rotation_length - 1,
        None,
        segment.rotation_length,
    )


def _companion_coordinate(segment: FloatSegment) -> float:
    """What a companion of 1 is in each of its places, so that they have its length together."""
    places = 1 if segment.rows else segment.rotations[0][0]
    return segment.companion * segment.clip / math.sqrt(places)


def _accompany(segment: FloatSegment, steps: NDArray[np.float32], value: float) -> None:
    """Put a weight, or a clip bit of plus or minus one, in its places."""
    if segment.companion:
        coordinate = value * _companion_coordinate(segment) / segment.step
        steps[_companions(segment)] = np.float32(coordinate)


@lru_cache(maxsize=8)
def value_places(segment: FloatSegment) -> NDArray[np.intp]:
    """Where each float that travels lies among the segment's values, before they are rotated.

    Rows that stay apart have their places side by side, by power of two. Otherwise it is a
    golden-ratio stride, which parts neighbours and every short period: rows of an item table, or
    one column of it, spread evenly over the rotation blocks.

    Returns:
        intp of shape (segment.carried,), in canonical order.
    """
    if segment.rows:
        return _places_by_rows(segment)
    (count, length), companion = segment.rotations[0], bool(segment.companion)
    payload = length - companion
    slots = count * payload
    stride = max(1, round(slots * _GOLDEN))
    while math.gcd(stride, slots) != 1:
        stride += 1
    order = np.arange(segment.carried, dtype=np.intp) * stride % slots
    return order + order // payload * companion


def row_places(segment: FloatSegment) -> NDArray[np.intp]:
    """Where the values of each row that stays apart lie: intp of shape (rows, width).

    All that a sum says of a row is there, rotated or not.
    """
    runs, start = [], 0
    for count, length in segment.rotations[: -1 if segment.companion else None]:
        runs.append(start + np.arange(count * length, dtype=np.intp).reshape(count, length))
        start += count * length
    return np.concatenate(runs, axis=1)


def _places_by_rows(segment: FloatSegment) -> NDArray[np.intp]:
    widths = [tensor.size // segment.rows for tensor in segment.sent]
    columns = np.split(row_places(segment), np.cumsum(widths)[:-1], axis=1)
    return np.concatenate([part.reshape(-1) for part in columns])


def _spread(
    segment: FloatSegment, vector: NDArray[np.float32], scale: float
) -> NDArray[np.float32]:
    """Lay the scaled update out in its places."""
    steps = np.zeros(segment.values, dtype=np.float32)
    steps[value_places(segment)] = vector * np.float32(scale)
    return steps


def _flip_signs(
    steps: _Numbers,
    rotation: bytes,
    segment: FloatSegment,
    label: str,
) -> None:
    drawn = signs(Stream.derive(label, rotation, segment.name), segment.values)
    np.multiply(steps, drawn, out=steps, casting="same_kind")


def _blocks(segment: FloatSegment, steps: _Numbers) -> Iterator[_Numbers]:
    """The rotation blocks as views, (count, length) for each length."""
    start = 0
    for count, length in segment.rotations:
        yield steps[start : start + count * length].reshape(count, length)
        start += count * length


def _rotate(blocks: _Numbers) -> None:
    """Orthonormal Walsh-Hadamard transform of each row, in place; it is its own inverse."""
    _transform(blocks)
    blocks *= blocks.dtype.type(1.0 / math.sqrt(blocks.shape[1]))


def _transform(blocks: _Numbers) -> None:
    """The same, of square root of length times the norm: whole numbers stay whole.

    Additions in a fixed order, so that every machine rounds alike.
    """
    rows = max(_VALUES_PER_PASS // blocks.shape[1], 1)
    for start in range(0, blocks.shape[0], rows):
        _butterflies(blocks[start : start + rows])


def _butterflies(rows: _Numbers) -> None:
    """Unnormalised transform of each row, as rows and columns of a square.

    Transposing in between keeps every addition on long contiguous runs.
    """
    count, length = rows.shape
    side = 1 << (length.bit_length() // 2)
    square = rows.reshape(count, side, length // side)
    _butterflies_down(square)
    turned = square.transpose(0, 2, 1).copy()
    _butterflies_down(turned)
    square[...] = turned.transpose(0, 2, 1)


def _butterflies_down(squares: _Numbers) -> None:
    """Butterflies over the middle axis, in place."""
    count, height, width = squares.shape
    half = 1
    while half < height:
        pairs = squares.reshape(count, height // (2 * half), 2, half * width)
        upper, lower = pairs[:, :, 0, :], pairs[:, :, 1, :]
        difference = upper - lower
        upper += lower
        lower[...] = difference
        half *= 2


def _round(
    segment: FloatSegment, steps: NDArray[np.float32], clipped: bool, randomness: Stream
) -> Quantized:
    """Stochastic rounding: floor(x + u) with u uniform in [0, 1), anew if the norm came out long.

    That it is bounded for certain is what the privacy of a release rests on (conditional rounding:
    Kairouz, Liu and Steinke 2021, section 4.1). It is biased by no more than how rarely it happens.
    """
    limit, longest = segment.max_abs, honest_norm(segment)
    bounded = np.clip(steps, -limit, limit)
    saturated = int(np.count_nonzero(bounded != steps))
    rounded = np.empty(steps.size, dtype=np.int64)
    for _ in range(_ROUNDINGS):
        energy = 0.0  # a sum of whole numbers: exact in any order
        for start in range(0, steps.size, _VALUES_PER_PASS):
            part = bounded[start : start + _VALUES_PER_PASS]
            up = randomness.uint32(part.size) * 2.0**-32
            up += part
            np.floor(up, out=up)
            energy += float(up @ up)
            rounded[start : start + _VALUES_PER_PASS] = up
        if energy <= longest**2:
            return Quantized(rounded, clipped, saturated)
    raise RuntimeError("no rounding was within the bound that all but one of 10**8 are")


def quantize_integers(segment: IntegerSegment, values: ArrayLike, *, rotation: bytes) -> Quantized:
    """Check raw integers and give each its public random sign.

    The signs keep sums of equal values (all counts one, say) from lining up in every coefficient.

    Raises:
        SchemaError: not a vector of ``segment.size`` integers.
        InputError: a magnitude above ``segment.max_abs``, which names the index; or a norm above
            ``segment.max_norm``.
    """
    array = np.asarray(values)
    if array.shape != (segment.size,) or array.dtype.kind not in "iu":
        raise SchemaError(
            f"segment {segment.name!r}: expected integers of shape=({segment.size},); got "
            f"shape={array.shape}, dtype={array.dtype}; convert or plan anew"
        )
    beyond = (array > segment.max_abs) | (array < -segment.max_abs)
    if beyond.any():
        raise InputError(
            f"segment {segment.name!r}: expected magnitudes of at most {segment.max_abs}; "
            f"index={int(np.argmax(beyond))} is larger; cap it or plan a larger max_abs"
        )
    if segment.max_norm is not None and np.linalg.norm(array.astype(float)) > segment.max_norm:
        raise InputError(
            f"segment {segment.name!r}: expected a norm of at most {segment.max_norm:g}; it is "
            "larger; contribute less, or plan a larger max_norm"
        )
    return Quantized(array.astype(np.int64) * _integer_signs(segment, rotation))


def _integer_signs(segment: IntegerSegment, rotation: bytes) -> NDArray[np.int64]:
    return signs(Stream.derive("rotation", rotation, segment.name), segment.size).astype(np.int64)


def dequantize_integers(
    segment: IntegerSegment, total: NDArray[np.int64], *, rotation: bytes
) -> NDArray[np.int64]:
    """The exact sum of what the clients passed to :func:`quantize_integers`."""
    return total * _integer_signs(segment, rotation)


def dequantize_update(
    segment: FloatSegment, total: NDArray[np.int64], *, rotation: bytes
) -> tuple[dict[str, NDArray[np.float64]], float]:
    """From the exact integer sum to the weighted sum of the clipped updates.

    Args:
        total: int64 of shape (segment.values,).
        rotation: the round's public string.

    Returns:
        The sum of w_i u_i as float64 tensors by name, in model units, or its projection where they
        are compressed; and the sum of what travels along: the weights w_i, or the clip bits, plus
        or minus one each; nan if nothing does.
    """
    # Whole numbers of four bytes, where they are enough: exact, and half as much to move.
    longest = max(length for _, length in segment.rotations)
    reach = longest * max(int(total.max(initial=0)), -int(total.min(initial=0)))
    turned: _Numbers = total.astype(np.int32) if reach < 1 << 31 else total.astype(np.float64)
    _flip_signs(turned, rotation, segment, "rotated")
    for blocks in _blocks(segment, turned):
        _transform(blocks)
    _flip_signs(turned, rotation, segment, "rotation")
    steps = turned.astype(np.float64)
    for blocks in _blocks(segment, steps):
        blocks *= segment.step / math.sqrt(blocks.shape[1])
    companion = math.nan
    if segment.companion:
        companion = float(steps[_companions(segment)].mean()) / _companion_coordinate(segment)
    whole = expand(segment, steps[value_places(segment)], rotation)
    return unflatten(segment, whole), companion
