"""Why a connection fails, when it is TLS that refuses it: gRPC says no more than UNAVAILABLE.

Another handshake, by the standard library, tells which certificate is at fault and how. It sends
nothing but the handshake.
"""

from __future__ import annotations

import socket
import ssl
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from secagg.certificates import Kit, Role, identity_of
from secagg.errors import (
    EarlyCertificateError,
    ExpiredCertificateError,
    IdentityError,
    PlaintextError,
    UntrustedCertificateError,
    WrongNameError,
    WrongRoleError,
)

__all__ = ["why_unreachable"]

_TIMEOUT_S = 5.0

# X509_V_ERR_* of OpenSSL's x509_vfy.h.
_NOT_YET_VALID, _EXPIRED, _WRONG_PURPOSE = 9, 10, 26
_WRONG_NAME = (62, 64)


def why_unreachable(
    address: str, kit: Kit | None, roles: tuple[Role, ...] = ()
) -> IdentityError | None:
    """What is wrong with the handshake; None where it succeeds or nobody answers.

    Args:
        roles: what the other side's certificate may be; anything when empty.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    # A service that dies in the middle of a handshake looks like one that refuses it, once.
    for _ in range(2):
        try:
            with socket.create_connection((host, int(port)), _TIMEOUT_S) as connection:
                return _plain(connection) if kit is None else _shaken(connection, host, kit, roles)
        except _EndedError as ended:
            refusal = ended.refusal
        except OSError:
            return None
    return refusal


class _EndedError(Exception):
    """The other side ended the connection without a word."""

    def __init__(self, refusal: IdentityError) -> None:
        self.refusal = refusal


def _plain(connection: socket.socket) -> IdentityError | None:
    """Whether a server to which we speak plaintext wants TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(connection):
            return PlaintextError(
                "expected a server that speaks plaintext; this one speaks TLS; pass a kit instead "
                "of asking for an insecure connection"
            )
    except ssl.SSLError:
        return None


def _shaken(
    connection: socket.socket, host: str, kit: Kit, roles: tuple[Role, ...]
) -> IdentityError | None:
    seen = False
    try:
        with _context(kit).wrap_socket(connection, server_hostname=host) as tls:
            seen = True
            shown = ssl.DER_cert_to_PEM_cert(tls.getpeercert(binary_form=True) or b"")
            identity = identity_of(shown.encode())
            if roles and identity.role not in roles:
                return _wrong_role()
            # A server that does not take our certificate closes the connection without a word.
            if tls.recv(1) == b"":
                raise _EndedError(_refused(kit))
    except ssl.SSLCertVerificationError as error:
        return _of_certificate(error)
    except (ssl.SSLError, ConnectionResetError) as error:
        if "WRONG_VERSION_NUMBER" in str(error) or "RECORD_LAYER" in str(error):
            return PlaintextError(
                "expected a server that speaks TLS; this one speaks plaintext; give it a kit too"
            )
        # Ours is what a server looks at last, in TLS 1.3. One that hangs up before is away behind
        # a proxy that is not, and will be back.
        if not seen and isinstance(error, ssl.SSLEOFError | ConnectionResetError):
            return None
        raise _EndedError(_refused(kit)) from None
    return None


def _refused(kit: Kit) -> IdentityError:
    """A server does not say what it has against our certificate, but we may see it ourselves."""
    own, now = x509.load_pem_x509_certificate(kit.certificate), datetime.now(UTC)
    if now > own.not_valid_after_utc:
        return ExpiredCertificateError(
            "expected the server to take this certificate; its time is over; have the authority "
            "rotate it"
        )
    if now < own.not_valid_before_utc:
        return EarlyCertificateError(
            "expected the server to take this certificate; its time has not come; check this "
            "machine's clock"
        )
    return UntrustedCertificateError(
        "expected the server to take this certificate; it ended the connection when it saw it; "
        "its authority is probably another one: use kits of one federation"
    )


def _wrong_role() -> IdentityError:
    return WrongRoleError(
        "expected another role of the party at this address; its certificate is for something "
        "else; check the address"
    )


def _of_certificate(error: ssl.SSLCertVerificationError) -> IdentityError:
    if error.verify_code == _EXPIRED:
        return ExpiredCertificateError(
            "expected a server certificate that is valid now; it has expired; rotate it"
        )
    if error.verify_code == _NOT_YET_VALID:
        return EarlyCertificateError(
            "expected a server certificate that is valid now; its time has not come; check the "
            "clocks of both machines"
        )
    if error.verify_code in _WRONG_NAME:
        return WrongNameError(
            "expected a server certificate for the host dialled; it is for others; dial one of "
            "its names, or rotate it with this one"
        )
    if error.verify_code == _WRONG_PURPOSE:
        return _wrong_role()
    return UntrustedCertificateError(
        "expected a server certificate of the kit's own authority; another one issued it; use "
        "kits of one federation, and check the address"
    )


def _context(kit: Kit) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=kit.ca.decode())
    context.set_alpn_protocols(["h2"])
    # The standard library reads a certificate from files only, and both in one will do.
    with tempfile.TemporaryDirectory(prefix="secagg-") as folder:
        pair = Path(folder) / "pair.pem"
        pair.touch(0o600)
        pair.write_bytes(kit.private_key + kit.certificate)
        context.load_cert_chain(pair)
    return context
