"""Our 15008 beside the rules that a server of CONNECT has to keep, one tunnel for each.

A name begins with the section of RFC 9113, or of RFC 7541 where it says `hpack`.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from agent.model.capture import HBONE_PORT
from agent.tunnel import frames, tls
from agent.tunnel.connection import Limits
from agent.tunnel.frames import ErrorCode, FrameType, Setting
from tests.interop.conftest import Neighbors, identity
from tests.node.conftest import certificate_for
from tests.support.namespaces import PEER4
from tests.support.raw_peer import (
    Broken,
    Fine,
    Frame,
    Outcome,
    RawPeer,
    Reset,
    block,
    frame,
    handshake,
    headers,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.root

APP_PORT, READER_PORT = 8080, 8081
END_STREAM, END_HEADERS, PADDED = frames.END_STREAM, frames.END_HEADERS, frames.PADDED
PROTOCOL, FLOW, SIZE = (
    ErrorCode.PROTOCOL_ERROR,
    ErrorCode.FLOW_CONTROL_ERROR,
    ErrorCode.FRAME_SIZE_ERROR,
)
CALM, CLOSED, HPACK = (
    ErrorCode.ENHANCE_YOUR_CALM,
    ErrorCode.STREAM_CLOSED,
    ErrorCode.COMPRESSION_ERROR,
)
START = frames.PREFACE + frames.build_settings({})
METHOD, AUTHORITY = (":method", "CONNECT"), (":authority", f"{PEER4}:{APP_PORT}")
CONNECT = (METHOD, AUTHORITY)
PING = frames.build_ping(b"12345678", is_ack=False)
PONG = Frame(FrameType.PING, frames.ACK, 0, b"12345678")
MOST = 2**31 - 1


def word(value: int) -> bytes:
    return value.to_bytes(4, "big")


def opened(stream_id: int, *more: tuple[str, str], ends: bool = False) -> bytes:
    return headers(stream_id, *CONNECT, *more, ends=ends)


def data(stream_id: int, payload: bytes = b"x", flags: int = 0) -> bytes:
    return frame(FrameType.DATA, flags, stream_id, payload)


def raw_block(encoded: bytes) -> bytes:
    return frame(FrameType.HEADERS, END_HEADERS, 1, encoded)


def settings(name: int, value: int) -> bytes:
    return frame(FrameType.SETTINGS, 0, 0, name.to_bytes(2, "big") + word(value))


def updates(stream_id: int, *increments: int) -> bytes:
    return b"".join(frames.build_window_update(stream_id, each) for each in increments)


def priority(stream_id: int, size: int = 5) -> bytes:
    return frame(FrameType.PRIORITY, 0, stream_id, bytes(size))


# What is sent after the preface and SETTINGS, and what has to come of it.
AFTER_THE_START: dict[str, tuple[bytes, Outcome]] = {
    "4.1 a frame of an unknown type": (frame(77, 0xFF, 0, b"what"), Fine()),
    "4.1 an unknown frame as long as frames may be": (
        frame(77, 0, 0, bytes(Limits().frame_bytes)), Fine(),
    ),
    "4.1 unused flags": (frame(FrameType.PING, 0xFE, 0, b"12345678"), Fine(PONG)),
    "4.1 the reserved bit": (frames.build_head(4, 8, 0, 1 << 31) + word(1), Fine()),
    "4.2 DATA beyond the size that we named": (
        opened(1) + frames.build_head(Limits().frame_bytes + 1, 0, 0, 1), Broken(SIZE),
    ),
    "4.2 an unknown frame beyond that size": (
        frames.build_head(Limits().frame_bytes + 1, 77, 0, 0), Broken(SIZE),
    ),
    "4.2 DATA as long as frames may be": (opened(1) + data(1, bytes(Limits().frame_bytes)), Fine()),
    "4.3 a block that cannot be decoded": (raw_block(b"\xff" * 9), Broken(HPACK)),
    "4.3 a block is decoded on a stream that is refused": (
        # The name and value that stream 3 asks for are in the table since stream 1, a GET.
        raw_block(b"\x40\x01a\x01b" + block((":method", "GET")))
        + frame(FrameType.HEADERS, END_HEADERS, 3, block(*CONNECT) + b"\xbe"),
        Reset(PROTOCOL, 1),
    ),
    "hpack 2.3.3 an index of 0": (raw_block(b"\x80"), Broken(HPACK)),
    "hpack 2.3.3 an index beyond the table": (raw_block(b"\xfe"), Broken(HPACK)),
    "hpack 4.2 the table's size after a field": (
        raw_block(block(*CONNECT) + b"\x20"), Broken(HPACK),
    ),
    "hpack 5.1 an integer without an end": (raw_block(b"\xff" * 20), Broken(HPACK)),
    "hpack 5.2 a string that is cut off": (raw_block(b"\x00\x05ab"), Broken(HPACK)),
    "hpack 5.2 Huffman padding of 8 bits": (raw_block(b"\x00\x82\x1f\xff\x00"), Broken(HPACK)),
    "hpack 5.2 Huffman padding of zeros": (raw_block(b"\x00\x81\x18\x00"), Broken(HPACK)),
    "hpack 5.2 Huffman's end of a string": (
        raw_block(b"\x00\x84\xff\xff\xff\xff\x00"), Broken(HPACK),
    ),
    "hpack 6.3 a table larger than ours": (raw_block(b"\x3f\xe2\x1f"), Broken(HPACK)),
    "5.1 DATA on an idle stream": (data(1), Broken(PROTOCOL)),
    "5.1 RST_STREAM on an idle stream": (frames.build_reset(1, 8), Broken(PROTOCOL)),
    "5.1 WINDOW_UPDATE on an idle stream": (updates(1, 1), Broken(PROTOCOL)),
    "5.1 PRIORITY on an idle stream": (priority(1), Fine()),
    "5.1 DATA after END_STREAM": (opened(1, ends=True) + data(1), Reset(CLOSED)),
    "5.1 HEADERS after END_STREAM": (opened(1, ends=True) * 2, Reset(CLOSED)),
    "5.1 WINDOW_UPDATE and PRIORITY after END_STREAM": (
        opened(1, ends=True) + updates(1, 1) + priority(1), Fine(),
    ),
    "5.1 RST_STREAM after END_STREAM": (opened(1, ends=True) + frames.build_reset(1, 8), Fine()),
    "5.1 frames of a stream that the peer reset": (
        opened(1) + frames.build_reset(1, 8) + data(1) + updates(1, 1) + frames.build_reset(1, 8),
        Fine(),
    ),
    "5.1 frames of a stream that we reset": (
        headers(1, METHOD) + data(1) + updates(1, 1) + headers(1, ("x", "y"), ends=True),
        Reset(PROTOCOL),
    ),
    "5.1.1 an even number": (opened(2), Broken(PROTOCOL)),
    "5.1.1 a smaller number": (opened(5) + opened(3), Broken(PROTOCOL)),
    "5.1.1 a number once more": (
        opened(1) + frames.build_reset(1, 8) + opened(1), Broken(PROTOCOL),
    ),
    "5.5 an unknown frame inside a header block": (
        frame(FrameType.HEADERS, 0, 1, block(METHOD)) + frame(77, 0, 1), Broken(PROTOCOL),
    ),
    "6.1 DATA on stream 0": (data(0), Broken(PROTOCOL)),
    "6.1 padding as long as the payload": (opened(1) + data(1, b"\x02x", PADDED), Broken(PROTOCOL)),
    "6.1 padding without its length": (opened(1) + data(1, b"", PADDED), Broken(SIZE)),
    "6.1 padding": (opened(1) + data(1, b"\x02hi\0\0", PADDED | END_STREAM), Fine()),
    "6.1 nothing but padding": (opened(1) + data(1, b"\x02\0\0", PADDED), Fine()),
    "6.2 HEADERS on stream 0": (opened(0), Broken(PROTOCOL)),
    "6.2 padding longer than the block": (
        frame(FrameType.HEADERS, END_HEADERS | PADDED, 1, b"\x09" + b"x" * 8), Broken(PROTOCOL),
    ),
    "6.2 padding and priority longer than the payload": (
        frame(FrameType.HEADERS, END_HEADERS | PADDED | 0x20, 1, b"\x02" + bytes(6)),
        Broken(PROTOCOL),
    ),
    "6.2 priority that is cut off": (
        frame(FrameType.HEADERS, END_HEADERS | 0x20, 1, b"1234"), Broken(SIZE),
    ),
    "6.2 padding and priority": (
        frame(
            FrameType.HEADERS, END_HEADERS | PADDED | 0x20, 1,
            b"\x03" + bytes(5) + block(*CONNECT) + bytes(3),
        ),
        Fine(),
    ),
    "6.3 PRIORITY on stream 0": (priority(0), Broken(PROTOCOL)),
    "6.3 PRIORITY of 4 bytes": (opened(1) + priority(1, 4), Broken(SIZE)),
    "6.4 RST_STREAM on stream 0": (frames.build_reset(0, 8), Broken(PROTOCOL)),
    "6.4 RST_STREAM of 3 bytes": (
        opened(1) + frame(FrameType.RST_STREAM, 0, 1, b"abc"), Broken(SIZE),
    ),
    "6.5 SETTINGS on a stream": (frame(FrameType.SETTINGS, 0, 1), Broken(PROTOCOL)),
    "6.5 SETTINGS of 7 bytes": (frame(FrameType.SETTINGS, 0, 0, b"1234567"), Broken(SIZE)),
    "6.5 an ACK with a payload": (
        frame(FrameType.SETTINGS, frames.ACK, 0, b"123456"), Broken(SIZE),
    ),
    "6.5.2 ENABLE_PUSH of 2": (settings(Setting.ENABLE_PUSH, 2), Broken(PROTOCOL)),
    "6.5.2 ENABLE_PUSH of 1": (settings(Setting.ENABLE_PUSH, 1), Fine()),
    "6.5.2 a window of 2^31": (settings(Setting.INITIAL_WINDOW_SIZE, 2**31), Broken(FLOW)),
    "6.5.2 frames of 16383 bytes": (settings(Setting.MAX_FRAME_SIZE, 16383), Broken(PROTOCOL)),
    "6.5.2 frames of 2^24 bytes": (settings(Setting.MAX_FRAME_SIZE, 2**24), Broken(PROTOCOL)),
    "6.5.2 an unknown setting": (settings(0xABCD, 7), Fine()),
    "6.5.3 SETTINGS are acknowledged": (
        settings(Setting.MAX_FRAME_SIZE, 20_000), Fine(Frame(FrameType.SETTINGS, 1, 0, b"")),
    ),
    "6.6 PUSH_PROMISE": (
        opened(1) + frame(FrameType.PUSH_PROMISE, END_HEADERS, 1, word(2)), Broken(PROTOCOL),
    ),
    "6.7 PING is answered": (PING, Fine(PONG)),
    "6.7 PING on a stream": (frame(FrameType.PING, 0, 1, b"12345678"), Broken(PROTOCOL)),
    "6.7 PING of 7 bytes": (frame(FrameType.PING, 0, 0, b"1234567"), Broken(SIZE)),
    "6.7 an answer to no PING": (frames.build_ping(b"12345678", is_ack=True), Fine()),
    "6.8 GOAWAY on a stream": (frame(FrameType.GOAWAY, 0, 1, bytes(8)), Broken(PROTOCOL)),
    "6.8 GOAWAY of 7 bytes": (frame(FrameType.GOAWAY, 0, 0, bytes(7)), Broken(SIZE)),
    "6.8 GOAWAY leaves what is open": (
        opened(1) + frames.build_goaway(0, 0) + data(1) + PING, Fine(PONG),
    ),
    "6.9 the connection's window grows by 0": (updates(0, 0), Broken(PROTOCOL)),
    "6.9 a stream's window grows by 0": (opened(1) + updates(1, 0), Reset(PROTOCOL)),
    "6.9 WINDOW_UPDATE of 3 bytes": (frame(FrameType.WINDOW_UPDATE, 0, 0, b"abc"), Broken(SIZE)),
    "6.9.1 the connection's window beyond 2^31": (updates(0, MOST), Broken(FLOW)),
    "6.9.1 a stream's window beyond 2^31": (opened(1) + updates(1, MOST), Reset(FLOW)),
    "6.9.1 more than a stream's window": (
        opened(1) + data(1, bytes(Limits().frame_bytes)) * 24, Reset(FLOW),
    ),
    "6.9.2 SETTINGS take a window beyond 2^31": (
        opened(1) + updates(1, MOST - 65535) + settings(Setting.INITIAL_WINDOW_SIZE, 65536),
        Broken(FLOW),
    ),
    "6.10 CONTINUATION of nothing": (frame(FrameType.CONTINUATION, 4, 1), Broken(PROTOCOL)),
    "6.10 CONTINUATION after the end of a block": (
        opened(1) + frame(FrameType.CONTINUATION, 4, 1), Broken(PROTOCOL),
    ),
    "6.10 CONTINUATION of another stream": (
        frame(FrameType.HEADERS, 0, 1, block(METHOD)) + frame(FrameType.CONTINUATION, 4, 3),
        Broken(PROTOCOL),
    ),
    "6.10 CONTINUATION on stream 0": (
        frame(FrameType.HEADERS, 0, 1, block(METHOD)) + frame(FrameType.CONTINUATION, 4, 0),
        Broken(PROTOCOL),
    ),
    "6.10 another frame inside a block": (
        frame(FrameType.HEADERS, 0, 1, block(METHOD)) + PING, Broken(PROTOCOL),
    ),
    "6.10 a block in parts": (
        frame(FrameType.HEADERS, 0, 1, block(METHOD)) + frame(FrameType.CONTINUATION, 0, 1)
        + frame(FrameType.CONTINUATION, END_HEADERS, 1, block(AUTHORITY)),
        Fine(),
    ),
    "8.2.1 a name with upper case": (opened(1, ("Baggage", "x")), Reset(PROTOCOL)),
    "8.2.1 a name with a space": (opened(1, ("a b", "x")), Reset(PROTOCOL)),
    "8.2.1 a value with a line's end": (opened(1, ("a", "x\r\ny")), Reset(PROTOCOL)),
    "8.2.1 a value that begins with a space": (opened(1, ("a", " x")), Reset(PROTOCOL)),
    "8.2.1 a value of other bytes": (opened(1, ("a", "\xe9t\xe9")), Fine()),
    "8.2.2 connection": (opened(1, ("connection", "keep-alive")), Reset(PROTOCOL)),
    "8.2.2 transfer-encoding": (opened(1, ("transfer-encoding", "chunked")), Reset(PROTOCOL)),
    "8.2.2 te that is not trailers": (opened(1, ("te", "gzip")), Reset(PROTOCOL)),
    "8.2.2 te that is trailers": (opened(1, ("te", "trailers")), Fine()),
    "8.3 a pseudo-header after other fields": (
        headers(1, METHOD, ("a", "b"), AUTHORITY), Reset(PROTOCOL),
    ),
    "8.3 an unknown pseudo-header": (opened(1, (":protocol", "websocket")), Reset(PROTOCOL)),
    "8.3 a pseudo-header of answers": (opened(1, (":status", "200")), Reset(PROTOCOL)),
    "8.3 a pseudo-header twice": (opened(1, AUTHORITY), Reset(PROTOCOL)),
    "8.3.1 no :method": (headers(1, AUTHORITY), Reset(PROTOCOL)),
    "8.3.1 GET without :path": (
        headers(1, (":method", "GET"), (":scheme", "https"), AUTHORITY), Reset(PROTOCOL),
    ),
    "8.5 CONNECT with :path": (opened(1, (":path", "/")), Reset(PROTOCOL)),
    "8.5 CONNECT with :scheme": (opened(1, (":scheme", "https")), Reset(PROTOCOL)),
    "8.5 CONNECT without :authority": (headers(1, METHOD), Reset(PROTOCOL)),
    "8.5 trailers": (opened(1) + headers(1, ("x", "y"), ends=True), Reset(PROTOCOL)),
    "10.5 a flood of SETTINGS": (frames.build_settings({}) * 2000, Broken(CALM)),
    "10.5 a flood of empty DATA": (opened(1) + data(1, b"") * 1000, Broken(CALM)),
    "10.5 a flood of empty CONTINUATION": (
        frame(FrameType.HEADERS, 0, 1) + frame(FrameType.CONTINUATION, 0, 1) * 1000, Broken(CALM),
    ),
    "10.5 a flood of CONTINUATION": (
        frame(FrameType.HEADERS, 0, 1) + frame(FrameType.CONTINUATION, 0, 1, bytes(999)) * 40,
        Broken(CALM),
    ),
    "10.5 a flood of resets": (
        b"".join(opened(n) + frames.build_reset(n, 8) for n in range(1, 2001, 2)), Broken(CALM),
    ),
    "10.5 a flood of malformed requests": (
        b"".join(headers(n, METHOD) for n in range(1, 2001, 2)), Broken(CALM),
    ),
    "10.5.1 more fields than we take": (opened(1, ("a", "b" * 17_000)), Broken(CALM)),
}  # fmt: skip
INSTEAD_OF_THE_START: dict[str, tuple[bytes, Outcome]] = {
    "3.4 another protocol": (b"GET / HTTP/1.1\r\n\r\n" * 2, Broken(PROTOCOL)),
    "3.4 the preface without SETTINGS": (frames.PREFACE + PING, Broken(PROTOCOL)),
    "3.4 an ACK before SETTINGS": (frames.PREFACE + frames.SETTINGS_ACK, Broken(PROTOCOL)),
}


@pytest.fixture(scope="module")
def application(server: Neighbors) -> socket.socket:
    """It listens, and reads nothing."""
    listener = server.ours.namespace.listen(PEER4, APP_PORT)
    listener.listen(4096)
    return listener


@pytest.fixture
def peer(server: Neighbors, application: socket.socket) -> Iterator[RawPeer]:
    certificate = certificate_for(server.authority, identity("client"))
    raw = server.theirs.connect(PEER4, HBONE_PORT)
    made = handshake(tls.build_context(certificate, is_server=False), raw, is_server=False)
    yield made
    made.close()


def judge(peer: RawPeer, sent: bytes, outcome: Outcome) -> None:
    peer.send(sent)
    peer.settle()
    has_ended = not peer.seen[-1].is_pong
    outcome.check(peer.seen, has_ended=has_ended)


@pytest.mark.parametrize("rule", AFTER_THE_START)
def test_rule(peer: RawPeer, rule: str) -> None:
    sent, outcome = AFTER_THE_START[rule]
    judge(peer, START + sent, outcome)


@pytest.mark.parametrize("rule", INSTEAD_OF_THE_START)
def test_rule_of_the_start(peer: RawPeer, rule: str) -> None:
    judge(peer, *INSTEAD_OF_THE_START[rule])


def test_3_4_our_preface_is_settings(peer: RawPeer) -> None:
    first = peer.next_frame()
    assert first is not None
    assert (first.kind, first.flags, first.stream_id) == (FrameType.SETTINGS, 0, 0)
    named = dict(frames.parse_settings(memoryview(first.payload)))
    assert named[Setting.MAX_CONCURRENT_STREAMS] == Limits().concurrent_streams
    assert Setting.ENABLE_PUSH not in named  # §6.5.2: no server may name it as 1


def test_5_4_1_goaway_names_the_last_stream_that_was_served(peer: RawPeer) -> None:
    peer.send(START + opened(1) + opened(7) + frame(FrameType.PING, 0, 1, bytes(8)))
    goodbye = peer.read_until(lambda each: each.kind == FrameType.GOAWAY)
    assert int.from_bytes(goodbye.payload[:4], "big") == 7


@pytest.fixture
def reader(server: Neighbors) -> Iterator[socket.socket]:
    """An application that answers, for one test."""
    with server.ours.namespace.listen(PEER4, READER_PORT) as listener:
        yield listener


def to_reader(stream_id: int) -> bytes:
    return headers(stream_id, METHOD, (":authority", f"{PEER4}:{READER_PORT}"))


def is_data(found: Frame) -> bool:
    return found.kind == FrameType.DATA


def test_8_5_connect_is_answered_and_data_flows(peer: RawPeer, reader: socket.socket) -> None:
    peer.send(START + to_reader(1))
    assert peer.read_headers(1) == {":status": "200"}
    accepted, _ = reader.accept()
    with accepted:
        peer.send(data(1, b"\x01question\0", PADDED | END_STREAM))
        assert accepted.recv(8, socket.MSG_WAITALL) == b"question"
        assert accepted.recv(1) == b""
        accepted.sendall(b"answer")
        assert peer.read_until(is_data) == Frame(FrameType.DATA, 0, 1, b"answer")
    assert peer.read_until(is_data) == Frame(FrameType.DATA, END_STREAM, 1, b"")


def test_8_5_another_method_is_answered_400(peer: RawPeer) -> None:
    peer.send(START + headers(1, (":method", "GET"), (":scheme", "https"), (":path", "/")))
    assert peer.read_headers(1) == {":status": "400"}


def test_6_9_2_window_of_one_byte_is_kept_to(peer: RawPeer, reader: socket.socket) -> None:
    peer.send(frames.PREFACE + settings(Setting.INITIAL_WINDOW_SIZE, 1) + to_reader(1))
    accepted, _ = reader.accept()
    with accepted:
        accepted.sendall(b"abcd")
        for letter in (b"a", b"b"):
            assert peer.read_until(is_data).payload == letter
            peer.settle()  # nothing else comes before the window grows
            assert peer.seen[-1].is_pong
            assert [each.payload for each in peer.seen if is_data(each)][-1] == letter
            peer.send(updates(1, 1))
        assert peer.read_until(is_data).payload == b"c"
        # What is in force for all streams: the window is 0 now, then 2, of which 1 is owed.
        peer.send(
            settings(Setting.INITIAL_WINDOW_SIZE, 0)
            + settings(Setting.INITIAL_WINDOW_SIZE, 2)
            + updates(1, 1)
        )
        assert peer.read_until(is_data).payload == b"d"


def test_4_2_frames_are_no_longer_than_the_peer_takes(peer: RawPeer, reader: socket.socket) -> None:
    peer.send(START + to_reader(1) + updates(0, 1 << 20) + updates(1, 1 << 20))
    accepted, _ = reader.accept()
    with accepted:
        accepted.sendall(bytes(100_000))
        left = 100_000
        while left:
            size = len(peer.read_until(is_data).payload)
            assert size <= frames.DEFAULT_FRAME_BYTES
            left -= size
