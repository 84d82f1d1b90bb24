"""One connection, both ends in memory."""

from __future__ import annotations

import hpack
import pytest

from agent.errors import LocalProtocolError
from agent.tunnel import frames
from agent.tunnel.connection import MAX_UNSENT_REPLIES, Connection, Limits, Role
from agent.tunnel.events import (
    ConnectionTerminated,
    ConnectRequested,
    Event,
    GoAwayReceived,
    PongReceived,
    StreamEnded,
    StreamReset,
)
from agent.tunnel.frames import ErrorCode, FrameType, Setting
from tests.support.pair import Pair, data_of


def frame(frame_type: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    return frames.build_head(len(payload), frame_type, flags, stream_id) + payload


def request(stream_id: int = 1, **pseudo: str) -> bytes:
    headers = [(f":{name}", value) for name, value in pseudo.items()]
    block = hpack.Encoder().encode(headers or [(":method", "CONNECT"), (":authority", "a:1")])
    return frame(FrameType.HEADERS, frames.END_HEADERS, stream_id, block)


def server_after(*parts: bytes) -> tuple[Connection, list[Event]]:
    """Feed a fresh server a good start and then `parts`."""
    server = Connection(Role.SERVER)
    found = server.receive(frames.PREFACE + frames.build_settings({}))
    for part in parts:
        found += server.receive(part)
    return server, found


def test_request_carries_authority_and_headers() -> None:
    pair = Pair()
    pair.settle()
    stream_id = pair.client.open_stream("[fd00::1]:80", {"baggage": "k8s.pod.name=a"})
    pair.settle()
    (asked,) = [event for event in pair.server_events if isinstance(event, ConnectRequested)]
    assert (asked.stream_id, asked.authority, asked.fault) == (stream_id, "[fd00::1]:80", None)
    assert asked.headers["baggage"] == "k8s.pod.name=a"


def test_half_close_leaves_the_other_direction_open() -> None:
    pair = Pair()
    stream_id = pair.open()
    pair.client.send_data(stream_id, b"question", ends=True)
    pair.settle()
    assert data_of(pair.server_events, stream_id) == b"question"
    assert pair.server_events[-1] == StreamEnded(stream_id)
    pair.server.send_data(stream_id, b"answer", ends=True)
    pair.settle()
    assert data_of(pair.client_events, stream_id) == b"answer"
    assert pair.client_events[-1] == StreamEnded(stream_id)
    assert pair.client.stream_count == pair.server.stream_count == 0


def test_reset_passes_its_code() -> None:
    pair = Pair()
    stream_id = pair.open()
    pair.client.reset(stream_id, ErrorCode.CONNECT_ERROR)
    pair.settle()
    assert pair.server_events[-1] == StreamReset(stream_id, ErrorCode.CONNECT_ERROR)
    assert pair.server.stream_count == 0


@pytest.mark.parametrize("status", [400, 401, 503])
def test_refusal_ends_the_stream(status: int) -> None:
    pair = Pair()
    pair.settle()
    stream_id = pair.client.open_stream("10.0.0.1:80", {})
    pair.settle()
    pair.server.respond(stream_id, status)
    pair.settle()
    assert pair.client.stream_count == pair.server.stream_count == 0


def test_stalled_reader_costs_its_window_and_stalls_no_other_stream() -> None:
    pair = Pair()
    stalled, other = pair.open(), pair.open()
    total = 0
    while size := pair.client.sendable(stalled):
        pair.client.send_data(stalled, b"x" * size)
        total += size
        pair.settle()
    assert total == Limits().stream_window
    received = 0
    for _ in range(40):
        pair.server_events.clear()
        size = pair.client.sendable(other)
        assert size > 0
        pair.client.send_data(other, b"y" * size)
        pair.settle()
        arrived = len(data_of(pair.server_events, other))
        pair.server.acknowledge(other, arrived)
        received += arrived
        pair.settle()
    assert received > 20 * Limits().stream_window
    pair.server.acknowledge(stalled, total)
    pair.settle()
    assert pair.client.sendable(stalled) == Limits().stream_window


def test_sending_against_the_window_is_our_defect() -> None:
    pair = Pair()
    stream_id = pair.open()
    with pytest.raises(LocalProtocolError):
        pair.client.send_data(stream_id, b"x" * (pair.client.sendable(stream_id) + 1))


def test_ping_comes_back() -> None:
    pair = Pair()
    pair.client.ping(b"12345678")
    pair.settle()
    assert PongReceived(b"12345678") in pair.client_events


def test_drain_lets_open_streams_go_on_and_refuses_new_ones() -> None:
    pair = Pair()
    stream_id = pair.open()
    late = pair.client.open_stream("10.0.0.1:80", {})
    pair.server.drain()
    pair.settle()
    assert StreamReset(late, ErrorCode.REFUSED_STREAM) in pair.client_events
    assert GoAwayReceived(stream_id, ErrorCode.NO_ERROR) in pair.client_events
    assert not pair.client.may_open
    pair.client.send_data(stream_id, b"still", ends=True)
    pair.settle()
    assert data_of(pair.server_events, stream_id) == b"still"


def test_streams_beyond_the_limit_are_refused_alone() -> None:
    server = Connection(Role.SERVER, Limits(concurrent_streams=2))
    server.receive(frames.PREFACE + frames.build_settings({}))
    server.take_output()
    asked = [event for n in (1, 3, 5) for event in server.receive(request(n))]
    assert [event.stream_id for event in asked if isinstance(event, ConnectRequested)] == [1, 3]
    assert server.take_output() == frames.build_reset(5, ErrorCode.REFUSED_STREAM)


@pytest.mark.parametrize(
    "pseudo",
    [
        {"method": "GET", "authority": "a:1"},
        {"method": "CONNECT"},
        {"method": "CONNECT", "authority": "a:1", "path": "/"},
    ],
)
def test_request_that_is_no_connect_is_a_fault_of_the_stream(pseudo: dict[str, str]) -> None:
    _server, found = server_after(request(1, **pseudo))
    asked = found[-1]
    assert isinstance(asked, ConnectRequested)
    assert asked.fault


def word(value: int) -> bytes:
    return value.to_bytes(4, "big")


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        ([frame(FrameType.DATA, 0, 1, b"x")], ErrorCode.PROTOCOL_ERROR),
        ([frame(FrameType.DATA, 0, 0, b"x")], ErrorCode.PROTOCOL_ERROR),
        ([request(2)], ErrorCode.PROTOCOL_ERROR),
        ([request(1), frame(FrameType.DATA, frames.PADDED, 1, b"\x09x")], ErrorCode.PROTOCOL_ERROR),
        (
            [frame(FrameType.HEADERS, frames.END_HEADERS, 1, b"\xff" * 9)],
            ErrorCode.COMPRESSION_ERROR,
        ),
        ([frame(FrameType.HEADERS, 0, 1, b"\x82"), request(3)], ErrorCode.PROTOCOL_ERROR),
        ([frame(FrameType.CONTINUATION, 0, 1)], ErrorCode.PROTOCOL_ERROR),
        ([request(1, method="CONNECT", authority="a" * 20000)], ErrorCode.ENHANCE_YOUR_CALM),
        ([frame(FrameType.PING, 0, 0, b"short")], ErrorCode.FRAME_SIZE_ERROR),
        ([frame(FrameType.PING, 0, 3, b"12345678")], ErrorCode.PROTOCOL_ERROR),
        ([frame(FrameType.RST_STREAM, 0, 9, word(0))], ErrorCode.PROTOCOL_ERROR),
        ([frame(FrameType.PUSH_PROMISE, 0, 1, word(2))], ErrorCode.PROTOCOL_ERROR),
        ([frame(FrameType.SETTINGS, 0, 0, b"abc")], ErrorCode.FRAME_SIZE_ERROR),
        (
            [frames.build_settings({Setting.INITIAL_WINDOW_SIZE: 2**31})],
            ErrorCode.FLOW_CONTROL_ERROR,
        ),
        ([frames.build_settings({Setting.MAX_FRAME_SIZE: 1})], ErrorCode.PROTOCOL_ERROR),
        ([frame(FrameType.WINDOW_UPDATE, 0, 0, word(0))], ErrorCode.FLOW_CONTROL_ERROR),
        ([frame(FrameType.WINDOW_UPDATE, 0, 0, word(2**31 - 1))], ErrorCode.FLOW_CONTROL_ERROR),
        ([frames.build_head(2**24 - 1, FrameType.DATA, 0, 1)], ErrorCode.FRAME_SIZE_ERROR),
        (
            [frames.build_ping(b"12345678", is_ack=False)] * (MAX_UNSENT_REPLIES + 1),
            ErrorCode.ENHANCE_YOUR_CALM,
        ),
        (
            [part for n in range(1, 4000, 2) for part in (request(n), frames.build_reset(n, 8))],
            ErrorCode.ENHANCE_YOUR_CALM,
        ),
        ([request(1), *[frame(FrameType.DATA, 0, 1)] * 500], ErrorCode.ENHANCE_YOUR_CALM),
    ],
)
def test_broken_protocol_ends_the_connection_with_its_code(
    parts: list[bytes], code: ErrorCode
) -> None:
    server, found = server_after(*parts)
    last = found[-1]
    assert isinstance(last, ConnectionTerminated)
    assert last.code == code
    assert server.take_output()[-4:] == word(code)
    assert server.receive(request(99)) == []


def test_garbage_instead_of_the_preface_ends_the_connection() -> None:
    found = Connection(Role.SERVER).receive(b"GET / HTTP/1.1\r\n")
    assert isinstance(found[0], ConnectionTerminated)


def test_peer_that_breaks_a_stream_window_loses_the_stream_only() -> None:
    limits = Limits(stream_window=1000)
    server = Connection(Role.SERVER, limits)
    server.receive(frames.PREFACE + frames.build_settings({}) + request(1) + request(3))
    found = server.receive(frame(FrameType.DATA, 0, 1, b"x" * 1001))
    assert found == [StreamReset(1, ErrorCode.FLOW_CONTROL_ERROR)]
    assert data_of(server.receive(frame(FrameType.DATA, 0, 3, b"fine")), 3) == b"fine"


def test_padding_is_not_data_and_is_given_back() -> None:
    server, _ = server_after(request(1))
    found = server.receive(
        frame(FrameType.DATA, frames.PADDED | frames.END_STREAM, 1, b"\x02hi\0\0")
    )
    assert data_of(found, 1) == b"hi"
    assert found[-1] == StreamEnded(1)


def test_resets_of_streams_that_were_served_never_end_the_connection() -> None:
    pair = Pair()
    for _ in range(1000):
        pair.client.reset(pair.open(), ErrorCode.CONNECT_ERROR)
        pair.settle()
    assert not pair.server.is_terminated
    assert not pair.client.is_terminated
