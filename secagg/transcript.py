"""Unambiguous hashing of structured values: one label, then length-prefixed fields.

Every digest, seed and public string of the project is made here, so that a value hashed for one
purpose can never be mistaken for a value hashed for another (domain separation), and no two lists
of fields share an encoding. Must never be fed floats: callers fix their own exact encoding first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

__all__ = ["DIGEST_BYTES", "PROTOCOL", "Field", "digest", "encode"]

PROTOCOL = "secagg/1"
"""Protocol version, part of every digest: two versions never agree on one by accident."""

DIGEST_BYTES = 32

Field = bytes | memoryview | str | int
"""A memory view, of bytes, stands for them without a copy."""


def encode(label: str, *fields: Field) -> bytes:
    """Injective encoding of a label and its fields.

    Integers are 8 bytes, little endian, in [0, 2**64). Strings are UTF-8.
    """
    return b"".join(_encoded(label, fields))


def digest(label: str, *fields: Field) -> bytes:
    """SHA-256 of :func:`encode`, 32 bytes."""
    running = hashlib.sha256()
    for part in _encoded(label, fields):
        running.update(part)
    return running.digest()


def _encoded(label: str, fields: Sequence[Field]) -> Iterator[bytes | memoryview]:
    """Pieces whose concatenation is the encoding; a large field is one of them as it is."""
    name = f"{PROTOCOL}/{label}".encode()
    yield from (_length(len(name)), name)
    for field in fields:
        kind, data = _field(field)
        yield from (_length(1 + len(data)), kind, data)


def _field(field: Field) -> tuple[bytes, bytes | memoryview]:
    if isinstance(field, str):
        return b"s", field.encode()
    if isinstance(field, int):
        return b"i", field.to_bytes(8, "little")
    return b"b", field


def _length(size: int) -> bytes:
    return size.to_bytes(8, "little")
