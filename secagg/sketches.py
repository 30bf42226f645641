"""Sketches: what the server shows the key holder of an upload, so that it can judge its norm.

A row is the inner product of an upload's plaintext with random multipliers, still encrypted, a few
of its coefficients, and what is needed to decrypt those, and nothing else. Averages of squares of
random inner products are norms (Johnson and Lindenstrauss); structured multipliers make them
affordable on ciphertexts. For row i of a segment with blocks j:

* The multiplier of block j is r_ij = sum_l (u_ijl + X**2048 v_ijl) p_il: two short random
  polynomials p_il, mixed anew for each block by random u, v in {-1, 0, 1}, two of them not zero. So
  each block is looked at through a multiplier of its own, for the price of two products a row.
* The row's values are a few coefficients, at random places, of sum_j r_ij c_j.
* A *probe* row has instead, for multipliers, the signs of a known direction on a random part of the
  coordinates of a few random blocks, and one value: the sum of those coordinates.
* The row's *mask* is sum_j r_ij a_j, with an error added and its lowest bytes cut off: with it, and
  with the client's key, the values open, up to noise that does not matter. To whoever does not know
  the multipliers, it is a sample of ring-LWE, that is, random.

All of it is expanded from the upload's digest and a *challenge key* that the server committed to
before the upload was made: neither can the client know it beforehand, nor the server choose it
afterwards, and the client can recompute later what was shown of its update. Nothing here knows a
client's key. See docs/checks.md for what it is worth.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from secagg import ring
from secagg.context import RoundContext
from secagg.direction import Direction
from secagg.errors import ConfigurationError, MalformedError
from secagg.parameters import MODULUS, RESIDUE_BYTES, RING_DEGREE, FloatSegment, Plan
from secagg.residues import halves, joined, multiply, reduced
from secagg.sampling import Stream, coin_differences, uniform_polynomials
from secagg.sketch_shape import (
    BLINDS,
    PROBED_BLOCKS,
    ProbeShape,
    Shape,
    direction_shape,
    norm_shapes,
    sketch_bytes,
    weight_shapes,
)

__all__ = ["Rows", "Sketch", "sketch"]

_PASS_BLOCKS = 128  # that are in floating point at a time
_POSITION_BYTES = 2


@dataclass(frozen=True, slots=True)
class Rows:
    """What is shown through equally shaped multipliers.

    Attributes:
        shape: rows and values.
        positions: uint16 of shape (rows, values): which coefficients.
        values: uint64 of the same shape: the coefficients, below q.
        masks: uint64 of shape (rows, 4096): coefficients without their lowest bytes.
    """

    shape: Shape
    positions: NDArray[np.uint16] = field(repr=False)
    values: NDArray[np.uint64] = field(repr=False)
    masks: NDArray[np.uint64] = field(repr=False)

    def to_bytes(self) -> bytes:
        """Little endian: positions (2 bytes), values (7), masks (7 less the dropped ones)."""
        return b"".join(
            (
                np.ascontiguousarray(self.positions, dtype="<u2").tobytes(),
                _low_bytes(self.values, RESIDUE_BYTES),
                _low_bytes(self.masks, self.shape.mask_bytes),
            )
        )

    @classmethod
    def from_bytes(cls, data: bytes, shape: Shape) -> Rows:
        """The inverse of :meth:`to_bytes`, of exactly the right size.

        Raises:
            MalformedError: a position, value or mask out of range.
        """
        shown = shape.rows * shape.values
        values_at = shown * _POSITION_BYTES
        masks_at = values_at + shown * RESIDUE_BYTES
        positions = np.frombuffer(data[:values_at], dtype="<u2").astype(np.uint16)
        values = _from_low_bytes(data[values_at:masks_at], RESIDUE_BYTES)
        masks = _from_low_bytes(data[masks_at:], shape.mask_bytes)
        largest = (MODULUS - 1) >> (8 * shape.dropped)
        if positions.max() >= RING_DEGREE or values.max() >= MODULUS or masks.max() > largest:
            raise MalformedError(
                "expected positions below 4096 and residues below q in a sketch; one is not; send "
                "the sketch as it was computed"
            )
        return cls(
            shape,
            positions.reshape(shape.rows, shape.values),
            values.reshape(shape.rows, shape.values),
            masks.reshape(shape.rows, RING_DEGREE),
        )


def _low_bytes(numbers: NDArray[np.uint64], count: int) -> bytes:
    wide = np.ascontiguousarray(numbers, dtype="<u8").view(np.uint8)
    return wide.reshape(-1, 8)[:, :count].tobytes()


def _from_low_bytes(data: bytes, count: int) -> NDArray[np.uint64]:
    wide = np.zeros((len(data) // count, 8), dtype=np.uint8)
    wide[:, :count] = np.frombuffer(data, dtype=np.uint8).reshape(-1, count)
    return wide.view("<u8").reshape(-1).astype(np.uint64)


@dataclass(frozen=True, slots=True)
class Sketch:
    """Everything that is shown of one upload.

    Attributes:
        upload_digest: SHA-256 of the upload.
        norms: the rows that estimate the norm of each segment that is checked, in the plan's order,
            then those of the noises of these, where clients add noise.
        weights: the rows that measure the weight of each weighted one of these.
        direction: the rows that compare it with the direction of the round before; None without.
    """

    upload_digest: bytes
    norms: tuple[Rows, ...] = field(repr=False)
    weights: tuple[Rows, ...] = field(repr=False, default=())
    direction: Rows | None = field(repr=False, default=None)

    def to_bytes(self) -> bytes:
        """All rows, one run after the other; `sketch_shape.sketch_bytes` of them."""
        direction = () if self.direction is None else (self.direction,)
        return b"".join(rows.to_bytes() for rows in (*self.norms, *self.weights, *direction))

    @property
    def digest(self) -> bytes:
        """SHA-256 of the bytes; what the key holder signs."""
        return hashlib.sha256(self.to_bytes()).digest()

    @classmethod
    def from_bytes(cls, plan: Plan, upload_digest: bytes, data: bytes | bytearray) -> Sketch:
        """A sketch from untrusted bytes; its size tells whether it holds a direction.

        Raises:
            MalformedError: no size that the plan allows, or a number out of range.
            ConfigurationError: the plan has no norm check.
        """
        shapes: list[Shape] = [*norm_shapes(plan), *weight_shapes(plan)]
        if not shapes:
            raise ConfigurationError("expected a plan with a norm check; this one has none")
        extra = direction_shape(plan)
        sizes = {sketch_bytes(plan, direction=False), sketch_bytes(plan, direction=True)}
        if len(data) not in sizes:
            raise MalformedError(
                f"expected a sketch of {' or '.join(map(str, sorted(sizes)))} bytes; got "
                f"bytes={len(data)}; compute it with the round's plan"
            )
        if extra is not None and len(data) == max(sizes):
            shapes.append(extra)
        rows, start = [], 0
        for shape in shapes:
            rows.append(Rows.from_bytes(bytes(data[start : start + shape.bytes]), shape))
            start += shape.bytes
        return cls(upload_digest, *_sorted_rows(plan, rows))


def sketch(
    context: RoundContext,
    upload_digest: bytes,
    chunks: Iterable[NDArray[np.uint64]],
    key: bytes,
    direction: Direction | None = None,
) -> Sketch:
    """Compute what the key holder is shown of an upload; the same inputs give the same sketch.

    Args:
        context: the attempt that the upload was made for.
        upload_digest: SHA-256 of the upload's bytes.
        chunks: the upload's residues, uint64 (blocks, 4096) each, below q, in order.
        key: the challenge key of this upload.
        direction: what updates are compared with, if the plan asks for it and there is something.

    Raises:
        ConfigurationError: the plan has no norm check.
        MalformedError: not exactly the plan's blocks.
    """
    plan = context.plan
    shapes = norm_shapes(plan)
    if not shapes:
        raise ConfigurationError("expected a plan with a norm check; this one has none")
    blocks = [part for _, part in plan.upload_ranges()]
    looks: list[_Look] = [
        _NormLook(
            shape,
            blocks[shape.segment],
            Stream.derive("sketch", key, upload_digest, shape.segment),
        )
        for shape in shapes
    ]
    for probe in weight_shapes(plan):
        randomness = Stream.derive("sketch weight", key, upload_digest, probe.segment)
        weight = Direction.of_weight(_floats(plan, probe), context.rotation)
        looks.append(_Probe(plan, probe, weight, randomness))
    extra = direction_shape(plan)
    if extra is not None and direction is not None:
        randomness = Stream.derive("sketch direction", key, upload_digest)
        looks.append(_Probe(plan, extra, direction, randomness))
    for start, uploaded, public in _passes(context, chunks):
        for look in looks:
            look.add(start, uploaded, public)
    return Sketch(upload_digest, *_sorted_rows(plan, [look.rows() for look in looks]))


def _floats(plan: Plan, probe: ProbeShape) -> FloatSegment:
    segment = plan.segments[probe.segment]
    if not isinstance(segment, FloatSegment):
        raise TypeError("only segments of floats are weighted")
    return segment


def _sorted_rows(
    plan: Plan, rows: list[Rows]
) -> tuple[tuple[Rows, ...], tuple[Rows, ...], Rows | None]:
    """Those of the norms, those of the weights, and those of the direction, if any."""
    first = len(norm_shapes(plan))
    second = first + len(weight_shapes(plan))
    return tuple(rows[:first]), tuple(rows[first:second]), rows[second] if rows[second:] else None


def _passes(
    context: RoundContext, chunks: Iterable[NDArray[np.uint64]]
) -> Iterator[tuple[int, NDArray[np.uint64], NDArray[np.uint64]]]:
    """Number of the first block, blocks of the upload, and their public polynomials."""
    stream, total, start = context.public_stream(), context.plan.blocks, 0
    for chunk in chunks:
        if start + chunk.shape[0] > total or chunk.shape[1:] != (RING_DEGREE,):
            break
        for at in range(0, chunk.shape[0], _PASS_BLOCKS):
            uploaded = chunk[at : at + _PASS_BLOCKS]
            yield start + at, uploaded, uniform_polynomials(stream, uploaded.shape[0])
        start += chunk.shape[0]
    else:
        if start == total:
            return
    raise MalformedError(f"expected an upload of exactly {total} blocks; got others")


class _Look(Protocol):
    """Random multipliers, and what they have been applied to so far."""

    def add(self, start: int, uploaded: NDArray[np.uint64], public: NDArray[np.uint64]) -> None: ...

    def rows(self) -> Rows: ...


class _NormLook:
    """Rows over the blocks of one segment, each block under a multiplier of its own."""

    def __init__(self, shape: Shape, blocks: slice, stream: Stream) -> None:
        self._shape, self._blocks = shape, blocks
        mixes, width = shape.rows * BLINDS * 2, RING_DEGREE // shape.values
        self._mixes = _mixes(stream, shape.rows, blocks.stop - blocks.start)
        self._blinds = _odd_and_even(
            coin_differences(stream, (shape.rows, BLINDS, RING_DEGREE))
        ).reshape(-1, RING_DEGREE)
        # One in each of as many equal stretches.
        drawn = stream.uint32(shape.rows * shape.values).reshape(shape.rows, shape.values)
        places = np.arange(shape.values) * width + drawn % width
        self._positions = places.astype(np.uint16)
        self._stream = stream
        # Of the upload and of the public polynomials: lower and upper halves of each mix.
        self._sums = np.zeros((2, 2, mixes, RING_DEGREE))

    def add(self, start: int, uploaded: NDArray[np.uint64], public: NDArray[np.uint64]) -> None:
        first = max(start, self._blocks.start)
        last = min(start + uploaded.shape[0], self._blocks.stop)
        if first < last:
            mine = slice(first - start, last - start)
            mixes = self._mixes[:, first - self._blocks.start : last - self._blocks.start]
            for total, polynomials in zip(self._sums, (uploaded, public), strict=True):
                total += mixes @ halves(polynomials[mine])

    def rows(self) -> Rows:
        blinds = ring.to_ntt(self._blinds).reshape(-1, BLINDS, RING_DEGREE)
        uploaded, public = (self._blinded(total, blinds) for total in self._sums)
        shown = np.take_along_axis(
            ring.coefficients(uploaded), self._positions.astype(np.intp), axis=1
        )
        masks = _cut(ring.coefficients(public), self._shape.dropped, self._stream)
        return Rows(self._shape, self._positions, shown, masks)

    def _blinded(
        self, mixed: NDArray[np.float64], blinds: NDArray[np.uint64]
    ) -> NDArray[np.uint64]:
        """sum_l p_l (U_l + X**2048 V_l) for each row, of the halves of all U_l and V_l."""
        mixed = mixed.reshape(2, -1, BLINDS, 2, RING_DEGREE)
        out = np.zeros((mixed.shape[1], RING_DEGREE), dtype=np.uint64)
        turn = _turn()
        # One mix at a time stays in the processor's cache.
        for row, blind in np.ndindex(*mixed.shape[1:3]):
            plain, turned = joined(mixed[:, row, blind])
            out[row] += multiply(reduced(plain + multiply(turned, turn)), blinds[row, blind])
        return reduced(out)


class _Probe:
    """Rows that sum the coordinates of one digit with the signs of a known direction.

    Each looks at a random part of the coordinates of a few random blocks, so that an update cannot
    be made to please it, and the sum fits into a digit.
    """

    def __init__(self, plan: Plan, shape: ProbeShape, direction: Direction, stream: Stream) -> None:
        self._shape, self._stream = shape, stream
        layout = plan.layouts[shape.segment]
        first = list(plan.block_ranges())[shape.segment][2].start
        self._multipliers: list[tuple[int, int, NDArray[np.int64]]] = []
        for row in range(shape.rows):
            signs = direction.of_digit(layout, row % shape.digits)
            filled = np.flatnonzero(signs.any(axis=1))
            order = np.argsort(stream.uint64(filled.size), kind="stable")
            chosen = filled[order[:PROBED_BLOCKS]]
            self._multipliers += [
                (first + int(block), row, _reversed(part))
                for block, part in zip(chosen, _thinned(signs[chosen], shape, stream), strict=True)
            ]
        self._sums = np.zeros((2, shape.rows, RING_DEGREE), dtype=np.uint64)

    def add(self, start: int, uploaded: NDArray[np.uint64], public: NDArray[np.uint64]) -> None:
        stop = start + uploaded.shape[0]
        here = [each for each in self._multipliers if start <= each[0] < stop]
        if not here:
            return
        transformed = ring.to_ntt(np.stack([multiplier for _, _, multiplier in here]))
        for (block, row, _), multiplier in zip(here, transformed, strict=True):
            for total, polynomials in zip(self._sums, (uploaded, public), strict=True):
                total[row] = reduced(total[row] + multiply(polynomials[block - start], multiplier))

    def rows(self) -> Rows:
        uploaded, public = (ring.coefficients(total) for total in self._sums)
        positions = np.zeros((self._shape.rows, 1), dtype=np.uint16)
        masks = _cut(public, self._shape.dropped, self._stream)
        return Rows(self._shape, positions, uploaded[:, :1], masks)


def _thinned(signs: NDArray[np.int64], shape: ProbeShape, stream: Stream) -> NDArray[np.int64]:
    """A random part of the signs, and random weights where there is nothing to sum up.

    An honest upload is zero there, in the digit that the row is about; and the fewer coordinates
    a segment has, the more there is in a multiplier that nobody can guess.
    """
    kept = stream.uint32(signs.size).reshape(signs.shape)
    chance = min(shape.sampled / np.count_nonzero(signs), 1.0)
    filling = coin_differences(stream, signs.shape)
    return np.where(signs == 0, filling, signs * (kept < chance * 2.0**32))


def _mix_table() -> NDArray[np.float64]:
    """The mix that each byte stands for: (256, BLINDS, 2), all u and v.

    Half of the bytes take one of the two places of either blind, a quarter both places of the
    first, a quarter both of the second; signs are free. Two places always: all blocks count alike,
    however few they are. And as often an odd number of the first blind's places as an even one: see
    `_odd_and_even`.
    """
    octets = np.arange(256)
    places = np.zeros((256, BLINDS, 2), dtype=bool)
    for blind in range(BLINDS):
        places[octets, blind, octets >> (2 + blind) & 1] = octets & 3 < 2
        places[octets & 3 == 2 + blind, blind] = True
    signs = 1.0 - 2.0 * (octets[:, None] >> np.arange(4, 8) & 1)
    mixes: NDArray[np.float64] = places * signs.reshape(256, BLINDS, 2)
    return mixes


_MIXES = _mix_table()


def _mixes(stream: Stream, rows: int, blocks: int) -> NDArray[np.float64]:
    """u and v of every row, blind and block: (rows * BLINDS * 2, blocks)."""
    octets = np.frombuffer(stream.read(rows * blocks), dtype=np.uint8).reshape(rows, blocks)
    mixes = np.moveaxis(_MIXES[octets], 1, -1)
    return np.ascontiguousarray(mixes.reshape(-1, blocks))


def _odd_and_even(blinds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each row's first blind odd at X = 1, its second one even.

    A shift of every coefficient by half a digit shows in a row where the multipliers of the shifted
    blocks add up to something odd at 1. With that, each block's is odd with probability one half,
    independently of all others, so that no choice of blocks is seen by fewer than half of the rows.
    """
    wrong = blinds.sum(axis=2) % 2 == np.arange(BLINDS)
    blinds[wrong, 0] = np.where(blinds[wrong, 0] == 0, 1, 0)
    return blinds


def _reversed(weights: NDArray[np.int64]) -> NDArray[np.int64]:
    """The multiplier whose product's constant coefficient is the inner product with the weights."""
    return np.concatenate([weights[:1], -weights[:0:-1]])


@lru_cache(maxsize=1)
def _turn() -> NDArray[np.uint64]:
    """X**2048, a square root of -1, in NTT form."""
    monomial = np.zeros((1, RING_DEGREE), dtype=np.int64)
    monomial[0, RING_DEGREE // 2] = 1
    turn: NDArray[np.uint64] = ring.to_ntt(monomial)[0]
    return turn


def _cut(masks: NDArray[np.uint64], dropped: int, stream: Stream) -> NDArray[np.uint64]:
    """Masks with an error, uniform in [0, 256**dropped), and without their lowest bytes.

    The error makes a mask a sample of ring-LWE; that its lowest bytes are cut off then takes
    nothing away. On average it makes up for the cut.
    """
    bits = np.uint64(8 * dropped)
    errors = stream.uint32(masks.size).reshape(masks.shape) & np.uint32((1 << int(bits)) - 1)
    return reduced(masks + errors) >> bits
