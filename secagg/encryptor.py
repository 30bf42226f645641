"""The client's role: from an update to an upload that nobody can read alone.

One seed encrypts one message, ever: the seed is derived from fresh randomness *and* the message, so
that not even a cloned random generator can put two messages under one key. A retry sends the same
bytes again; it never encrypts again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from secagg import ckks, ring
from secagg.context import RoundContext
from secagg.errors import ContextError, InputError, SchemaError
from secagg.onetime import errors, fresh_seed, message_salt, secret
from secagg.packing import largest, pack
from secagg.parameters import Plan
from secagg.quantize import Contribution, Quantized, quantize
from secagg.receipts import NO_COMMITMENT, Receipt, SigningKey
from secagg.residues import narrow
from secagg.sampling import Stream
from secagg.sealing import seal, seal_info
from secagg.upload import Admission, Upload

__all__ = ["Encryptor", "encrypt_integers", "encrypt_quantized", "upload_integers"]


class Encryptor:
    """Encrypts one client's contribution to one round.

    Args:
        context: the round, as the server announced it.
        identity: the client's signing key; a new one when omitted.
        randomness: source of the stochastic rounding, and of the client's privacy noise where the
            plan has any; the operating system when omitted. A seeded stream makes a run repeatable
            and is for demos and tests only: it takes the privacy away.
        commitment: the server's commitment to its challenge, 32 bytes, as it came with the round;
            needed where the plan has a norm check.
    """

    def __init__(
        self,
        context: RoundContext,
        identity: SigningKey | None = None,
        randomness: Stream | None = None,
        commitment: bytes = NO_COMMITMENT,
    ) -> None:
        self._context = context
        self._commitment = commitment
        self._identity = identity or SigningKey.generate()
        self._randomness = randomness or Stream.from_os()

    def encrypt(self, contribution: Contribution, *, samples: int = 1) -> Upload:
        """Encrypt the contribution to a plan of one segment.

        Args:
            contribution: what the segment describes.
            samples: examples behind it; ignored unless the plan weighs by samples.

        Raises:
            SchemaError: the plan has several segments, or names or shapes differ.
            NonFiniteError, InputError: see `quantize`.
        """
        segments = self._context.plan.segments
        if len(segments) != 1:
            raise SchemaError(
                f"expected a plan of one segment; this one has {[s.name for s in segments]}; "
                "use encrypt_segments"
            )
        return self.encrypt_segments({segments[0].name: contribution}, samples=samples)

    def encrypt_segments(
        self, contributions: Mapping[str, Contribution], *, samples: int = 1
    ) -> Upload:
        """Encrypt one contribution for each segment of the plan, by segment name.

        Raises:
            SchemaError, NonFiniteError, InputError: see `quantize`.
        """
        quantized = quantize(
            self._context.plan,
            contributions,
            samples=samples,
            rotation=self._context.rotation,
            randomness=self._randomness,
        )
        return encrypt_quantized(self._context, quantized, self._identity, self._commitment)


def encrypt_quantized(
    context: RoundContext,
    quantized: Sequence[Quantized],
    identity: SigningKey,
    commitment: bytes = NO_COMMITMENT,
) -> Upload:
    """Encrypt, seal and sign integers that are already quantised.

    Raises:
        InputError: they are not what the plan describes.
        ContextError: the plan has a norm check, and there is no commitment; or the other way round.
    """
    if (commitment != NO_COMMITMENT) != (context.plan.norm_check is not None):
        raise ContextError(
            "expected the server's commitment to its challenge exactly where the plan has a norm "
            "check; pass the one that came with the round"
        )
    parts = upload_integers(context.plan, quantized)
    for layout, most, part in zip(
        context.plan.upload_layouts, context.plan.upload_abs, parts, strict=True
    ):
        if part.shape != (layout.values,) or largest(part) > most:
            raise InputError(
                f"expected {layout.values} integers of magnitude up to {most}; got others; "
                "quantise with the round's plan"
            )
    return encrypt_integers(context, parts, identity, commitment)


def upload_integers(plan: Plan, quantized: Sequence[Quantized]) -> list[NDArray[np.int64]]:
    """What an upload consists of: values and their noise, together or one after the other.

    Raises:
        InputError: noise is missing, or there is some that the plan has not.
    """
    if any(
        (part.noise is None) == (layout.noise > 0)
        for part, layout in zip(quantized, plan.layouts, strict=True)
    ):
        raise InputError(
            "expected noise exactly where the plan has clients add it; quantise with it"
        )
    if not plan.noise_layouts:
        return [part.summand for part in quantized]
    noises = [part.noise for part in quantized if part.noise is not None]
    return [part.values for part in quantized] + noises


def encrypt_integers(
    context: RoundContext,
    parts: Sequence[NDArray[np.int64]],
    identity: SigningKey,
    commitment: bytes = NO_COMMITMENT,
) -> Upload:
    """Encrypt, seal and sign vectors of integers, whatever they are.

    Any client can send what this encrypts; an honest one has `encrypt_quantized` look at it first.

    Args:
        parts: int64 of shape (layout.values,) for each of the plan's upload_layouts.
    """
    salt = message_salt(context.id.digest, parts)
    seed = fresh_seed(salt)
    # The errors have a seed of their own, which nobody gets: the key holder sees the noise of an
    # audited upload, and who knows the errors can tell from it where a coefficient wrapped.
    coefficients = errors(fresh_seed(salt, "errors"), context.plan.blocks)
    for (layout, blocks), part in zip(context.plan.upload_ranges(), parts, strict=True):
        coefficients[blocks] += pack(layout, part)
    key = ring.to_ntt(secret(seed)[None])[0]
    payload = narrow(ckks.encrypt(coefficients, context.public_polynomials(), key))
    return _signed(context, payload, seed, identity, commitment)


def _signed(
    context: RoundContext, payload: bytes, seed: bytes, identity: SigningKey, commitment: bytes
) -> Upload:
    upload_digest = hashlib.sha256(payload).digest()
    info = seal_info(context.id.digest, identity.public, upload_digest)
    sealed = seal(seed, context.round_key, info)
    receipt = Receipt.sign(identity, context.id, upload_digest, sealed, commitment)
    return Upload(Admission(receipt, sealed), payload)
