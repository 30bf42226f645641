"""Updates in fewer floats, by a public linear map: what is summed compressed is the compressed sum.

Nothing about an update decides what is left out, so that there is nothing to send beside it and
nothing to learn from. A map is drawn anew in each round, from the round's public string, which all
attempts at a round share; over the rounds, everything gets through. What a round leaves out, a
client may add to its next update (error feedback: Stich et al. 2018, "Sparsified SGD with Memory";
Karimireddy et al. 2019, "Error Feedback Fixes SignSGD and other Gradient Compression Schemes").

Both maps have orthonormal rows: compressing never lengthens an update, which is clipped afterwards,
and expanding what was compressed projects it. All arithmetic is in a fixed order, so that every
machine rounds alike. Read `quantize` next.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from secagg.errors import SchemaError
from secagg.parameters import FloatSegment, LowRank, RandomSubset, TensorSpec
from secagg.sampling import Stream

__all__ = ["basis", "compress", "expand", "left_over", "subset"]

# A sum of twelve uniform numbers is close to Gaussian, and exact in a float.
_UNIFORMS = 12

_F = TypeVar("_F", np.float32, np.float64)


def compress(segment: FloatSegment, vector: NDArray[_F], rotation: bytes) -> NDArray[_F]:
    """What travels of an update, of its type; the update itself without compression.

    Args:
        vector: of shape (segment.parameters,), in canonical order.
        rotation: public string of the round.

    Returns:
        Of shape (segment.carried,): each table times its `basis`, or the coordinates of `subset`.

    Raises:
        SchemaError: another shape.
    """
    _check_size(vector, segment.parameters)
    if segment.compression is None:
        return vector
    if isinstance(segment.compression, RandomSubset):
        return vector[subset(segment, rotation)]
    return np.concatenate(
        [
            part if matrix is None else _times(part, matrix)
            for part, matrix in _parts(segment, vector, segment.tensors, rotation)
        ]
    )


def expand(segment: FloatSegment, vector: NDArray[_F], rotation: bytes) -> NDArray[_F]:
    """The shortest update that compresses to this, of its type: the transpose of `compress`.

    Args:
        vector: of shape (segment.carried,), such as a sum or a mean of what travelled.
        rotation: public string of the round.

    Returns:
        Of shape (segment.parameters,), in canonical order.

    Raises:
        SchemaError: another shape.
    """
    _check_size(vector, segment.carried)
    if segment.compression is None:
        return vector
    if isinstance(segment.compression, RandomSubset):
        whole = np.zeros(segment.parameters, dtype=vector.dtype)
        whole[subset(segment, rotation)] = vector
        return whole
    return np.concatenate(
        [
            part if matrix is None else _times(part, matrix.T)
            for part, matrix in _parts(segment, vector, segment.sent, rotation)
        ]
    )


def left_over(
    segment: FloatSegment, update: Mapping[str, NDArray[np.float32]], rotation: bytes
) -> dict[str, NDArray[np.float32]]:
    """What a round leaves out of an update: the update less its projection, by tensor name.

    Nothing, in zeros, without compression. Clipping and rounding are not in it: what they take away
    is taken on purpose, or zero on average.

    Args:
        update: float32 tensors by name, as the segment has them.

    Raises:
        SchemaError: tensors are missing, or of other sizes.
    """
    if update.keys() != {tensor.name for tensor in segment.tensors}:
        raise SchemaError(
            f"expected tensors {[tensor.name for tensor in segment.tensors]}; got {sorted(update)}"
        )
    flat = np.concatenate([update[tensor.name].reshape(-1) for tensor in segment.tensors])
    flat = flat - expand(segment, compress(segment, flat, rotation), rotation)
    parts = np.split(flat, _ends(segment.tensors))
    return {
        tensor.name: part.reshape(tensor.shape)
        for tensor, part in zip(segment.tensors, parts, strict=True)
    }


def basis(segment: FloatSegment, tensor: TensorSpec, rotation: bytes) -> NDArray[np.float64] | None:
    """The round's matrix for a table under `LowRank`; None for a tensor that is sent as it is.

    Returns:
        float64 of shape (columns, rank) with orthonormal columns, uniform among all such.
    """
    if not isinstance(segment.compression, LowRank):
        return None
    rank = segment.compression.rank
    if len(tensor.shape) < 2 or tensor.shape[-1] <= rank:
        return None
    return _orthonormal(rotation, segment.name, tensor.name, tensor.shape[-1], rank)


@lru_cache(maxsize=4)  # the same for all clients of a round
def subset(segment: FloatSegment, rotation: bytes) -> NDArray[np.intp]:
    """The coordinates that travel under `RandomSubset`: intp of shape (segment.carried,), rising.

    Every set of this size is equally likely.
    """
    words = Stream.derive("random subset", rotation, segment.name).uint64(segment.parameters)
    chosen: NDArray[np.intp] = np.argsort(words, kind="stable")[: segment.carried]
    return np.sort(chosen)


@lru_cache(maxsize=64)
def _orthonormal(
    rotation: bytes, segment: str, tensor: str, columns: int, rank: int
) -> NDArray[np.float64]:
    """Gaussian columns, made orthonormal one after the other (modified Gram-Schmidt)."""
    stream = Stream.derive("low rank", rotation, segment, tensor)
    words = stream.uint32(_UNIFORMS * columns * rank).reshape(_UNIFORMS, rank, columns)
    rows: NDArray[np.float64] = words.astype(np.float64).sum(axis=0) - _UNIFORMS * 2.0**31
    for index, row in enumerate(rows):
        for earlier in rows[:index]:
            row -= _dot(row, earlier) * earlier
        row /= math.sqrt(_dot(row, row))
    return rows.T


def _dot(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    return math.fsum(one * other)


def _times(flat: NDArray[_F], matrix: NDArray[np.float64]) -> NDArray[_F]:
    """A flat table times a matrix, flat; products are added up in the order of the columns."""
    table = flat.reshape(-1, matrix.shape[0])
    product = np.zeros((table.shape[0], matrix.shape[1]), dtype=flat.dtype)
    for column, row in zip(table.T, matrix.astype(flat.dtype), strict=True):
        product += column[:, None] * row
    return product.reshape(-1)


def _parts(
    segment: FloatSegment,
    vector: NDArray[_F],
    shapes: tuple[TensorSpec, ...],
    rotation: bytes,
) -> Iterator[tuple[NDArray[_F], NDArray[np.float64] | None]]:
    """Each tensor's part of a flat vector, with its matrix."""
    for tensor, part in zip(segment.tensors, np.split(vector, _ends(shapes)), strict=True):
        yield part, basis(segment, tensor, rotation)


def _ends(shapes: tuple[TensorSpec, ...]) -> NDArray[np.intp]:
    """Where each tensor but the last one ends in a flat vector."""
    return np.cumsum([tensor.size for tensor in shapes])[:-1]


def _check_size(vector: NDArray[_F], size: int) -> None:
    if vector.shape != (size,):
        raise SchemaError(f"expected a flat vector of {size} floats; got shape={vector.shape}")
