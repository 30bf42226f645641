"""What a wire must know of IPv4 and TCP: who sends to whom, how to damage or refuse a packet."""

from __future__ import annotations

import socket
import struct

__all__ = ["addresses", "damaged", "payload_bytes", "refusals", "too_big"]

_TCP, _ICMP = 6, 1
_FIN, _SYN, _RST, _ACK = 1, 2, 4, 16
_IP_BYTES, _TCP_BYTES = 20, 20


def addresses(packet: bytes) -> tuple[str, str] | None:
    """Source and destination of an IPv4 packet; None for anything else."""
    if len(packet) < _IP_BYTES or packet[0] >> 4 != 4:
        return None
    return socket.inet_ntoa(packet[12:16]), socket.inet_ntoa(packet[16:20])


def payload_bytes(packet: bytes) -> int:
    """Bytes that a TCP segment carries; 0 in anything else."""
    start = _payload_start(packet)
    return len(packet) - start if start else 0


def damaged(packet: bytes, place: int, *, noticed: bool) -> bytes:
    """A packet with one bit of its payload flipped; itself if it carries nothing.

    Args:
        place: which bit, modulo those of the payload.
        noticed: leave the checksum as it was, so that TCP drops the packet; or make it fit, so that
            whoever reads the stream gets the wrong bit.
    """
    start = _payload_start(packet)
    if not start or len(packet) == start:
        return packet
    changed = bytearray(packet)
    place %= 8 * (len(packet) - start)
    changed[start + place // 8] ^= 1 << place % 8
    return bytes(changed) if noticed else _checked(bytes(changed))


def refusals(packet: bytes) -> tuple[bytes, bytes] | None:
    """A reset for the sender and one for the receiver, as of a firewall that rejects a TCP packet.

    None for what is no TCP packet, or a reset itself.
    """
    if not _payload_start(packet) or packet[33] & _RST:
        return None
    header = _header_bytes(packet)
    here, there = packet[header : header + 2], packet[header + 2 : header + 4]
    sequence, acknowledged = struct.unpack_from("!II", packet, header + 4)
    flags = packet[header + 13]
    length = payload_bytes(packet) + bool(flags & _SYN) + bool(flags & _FIN)
    source, destination = packet[12:16], packet[16:20]
    following = (sequence + length) % (1 << 32)
    if flags & _ACK:
        back = struct.pack("!IIBBHHH", acknowledged, 0, 5 << 4, _RST, 0, 0, 0)
    else:
        back = struct.pack("!IIBBHHH", 0, following, 5 << 4, _RST | _ACK, 0, 0, 0)
    on = struct.pack("!IIBBHHH", sequence, 0, 5 << 4, _RST, 0, 0, 0)
    return (
        _checked(_ip(_TCP, destination, source, there + here + back)),
        _checked(_ip(_TCP, source, destination, here + there + on)),
    )


def too_big(packet: bytes, mtu: int, router: str) -> bytes:
    """What a router answers to a packet that is longer than the next link takes."""
    body = packet[: _header_bytes(packet) + 8]
    message = struct.pack("!BBHHH", 3, 4, 0, 0, mtu) + body
    message = message[:2] + _sum(message) + message[4:]
    return _ip(_ICMP, socket.inet_aton(router), packet[12:16], message)


def _header_bytes(packet: bytes) -> int:
    return 4 * (packet[0] & 15)


def _payload_start(packet: bytes) -> int:
    """Where a TCP segment's payload begins; 0 for anything else."""
    header = _header_bytes(packet)
    if packet[9] != _TCP or len(packet) < header + _TCP_BYTES:
        return 0
    return header + 4 * (packet[header + 12] >> 4)


def _ip(protocol: int, source: bytes, destination: bytes, body: bytes) -> bytes:
    header = struct.pack("!BBHHHBBH", 0x45, 0, _IP_BYTES + len(body), 0, 0, 64, protocol, 0)
    header += source + destination
    return header[:10] + _sum(header) + header[12:] + body


def _checked(packet: bytes) -> bytes:
    """A TCP packet with the checksum that fits it."""
    header = _header_bytes(packet)
    segment = packet[header : header + 16] + bytes(2) + packet[header + 18 :]
    pseudo = packet[12:20] + struct.pack("!BBH", 0, _TCP, len(segment))
    return packet[:header] + segment[:16] + _sum(pseudo + segment) + segment[18:]


def _sum(data: bytes) -> bytes:
    """The Internet checksum (RFC 1071)."""
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)
