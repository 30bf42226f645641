"""The key holder's signature on a round, by which clients tell its round key from anybody else's.

It covers the context: task, round, attempt, plan, model and round key. A server that put a round
key of its own in the place of the key holder's could open every seed; clients therefore pin the
key holder's identity and accept no round without its signature.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from secagg.context import ContextId
from secagg.errors import MalformedError, UntrustedKeyError
from secagg.receipts import SIGNATURE_BYTES, SigningKey
from secagg.transcript import encode

__all__ = ["IDENTITY_BYTES", "Endorsement", "read_pins"]

IDENTITY_BYTES = 32


@dataclass(frozen=True, slots=True)
class Endorsement:
    """A signature on a round's context.

    Attributes:
        identity: 32-byte Ed25519 public key of the key holder.
        signature: 64 bytes.
    """

    identity: bytes
    signature: bytes = field(repr=False)

    @classmethod
    def sign(cls, identity: SigningKey, context: ContextId) -> Endorsement:
        """Endorse a round."""
        return cls(identity.public, identity.sign(_message(context)))

    def verify(self, context: ContextId, pinned: Collection[bytes]) -> None:
        """Accept the round only from a key holder that is pinned.

        Raises:
            UntrustedKeyError: another identity, or not its signature on this context.
        """
        if self.identity not in pinned or len(self.signature) != SIGNATURE_BYTES:
            raise UntrustedKeyError(
                "expected a round endorsed by a key holder that is pinned here; got another one's; "
                "contribute nothing, and ask the operator whether its identity was rotated"
            )
        try:
            Ed25519PublicKey.from_public_bytes(self.identity).verify(
                self.signature, _message(context)
            )
        except (InvalidSignature, ValueError):
            raise UntrustedKeyError(
                "expected the pinned key holder's signature on this round key; it is not one: the "
                "server may have put a key of its own in its place; contribute nothing"
            ) from None


def _message(context: ContextId) -> bytes:
    return encode("round key endorsement", context.digest)


def read_pins(text: str) -> frozenset[bytes]:
    """The pinned identities of a ``key_holder.pub`` file: one public key in hexadecimal a line.

    Raises:
        MalformedError: a line is not one, or there is none.
    """
    try:
        pins = frozenset(bytes.fromhex(line) for line in text.split())
    except ValueError:
        pins = frozenset()
    if not pins or any(len(pin) != IDENTITY_BYTES for pin in pins):
        raise MalformedError(
            f"expected public keys of {IDENTITY_BYTES} bytes in hexadecimal, one a line; got "
            "something else; fetch key_holder.pub again"
        )
    return pins
