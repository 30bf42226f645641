"""Residues modulo q as bytes and as arrays: 7 bytes each on the wire, uint64 in memory.

What the *server* does to ciphertexts is here: check that each residue is below q, add, and, for a
sketch, multiply and mix. Untrusted bytes are measured before they are looked at. Read `packing`
next for what the residues mean, `ring` for where they live.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from secagg.errors import MalformedError
from secagg.parameters import BLOCK_BYTES, MODULUS, RESIDUE_BYTES, RING_DEGREE

__all__ = [
    "HALF_BITS",
    "ResidueSum",
    "folded",
    "halves",
    "joined",
    "multiply",
    "narrow",
    "reduced",
    "unpacked",
    "widen",
]

_Q = np.uint64(MODULUS)

_POSITIVE = np.uint64(64 * MODULUS)

HALF_BITS = 28
"""Bits of the lower half of a residue; sums of 2**25 halves are exact in float64."""
_MASK = np.uint64((1 << (8 * RESIDUE_BYTES)) - 1)

# 2**64 // q: so many residues below q fit into a uint64 before it must be reduced.
_LAZY_ADDITIONS = (1 << 64) // MODULUS


def widen(data: bytes | bytearray | memoryview, blocks: int) -> NDArray[np.uint64]:
    """Read ``blocks`` polynomials from untrusted bytes.

    Args:
        data: exactly ``blocks * 28672`` bytes: 7-byte little-endian residues.
        blocks: how many polynomials the caller expects, from the trusted plan.

    Returns:
        uint64 array of shape (blocks, 4096), every entry below q.

    Raises:
        MalformedError: the size is not the expected one, or a residue is q or more.
    """
    if len(data) != blocks * BLOCK_BYTES:
        raise MalformedError(
            f"expected exactly {blocks * BLOCK_BYTES} bytes ({blocks} polynomials of "
            f"{BLOCK_BYTES} bytes); got bytes={len(data)}; send the chunk whole and unpadded"
        )
    residues = unpacked(data)
    if residues.max(initial=0) >= _Q:
        first = int(np.argmax(residues >= _Q))
        raise MalformedError(
            f"expected residues below q={MODULUS}; the residue at block={first // RING_DEGREE}, "
            f"position={first % RING_DEGREE} is not; reduce modulo q before sending"
        )
    return residues.reshape(blocks, RING_DEGREE)


def unpacked(data: bytes | bytearray | memoryview) -> NDArray[np.uint64]:
    """Words of 7 bytes, little endian, of any value: uint64 of shape (len(data) // 7,)."""
    out = np.empty(len(data) // RESIDUE_BYTES, dtype=np.uint64)
    if out.size:
        # An unaligned view reads one byte past each word; past the last one there may be none.
        out[:-1] = np.ndarray((out.size - 1,), "<u8", data, 0, (RESIDUE_BYTES,))
        out[-1] = int.from_bytes(data[-RESIDUE_BYTES:], "little")
        out &= _MASK
    return out


def narrow(residues: NDArray[np.uint64]) -> bytes:
    """The wire form of residues below q: 7 bytes each, little endian, in C order."""
    wide = np.ascontiguousarray(residues, dtype="<u8").view(np.uint8)
    return wide.reshape(-1, 8)[:, :RESIDUE_BYTES].tobytes()


class ResidueSum:
    """Running sum modulo q of any number of equally long residue arrays, in constant memory.

    Reduction is lazy: 256 residues of 56 bits fit into 64 bits, so all but one in 255 additions
    are a single pass of machine adds.
    """

    def __init__(self, blocks: int) -> None:
        self._total = np.zeros((blocks, RING_DEGREE), dtype=np.uint64)
        self._pending = 1  # the total itself counts as one term once reduced

    def add(self, residues: NDArray[np.uint64]) -> None:
        """Add residues below q of shape (blocks, 4096); the caller has validated them."""
        if self._pending == _LAZY_ADDITIONS:
            self._reduce()
        np.add(self._total, residues, out=self._total)
        self._pending += 1

    def value(self) -> NDArray[np.uint64]:
        """The sum so far, reduced: uint64 of shape (blocks, 4096), below q."""
        self._reduce()
        return self._total.copy()

    def _reduce(self) -> None:
        np.remainder(self._total, _Q, out=self._total)
        self._pending = 1


def multiply(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Products modulo q, element by element; both below q, shapes that broadcast.

    The quotient in float64 is right to within 2**5, so that what is left, in wrapping 64-bit
    arithmetic, is the product less a few multiples of q.
    """
    quotient = first.view(np.int64) * (second.view(np.int64) * (1.0 / MODULUS))
    return _reduced(first * second, quotient)


def halves(residues: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Lower and upper 28 bits as float64, shape (2, \\*shape), for linear algebra: see `joined`."""
    out = np.empty((2, *residues.shape))
    # Signed and short integers convert to floats several times faster.
    out[0] = (residues & np.uint64((1 << HALF_BITS) - 1)).astype(np.int32)
    out[1] = (residues >> np.uint64(HALF_BITS)).astype(np.int32)
    return out


def joined(sums: NDArray[np.float64]) -> NDArray[np.uint64]:
    """Residues from sums of `halves`: (2, \\*shape), whole numbers of magnitudes below 2**53."""
    lower, upper = sums[0].astype(np.int64), sums[1].astype(np.int64)
    total = (upper << HALF_BITS) + lower  # wraps, as does what is taken off
    return _reduced(total.view(np.uint64), sums[1] * (2.0**HALF_BITS / MODULUS))


def _reduced(total: NDArray[np.uint64], quotient: NDArray[np.float64]) -> NDArray[np.uint64]:
    """``total - quotient * q``, all modulo 2**64, reduced; its true size is below 2**61."""
    left = total - np.rint(quotient).astype(np.int64).view(np.uint64) * _Q
    return reduced(left + _POSITIVE)


def folded(residues: NDArray[np.uint64], blocks: int) -> NDArray[np.uint64]:
    """Uploads' polynomials with those of their noise added: the first ``blocks`` plus the others.

    Args:
        residues: uint64 of shape (blocks or 2 * blocks, 4096), below q.
    """
    if residues.shape[0] == blocks:
        return residues
    return reduced(residues[:blocks] + residues[blocks:])


def reduced(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Numbers modulo q, of any shape; numpy divides by a scalar faster than it takes remainders."""
    return numbers - numbers // _Q * _Q
