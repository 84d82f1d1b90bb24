"""TCP packets made by hand, as an attacker with CAP_NET_RAW sends them."""

from __future__ import annotations

import struct
from ipaddress import ip_address

SYN, ACK, PUSH = 0x02, 0x10, 0x08


def tcp_packet(
    source: str,
    target: str,
    flags: int,
    ports: tuple[int, int],
    data: bytes = b"",
    numbers: tuple[int, int] = (1, 1),
    fragment: int = 0,
) -> bytes:
    """Return an IPv4 packet that a TCP takes; `numbers` are sequence and acknowledgment.

    `fragment` are flags and offset of the IP header. The kernel fills that header's checksum, if a
    raw socket sends it; see `with_checksum`.
    """
    addresses = ip_address(source).packed + ip_address(target).packed
    segment = struct.pack(">HHIIBBHHH", *ports, *numbers, 5 << 4, flags, 1024, 0, 0) + data
    padded = segment + bytes(len(segment) % 2)
    number = _checksum(addresses + struct.pack(">HH", 6, len(segment)) + padded)
    segment = segment[:16] + struct.pack(">H", number) + segment[18:]
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(segment), 1, fragment, 64, 6, 0)
    return head + addresses + segment


def with_checksum(packet: bytes) -> bytes:
    """Fill the checksum of the IPv4 header, which the kernel does not do for a frame."""
    return packet[:10] + struct.pack(">H", _checksum(packet[:20])) + packet[12:]


def _checksum(text: bytes) -> int:
    total: int = sum(struct.unpack(f">{len(text) // 2}H", text))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF
