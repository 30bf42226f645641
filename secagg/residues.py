"""Residues modulo q as bytes and as arrays: 7 bytes each on the wire, uint64 in memory.

Everything the *server* does to ciphertexts is here, and it is only this: check that each residue
is below q, and add. Untrusted bytes are measured before they are looked at. Read `packing` next
for what the residues mean, `ring` for where they live.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from secagg.errors import MalformedError
from secagg.parameters import BLOCK_BYTES, MODULUS, RESIDUE_BYTES, RING_DEGREE

__all__ = ["ResidueSum", "narrow", "widen"]

_Q = np.uint64(MODULUS)
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
    # An unaligned view of stride 7 reads one byte past each residue; the copy gives the last one
    # a byte to read.
    padded = bytes(data) + b"\0"
    view = np.ndarray((blocks * RING_DEGREE,), "<u8", padded, 0, (RESIDUE_BYTES,))
    residues = view & _MASK
    if residues.size and residues.max() >= _Q:
        first = int(np.argmax(residues >= _Q))
        raise MalformedError(
            f"expected residues below q={MODULUS}; the residue at block={first // RING_DEGREE}, "
            f"position={first % RING_DEGREE} is not; reduce modulo q before sending"
        )
    return residues.reshape(blocks, RING_DEGREE)


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
