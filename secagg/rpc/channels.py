"""The one place where connections and listeners are built, with their limits.

Mutual TLS wherever a kit is given: both sides show a certificate of one authority. Plaintext is for
loopback alone: anything else is refused before a socket is opened. Listeners notice a kit whose
files were replaced and use it for the next connection, so that certificates rotate without a
restart.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence

import grpc
import grpc.aio

from secagg.certificates import Kit, KitOnDisk
from secagg.errors import ConfigurationError
from secagg.rpc.footprint import most_connections
from secagg.wire.codec import MAX_MESSAGE_BYTES

__all__ = [
    "add_listener",
    "aio_channel",
    "channel",
    "check_address",
    "check_listenable",
    "is_loopback",
    "server",
]

# Ciphertexts are incompressible, and the same limits hold on both sides. The keepalive stays below
# the four idle minutes after which common load balancers cut a connection.
_PORT = re.compile(r"[0-9]{1,5}")
_KEEPALIVE_MS = 210_000
_READ_BUFFER = 64 << 10
_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.enable_retries", 0),
)
# A service that was away for long, or comes back at another address, is found again within seconds:
# gRPC's own pauses grow to two minutes, and it looks a name up twice a minute.
_CLIENT_OPTIONS = (
    *_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 10_000),
    ("grpc.dns_min_time_between_resolutions_ms", 5_000),
)
# A connection that never finishes its handshake, pings without need or opens streams without end
# is cut: each of them costs the server something. Windows do not widen with the bandwidth of a
# connection: what nobody reads yet stays where it comes from, but for 64 KiB a stream. A message
# that is being read is let through whole. Nor do buffers: a connection that has sent a lot would
# keep a megabyte for what it may send next, for as long as it is open.
_SERVER_OPTIONS = (
    *_OPTIONS,
    ("grpc.http2.bdp_probe", 0),
    ("grpc.experimental.tcp_max_read_buffer_size", _READ_BUFFER),
    ("grpc.experimental.tcp_max_read_chunk_size", _READ_BUFFER),
    ("grpc.so_reuseport", 0),
    ("grpc.server_handshake_timeout_ms", 20_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", _KEEPALIVE_MS // 2),
    ("grpc.http2.max_ping_strikes", 2),
    ("grpc.max_concurrent_streams", 16),
    ("grpc.max_connection_idle_ms", 15 * 60_000),
)


def is_loopback(address: str) -> bool:
    """Whether ``host:port`` can be reached from this machine only."""
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_address(address: str, *, encrypted: bool) -> str:
    """The address itself, if it may be used.

    Raises:
        ConfigurationError: not ``host:port``; or not a loopback address, without TLS.
    """
    host, _, port = address.rpartition(":")
    if not host or not _PORT.fullmatch(port) or int(port) > 65535:
        raise ConfigurationError(f"expected an address of the form host:port; got {address!r}")
    if not encrypted and not is_loopback(address):
        raise ConfigurationError(
            f"expected a loopback address such as 127.0.0.1:{port}, because plaintext is for one "
            f"machine only; got {address!r}; use a kit made by `secagg provision`"
        )
    return address


def check_listenable(address: str, *, encrypted: bool) -> None:
    """Refuse an address that cannot be listened on, before any server exists.

    Raises:
        ConfigurationError: see :func:`check_address`, or the port is taken.
    """
    host, _, port = check_address(address, encrypted=encrypted).rpartition(":")
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


def channel(address: str, kit: Kit | None) -> grpc.Channel:
    """A blocking connection; plaintext without a kit.

    Raises:
        ConfigurationError: see :func:`check_address`.
    """
    check_address(address, encrypted=kit is not None)
    if kit is None:
        return grpc.insecure_channel(address, options=_CLIENT_OPTIONS)
    return grpc.secure_channel(address, _client_credentials(kit), options=_CLIENT_OPTIONS)


def aio_channel(address: str, kit: Kit | None) -> grpc.aio.Channel:
    """An asyncio connection; plaintext without a kit.

    Raises:
        ConfigurationError: see :func:`check_address`.
    """
    check_address(address, encrypted=kit is not None)
    if kit is None:
        return grpc.aio.insecure_channel(address, options=_CLIENT_OPTIONS)
    return grpc.aio.secure_channel(address, _client_credentials(kit), options=_CLIENT_OPTIONS)


def _client_credentials(kit: Kit) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(kit.ca, kit.private_key, kit.certificate)


def server(
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
) -> grpc.aio.Server:
    """An asyncio server without listeners.

    Whoever connects beyond the connections that it has room for is cut off, and comes back.
    """
    room = ("grpc.max_allowed_incoming_connections", most_connections())
    return grpc.aio.server(interceptors=list(interceptors), options=(*_SERVER_OPTIONS, room))


def add_listener(target: grpc.aio.Server, address: str, kit: Kit | None) -> str:
    """Listen; plaintext without a kit.

    Returns:
        The address with the port that was really bound (port 0 asks for a free one).

    Raises:
        ConfigurationError: see :func:`check_address`, or the port is taken.
    """
    host = check_address(address, encrypted=kit is not None).rpartition(":")[0]
    try:
        if kit is None:
            return f"{host}:{target.add_insecure_port(address)}"
        return f"{host}:{target.add_secure_port(address, _ServerKit(kit).credentials())}"
    except RuntimeError:
        raise ConfigurationError(
            f"expected a free port; {address!r} cannot be bound; stop what listens there or "
            "choose another"
        ) from None


class _ServerKit:
    """A listener's certificate, read again whenever its files have changed."""

    def __init__(self, kit: Kit) -> None:
        self._kit = kit
        self._on_disk = KitOnDisk(kit)

    def credentials(self) -> grpc.ServerCredentials:
        return grpc.dynamic_ssl_server_credentials(
            _configuration(self._kit),
            self._renewed,  # type: ignore[arg-type]  # None goes on with the one in use
            require_client_authentication=True,
        )

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """The new certificate if there is one; None goes on with the one in use."""
        current = self._on_disk.current()
        if current is self._kit:
            return None
        self._kit = current
        return _configuration(current)


def _configuration(kit: Kit) -> grpc.ServerCertificateConfiguration:
    pair = [(kit.private_key, kit.certificate)]
    return grpc.ssl_server_certificate_configuration(pair, root_certificates=kit.ca)
