"""Uploads of a client that keeps to the protocol as far as it must, and chooses everything else.

What it must: a receipt that is valid and a seal that opens. What it chooses: coefficients, noise,
integers, seeds, bytes, and the commitment that it signs. For attacks and measurements only.
"""

from __future__ import annotations

import hashlib
import os

import numpy as np
from numpy.typing import NDArray

from secagg import ckks, onetime, ring
from secagg.context import RoundContext
from secagg.parameters import FloatSegment
from secagg.quantize import rotated, rotated_weight
from secagg.receipts import NO_COMMITMENT, Receipt, SigningKey
from secagg.residues import narrow
from secagg.sealing import seal, seal_info
from secagg.upload import Admission, Upload

__all__ = ["encrypted", "integers", "signed", "upload"]


def integers(
    segment: FloatSegment,
    rotation: bytes,
    vector: NDArray[np.float32],
    weight: float,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """A vector of any norm and a weight of any size, rounded: int64 (segment.values,).

    Args:
        segment: what an update consists of.
        rotation: the round's public string.
        vector: float32 (segment.parameters,), in model units, multiplied by its weight already.
        weight: what it claims, where the segment has weights.
        rng: rounds.
    """
    steps = rotated(segment, vector, rotation).astype(np.float64)
    if segment.weighted:
        flat = rotated_weight(segment, rotation)
        steps += weight * segment.clip / np.linalg.norm(flat.astype(np.float64)) * flat
    steps /= segment.step
    return np.floor(steps + rng.random(steps.size)).astype(np.int64)


def encrypted(
    context: RoundContext,
    plaintext: NDArray[np.int64],
    seed: bytes,
    noise: NDArray[np.int64] | None = None,
) -> NDArray[np.uint64]:
    """Any coefficients under the key of a seed: uint64 (plan.blocks, 4096), below q.

    Args:
        context: the attempt.
        plaintext: int64 (plan.blocks, 4096), magnitudes below q.
        seed: 32 bytes.
        noise: of the same shape; an honest client's when omitted.
    """
    if noise is None:
        noise = onetime.errors(os.urandom(32), context.plan.blocks)
    key = ring.to_ntt(onetime.secret(seed)[None])[0]
    return ckks.encrypt(plaintext + noise, context.public_polynomials(), key)


def signed(
    context: RoundContext,
    payload: bytes,
    seed: bytes,
    identity: SigningKey,
    commitment: bytes = NO_COMMITMENT,
) -> Upload:
    """Any bytes, with a seal of any seed and a receipt that are valid."""
    name = hashlib.sha256(payload).digest()
    sealed = seal(seed, context.round_key, seal_info(context.id.digest, identity.public, name))
    receipt = Receipt.sign(identity, context.id, name, sealed, commitment)
    return Upload(Admission(receipt, sealed), payload)


def upload(
    context: RoundContext,
    plaintext: NDArray[np.int64],
    identity: SigningKey,
    commitment: bytes = NO_COMMITMENT,
    noise: NDArray[np.int64] | None = None,
) -> Upload:
    """Any coefficients, in an upload that is valid in all else."""
    seed = os.urandom(32)
    payload = narrow(encrypted(context, plaintext, seed, noise))
    return signed(context, payload, seed, identity, commitment)
