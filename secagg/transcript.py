"""Unambiguous hashing of structured values: one label, then length-prefixed fields.

Every digest, seed and public string of the project is made here, so that a value hashed for one
purpose can never be mistaken for a value hashed for another (domain separation), and no two lists
of fields share an encoding. Must never be fed floats: callers fix their own exact encoding first.
"""

from __future__ import annotations

import hashlib

__all__ = ["DIGEST_BYTES", "PROTOCOL", "Field", "digest", "encode"]

PROTOCOL = "secagg/1"
"""Protocol version, part of every digest: two versions never agree on one by accident."""

DIGEST_BYTES = 32

Field = bytes | str | int


def encode(label: str, *fields: Field) -> bytes:
    """Injective encoding of a label and its fields.

    Integers are 8 bytes, little endian, in [0, 2**64). Strings are UTF-8.
    """
    parts = [_prefixed(f"{PROTOCOL}/{label}".encode())]
    parts.extend(_prefixed(_field(field)) for field in fields)
    return b"".join(parts)


def digest(label: str, *fields: Field) -> bytes:
    """SHA-256 of :func:`encode`, 32 bytes."""
    return hashlib.sha256(encode(label, *fields)).digest()


def _field(field: Field) -> bytes:
    if isinstance(field, str):
        return b"s" + field.encode()
    if isinstance(field, int):
        return b"i" + field.to_bytes(8, "little")
    return b"b" + field


def _prefixed(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + data
