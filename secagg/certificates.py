"""Certificates: who a party is on a connection, and the kit it needs to prove it.

One authority issues every certificate of a federation (ECDSA P-256). A party's identity is one URI
in its certificate, ``urn:secagg:<role>:<name>``; services also carry the hosts they are reached at.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import ExtendedKeyUsageOID

from secagg.errors import (
    CertificateError,
    EarlyCertificateError,
    ExpiredCertificateError,
    IdentityError,
    NoCertificateError,
    UntrustedCertificateError,
    WrongRoleError,
)
from secagg.private_files import open_to_others

__all__ = [
    "URI_PREFIX",
    "USES",
    "Identity",
    "Kit",
    "KitOnDisk",
    "Role",
    "authority_of",
    "check_key",
    "check_private",
    "identity_of",
    "is_name",
]

_E = TypeVar("_E", bound=x509.ExtensionType)

URI_PREFIX = "urn:secagg:"
"""What every identity starts with; ``ROLE:NAME`` follows."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_MAX_PEM_BYTES = 64 * 1024
_UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
    # A serial number below 1, where warnings are errors.
    CryptographyDeprecationWarning,
)


class Role(StrEnum):
    """What a party may do in a federation."""

    SERVER = "server"
    KEY_HOLDER = "key-holder"
    CLIENT = "client"
    OPERATOR = "operator"
    MONITOR = "monitor"


# The server is a client of the key holder, and a key holder's own tools speak to it with its kit.
_BOTH = frozenset({ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH})
USES = {
    Role.SERVER: _BOTH,
    Role.KEY_HOLDER: _BOTH,
    Role.CLIENT: frozenset({ExtendedKeyUsageOID.CLIENT_AUTH}),
    Role.OPERATOR: frozenset({ExtendedKeyUsageOID.CLIENT_AUTH}),
    Role.MONITOR: frozenset({ExtendedKeyUsageOID.CLIENT_AUTH}),
}
"""The extended key usages that a certificate of each role must have."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a certificate says its owner is.

    Attributes:
        role: what the party may do.
        name: unique within the federation.
        serial_number: of the certificate; revocation goes by it.
    """

    role: Role
    name: str = field(repr=False)
    serial_number: int


def is_name(text: str) -> bool:
    """Whether this can name a party: 1 to 64 letters, digits or ``_.-``, no sign first."""
    return _NAME.fullmatch(text) is not None


def identity_of(certificate_pem: bytes) -> Identity:
    """Who a certificate names; its signature and dates are for TLS and `Kit.load` to check.

    Raises:
        CertificateError: not one certificate, or not exactly one identity in it.
    """
    return _identity(_certificate(certificate_pem, "certificate"))


def authority_of(ca_pem: bytes) -> tuple[x509.Certificate, ec.EllipticCurvePublicKey]:
    """An authority's certificate, and the key that it vouches for.

    Raises:
        CertificateError: not the one certificate of an authority with an elliptic-curve key.
    """
    certificate = _certificate(ca_pem, "ca.pem")
    constraints = _extension(certificate, x509.BasicConstraints)
    key = _public_key(certificate)
    if not (constraints and constraints.ca and isinstance(key, ec.EllipticCurvePublicKey)):
        raise CertificateError(
            "expected the certificate of an authority with an elliptic-curve key as ca.pem; got "
            "another certificate; take ca.pem from the authority's folder"
        )
    return certificate, key


def check_key(certificate: x509.Certificate, key_pem: bytes) -> PrivateKeyTypes:
    """The private key of a certificate.

    Raises:
        CertificateError: not a key in PEM without a passphrase, or the key of another certificate.
    """
    try:
        key = serialization.load_pem_private_key(key_pem, password=None)
    except _UNREADABLE:
        raise CertificateError(
            "expected a private key in PEM without a passphrase beside the certificate; got "
            "something else; `secagg provision` makes kits"
        ) from None
    if key.public_key() != _public_key(certificate):
        raise CertificateError(
            "expected the private key of the certificate beside it; got the key of another; copy "
            "both from one kit"
        )
    return key


def check_private(path: Path) -> None:
    """Refuse a file of secrets that others than its owner can read; see `open_to_others`.

    Raises:
        CertificateError: its mode allows it.
    """
    status = path.stat()
    if open_to_others(status):
        raise CertificateError(
            f"expected {path} to be readable by its owner only; its mode is "
            f"{status.st_mode & 0o777:04o}; make it 0600, and have the kit made anew if others "
            "could read it"
        )


@dataclass(frozen=True)
class Kit:
    """What a party needs to speak TLS: PEM of the trust anchor, its certificate and its key.

    Attributes:
        folder: where the kit lies; :meth:`file` gives its other files.
        identity: who the certificate names.
        ca: the authority's certificate.
        certificate: the party's own.
        private_key: PKCS#8 without a passphrase.
    """

    folder: Path = field(repr=False)
    identity: Identity
    ca: bytes = field(repr=False)
    certificate: bytes = field(repr=False)
    private_key: bytes = field(repr=False)

    @classmethod
    def load(cls, folder: Path, *roles: Role, now: datetime | None = None) -> Kit:
        """Read a kit and check that it would work, for one of ``roles`` (none given: any role).

        Raises:
            NoCertificateError: the folder or one of its files is not there.
            CertificateError: not PEM, a key of another certificate, or one that others can read.
            UntrustedCertificateError: issued by another authority than the kit's ``ca.pem``.
            ExpiredCertificateError, EarlyCertificateError: not valid at ``now``.
            WrongRoleError: for another role, or without the key usages of its role.
        """
        ca_pem, certificate_pem = _read(folder / "ca.pem"), _read(folder / "certificate.pem")
        key_pem = _read(folder / "private.key")
        check_private(folder / "private.key")
        ca, _ = authority_of(ca_pem)
        certificate = _certificate(certificate_pem, "certificate.pem")
        check_key(certificate, key_pem)
        _check_issuer(certificate, ca)
        for each, owner in ((certificate, "certificate.pem"), (ca, "ca.pem")):
            _check_dates(each, owner, now or datetime.now(UTC))
        identity = _identity(certificate)
        _check_role(certificate, identity.role, roles)
        return cls(folder, identity, ca_pem, certificate_pem, key_pem)

    def file(self, name: str) -> Path:
        """Where another file of the kit lies, such as ``signing.key``."""
        return self.folder / name


class KitOnDisk:
    """A kit as its files say now, so that certificates rotate without a restart.

    Between the replacement of one file and the next they do not fit together: the kit in use goes
    on until they do.

    Args:
        kit: as it was loaded.
    """

    def __init__(self, kit: Kit) -> None:
        self._kit = kit
        self._seen = self._stamp()

    def current(self) -> Kit:
        """The newest kit that can be used."""
        stamp = self._stamp()
        if stamp != self._seen:
            with contextlib.suppress(IdentityError, OSError):
                self._kit = Kit.load(self._kit.folder, self._kit.identity.role)
                self._seen = stamp
        return self._kit

    def _stamp(self) -> tuple[tuple[int, int], ...]:
        names = ("ca.pem", "certificate.pem", "private.key")
        with contextlib.suppress(OSError):
            stats = [self._kit.file(name).stat() for name in names]
            return tuple((stat.st_mtime_ns, stat.st_ino) for stat in stats)
        return ()


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_PEM_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise NoCertificateError(
            f"expected the file {path} of a start kit; it is not there; `secagg provision` makes "
            "kits, and the authority hands them out"
        ) from None
    except OSError as error:
        raise CertificateError(f"expected a readable file; {path}: {error.strerror}") from None
    if len(data) > _MAX_PEM_BYTES:
        raise CertificateError(
            f"expected at most {_MAX_PEM_BYTES} bytes of PEM; {path} is larger; `secagg provision` "
            "makes kits"
        )
    return data


def _certificate(pem: bytes, what: str) -> x509.Certificate:
    try:
        loaded = x509.load_pem_x509_certificates(pem)
        certificates = [each for each in loaded if each.serial_number > 0]
    except _UNREADABLE:
        certificates = []
    if len(certificates) != 1:
        raise CertificateError(
            f"expected one PEM certificate as {what}; got {len(certificates)} that can be read; "
            "`secagg provision` makes kits"
        )
    return certificates[0]


def _extension(certificate: x509.Certificate, kind: type[_E]) -> _E | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except (*_UNREADABLE, x509.ExtensionNotFound):
        return None


def _public_key(certificate: x509.Certificate) -> object:
    try:
        return certificate.public_key()
    except _UNREADABLE:
        return None


def _identity(certificate: x509.Certificate) -> Identity:
    names = _extension(certificate, x509.SubjectAlternativeName) or ()
    ours = [
        name.value
        for name in names
        if isinstance(name, x509.UniformResourceIdentifier) and name.value.startswith(URI_PREFIX)
    ]
    if len(ours) != 1:
        raise CertificateError(
            f"expected one identity {URI_PREFIX}ROLE:NAME in the certificate; got {len(ours)}; use "
            "a certificate that `secagg provision` made"
        )
    role, _, name = ours[0].removeprefix(URI_PREFIX).partition(":")
    if role not in set(Role) or not is_name(name):
        raise CertificateError(
            f"expected {URI_PREFIX}ROLE:NAME with a role of {', '.join(Role)}; the certificate has "
            "another role or a name that cannot be; use one that `secagg provision` made"
        )
    return Identity(Role(role), name, certificate.serial_number)


def _check_issuer(certificate: x509.Certificate, ca: x509.Certificate) -> None:
    try:
        certificate.verify_directly_issued_by(ca)
    except (*_UNREADABLE, InvalidSignature):
        raise UntrustedCertificateError(
            "expected a certificate issued by the authority in ca.pem; another one issued it; use "
            "the kits of one federation"
        ) from None


def _check_dates(certificate: x509.Certificate, what: str, now: datetime) -> None:
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > end:
        raise ExpiredCertificateError(
            f"expected {what} to be valid at {now:%Y-%m-%d %H:%M} UTC; its time ended at "
            f"{end:%Y-%m-%d %H:%M}; have `secagg provision` rotate it"
        )
    if now < start:
        raise EarlyCertificateError(
            f"expected {what} to be valid at {now:%Y-%m-%d %H:%M} UTC; its time starts at "
            f"{start:%Y-%m-%d %H:%M}; check this machine's clock"
        )


def _check_role(certificate: x509.Certificate, role: Role, wanted: Sequence[Role]) -> None:
    if wanted and role not in wanted:
        raise WrongRoleError(
            f"expected the kit of a {' or '.join(wanted)}; got one of a {role}; point to the "
            "folder of the right kit"
        )
    if not USES[role] <= set(_extension(certificate, x509.ExtendedKeyUsage) or ()):
        raise WrongRoleError(
            f"expected a certificate whose extended key usages allow a {role}; they do not; use "
            "one that `secagg provision` made"
        )
