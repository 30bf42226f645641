"""Fuzz target: who is who. Enrolment, certificates, kits, pins, shares, registers, audit logs.

The second byte of an input says whether what was changed is signed anew: only then does it reach
what comes after the check of a signature.
"""

from __future__ import annotations

import atexit
import base64
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import cohort
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fuzz_inputs import Choices, Target, altered, refusable
from shamir_mnemonic import Share

from secagg import audit, custodians, signed_json
from secagg.certificates import Kit, authority_of, identity_of
from secagg.endorsement import read_pins
from secagg.enrolment import Enrolment
from secagg.errors import (
    AuditError,
    ConfigurationError,
    IdentityError,
    InputError,
    MalformedError,
    SealError,
)
from secagg.provision import Federation
from secagg.register import Register
from secagg.sealing import RoundKeyPair
from secagg_client.kits import ClientKit
from secagg_keyholder.vault import load_identity

__all__ = ["IDENTITIES"]

_REFUSALS = (IdentityError, MalformedError, ConfigurationError, AuditError, InputError)
_PASSPHRASE = "00" * 32
_SECRET = "5a" * 32
_FILES = ("ca.pem", "certificate.pem", "private.key", "signing.key", "key_holder.pub")


@cache
def _federation() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="secagg-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    made = folder / "made"
    Federation.create(made, clients=["client-1", "client-2"], passphrase=_PASSPHRASE)
    shutil.copytree(made / "clients" / "client-1", folder / "kit")
    return folder


@cache
def _authority() -> tuple[bytes, ec.EllipticCurvePrivateKey]:
    home = _federation() / "made" / "authority"
    found = {path.name: path.read_bytes() for path in home.iterdir() if path.is_file()}
    key = serialization.load_pem_private_key(found["ca.key"], None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return found["ca.pem"], key


def _enrolment(body: bytes, signed: bool) -> None:
    ca, key = _authority()
    if signed:
        try:
            body = signed_json.sign("enrolment", json.loads(body), key)
        except (ValueError, RecursionError):
            return
    found = Enrolment.from_bytes(body, ca)
    assert Enrolment.from_bytes(found.to_bytes(key), ca) == found
    for name in found.active():
        assert found.client_of(found.require(name).signing_keys[0]) == name


def _certificate(body: bytes, armoured: bool) -> None:
    if armoured:
        lines = base64.encodebytes(body)
        body = b"-----BEGIN CERTIFICATE-----\n" + lines + b"-----END CERTIFICATE-----\n"
    with refusable(IdentityError):
        assert identity_of(body).serial_number > 0
    authority_of(body)


def _kit(body: bytes, _signed: bool) -> None:
    """A client's kit, one file of which is something else."""
    choices = Choices(body)
    name = choices.pick(_FILES)
    folder = _federation() / "kit"
    kept = (folder / name).read_bytes()
    # A signing key is 32 bytes at random: to split them into lines would fail in one of 60 kits.
    armoured = choices.flip() and kept.startswith(b"-----BEGIN")
    (folder / name).write_bytes(_rearmoured(kept, choices) if armoured else choices.altered(kept))
    try:
        with refusable(IdentityError):
            Kit.load(folder)
        loaded = ClientKit.load(folder)
        assert loaded.pins()
    finally:
        (folder / name).write_bytes(kept)


def _rearmoured(pem: bytes, choices: Choices) -> bytes:
    """PEM whose bytes inside are changed."""
    lines = pem.splitlines()
    inside = choices.altered(base64.b64decode(b"".join(lines[1:-1])))
    return b"\n".join([lines[0], base64.encodebytes(inside).strip(), lines[-1], b""])


def _pins(body: bytes, _signed: bool) -> None:
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return
    found = read_pins(text)
    assert read_pins("\n".join(pin.hex() for pin in found)) == found


def _shares(body: bytes, structured: bool) -> None:
    """Shares as custodians type them; or as one makes them up who knows their checksum."""
    choices = Choices(body)
    shares = custodians.split(_SECRET, 2, 3)[:2] if structured else []
    if structured:
        shares = [_made_up(share, choices) for share in shares]
    else:
        shares = choices.rest().decode(errors="replace").split("\n")
    custodians.combine(shares)


def _made_up(share: str, choices: Choices) -> str:
    parsed: Any = Share.from_mnemonic(share)
    change = choices.number(8)
    if change == 1:
        parsed = replace(parsed, identifier=choices.number(1 << 15))
    elif change == 2:
        parsed = replace(parsed, iteration_exponent=choices.number(16))
    elif change == 3:
        parsed = replace(parsed, index=choices.number(16))
    elif change == 4:
        parsed = replace(parsed, member_threshold=1 + choices.number(16))
    elif change == 5:
        parsed = replace(parsed, value=choices.taken(16 + 2 * choices.number(40)))
    elif change == 6:
        parsed = replace(
            parsed,
            group_threshold=1 + choices.number(16),
            group_count=1 + choices.number(16),
            group_index=choices.number(16),
        )
    elif change == 7:
        parsed = replace(parsed, extendable=not parsed.extendable)
    return str(parsed.mnemonic())


def _register(body: bytes, _signed: bool) -> None:
    found = Register.from_bytes(body)
    assert Register.from_bytes(found.to_bytes()) == found


def _log_line(body: bytes, _signed: bool) -> None:
    line = body.decode(errors="surrogateescape")
    assert audit.to_line(audit.from_line(line)) == line


def _log_file(body: bytes, _signed: bool) -> None:
    file = _federation() / "log"
    file.write_bytes(body)
    audit.verify(audit.read_entries(file))


def _identity_key(body: bytes, armoured: bool) -> None:
    choices = Choices(body)
    kept = (_federation() / "made" / "keyholder" / "identity.key").read_bytes()
    file = _federation() / "identity.key"
    file.write_bytes(_rearmoured(kept, choices) if armoured else choices.altered(kept))
    load_identity(file, _PASSPHRASE)


def _round_key(body: bytes, sized: bool) -> None:
    pair = RoundKeyPair.from_bytes(body[:96].ljust(96, b"\0") if sized else body)
    assert RoundKeyPair.from_bytes(pair.to_bytes()).public == pair.public
    with refusable(SealError):
        pair.open(body[96:].ljust(1168, b"\0")[:1168], b"fuzz")


# Inputs that are kept count on these places: new ones go to the end.
_KINDS: tuple[Callable[[bytes, bool], None], ...] = (
    *(_enrolment, _certificate, _kit, _pins, _shares, _register, _log_line, _log_file),
    *(_identity_key, _round_key),
)
_PLACE = {kind: index for index, kind in enumerate(_KINDS)}


def _one(data: bytes) -> None:
    if len(data) < 2:
        return
    with refusable(*_REFUSALS):
        _KINDS[data[0] % len(_KINDS)](data[2:], data[1] & 1 == 1)


def _mutate(data: bytes, random: Random) -> bytes:
    if len(data) < 2:
        return bytes([random.randrange(len(_KINDS)), 1])
    try:
        document = json.loads(data[2:])
    except (ValueError, RecursionError):
        return data[:2] + altered(data[2:], random)
    return data[:2] + json.dumps(_changed(document, random)).encode()


_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, -1, 1 << 63, 1 << 64, 10**40, 1.5, "", "a", "00", "A0", "../x"),
    *("00" * 32, "ff" * 32, [], {}, [[]], "\ud800", float("nan"), float("inf"), "é" * 70),
)


def _changed(document: Any, random: Random, depth: int = 5) -> Any:  # noqa: ANN401
    """A JSON value of which one place is something else."""
    if not depth or random.random() < 0.15 or not isinstance(document, dict | list) or not document:
        return random.choice(_VALUES)
    if isinstance(document, list):
        at = random.randrange(len(document))
        kind = random.randrange(4)
        if kind == 0:
            return [*document, document[at]]
        if kind == 1:
            return document[:at] + document[at + 1 :]
        return [*document[:at], _changed(document[at], random, depth - 1), *document[at + 1 :]]
    key = random.choice(list(document))
    kind = random.randrange(5)
    if kind == 0:
        return {name: value for name, value in document.items() if name != key}
    if kind == 1:
        return document | {random.choice(("x", "", key + "x", "a/b")): document[key]}
    return document | {key: _changed(document[key], random, depth - 1)}


def _seeds() -> dict[str, bytes]:
    def seed(kind: Callable[..., None], body: bytes, how: int = 0) -> bytes:
        return bytes([_PLACE[kind], how]) + body

    members = {
        f"client-{index}": {"signing_keys": [f"{index:02x}" * 32], "revoked": index == 2}
        for index in range(3)
    }
    body = {
        "version": 1,
        "serial": 3,
        "members": members,
        "key_holder_identities": ["77" * 32],
        "revoked_certificates": ["0a"],
    }
    party = {
        "role": "client",
        "hosts": [],
        "certificates": [7],
        "expires": "2030-01-01T00:00:00+00:00",
        "keys": ["01" * 32],
        "revoked": False,
    }
    holder = party | {"role": "key-holder", "hosts": ["localhost"], "keys": ["02" * 32]}
    register = {
        "version": 1,
        "serial": 2,
        "days": 365,
        "custodians": [2, 3],
        "parties": {"keyholder": holder, "client-1": party},
        "revoked_certificates": [9],
    }
    return {
        "an enrolment": seed(_enrolment, json.dumps(body).encode(), 1),
        "an enrolment unsigned": seed(_enrolment, json.dumps({"enrolment": body}).encode()),
        "no certificate": seed(_certificate, bytes.fromhex("3003020100"), 1),
        "a kit": seed(_kit, b"\0"),
        "a kit's certificate": seed(_kit, b"\1\1\1\40\0\3\1\2"),
        "a kit's key": seed(_kit, b"\2\1\1\40\0\3\1\2"),
        "a kit's signing key": seed(_kit, b"\3\0\1\40\0"),
        "pins": seed(_pins, b"%s\n%s\n" % (b"0a" * 32, b"0b" * 32)),
        "shares": seed(_shares, b"", 1),
        "shares with another exponent": seed(_shares, b"\2\3\2\3", 1),
        "shares of another length": seed(_shares, b"\5\2" + bytes(20), 1),
        "shares in words": seed(_shares, b"academic acid acrobat leader\nacademic acid", 0),
        "a register": seed(_register, json.dumps(register).encode()),
        "a log's line": seed(_log_line, _LINE),
        "a log": seed(_log_file, _LINE + b"\n"),
        "an identity key": seed(_identity_key, b"\0"),
        "an identity key changed": seed(_identity_key, b"\1\40\0\3\1\2", 1),
        "a round key": seed(_round_key, bytes(range(96))),
        "a round key and a seal": seed(_round_key, bytes(range(200)), 1),
    }


_FIRST = audit.next_entry(None, "round-opened", {"round": 1}, datetime(2030, 1, 1, tzinfo=UTC))
_LINE = audit.to_line(_FIRST).encode()


def _prepare() -> None:
    assert _authority()
    assert cohort.identity(0)


IDENTITIES = Target(
    "identities",
    "enrolment lists, certificates, kits, pins, shares, registers, audit logs, sealed seeds",
    ("Enrolment.from_bytes", "Kit.load", "ClientKit.load", "custodians.combine", "Register"),
    _one,
    _seeds,
    _mutate,
    _prepare,
)
