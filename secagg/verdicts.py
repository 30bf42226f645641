"""Verdicts: what the key holder says of an upload's sketch, signed.

A verdict is one bit, and names the sketch that it is about: see `recheck` for what its client can
do with that.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from secagg.context import ContextId
from secagg.errors import UntrustedKeyError
from secagg.receipts import Receipt, SigningKey
from secagg.transcript import encode

__all__ = ["Verdict"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The key holder's signed answer about one upload.

    Attributes:
        receipt: the client's own, of the upload that was judged.
        sketch_digest: SHA-256 of the sketch by which it was judged.
        accepted: whether the upload may be summed.
        identity: the key holder's public identity key, 32 bytes.
        signature: 64 bytes over all of the above.
    """

    receipt: Receipt
    sketch_digest: bytes
    accepted: bool
    identity: bytes = field(repr=False)
    signature: bytes = field(repr=False)

    @classmethod
    def sign(
        cls, identity: SigningKey, receipt: Receipt, sketch_digest: bytes, *, accepted: bool
    ) -> Verdict:
        """Sign what was found."""
        signature = identity.sign(_message(receipt, sketch_digest, accepted))
        return cls(receipt, sketch_digest, accepted, identity.public, signature)

    def verify(self, context: ContextId, pinned: Collection[bytes]) -> None:
        """Check that a pinned key holder said this, in this attempt.

        Raises:
            ContextError: about an upload for something else.
            UntrustedKeyError: not the signature of a key holder that is pinned.
        """
        context.require(self.receipt.context)
        try:
            if self.identity not in pinned:
                raise ValueError
            message = _message(self.receipt, self.sketch_digest, self.accepted)
            Ed25519PublicKey.from_public_bytes(self.identity).verify(self.signature, message)
        except (InvalidSignature, ValueError):
            raise UntrustedKeyError(
                "expected a verdict signed by the key holder that is pinned; it is not; report it"
            ) from None


def _message(receipt: Receipt, sketch_digest: bytes, accepted: bool) -> bytes:
    return encode(
        "norm verdict",
        receipt.context.digest,
        receipt.client_key,
        receipt.upload_digest,
        receipt.challenge_commitment,
        sketch_digest,
        int(accepted),
    )
