"""The authority of a federation: issues the certificates that `secagg.certificates` checks."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from secagg.certificates import URI_PREFIX, USES, Role, authority_of, check_key, is_name
from secagg.errors import CertificateError, ConfigurationError

__all__ = ["AUTHORITY_DAYS", "Authority", "Issued", "host_name"]

AUTHORITY_DAYS = 3650
"""How long an authority's own certificate is valid; no certificate outlives its authority."""

_HOST = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9][A-Za-z0-9-]*(\.[A-Za-z0-9][A-Za-z0-9-]*)*")
# Clocks disagree; a certificate issued here must be valid there at once.
_BACKDATED = timedelta(minutes=10)


def host_name(text: str) -> x509.GeneralName:
    """A host as certificates name it.

    Raises:
        ConfigurationError: neither an IP address nor a DNS name.
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        if _HOST.fullmatch(text):
            return x509.DNSName(text)
    raise ConfigurationError(
        f"expected a DNS name or an IP address, without a port; got {text!r}"
    ) from None


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate just issued, with the only copy of its private key; both are PEM."""

    certificate: bytes = field(repr=False)
    private_key: bytes = field(repr=False)
    serial_number: int
    not_after: datetime


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate authority with its private key; whoever has that key can admit anybody."""

    certificate: x509.Certificate = field(repr=False)
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @classmethod
    def create(cls, now: datetime | None = None) -> Authority:
        """A new authority, valid for :data:`AUTHORITY_DAYS`."""
        start = now or datetime.now(UTC)
        key = ec.generate_private_key(ec.SECP256R1())
        # Two authorities of one name would be told apart by their signatures alone.
        name = _name(f"secagg authority {os.urandom(8).hex()}")
        unsigned = _unsigned(name, key, name, key, start, start + timedelta(AUTHORITY_DAYS))
        unsigned = unsigned.add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        ).add_extension(_key_usage(signs_certificates=True), critical=True)
        return cls(unsigned.sign(key, hashes.SHA256()), key)

    @classmethod
    def from_pem(cls, ca: bytes, private_key: bytes) -> Authority:
        """An authority from its certificate and its key.

        Raises:
            CertificateError: not PEM, not an authority, or not its key.
        """
        certificate, _ = authority_of(ca)
        key = check_key(certificate, private_key)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise CertificateError("expected an elliptic-curve key of the authority; got another")
        return cls(certificate, key)

    @property
    def ca_pem(self) -> bytes:
        """The certificate: everybody's trust anchor."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def key_pem(self) -> bytes:
        """The private key as PKCS#8 without a passphrase; store it readable by its owner only."""
        return _private_pem(self.key)

    def issue(
        self,
        role: Role,
        name: str,
        *,
        hosts: Sequence[str] = (),
        days: int = 365,
        now: datetime | None = None,
    ) -> Issued:
        """A new key and its certificate, valid for ``days`` but never longer than the authority.

        Raises:
            ConfigurationError: not a name, or a host that cannot be in a certificate.
        """
        if not is_name(name):
            raise ConfigurationError(
                "expected a name of 1 to 64 letters, digits, '_', '.' or '-', starting with a "
                f"letter or digit; got another of characters={len(name)}"
            )
        start = now or datetime.now(UTC)
        until = min(start + timedelta(days), self.certificate.not_valid_after_utc)
        identity = x509.UniformResourceIdentifier(f"{URI_PREFIX}{role}:{name}")
        names = x509.SubjectAlternativeName([identity, *map(host_name, hosts)])
        uses = x509.ExtendedKeyUsage(sorted(USES[role], key=lambda use: use.dotted_string))
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _unsigned(_name(name), key, self.certificate.subject, self.key, start, until)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(uses, critical=False)
            .add_extension(names, critical=False)
            .sign(self.key, hashes.SHA256())
        )
        return Issued(
            certificate.public_bytes(serialization.Encoding.PEM),
            _private_pem(key),
            certificate.serial_number,
            certificate.not_valid_after_utc,
        )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _unsigned(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    start: datetime,
    until: datetime,
) -> x509.CertificateBuilder:
    own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    issued_by = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key.public_key())
        .issuer_name(issuer)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - _BACKDATED)
        .not_valid_after(until)
        .add_extension(own, critical=False)
        .add_extension(issued_by, critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
