"""Enrolment: who may take part, as a list that the authority signs.

Services read the list from a file and believe the signature alone: whoever can write the file
cannot enrol anybody, bring a revoked client back, or swap the key behind a name.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric import ec

from secagg.certificates import is_name
from secagg.errors import (
    ConfigurationError,
    NotEnrolledError,
    RevokedError,
    SecaggError,
    UntrustedKeyError,
)
from secagg.signed_json import fields, hex_bytes, items, refuse, sign, verified

__all__ = [
    "MAX_BYTES",
    "MAX_KEYS",
    "Enrolment",
    "EnrolmentFile",
    "Member",
    "OpenEnrolment",
    "Roster",
]

MAX_BYTES = 64 * 1024 * 1024
"""Largest list that is read."""

MAX_KEYS = 2
"""Keys that one party has at a time: one, and the one it replaces."""

_KEY_BYTES = 32
_VERSION = 1


class Roster(Protocol):
    """What services ask an enrolment; see `Enrolment` for the errors."""

    def client_of(self, signing_key: bytes) -> str:
        """The name of the client with this signing key."""
        ...

    def require(self, name: str) -> Member:
        """The client of this name."""
        ...

    def check_certificate(self, serial_number: int) -> None:
        """Refuse a revoked certificate."""
        ...

    def active(self) -> list[str]:
        """The names of everybody who may take part."""
        ...


@dataclass(frozen=True, slots=True)
class Member:
    """A client that is, or was, enrolled.

    Attributes:
        name: as in its certificates.
        signing_keys: 32-byte Ed25519 public keys, newest first; two while one replaces the other.
        revoked: never again.
    """

    name: str = field(repr=False)
    signing_keys: tuple[bytes, ...] = field(repr=False)
    revoked: bool = False


@dataclass(frozen=True)
class Enrolment:
    """The list: everybody who may take part, and the certificates that no longer count.

    Attributes:
        serial: from 1; grows with every change.
        members: clients by name.
        key_holder_identities: 32-byte Ed25519 public keys, newest first; two while one replaces
            the other.
        revoked_certificates: serial numbers, of whatever role.

    Raises:
        MalformedError: such a list cannot be.
    """

    serial: int
    members: Mapping[str, Member] = field(repr=False)
    key_holder_identities: tuple[bytes, ...]
    revoked_certificates: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if not 1 <= self.serial < 1 << 63:
            refuse("a serial from 1 below 2**63")
        if not all(is_name(name) and name == member.name for name, member in self.members.items()):
            refuse("names of 1 to 64 letters, digits, '_', '.' or '-'")
        for keys in (self.key_holder_identities, *(m.signing_keys for m in self.members.values())):
            if not 1 <= len(keys) <= MAX_KEYS or any(len(key) != _KEY_BYTES for key in keys):
                refuse(f"1 to {MAX_KEYS} keys of {_KEY_BYTES} bytes each")
        counts = Counter(key for m in self.members.values() for key in m.signing_keys)
        if len(set(self.key_holder_identities)) < len(self.key_holder_identities) or any(
            count > 1 for count in counts.values()
        ):
            refuse("every key once")
        if any(serial < 1 for serial in self.revoked_certificates):
            refuse("positive serial numbers of certificates")

    @cached_property
    def _names(self) -> dict[bytes, str]:
        return {key: name for name, m in self.members.items() for key in m.signing_keys}

    def client_of(self, signing_key: bytes) -> str:
        """The name of the client that signs with this key.

        Raises:
            NotEnrolledError: nobody's key.
            RevokedError: the key of a revoked client.
        """
        name = self._names.get(signing_key)
        if name is None:
            raise NotEnrolledError(
                "expected the signing key of an enrolled client; this key is nobody's; have the "
                "authority enrol it, or sign with the newest key"
            )
        return self.require(name).name

    def require(self, name: str) -> Member:
        """The client of this name.

        Raises:
            NotEnrolledError: nobody has that name.
            RevokedError: whoever had it has been revoked.
        """
        member = self.members.get(name)
        if member is None:
            raise NotEnrolledError(
                "expected the name of an enrolled client; nobody has this one; have the authority "
                "enrol it"
            )
        if member.revoked:
            raise RevokedError(
                "expected an enrolled client; this one has been revoked; ask the authority"
            )
        return member

    def check_certificate(self, serial_number: int) -> None:
        """Refuse a certificate that no longer counts.

        Raises:
            RevokedError: it has been revoked.
        """
        if serial_number in self.revoked_certificates:
            raise RevokedError(
                "expected a certificate that counts; this one has been revoked; use the newest kit "
                "or ask the authority"
            )

    def active(self) -> list[str]:
        """The names of all clients that are not revoked, sorted."""
        return sorted(name for name, member in self.members.items() if not member.revoked)

    def to_bytes(self, authority_key: ec.EllipticCurvePrivateKey) -> bytes:
        """The list as a JSON document that the authority signs."""
        body = {
            "version": _VERSION,
            "serial": self.serial,
            "members": {
                name: {
                    "signing_keys": [key.hex() for key in member.signing_keys],
                    "revoked": member.revoked,
                }
                for name, member in self.members.items()
            },
            "key_holder_identities": [key.hex() for key in self.key_holder_identities],
            "revoked_certificates": [_hex_of(n) for n in sorted(self.revoked_certificates)],
        }
        return sign("enrolment", body, authority_key)

    @classmethod
    def from_bytes(cls, data: bytes, ca_pem: bytes) -> Enrolment:
        """Read a list and check that this authority has signed it.

        Raises:
            UntrustedKeyError: the signature does not cover the list; somebody has changed it.
            MalformedError: not such a document.
            CertificateError: ``ca_pem`` is not the certificate of an authority.
        """
        if len(data) > MAX_BYTES:
            refuse(f"at most {MAX_BYTES} bytes")
        body = fields(
            verified("enrolment", data, ca_pem),
            *("version", "serial", "members", "key_holder_identities", "revoked_certificates"),
        )
        if body["version"] != _VERSION:
            refuse(f"version {_VERSION}")
        serial = body["serial"]
        if not isinstance(serial, int) or isinstance(serial, bool):
            refuse("an integer as serial")
        members = {name: _member(name, each) for name, each in fields(body["members"]).items()}
        revoked = [int.from_bytes(hex_bytes(text)) for text in items(body["revoked_certificates"])]
        if len(set(revoked)) < len(revoked):
            refuse("every revoked certificate once")
        return cls(serial, members, _keys(body["key_holder_identities"]), frozenset(revoked))


def _member(name: str, value: object) -> Member:
    entry = fields(value, "signing_keys", "revoked")
    if not isinstance(entry["revoked"], bool):
        refuse("true or false as revoked")
    return Member(name, _keys(entry["signing_keys"]), entry["revoked"])


def _keys(value: object) -> tuple[bytes, ...]:
    return tuple(hex_bytes(text) for text in items(value))


def _hex_of(serial_number: int) -> str:
    return serial_number.to_bytes((serial_number.bit_length() + 7) // 8).hex()


class OpenEnrolment:
    """Everybody may take part; for plaintext on loopback, where nobody has a certificate.

    A client's name is the hexadecimal text of its signing key.
    """

    def client_of(self, signing_key: bytes) -> str:
        """The name that goes with any signing key."""
        return signing_key.hex()

    def require(self, name: str) -> Member:
        """The client that signs with the key in its name.

        Raises:
            NotEnrolledError: not the hexadecimal text of a key.
        """
        try:
            key = bytes.fromhex(name)
        except ValueError:
            key = b""
        if len(key) != _KEY_BYTES or key.hex() != name:
            raise NotEnrolledError(
                f"expected the hexadecimal text of a signing key of {_KEY_BYTES} bytes as a name; "
                "got another; without an enrolment a client's key is its name"
            )
        return Member(name, (key,))

    def check_certificate(self, serial_number: int) -> None:
        """Nothing is revoked where nobody is enrolled."""

    def active(self) -> list[str]:
        """Nobody is known in advance."""
        return []


class EnrolmentFile:
    """An enrolment as its file says now: read again whenever the file has been replaced.

    A file that is missing, damaged, badly signed or older than the list in force is refused: the
    list stays in force, and ``problem`` says why until the file is good again.

    Raises:
        ConfigurationError: the first read finds no readable file.
        UntrustedKeyError, MalformedError, CertificateError: see `Enrolment.from_bytes`.
    """

    def __init__(self, path: Path, ca_pem: bytes) -> None:
        self.path = path
        self.problem: str | None = None
        self._ca_pem = ca_pem
        self._lock = Lock()
        # None: nothing was read the last time, so look again whatever the file looks like.
        self._seen: _Stamp | None
        try:
            self._seen, data = _read(path)
        except OSError as error:
            raise ConfigurationError(_unreadable(path, error)) from None
        self._enrolment = Enrolment.from_bytes(data, ca_pem)

    def current(self) -> Enrolment:
        """The list in force."""
        with self._lock:
            try:
                if _stamp(self.path.stat()) != self._seen:
                    self._reload()
            except OSError as error:
                self._seen = None
                self.problem = _unreadable(self.path, error)
            except SecaggError as error:
                self.problem = str(error)
            return self._enrolment

    def _reload(self) -> None:
        self._seen, data = _read(self.path)
        new, old = Enrolment.from_bytes(data, self._ca_pem), self._enrolment
        # Two lists of one serial: a copy of the authority's folder has gone its own way.
        if new.serial < old.serial or (new.serial == old.serial and new != old):
            raise UntrustedKeyError(
                f"expected an enrolment that follows serial={old.serial}, which is in force; got "
                f"serial={new.serial}; take the newest enrolment.json from the authority"
            )
        self._enrolment, self.problem = new, None

    def client_of(self, signing_key: bytes) -> str:
        """See `Enrolment.client_of`."""
        return self.current().client_of(signing_key)

    def require(self, name: str) -> Member:
        """See `Enrolment.require`."""
        return self.current().require(name)

    def check_certificate(self, serial_number: int) -> None:
        """See `Enrolment.check_certificate`."""
        self.current().check_certificate(serial_number)

    def active(self) -> list[str]:
        """See `Enrolment.active`."""
        return self.current().active()


_Stamp = tuple[int, int, int]


def _stamp(status: os.stat_result) -> _Stamp:
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read(path: Path) -> tuple[_Stamp, bytes]:
    with path.open("rb") as file:
        # Of the open file: by now another may have its name.
        return _stamp(os.fstat(file.fileno())), file.read(MAX_BYTES + 1)


def _unreadable(path: Path, error: OSError) -> str:
    return (
        f"expected the authority's enrolment in {path}: {error.strerror}; `secagg provision` "
        "writes it into the kits of the server and the key holder"
    )
