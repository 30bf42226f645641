"""One-time seeds of 32 bytes, and what is expanded from them: the secret key, and the errors.

The seed of the key travels sealed to the key holder; the errors have a seed of their own that never
leaves the client.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Literal

import numpy as np
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from secagg.parameters import RING_DEGREE
from secagg.sampling import Stream, centred_binomial, ternary
from secagg.sealing import SEED_BYTES
from secagg.transcript import digest, encode

__all__ = ["errors", "fresh_seed", "message_salt", "secret"]


def message_salt(context_digest: bytes, message: Iterable[NDArray[np.int64]]) -> bytes:
    """32 bytes that name a message and its round; see :func:`fresh_seed`."""
    return digest("message", context_digest, *(_narrowed(part) for part in message))


def _narrowed(integers: NDArray[np.int64]) -> bytes:
    """In as few bytes each as they take: a plan has so many that hashing them whole would show.

    Their number is the plan's, so that the length tells the width.
    """
    most = max(int(integers.max(initial=0)), ~int(integers.min(initial=0)))
    return integers.astype(np.min_scalar_type(~most)).tobytes()


def fresh_seed(salt: bytes, purpose: Literal["key", "errors"] = "key") -> bytes:
    """A seed for exactly one message: HKDF (RFC 5869) of fresh bytes, salted with the message.

    Even a generator that repeats its output (a cloned virtual machine) gives different messages
    different keys, and a message's key and errors different seeds.
    """
    info = encode("one-time seed", purpose)
    kdf = HKDF(algorithm=SHA256(), length=SEED_BYTES, salt=salt, info=info)
    return kdf.derive(os.urandom(SEED_BYTES))


def secret(seed: bytes) -> NDArray[np.int64]:
    """The ternary secret polynomial of a seed: int64 (4096,) in {-1, 0, 1}."""
    return ternary(Stream.derive("key", seed))


def errors(seed: bytes, blocks: int) -> NDArray[np.int64]:
    """The error polynomials of a seed: int64 (blocks, 4096) in [-21, 21]."""
    drawn = centred_binomial(Stream.derive("errors", seed), blocks * RING_DEGREE)
    return drawn.reshape(blocks, RING_DEGREE)
