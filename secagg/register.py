"""The authority's register: every party of a federation, what it holds, and what is revoked.

It is the authority's own record (``federation.json``); the signed enrolment follows from it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from secagg.certificates import Role, is_name
from secagg.enrolment import MAX_KEYS, Enrolment, Member
from secagg.errors import ConfigurationError, MalformedError

__all__ = ["KEY_HOLDER", "SERVER", "Party", "Register"]

SERVER = str(Role.SERVER)
KEY_HOLDER = str(Role.KEY_HOLDER)

_VERSION = 1
_NEVER = datetime.fromtimestamp(0, UTC)


@dataclass
class Party:
    """What one party holds.

    Attributes:
        role: what it may do.
        hosts: DNS names and IP addresses it is reached at; services only.
        certificates: serial numbers of all it ever had, newest last.
        expires: when its newest certificate does, in UTC.
        keys: public keys of 32 bytes, newest first: a client's for signing, or the key holder's
            identities; others have none.
        revoked: shut out for good.
    """

    role: Role
    hosts: list[str] = field(default_factory=list)
    certificates: list[int] = field(default_factory=list)
    expires: datetime = _NEVER
    keys: list[bytes] = field(default_factory=list, repr=False)
    revoked: bool = False

    @property
    def state(self) -> str:
        """``active``, ``rotating`` while an old key still counts, or ``revoked``."""
        if self.revoked:
            return "revoked"
        return "rotating" if len(self.keys) > 1 else "active"


@dataclass
class Register:
    """Every party by name, and the serial of the enrolment.

    Attributes:
        days: how long certificates are valid.
        custodians: threshold and count of the passphrase's shares; None if it is in one piece.
        serial: of the enrolment; 0 before the first.
        parties: by name; a name is never given twice, not even after it was revoked.
        revoked_certificates: serial numbers that count no longer.
    """

    days: int
    custodians: tuple[int, int] | None = None
    serial: int = 0
    parties: dict[str, Party] = field(default_factory=dict, repr=False)
    revoked_certificates: set[int] = field(default_factory=set)

    def party(self, name: str, *roles: Role) -> Party:
        """The party of this name, and of one of these roles if any are given.

        Raises:
            ConfigurationError: there is none.
        """
        party = self.parties.get(name)
        if party is None or (roles and party.role not in roles):
            raise ConfigurationError(
                f"expected the name of a {' or '.join(roles) or 'party'} of this federation; no "
                "such one is registered; `secagg provision list` names all"
            )
        return party

    def add(self, role: Role, *names: str, hosts: Sequence[str] = ()) -> None:
        """Take in new parties, all or none.

        Raises:
            ConfigurationError: not a name, or one that is or was somebody's.
        """
        # Folders are named after parties, and some file systems do not tell capitals apart.
        taken = {name.casefold() for name in self.parties}
        for number, name in enumerate(names, start=1):
            if not is_name(name):
                raise ConfigurationError(
                    "expected names of 1 to 64 letters, digits, '_', '.' or '-', starting with a "
                    f"letter or digit; {role} {number} of {len(names)} has another; rename it"
                )
            if name.casefold() in taken:
                raise ConfigurationError(
                    "expected names that are not and never were anybody's, capitals aside; that of "
                    f"{role} {number} of {len(names)} is taken; choose another"
                )
            taken.add(name.casefold())
        self.parties |= {name: Party(role, hosts=list(hosts)) for name in names}

    def begin_rotation(self, name: str, role: Role, *, revoke_old: bool) -> None:
        """Make room for a new certificate and key beside the old ones.

        Raises:
            ConfigurationError: no such party, a revoked one, or one with an old key already.
        """
        party = self.party(name, role)
        if party.revoked:
            raise ConfigurationError(
                "expected a party that may take part; this one has been revoked for good; enrol it "
                "under another name"
            )
        if len(party.keys) >= MAX_KEYS:
            raise ConfigurationError(
                "expected a party with one key; this one has an old key beside the newest; retire "
                "the old one first"
            )
        if revoke_old:
            self.revoked_certificates.update(party.certificates)

    def end_rotation(self, name: str, role: Role) -> None:
        """Drop all keys but the newest.

        Raises:
            ConfigurationError: no such party, or it has one key only.
        """
        party = self.party(name, role)
        if len(party.keys) < 2:
            raise ConfigurationError(
                "expected a party that is being rotated; this one has no old key; rotate it first"
            )
        del party.keys[1:]

    def revoke(self, name: str) -> None:
        """Shut out a client, an operator or a monitor, with every certificate it ever had.

        Raises:
            ConfigurationError: there is none of that name.
        """
        party = self.party(name, Role.CLIENT, Role.OPERATOR, Role.MONITOR)
        party.revoked = True
        self.revoked_certificates.update(party.certificates)

    def enrolment(self) -> Enrolment:
        """The list that services go by."""
        members = {
            name: Member(name, tuple(party.keys), party.revoked)
            for name, party in self.parties.items()
            if party.role is Role.CLIENT
        }
        identities = tuple(self.party(KEY_HOLDER).keys)
        return Enrolment(self.serial, members, identities, frozenset(self.revoked_certificates))

    def to_bytes(self) -> bytes:
        """The register as an indented JSON document."""
        document = {
            "version": _VERSION,
            "serial": self.serial,
            "days": self.days,
            "custodians": self.custodians,
            "parties": {name: _to_json(party) for name, party in self.parties.items()},
            "revoked_certificates": sorted(self.revoked_certificates),
        }
        return json.dumps(document, indent=1).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> Register:
        """Read a register.

        Raises:
            ConfigurationError: not one, or damaged.
        """
        try:
            document = json.loads(data)
            if document["version"] != _VERSION:
                raise ValueError(document["version"])
            register = cls(
                int(document["days"]),
                _pair(document["custodians"]),
                int(document["serial"]),
                {name: _from_json(party) for name, party in document["parties"].items()},
                {int(serial) for serial in document["revoked_certificates"]},
            )
            # A damaged record must not be signed.
            register.enrolment()
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
            MalformedError,
        ):
            raise ConfigurationError(
                f"expected the register of a federation, version {_VERSION}; federation.json is "
                "damaged or of another version; put back a copy of the authority's folder"
            ) from None
        return register


def _to_json(party: Party) -> dict[str, object]:
    return {
        "role": party.role,
        "hosts": party.hosts,
        "certificates": party.certificates,
        "expires": party.expires.isoformat(),
        "keys": [key.hex() for key in party.keys],
        "revoked": party.revoked,
    }


def _from_json(fields: dict[str, Any]) -> Party:
    return Party(
        Role(fields["role"]),
        [str(host) for host in fields["hosts"]],
        [int(serial) for serial in fields["certificates"]],
        datetime.fromisoformat(fields["expires"]),
        [bytes.fromhex(key) for key in fields["keys"]],
        fields["revoked"] is True,
    )


def _pair(value: list[int] | None) -> tuple[int, int] | None:
    if value is None:
        return None
    threshold, count = value
    return int(threshold), int(count)
