"""Seeds sealed to the key holder's round key with HPKE (RFC 9180), from `cryptography`.

The key encapsulation is the hybrid ML-KEM-768 + X25519 ("X-Wing"): whoever records traffic today
must break both to open a seed, so that the seal is not weaker than the lattice cipher it carries
the keys of. Sealing authenticates nobody; `receipts` does. A private key's repr never shows it.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)

from secagg.errors import MalformedError, SealError
from secagg.transcript import encode

__all__ = [
    "ROUND_KEY_BYTES",
    "ROUND_PRIVATE_BYTES",
    "SEALED_SEED_BYTES",
    "SEED_BYTES",
    "RoundKeyPair",
    "seal",
    "seal_info",
]

SEED_BYTES = 32

_MLKEM_BYTES = 1184
ROUND_KEY_BYTES = _MLKEM_BYTES + 32
"""Public round key on the wire: ML-KEM-768 encapsulation key, then X25519 public key."""

_MLKEM_SEED_BYTES = 64
ROUND_PRIVATE_BYTES = _MLKEM_SEED_BYTES + 32
"""Private round key: the seed of the ML-KEM-768 key, then the X25519 private key."""

SEALED_SEED_BYTES = 1120 + SEED_BYTES + 16
"""Encapsulation (1088 + 32), encrypted seed, authentication tag."""

_SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)


class RoundKeyPair:
    """The key holder's key for one round and attempt."""

    def __init__(self) -> None:
        self._take(MLKEM768PrivateKey.generate(), X25519PrivateKey.generate())

    def _take(self, mlkem: MLKEM768PrivateKey, x25519: X25519PrivateKey) -> None:
        self._halves = mlkem, x25519
        self._private = MLKEM768X25519PrivateKey(mlkem, x25519)
        self.public = mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()

    @classmethod
    def from_bytes(cls, data: bytes) -> RoundKeyPair:
        """The key that :meth:`to_bytes` wrote.

        Raises:
            MalformedError: not `ROUND_PRIVATE_BYTES` bytes.
        """
        if len(data) != ROUND_PRIVATE_BYTES:
            raise MalformedError(
                f"expected a private round key of {ROUND_PRIVATE_BYTES} bytes; got "
                f"bytes={len(data)}; it was cut or is not one"
            )
        pair = cls.__new__(cls)
        pair._take(
            MLKEM768PrivateKey.from_seed_bytes(data[:_MLKEM_SEED_BYTES]),
            X25519PrivateKey.from_private_bytes(data[_MLKEM_SEED_BYTES:]),
        )
        return pair

    def to_bytes(self) -> bytes:
        """The private half, `ROUND_PRIVATE_BYTES` bytes; it opens every seed of the round."""
        mlkem, x25519 = self._halves
        return mlkem.private_bytes_raw() + x25519.private_bytes_raw()

    def open(self, sealed: bytes, info: bytes) -> bytes:
        """The seed inside a sealed message.

        Raises:
            SealError: wrong size, another key, another context, or damaged.
        """
        if len(sealed) != SEALED_SEED_BYTES:
            raise SealError(
                f"expected a sealed seed of {SEALED_SEED_BYTES} bytes; got bytes={len(sealed)}"
            )
        try:
            return _SUITE.decrypt(sealed, self._private, info=info)
        except (InvalidTag, ValueError):
            raise SealError(
                "expected a seed sealed to this round's key for this very upload; it does not "
                "open; fetch the round again and encrypt anew"
            ) from None

    def __repr__(self) -> str:
        return "RoundKeyPair(OMITTED)"


def seal(seed: bytes, round_key: bytes, info: bytes) -> bytes:
    """Seal a seed to a public round key; only the same ``info`` opens it.

    Raises:
        MalformedError: the round key is not one.
    """
    if len(round_key) != ROUND_KEY_BYTES:
        raise MalformedError(
            f"expected a round key of {ROUND_KEY_BYTES} bytes; got bytes={len(round_key)}"
        )
    try:
        public = MLKEM768X25519PublicKey(
            MLKEM768PublicKey.from_public_bytes(round_key[:_MLKEM_BYTES]),
            X25519PublicKey.from_public_bytes(round_key[_MLKEM_BYTES:]),
        )
        return _SUITE.encrypt(seed, public, info=info)
    except ValueError:
        raise MalformedError("expected a valid round key; this one encodes no point") from None


def seal_info(context_digest: bytes, client_key: bytes, upload_digest: bytes) -> bytes:
    """What a sealed seed is bound to, so that it opens for this very upload only."""
    return encode("seal", context_digest, client_key, upload_digest)
