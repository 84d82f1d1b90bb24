"""What a recording of a link shows: TCP streams, and whether they are TLS. Pure.

    Ethernet II | IPv4 (RFC 791) or IPv6 (RFC 8200) | TCP (RFC 9293) | payload

IPv6 extension headers and IP fragments are not followed: nothing in a lab sends them, and a frame
that is not understood is left out. A TLS record (RFC 8446 §5.1) and its ServerHello (§4.1.3):

    type 1 | version 2 | length 2 | handshake type 1 | length 3 | version 2 | random 32 |
    session id 1+n | cipher suite 2 | compression 1 | extensions 2+n: type 2 | length 2 | data
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from agent.model.pod import Address

ETHERNET_BYTES = 14
ETHERTYPE_IPV4, ETHERTYPE_IPV6 = 0x0800, 0x86DD
IPPROTO_TCP = 6
IPV6_HEADER_BYTES = 40
RECORD_HEADER_BYTES = 5
HANDSHAKE, APPLICATION_DATA = 22, 23  # ContentType
SERVER_HELLO = 2  # HandshakeType
SUPPORTED_VERSIONS = 43  # ExtensionType
VERSIONS = {0x0303: "TLS 1.2", 0x0304: "TLS 1.3"}
CIPHER_SUITES = {
    0x1301: "TLS_AES_128_GCM_SHA256",
    0x1302: "TLS_AES_256_GCM_SHA384",
    0x1303: "TLS_CHACHA20_POLY1305_SHA256",
}


@dataclass(frozen=True, slots=True)
class Direction:
    """One direction of a TCP connection."""

    source: Address
    source_port: int
    destination: Address
    destination_port: int

    @property
    def ends(self) -> tuple[tuple[Address, int], tuple[Address, int]]:
        """Source and destination, each an address and a port."""
        return (self.source, self.source_port), (self.destination, self.destination_port)


@dataclass(frozen=True, slots=True)
class Hello:
    """What a server chose for its TLS connection."""

    version: str
    cipher_suite: str


def parse_segment(frame: bytes) -> tuple[Direction, bytes] | None:
    """Return the direction and payload of an Ethernet frame; None if it carries no TCP."""
    ethertype = int.from_bytes(frame[12:ETHERNET_BYTES], "big")
    packet = frame[ETHERNET_BYTES:]
    source: Address
    destination: Address
    if ethertype == ETHERTYPE_IPV4 and len(packet) >= 20 and packet[9] == IPPROTO_TCP:
        length = int.from_bytes(packet[2:4], "big")
        header_bytes = (packet[0] & 0xF) * 4
        source, destination = IPv4Address(packet[12:16]), IPv4Address(packet[16:20])
    elif (
        ethertype == ETHERTYPE_IPV6
        and len(packet) >= IPV6_HEADER_BYTES
        and packet[6] == IPPROTO_TCP
    ):
        length = IPV6_HEADER_BYTES + int.from_bytes(packet[4:6], "big")
        header_bytes = IPV6_HEADER_BYTES
        source, destination = IPv6Address(packet[8:24]), IPv6Address(packet[24:40])
    else:
        return None
    segment = packet[header_bytes:length]  # the link may pad a short frame
    if len(segment) < 20:
        return None
    source_port, destination_port = struct.unpack_from(">HH", segment)
    payload = segment[(segment[12] >> 4) * 4 :]
    return Direction(source, source_port, destination, destination_port), payload


def join_streams(frames: Iterable[bytes]) -> dict[Direction, bytes]:
    """Join the payloads of each direction in the order of arrival; empty directions are listed."""
    streams: dict[Direction, bytearray] = {}
    for frame in frames:
        parsed = parse_segment(frame)
        if parsed is not None:
            direction, payload = parsed
            streams.setdefault(direction, bytearray()).extend(payload)
    return {direction: bytes(stream) for direction, stream in streams.items()}


def parse_server_hello(stream: bytes) -> Hello | None:
    """Return what the server chose, if `stream` is its side of a TLS connection."""
    body = stream[RECORD_HEADER_BYTES:]
    if len(body) < 39 or stream[0] != HANDSHAKE or body[0] != SERVER_HELLO:
        return None
    version = int.from_bytes(body[4:6], "big")
    position = 38 + 1 + body[38]  # after the session id
    if len(body) < position + 5:
        return None
    cipher_suite, _compression, extensions = struct.unpack_from(">HBH", body, position)
    position += 5
    end = min(position + extensions, len(body))
    while position + 4 <= end:
        extension, length = struct.unpack_from(">HH", body, position)
        if extension == SUPPORTED_VERSIONS:
            version = int.from_bytes(body[position + 4 : position + 6], "big")
        position += 4 + length
    return Hello(
        VERSIONS.get(version, f"TLS 0x{version:04x}"),
        CIPHER_SUITES.get(cipher_suite, f"0x{cipher_suite:04x}"),
    )


def is_all_records(stream: bytes) -> bool:
    """Say whether `stream` is TLS records from its first byte to its last."""
    position = 0
    while position < len(stream):
        head = stream[position : position + RECORD_HEADER_BYTES]
        if len(head) < RECORD_HEADER_BYTES or not 20 <= head[0] <= APPLICATION_DATA:
            return False
        position += RECORD_HEADER_BYTES + int.from_bytes(head[3:5], "big")
    return position == len(stream) > 0
