"""Frames made by hand after the RFCs, and a real handshake of OpenSSL in memory."""

from __future__ import annotations

import contextlib
import ssl
import struct
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING

import pytest

from agent.demo.wire import (
    Direction,
    Hello,
    is_all_records,
    join_streams,
    parse_segment,
    parse_server_hello,
)
from agent.identity.local import LocalAuthority
from agent.model.identity import SpiffeId
from agent.tunnel import tls
from agent.tunnel.messages import PutCertificate

if TYPE_CHECKING:
    from pathlib import Path

V4 = Direction(IPv4Address("10.0.0.1"), 1000, IPv4Address("10.0.0.2"), 80)
V6 = Direction(IPv6Address("fd00::1"), 1000, IPv6Address("fd00::2"), 80)


def tcp(direction: Direction, payload: bytes, options: bytes = b"") -> bytes:
    offset = (20 + len(options)) // 4 << 4
    ports = struct.pack(">HH", direction.source_port, direction.destination_port)
    return ports + bytes(8) + bytes([offset, 0x18]) + bytes(6) + options + payload


def frame(direction: Direction, payload: bytes, protocol: int = 6, options: bytes = b"") -> bytes:
    segment = tcp(direction, payload, options)
    addresses = direction.source.packed + direction.destination.packed
    if direction.source.version == 4:
        head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(segment), 0, 0, 64, protocol, 0)
        return bytes(12) + b"\x08\x00" + head + addresses + segment
    head = struct.pack(">IHBB", 6 << 28, len(segment), protocol, 64)
    return bytes(12) + b"\x86\xdd" + head + addresses + segment


@pytest.mark.parametrize("direction", [V4, V6], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("options", [b"", bytes(12)], ids=["bare", "options"])
def test_segment_gives_direction_and_payload(direction: Direction, options: bytes) -> None:
    assert parse_segment(frame(direction, b"hello", options=options)) == (direction, b"hello")


def test_direction_has_two_ends() -> None:
    assert V4.ends == ((IPv4Address("10.0.0.1"), 1000), (IPv4Address("10.0.0.2"), 80))


def test_padding_of_a_short_frame_is_no_payload() -> None:
    assert parse_segment(frame(V4, b"") + bytes(6)) == (V4, b"")


@pytest.mark.parametrize("direction", [V4, V6], ids=["ipv4", "ipv6"])
def test_what_is_not_tcp_is_left_out(direction: Direction) -> None:
    assert parse_segment(frame(direction, b"hello", protocol=17)) is None


@pytest.mark.parametrize("length", range(0, 53))
def test_cut_frame_is_left_out(length: int) -> None:
    assert parse_segment(frame(V4, b"")[:length]) is None


def test_streams_are_joined_by_direction_in_order() -> None:
    back = Direction(V4.destination, 80, V4.source, 1000)
    frames = [frame(V4, b"ab"), frame(back, b"x"), b"noise", frame(V4, b"c")]
    assert join_streams(frames) == {V4: b"abc", back: b"x"}


@pytest.fixture
def server_stream(tmp_path: Path) -> bytes:
    """Return what a server of ours sends in a handshake."""
    issued = LocalAuthority.create(tmp_path, "td").issue(SpiffeId("td", "ns", "sa"))
    certificate = PutCertificate("spiffe://td/ns/ns/sa/sa", issued.chain, issued.key, issued.roots)
    buffers = [ssl.MemoryBIO(), ssl.MemoryBIO()]
    ends = [
        tls.build_context(certificate, is_server=is_server).wrap_bio(
            buffers[not is_server], buffers[is_server], server_side=is_server
        )
        for is_server in (True, False)
    ]
    sent = b""
    for _ in range(4):
        for end in reversed(ends):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
            if end is ends[0]:
                fresh = buffers[1].read()
                sent += fresh
                buffers[1].write(fresh)
    return sent


def test_server_hello_tells_version_and_cipher(server_stream: bytes) -> None:
    assert parse_server_hello(server_stream) == Hello("TLS 1.3", "TLS_AES_256_GCM_SHA384")


def test_handshake_is_all_records(server_stream: bytes) -> None:
    assert is_all_records(server_stream)
    assert not is_all_records(server_stream[:-1])
    assert not is_all_records(server_stream + b"HTTP/1.1 200 OK")
    assert not is_all_records(b"")


def test_plain_text_is_no_tls() -> None:
    assert parse_server_hello(b"HTTP/1.0 200 OK\r\nServer: SimpleHTTP\r\n\r\n" + bytes(40)) is None
    assert not is_all_records(b"HTTP/1.0 200 OK\r\n")


@pytest.mark.parametrize("length", range(0, 128, 7))
def test_cut_hello_is_no_error(server_stream: bytes, length: int) -> None:
    parse_server_hello(server_stream[:length])


def test_hello_without_the_version_extension_is_tls_1_2() -> None:
    body = b"\x03\x03" + bytes(32) + b"\0" + b"\xc0\x2b" + b"\0" + b"\0\0"
    hello = bytes([22, 3, 3, 0, len(body) + 4, 2, 0, 0, len(body)]) + body
    assert parse_server_hello(hello) == Hello("TLS 1.2", "0xc02b")
