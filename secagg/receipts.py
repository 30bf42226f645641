"""Receipts: a client's signature over its upload, its sealed seed and the round's context.

The list of receipts behind a sum is its *manifest*. The key holder opens only seeds whose hash a
valid receipt signs, one receipt a client and round, so that nobody can put seeds of their own in
the place of a victim's companions.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from secagg.context import ContextId
from secagg.errors import MalformedError, ReceiptError
from secagg.transcript import DIGEST_BYTES, encode

__all__ = ["CLIENT_KEY_BYTES", "NO_COMMITMENT", "SIGNATURE_BYTES", "Receipt", "SigningKey"]

CLIENT_KEY_BYTES = 32
SIGNATURE_BYTES = 64

NO_COMMITMENT = bytes(DIGEST_BYTES)
"""What a receipt holds of the server's challenge in a round without a norm check."""


class SigningKey:
    """A client's Ed25519 identity key; its public half names the client."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public = private.public_key().public_bytes_raw()

    @classmethod
    def generate(cls) -> SigningKey:
        """A new identity."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_bytes(cls, data: bytes) -> SigningKey:
        """An identity from its 32 private bytes.

        Raises:
            MalformedError: not 32 bytes.
        """
        if len(data) != 32:
            raise MalformedError(f"expected a signing key of 32 bytes; got bytes={len(data)}")
        return cls(Ed25519PrivateKey.from_private_bytes(data))

    def to_bytes(self) -> bytes:
        """The 32 private bytes; store them readable by their owner only."""
        return self._private.private_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """Ed25519 signature, 64 bytes."""
        return self._private.sign(message)

    def __repr__(self) -> str:
        return "SigningKey(OMITTED)"


@dataclass(frozen=True, slots=True)
class Receipt:
    """A client's signed statement: this upload, sealed with this seed, for this round.

    Attributes:
        context: what the upload is for.
        client_key: 32-byte Ed25519 public key that names the client.
        upload_digest: SHA-256 of the ciphertext bytes.
        sealed_seed_sha256: SHA-256 of the sealed seed.
        challenge_commitment: the server's commitment to what it will ask about this upload, as the
            client received it (see `challenges`); `NO_COMMITMENT` without a norm check.
        signature: 64 bytes over all of the above.
    """

    context: ContextId
    client_key: bytes = field(repr=False)
    upload_digest: bytes
    sealed_seed_sha256: bytes
    challenge_commitment: bytes = field(repr=False)
    signature: bytes = field(repr=False)

    @classmethod
    def sign(
        cls,
        key: SigningKey,
        context: ContextId,
        upload_digest: bytes,
        sealed_seed: bytes,
        challenge_commitment: bytes = NO_COMMITMENT,
    ) -> Receipt:
        """Sign an upload, its sealed seed and the challenge that it will have to answer."""
        sealed_sha = hashlib.sha256(sealed_seed).digest()
        message = _message(context, key.public, upload_digest, sealed_sha, challenge_commitment)
        signature = key.sign(message)
        return cls(context, key.public, upload_digest, sealed_sha, challenge_commitment, signature)

    def verify(self, context: ContextId, sealed_seed: bytes) -> None:
        """Check that the receipt belongs to this round and covers this sealed seed.

        Raises:
            ContextError: made for another context.
            ReceiptError: the signature or the seed's hash does not match.
        """
        context.require(self.context)
        expected = {
            "client_key": CLIENT_KEY_BYTES,
            "upload_digest": DIGEST_BYTES,
            "challenge_commitment": DIGEST_BYTES,
            "signature": SIGNATURE_BYTES,
        }
        for name, size in expected.items():
            if len(getattr(self, name)) != size:
                raise ReceiptError(
                    f"expected {name} of {size} bytes; got bytes={len(getattr(self, name))}"
                )
        if hashlib.sha256(sealed_seed).digest() != self.sealed_seed_sha256:
            raise ReceiptError("expected the sealed seed that the receipt signs; its hash differs")
        message = _message(
            context,
            self.client_key,
            self.upload_digest,
            self.sealed_seed_sha256,
            self.challenge_commitment,
        )
        try:
            Ed25519PublicKey.from_public_bytes(self.client_key).verify(self.signature, message)
        except (InvalidSignature, ValueError):
            raise ReceiptError(
                "expected a receipt signed by the key it names; the signature is not valid; sign "
                "the upload you send with your own key"
            ) from None


def _message(
    context: ContextId, client_key: bytes, upload: bytes, sealed_sha256: bytes, commitment: bytes
) -> bytes:
    return encode("receipt", context.digest, client_key, upload, sealed_sha256, commitment)
