"""JSON documents that an authority signs: one form, read strictly, believed only when signed.

A document is ``{NAME: body, "signature": hex}``. The signature (ECDSA with SHA-256) covers the
body's canonical form: sorted keys, no white space, integers alone. Whoever reads the body sees what
was signed, because no field may come twice and no value has two texts.
"""

from __future__ import annotations

import json
from typing import NoReturn

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from secagg.certificates import authority_of
from secagg.errors import MalformedError, UntrustedKeyError
from secagg.transcript import encode

__all__ = ["fields", "hex_bytes", "items", "refuse", "sign", "verified"]

_ALGORITHM = ec.ECDSA(hashes.SHA256())


def sign(name: str, body: object, authority_key: ec.EllipticCurvePrivateKey) -> bytes:
    """A signed document of this name, on one line."""
    signature = authority_key.sign(_signed(name, body), _ALGORITHM)
    return _canonical({name: body, "signature": signature.hex()}) + b"\n"


def verified(name: str, data: bytes, ca_pem: bytes) -> object:
    """The body of a document of this name that the authority has signed.

    Raises:
        UntrustedKeyError: the signature does not cover the body; somebody has changed it.
        MalformedError: not such a document.
        CertificateError: ``ca_pem`` is not the certificate of an authority.
    """
    _, key = authority_of(ca_pem)
    try:
        document = fields(_parsed(data), name, "signature")
        key.verify(hex_bytes(document["signature"]), _signed(name, document[name]), _ALGORITHM)
    except InvalidSignature:
        raise UntrustedKeyError(
            f"expected the {name} signed by the authority in ca.pem; the signature does not cover "
            f"it; take {name}.json and ca.pem from the authority again"
        ) from None
    except RecursionError:
        refuse("no more than its few levels")
    return document[name]


def refuse(expected: str) -> NoReturn:
    """Say what a document should have been.

    Raises:
        MalformedError: always.
    """
    raise MalformedError(
        f"expected a signed document with {expected}; got something else; take the file from the "
        "authority again"
    )


def fields(value: object, *names: str) -> dict[str, object]:
    """An object with exactly these fields, or with any if none are named.

    Raises:
        MalformedError: something else.
    """
    if not isinstance(value, dict) or (names and value.keys() != set(names)):
        refuse(f"an object of exactly {', '.join(names)}" if names else "an object in its place")
    return value


def items(value: object) -> list[object]:
    """A list.

    Raises:
        MalformedError: something else.
    """
    if not isinstance(value, list):
        refuse("a list in its place")
    return value


def hex_bytes(value: object) -> bytes:
    """Bytes from lower-case hexadecimal text.

    Raises:
        MalformedError: something else.
    """
    # fromhex skips spaces and takes capitals: several texts for one value.
    try:
        data = bytes.fromhex(value) if isinstance(value, str) else None
    except ValueError:
        data = None
    if data is None or data.hex() != value:
        refuse("lower-case hexadecimal strings")
    return data


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _signed(name: str, body: object) -> bytes:
    return encode(name, _canonical(body))


def _parsed(data: bytes) -> object:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            refuse("every field once")
        return found

    def no_float(_: str) -> NoReturn:
        refuse("integers only")

    try:
        return json.loads(
            data.decode(), object_pairs_hook=unique, parse_float=no_float, parse_constant=no_float
        )
    except ValueError:
        refuse("one whole JSON document")
