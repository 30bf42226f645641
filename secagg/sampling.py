"""Randomness: cryptographic streams and the distributions drawn from them.

The only generator is ChaCha20 (RFC 8439) keyed with 32 bytes: from the operating system for
anything that protects something, from a hash for anything public, from a test's seed where a run
must repeat. `numpy.random` is never used. Lengths are fixed in advance, so two parties that expand
the same key hold the same values, whatever their chunking.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

from secagg.parameters import MODULUS, RESIDUE_BYTES, RING_DEGREE
from secagg.residues import unpacked
from secagg.transcript import digest

__all__ = [
    "CBD_BITS",
    "ERROR_STD",
    "Stream",
    "centred_binomial",
    "coin_differences",
    "signs",
    "ternary",
    "uniform_polynomials",
]

CBD_BITS = 21
"""Errors are the difference of two sums of 21 fair bits: variance 10.5, |e| <= 21 (as in SEAL)."""

ERROR_STD: float = math.sqrt(CBD_BITS / 2)

_HALF = np.uint64((1 << CBD_BITS) - 1)
_SHIFT = np.uint64(CBD_BITS)

# A residue is rejected with probability 2**-32. Each block of the public polynomials reads a
# fixed 8 words more than it needs, so that block j can be expanded without its predecessors; more
# than 8 rejections in a block happen with probability below 2**-180.
_SPARE_WORDS = 8
_BLOCK_WORDS = RING_DEGREE + _SPARE_WORDS

# Of 8 bytes, so that what is done to them is done in a level-2 cache.
_PASS_WORDS = 1 << 15

# Bytes below 243 = 3**5 give five uniform trits each; 13/256 of the bytes are rejected.
_TRITS_PER_BYTE = 5
_TRIT_BYTES_LIMIT = 3**_TRITS_PER_BYTE
_TRITS: NDArray[np.int64] = (
    np.arange(_TRIT_BYTES_LIMIT)[:, None] // 3 ** np.arange(_TRITS_PER_BYTE)[None, :] % 3 - 1
).astype(np.int64)
# 820 accepted bytes are needed; of 1024 drawn, fewer are accepted with probability below 2**-200.
_TERNARY_BYTES = 1024


class Stream:
    """A ChaCha20 keystream, read from the front. Its repr never shows the key."""

    def __init__(self, key: bytes) -> None:
        if len(key) != 32:
            raise ValueError(f"a stream needs a 32-byte key; got {len(key)} bytes")
        self._cipher = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()

    @classmethod
    def from_os(cls) -> Stream:
        """A stream keyed with 32 fresh bytes of the operating system."""
        return cls(os.urandom(32))

    @classmethod
    def derive(cls, label: str, *fields: bytes | str | int) -> Stream:
        """A stream keyed with a domain-separated hash; as secret as its fields are."""
        return cls(digest(f"stream/{label}", *fields))

    def read(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        return self._cipher.update(bytes(count))

    def uint64(self, count: int) -> NDArray[np.uint64]:
        """The next ``count`` words, uniform in [0, 2**64)."""
        return np.frombuffer(self.read(8 * count), dtype="<u8")

    def uint32(self, count: int) -> NDArray[np.uint32]:
        """The next ``count`` words, uniform in [0, 2**32)."""
        return np.frombuffer(self.read(4 * count), dtype="<u4")

    def __repr__(self) -> str:
        return "Stream(OMITTED)"


def centred_binomial(stream: Stream, count: int) -> NDArray[np.int64]:
    """``count`` samples of CBD(21): int64 in [-21, 21], mean 0, variance 10.5."""
    samples = np.empty(count, dtype=np.int64)
    for piece in _pieces(count, _PASS_WORDS):
        words = stream.uint64(piece.stop - piece.start)
        first = np.bitwise_count(words & _HALF).view(np.int8)
        samples[piece] = first - np.bitwise_count((words >> _SHIFT) & _HALF).view(np.int8)
    return samples


def ternary(stream: Stream) -> NDArray[np.int64]:
    """One secret polynomial: 4096 coefficients, int64, uniform in {-1, 0, 1}."""
    drawn = np.frombuffer(stream.read(_TERNARY_BYTES), dtype=np.uint8)
    trits: NDArray[np.int64] = _TRITS[drawn[drawn < _TRIT_BYTES_LIMIT]].reshape(-1)
    if trits.size < RING_DEGREE:  # pragma: no cover - probability below 2**-200
        raise RuntimeError("the stream yielded too few trits")
    return trits[:RING_DEGREE]


def uniform_polynomials(stream: Stream, blocks: int) -> NDArray[np.uint64]:
    """The next ``blocks`` polynomials with uniform coefficients: uint64 (blocks, 4096), below q."""
    out = np.empty((blocks, RING_DEGREE), dtype=np.uint64)
    for piece in _pieces(blocks, _PASS_WORDS // RING_DEGREE):
        count = (piece.stop - piece.start) * _BLOCK_WORDS
        words = unpacked(stream.read(count * RESIDUE_BYTES)).reshape(-1, _BLOCK_WORDS)
        if words.max() < np.uint64(MODULUS):
            out[piece] = words[:, :RING_DEGREE]
        else:
            out[piece] = [_accepted(row) for row in words]
    return out


def _pieces(count: int, size: int) -> Iterator[slice]:
    return (slice(at, min(at + size, count)) for at in range(0, count, size))


def _accepted(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The first 4096 words of one block that are below q."""
    kept = words[words < np.uint64(MODULUS)]
    if kept.size < RING_DEGREE:  # pragma: no cover - probability below 2**-180
        raise RuntimeError("the stream yielded too few residues")
    return kept[:RING_DEGREE]


def signs(stream: Stream, count: int) -> NDArray[np.int8]:
    """``count`` fair signs: int8 in {-1, 1}, one bit of the stream each."""
    octets = np.frombuffer(stream.read((count + 7) // 8), dtype=np.uint8)
    bits = np.unpackbits(octets, count=count, bitorder="little")
    return (bits.astype(np.int8) << 1) - 1


def coin_differences(stream: Stream, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Differences of two fair bits: int64 in {-1, 0, 1} with probabilities 1/4, 1/2, 1/4."""
    count = math.prod(shape)
    octets = np.frombuffer(stream.read((2 * count + 7) // 8), dtype=np.uint8)
    bits = np.unpackbits(octets, count=2 * count, bitorder="little").view(np.int8)
    return (bits[:count] - bits[count:]).reshape(shape).astype(np.int64)
