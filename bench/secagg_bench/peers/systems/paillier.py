"""Paillier of python-paillier (`phe`, with gmpy2), many values in a plaintext as in BatchCrypt.

Packing follows the description in Zhang et al. 2020, "BatchCrypt: Efficient Homomorphic Encryption
for Cross-Silo Federated Learning" (USENIX ATC): values are clipped, quantised symmetrically and
rounded at random; each is written in two's complement with two sign bits, wide enough for the sum
of all clients; above it is room for the carries, log2(clients) bits of zeros. So sums of plaintexts
are sums of values, and two sign bits that differ show one that has overflowed. The code is ours.

Where it departs from the paper: values keep all their ``bits`` however many clients there are, and
the field grows, where the paper scales values so that a sum fits; and the clipping range is not
fitted to the gradients but the same for all: 5 standard deviations of the values of an update of
norm 1, beyond which hardly any is.

2048 bits of key, as in the paper and most others, are as strong as 112 bits; 128 take 3072 (NIST SP
800-57, part 1). Keys are for all rounds, and whoever has the secret one could open every upload.
Sums are handed over as they are, not randomised again, since only the key holder sees them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ._flat import flatten, shaped

if TYPE_CHECKING:
    from secagg_bench.peers.worker import Clock

_RANGE_STDS = 5.0


class Packing:
    """How signed integers share plaintexts.

    Args:
        bits: of one client's value, its sign among them: magnitudes below 2**(bits - 1).
        clients: most summands of a sum.
        room: bits of a plaintext.
    """

    def __init__(self, bits: int, clients: int, room: int) -> None:
        carries = (clients - 1).bit_length()
        self._field = bits + carries + 1  # the sum, with a second sign bit
        self._lane = self._field + carries
        self.values = room // self._lane
        if self.values < 1:
            raise ValueError(f"expected lanes of at most {room} bits; got {self._lane}")

    def pack(self, values: NDArray[np.int64]) -> list[int]:
        """Integers of as many bits as there is room; the last one is filled up with zeros."""
        rows = -(-values.size // self.values)
        padded = np.zeros(rows * self.values, dtype=np.int64)
        padded[: values.size] = values
        fields = padded & ((1 << self._field) - 1)
        bits = (fields[:, None] >> np.arange(self._lane)) & 1
        packed = np.packbits(bits.astype(np.uint8).reshape(rows, -1), axis=1, bitorder="little")
        return [int.from_bytes(row.tobytes(), "little") for row in packed]

    def unpack(self, sums: list[int], size: int) -> NDArray[np.int64]:
        """The sums of the packed values, int64 of shape (size,).

        Raises:
            ValueError: one has left its field.
        """
        width = self.values * self._lane
        raw = b"".join(each.to_bytes(-(-width // 8), "little") for each in sums)
        rows = np.frombuffer(raw, dtype=np.uint8).reshape(len(sums), -1)
        bits = np.unpackbits(rows, axis=1, count=width, bitorder="little")
        fields = bits.reshape(-1, self._lane)[:size, : self._field].astype(np.int64)
        if (fields[:, -1] != fields[:, -2]).any():
            raise ValueError("expected sums within their fields; one has overflowed; add fewer")
        weights = 1 << np.arange(self._field, dtype=np.int64)
        weights[-1] *= -1
        return np.asarray(fields @ weights, dtype=np.int64)


class System:
    """Keys are made once and stay for all rounds.

    Args:
        key_bits: of the public modulus; a ciphertext has twice as many.
        bits: of a quantised value.
        max_clients: that a sum has room for; ``clients`` when omitted.
    """

    DISTRIBUTIONS: ClassVar = ("phe", "gmpy2")

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        clients: int,
        clock: Clock,
        *,
        key_bits: int = 2048,
        bits: int = 8,
        max_clients: int | None = None,
    ) -> None:
        import phe
        from phe.util import HAVE_GMP

        if not HAVE_GMP:
            raise RuntimeError("expected gmpy2 beside phe, which is many times slower without it")
        self._phe: Any = phe
        self._public, self._secret = phe.generate_paillier_keypair(n_length=key_bits)
        # phe takes plaintexts below a third of the modulus.
        self._packing = Packing(bits, max_clients or clients, key_bits - 2)
        self._bytes = key_bits // 4
        self._size = sum(math.prod(shape) for shape in shapes.values())
        self._largest = (1 << (bits - 1)) - 1
        self._step = _RANGE_STDS / math.sqrt(self._size) / self._largest
        self._shapes, self._clock = shapes, clock
        self._sum: list[Any] = []
        self._added = 0

    def round(self) -> None:
        """Forget the sum."""
        self._sum, self._added = [], 0

    def client(self, number: int, update: Mapping[str, NDArray[np.float32]]) -> list[bytes]:
        """One message: ciphertexts of equal length."""
        with self._clock.part("quantise"):
            scaled = flatten(update).astype(np.float64) / self._step
            rounded = np.floor(scaled + np.random.default_rng().random(scaled.size))
            values = np.clip(rounded, -self._largest, self._largest).astype(np.int64)
            plaintexts = self._packing.pack(values)
        return [self._to_bytes([self._public.encrypt(each) for each in plaintexts])]

    def add(self, number: int, messages: list[bytes]) -> None:
        """A product of ciphertexts each; phe checks nothing of them."""
        with self._clock.part("parse"):
            numbers = self._from_bytes(messages[0])
        if self._added:
            self._sum = [mine + more for mine, more in zip(self._sum, numbers, strict=True)]
        else:
            self._sum = numbers
        self._added += 1

    def hand_over(self) -> list[bytes]:
        """One message, as long as an upload."""
        return [self._to_bytes(self._sum)]

    def open(self, messages: list[bytes]) -> dict[str, NDArray[Any]]:
        """The mean, float64."""
        plaintexts = [self._secret.decrypt(each) for each in self._from_bytes(messages[0])]
        total = self._packing.unpack(plaintexts, self._size)
        return shaped(total * (self._step / self._added), self._shapes)

    def _to_bytes(self, numbers: list[Any]) -> bytes:
        return b"".join(
            int(each.ciphertext(be_secure=False)).to_bytes(self._bytes, "little")
            for each in numbers
        )

    def _from_bytes(self, data: bytes) -> list[Any]:
        parts = [data[start : start + self._bytes] for start in range(0, len(data), self._bytes)]
        return [
            self._phe.EncryptedNumber(self._public, int.from_bytes(part, "little"))
            for part in parts
        ]
