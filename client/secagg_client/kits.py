"""What the authority gave a client."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from secagg.certificates import Kit, Role
from secagg.endorsement import read_pins
from secagg.errors import CertificateError, MalformedError
from secagg.receipts import SigningKey

__all__ = ["ClientKit"]


@dataclass(frozen=True, slots=True)
class ClientKit:
    """A client's certificate, its signing key, and whom it trusts.

    Attributes:
        tls: certificate and key for the connection.
        identity: signs receipts.
    """

    tls: Kit
    identity: SigningKey

    @classmethod
    def load(cls, folder: Path | str) -> ClientKit:
        """Read a client's kit.

        Raises:
            IdentityError: see `Kit.load`; or the signing key or the pins cannot be read.
        """
        kit = cls(tls := Kit.load(Path(folder), Role.CLIENT), _signing_key(tls))
        kit.pins()
        return kit

    def pins(self) -> frozenset[bytes]:
        """Key holders that are trusted now; read each time, so that they can be rotated.

        Raises:
            CertificateError: the file is missing or damaged.
        """
        try:
            return read_pins(self.tls.file("key_holder.pub").read_text(encoding="utf-8"))
        except (OSError, MalformedError, UnicodeDecodeError):
            raise CertificateError(
                "expected key_holder.pub in the kit, one public key a line; it is missing or "
                "damaged; take it from the authority again"
            ) from None


def _signing_key(kit: Kit) -> SigningKey:
    try:
        return SigningKey.from_bytes(kit.file("signing.key").read_bytes())
    except (OSError, MalformedError):
        raise CertificateError(
            "expected signing.key in the kit, 32 bytes; it is missing or damaged; take the kit "
            "from the authority again"
        ) from None
