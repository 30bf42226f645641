"""The one place where connections and listeners are built, with their limits.

Plaintext is for loopback alone: anything else is refused before a socket is opened.
"""

from __future__ import annotations

import ipaddress
import socket

import grpc
import grpc.aio

from secagg.errors import ConfigurationError
from secagg.wire.codec import MAX_MESSAGE_BYTES

__all__ = [
    "add_listener",
    "aio_channel",
    "channel",
    "check_listenable",
    "check_loopback",
    "is_loopback",
    "server",
]

# Ciphertexts are incompressible, and the same limit holds on both sides. The keepalive stays below
# the four idle minutes after which common load balancers cut a connection.
_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.keepalive_time_ms", 210_000),
    ("grpc.enable_retries", 0),
)
_SERVER_OPTIONS = (*_OPTIONS, ("grpc.so_reuseport", 0))


def is_loopback(address: str) -> bool:
    """Whether ``host:port`` can be reached from this machine only."""
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_loopback(address: str) -> str:
    """The address itself, if plaintext is safe there.

    Raises:
        ConfigurationError: not ``host:port``, or not a loopback address.
    """
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ConfigurationError(f"expected an address of the form host:port; got {address!r}")
    if not is_loopback(address):
        raise ConfigurationError(
            f"expected a loopback address such as 127.0.0.1:{port}, because this version speaks "
            f"plaintext only; got {address!r}; tunnel remote connections until TLS is configured"
        )
    return address


def check_listenable(address: str) -> None:
    """Refuse an address that cannot be listened on, before any server exists.

    Raises:
        ConfigurationError: see :func:`check_loopback`, or the port is taken.
    """
    host, _, port = check_loopback(address).rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), int(port)))
        except OSError as error:
            raise ConfigurationError(
                f"expected a free port; {address!r} cannot be bound: {error.strerror}; stop what "
                "listens there or choose another"
            ) from None


def channel(address: str) -> grpc.Channel:
    """A blocking connection to a loopback address.

    Raises:
        ConfigurationError: see :func:`check_loopback`.
    """
    return grpc.insecure_channel(check_loopback(address), options=_OPTIONS)


def aio_channel(address: str) -> grpc.aio.Channel:
    """An asyncio connection to a loopback address.

    Raises:
        ConfigurationError: see :func:`check_loopback`.
    """
    return grpc.aio.insecure_channel(check_loopback(address), options=_OPTIONS)


def server() -> grpc.aio.Server:
    """An asyncio server without listeners."""
    return grpc.aio.server(options=_SERVER_OPTIONS)


def add_listener(target: grpc.aio.Server, address: str) -> str:
    """Listen on a loopback address.

    Returns:
        The address with the port that was really bound (port 0 asks for a free one).

    Raises:
        ConfigurationError: see :func:`check_loopback`, or the port is taken.
    """
    host = check_loopback(address).rpartition(":")[0]
    try:
        return f"{host}:{target.add_insecure_port(address)}"
    except RuntimeError:
        raise ConfigurationError(
            f"expected a free port; {address!r} cannot be bound; stop what listens there or "
            "choose another"
        ) from None
