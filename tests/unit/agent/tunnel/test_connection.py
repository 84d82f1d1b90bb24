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
    DataReceived,
    Event,
    GoAwayReceived,
    PongReceived,
    ResponseReceived,
    SettingsReceived,
    StreamEnded,
    StreamReset,
    WindowOpened,
)
from agent.tunnel.frames import ErrorCode, FrameType, Setting
from agent.tunnel.headers import STATUS_200
from tests.support.pair import Pair, data_of

PLENTY = bytes(2 * Limits().stream_window)


def frame(frame_type: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    return frames.build_head(len(payload), frame_type, flags, stream_id) + payload


def header_block(**pseudo: str) -> bytes:
    headers = [(f":{name}", value) for name, value in pseudo.items()]
    return hpack.Encoder().encode(headers or [(":method", "CONNECT"), (":authority", "a:1")])


def request(stream_id: int = 1, *, ends: bool = False, **pseudo: str) -> bytes:
    flags = frames.END_HEADERS | (frames.END_STREAM if ends else 0)
    return frame(FrameType.HEADERS, flags, stream_id, header_block(**pseudo))


response = request  # a frame of the other direction has the same form


def server_after(*parts: bytes) -> tuple[Connection, list[Event]]:
    """Feed a fresh server a good start and then `parts`."""
    server = Connection(Role.SERVER)
    found = server.receive(frames.PREFACE + frames.build_settings({}))
    for part in parts:
        found += server.receive(part)
    return server, found


def send(connection: Connection, stream_id: int, data: bytes) -> None:
    """Send what the windows have room for."""
    assert connection.send_some(stream_id, data, len(data)) == len(data)


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
    send(pair.client, stream_id, b"question")
    pair.client.end(stream_id)
    pair.settle()
    assert data_of(pair.server_events, stream_id) == b"question"
    assert pair.server_events[-1] == StreamEnded(stream_id)
    send(pair.server, stream_id, b"answer")
    pair.server.end(stream_id)
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
    while size := pair.client.send_some(stalled, PLENTY, len(PLENTY)):
        total += size
        pair.settle()
    assert total == Limits().stream_window
    received = 0
    for _ in range(40):
        pair.server_events.clear()
        assert pair.client.send_some(other, PLENTY, len(PLENTY)) > 0
        pair.settle()
        arrived = len(data_of(pair.server_events, other))
        pair.server.acknowledge(other, arrived)
        received += arrived
        pair.settle()
    assert received > 20 * Limits().stream_window
    pair.server.acknowledge(stalled, total)
    pair.settle()
    assert pair.client.send_some(stalled, PLENTY, len(PLENTY)) == Limits().stream_window


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
    send(pair.client, stream_id, b"still")
    pair.settle()
    assert data_of(pair.server_events, stream_id) == b"still"


def test_streams_beyond_the_limit_are_refused_alone() -> None:
    server = Connection(Role.SERVER, Limits(concurrent_streams=2))
    server.receive(frames.PREFACE + frames.build_settings({}))
    server.take_output()
    assert server.last_peer_stream_id == 0
    asked = [event for n in (1, 3, 5) for event in server.receive(request(n))]
    assert server.last_peer_stream_id == 5
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
def test_malformed_request_costs_its_stream(pseudo: dict[str, str]) -> None:
    server, found = server_after(request(1, ends=False, **pseudo))
    asked = found[-1]
    assert isinstance(asked, ConnectRequested)
    assert asked.fault
    server.respond(1, 400)  # nothing is left to answer
    assert server.stream_count == 0
    answer = frame(FrameType.HEADERS, frames.END_HEADERS, 1, b"\x08\x03400")
    assert server.take_output().endswith(answer + frames.build_reset(1, ErrorCode.PROTOCOL_ERROR))


def test_good_request_that_is_no_connect_is_left_to_be_answered() -> None:
    server, found = server_after(request(1, method="GET", scheme="https", path="/"))
    asked = found[-1]
    assert isinstance(asked, ConnectRequested)
    assert asked.fault == "the method is GET, not CONNECT"
    assert server.stream_count == 1


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
        ([frame(FrameType.HEADERS, 4, 0, header_block())], ErrorCode.PROTOCOL_ERROR),
        ([frame(FrameType.HEADERS, frames.PADDED, 1)], ErrorCode.FRAME_SIZE_ERROR),
        ([request(1), frame(FrameType.DATA, frames.PADDED, 1)], ErrorCode.FRAME_SIZE_ERROR),
        ([frame(FrameType.PRIORITY, 0, 0, b"12345")], ErrorCode.PROTOCOL_ERROR),
        ([frame(FrameType.PRIORITY, 0, 1, b"1234")], ErrorCode.FRAME_SIZE_ERROR),
        ([request(3), request(1)], ErrorCode.PROTOCOL_ERROR),
        ([request(1, method="CONNECT")] * 500, ErrorCode.ENHANCE_YOUR_CALM),
        (
            [request(number, method="CONNECT") for number in range(1, 1000, 2)],
            ErrorCode.ENHANCE_YOUR_CALM,
        ),
        ([frame(FrameType.HEADERS, frames.PADDED, 1, b"\x03ab")], ErrorCode.PROTOCOL_ERROR),
        ([frame(FrameType.HEADERS, frames.PRIORITY_FLAG, 1, b"abc")], ErrorCode.FRAME_SIZE_ERROR),
        (
            [
                frame(FrameType.HEADERS, 0, 1, b"x" * 99),
                *[frame(FrameType.CONTINUATION, 0, 1, b"x" * 16384)] * 3,
            ],
            ErrorCode.ENHANCE_YOUR_CALM,
        ),
        (
            [frame(FrameType.HEADERS, 0, 1), *[frame(FrameType.CONTINUATION, 0, 1)] * 500],
            ErrorCode.ENHANCE_YOUR_CALM,
        ),
        ([frame(FrameType.PING, 0, 0, b"x" * 70_000)], ErrorCode.FRAME_SIZE_ERROR),
        ([frame(FrameType.RST_STREAM, 0, 1, b"abc")], ErrorCode.FRAME_SIZE_ERROR),
        ([frame(FrameType.SETTINGS, 0, 1)], ErrorCode.PROTOCOL_ERROR),
        ([frame(FrameType.SETTINGS, frames.ACK, 0, b"123456")], ErrorCode.FRAME_SIZE_ERROR),
        ([frame(FrameType.GOAWAY, 0, 1, b"12345678")], ErrorCode.PROTOCOL_ERROR),
        ([frame(FrameType.GOAWAY, 0, 0, b"1234567")], ErrorCode.FRAME_SIZE_ERROR),
        ([frame(FrameType.WINDOW_UPDATE, 0, 0, b"abc")], ErrorCode.FRAME_SIZE_ERROR),
        ([frame(FrameType.WINDOW_UPDATE, 0, 1, word(1))], ErrorCode.PROTOCOL_ERROR),
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
        ([frames.build_settings({Setting.ENABLE_PUSH: 2})], ErrorCode.PROTOCOL_ERROR),
        (
            [
                request(1),
                frames.build_window_update(1, 2**31 - 1 - frames.DEFAULT_WINDOW),
                frames.build_settings({Setting.INITIAL_WINDOW_SIZE: frames.DEFAULT_WINDOW + 1}),
            ],
            ErrorCode.FLOW_CONTROL_ERROR,
        ),
        ([frame(FrameType.WINDOW_UPDATE, 0, 0, word(0))], ErrorCode.PROTOCOL_ERROR),
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
        (
            [
                part
                for n in range(1, 4000, 2)
                for part in (request(n, ends=True), frames.build_reset(n, 8))
            ],
            ErrorCode.ENHANCE_YOUR_CALM,
        ),
        ([request(1), *[frame(FrameType.DATA, 0, 1)] * 500], ErrorCode.ENHANCE_YOUR_CALM),
        # Resets that the peer makes us send (CVE-2025-8671).
        (
            [
                part
                for n in range(1, 4000, 2)
                for part in (request(n), frame(FrameType.WINDOW_UPDATE, 0, n, word(0)))
            ],
            ErrorCode.ENHANCE_YOUR_CALM,
        ),
        (
            [
                part
                for n in range(1, 4000, 2)
                for part in (request(n, ends=True), frame(FrameType.DATA, 0, n, b"x"))
            ],
            ErrorCode.ENHANCE_YOUR_CALM,
        ),
        (
            [part for n in range(1, 4000, 2) for part in (request(n), request(n))],
            ErrorCode.ENHANCE_YOUR_CALM,
        ),
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


def test_replies_that_have_left_may_be_asked_for_again() -> None:
    server, _ = server_after()
    pings = frames.build_ping(b"12345678", is_ack=False) * MAX_UNSENT_REPLIES
    for _ in range(3):
        server.take_output()  # to be encrypted, which is not yet to leave
        server.forgive_replies()
        server.receive(pings)
    assert not server.is_terminated
    server.take_output()
    server.receive(pings)
    assert server.is_terminated


def test_streams_that_were_served_pay_for_resets() -> None:
    server, _ = server_after()
    for number in range(1, 4000, 2):
        server.receive(request(number))
        server.respond(number, 200)
        server.receive(frames.build_reset(number, 8))
    assert not server.is_terminated


def test_window_of_the_connection_is_told_open_once() -> None:
    server, _ = server_after(request(1))
    server.respond(1, 200)
    grow = frame(FrameType.WINDOW_UPDATE, 0, 0, word(1))
    assert server.receive(grow * 3) == []  # it was open
    server.receive(frames.build_window_update(1, 1 << 20))
    assert server.send_some(1, bytes(1 << 20), 1 << 20) == frames.DEFAULT_WINDOW + 3
    assert server.receive(grow * 3) == [WindowOpened(0)]


def client_after(*parts: bytes) -> tuple[Connection, list[Event]]:
    """A client with stream 1 open, fed `parts`; its own output is forgotten."""
    client = Connection(Role.CLIENT)
    client.receive(frames.build_settings({}))
    client.open_stream("10.0.0.1:80", {})
    client.take_output()
    return client, [event for part in parts for event in client.receive(part)]


@pytest.mark.parametrize(
    "first", [frames.build_ping(b"12345678", is_ack=False), frames.SETTINGS_ACK]
)
def test_first_frame_must_be_settings(first: bytes) -> None:
    (found,) = Connection(Role.CLIENT).receive(first)
    assert isinstance(found, ConnectionTerminated)
    assert found.code == ErrorCode.PROTOCOL_ERROR


def test_everything_may_arrive_in_single_bytes() -> None:
    whole = request(1) + frame(FrameType.DATA, frames.PADDED, 1, b"\x02hi\0\0")
    server, found = server_after(*[bytes([byte]) for byte in whole])
    assert isinstance(found[1], ConnectRequested)
    assert data_of(found, 1) == b"hi"
    assert not server.is_terminated


def test_frame_of_a_kind_that_nobody_knows_is_ignored() -> None:
    server, found = server_after(
        frame(77, 0xFF, 5, b"what"),
        frame(FrameType.PRIORITY, 0, 1, b"12345"),
        frame(78, frames.END_STREAM, 1, b"x" * 200_000),
        frame(79, 0, 0),
        request(1),
    )
    assert found[0] == SettingsReceived()
    assert isinstance(found[1], ConnectRequested)
    assert len(found) == 2
    assert not server.is_terminated


def test_padding_and_priority_of_headers_are_skipped() -> None:
    padded = b"\x03" + b"\0\0\0\0\0" + header_block() + b"\0\0\0"
    flags = frames.END_HEADERS | frames.PADDED | frames.PRIORITY_FLAG
    _server, found = server_after(frame(FrameType.HEADERS, flags, 1, padded))
    assert isinstance(found[-1], ConnectRequested)
    assert found[-1].authority == "a:1"


def test_header_block_may_come_in_parts() -> None:
    block = header_block()
    _server, found = server_after(
        frame(FrameType.HEADERS, 0, 1, block[:2]),
        frame(FrameType.CONTINUATION, 0, 1, block[2:3]),
        frame(FrameType.CONTINUATION, frames.END_HEADERS, 1, block[3:]),
    )
    assert isinstance(found[-1], ConnectRequested)


def test_request_that_ends_at_once_is_a_half_closed_stream() -> None:
    server, found = server_after(request(1, ends=True))
    assert found[-1] == StreamEnded(1)
    server.respond(1, 200)
    send(server, 1, b"answer")
    server.end(1)
    assert server.stream_count == 0


@pytest.mark.parametrize("late", [request(1, ends=True), request(1), frame(FrameType.DATA, 1, 1)])
def test_frame_after_the_end_costs_the_stream_only(late: bytes) -> None:
    server, found = server_after(request(1, ends=True), request(3), late)
    assert found[-1] == StreamReset(1, ErrorCode.STREAM_CLOSED)
    assert not server.is_terminated
    assert server.stream_count == 1


def test_answer_after_the_end_costs_the_stream_only() -> None:
    answer = response(1, ends=True, status="200")
    client, found = client_after(answer, answer)
    assert found[1:] == [StreamEnded(1), StreamReset(1, ErrorCode.STREAM_CLOSED)]
    assert not client.is_terminated


def test_data_before_the_answer_costs_the_stream_only() -> None:
    client, found = client_after(frame(FrameType.DATA, 0, 1, b"x"), response(1, status="200"))
    assert found == [StreamReset(1, ErrorCode.PROTOCOL_ERROR)]
    assert not client.is_terminated


@pytest.mark.parametrize("ends", [True, False])
def test_connected_stream_has_no_trailers(ends: bool) -> None:
    trailers = request(1, ends=ends, status="0")
    _server, found = server_after(request(1), trailers)
    assert found[2:] == [StreamReset(1, ErrorCode.PROTOCOL_ERROR)]
    _client, found = client_after(response(1, status="200"), trailers)
    assert found == [ResponseReceived(1, 200), StreamReset(1, ErrorCode.PROTOCOL_ERROR)]


def test_what_was_on_the_way_to_a_stream_that_we_reset_is_discarded() -> None:
    server, _found = server_after(request(1), request(3))
    server.reset(1, ErrorCode.CANCEL)
    late = (request(1, ends=True), frame(FrameType.DATA, 0, 1, b"late"))
    assert [event for part in late for event in server.receive(part)] == []
    server.respond(3, 200)
    assert data_of(server.receive(frame(FrameType.DATA, 0, 3, b"fine")), 3) == b"fine"


def test_plain_answer_leaves_the_table_of_the_peers_headers_as_it_is() -> None:
    encoder = hpack.Encoder()
    long, plain = [(":status", "200"), ("server", "envoy")], [(":status", "200")]
    blocks = [encoder.encode(fields) for fields in (long, plain, long)]
    assert blocks[1] == STATUS_200
    assert len(blocks[2]) == 2  # of which the second is in the table since the first block
    client, found = client_after()
    for block in blocks:
        stream_id = client.open_stream("a:1", {})
        found += client.receive(frame(FrameType.HEADERS, frames.END_HEADERS, stream_id, block))
    assert [event.status for event in found if isinstance(event, ResponseReceived)] == [200] * 3


def test_value_of_a_field_may_be_any_bytes() -> None:
    fields = [(b":method", b"CONNECT"), (b":authority", b"a:1"), (b"note", b"\xe9t\xe9")]
    block = hpack.Encoder().encode(fields)
    _server, found = server_after(frame(FrameType.HEADERS, frames.END_HEADERS, 1, block))
    assert isinstance(found[-1], ConnectRequested)
    assert found[-1].headers["note"] == "\N{REPLACEMENT CHARACTER}t\N{REPLACEMENT CHARACTER}"


def test_server_may_not_ask_for_pushes() -> None:
    _client, (found,) = client_after(frames.build_settings({Setting.ENABLE_PUSH: 1}))
    assert isinstance(found, ConnectionTerminated)
    assert found.code == ErrorCode.PROTOCOL_ERROR


@pytest.mark.parametrize("status", ["", "20", "abc", "2000", "\N{SUPERSCRIPT TWO}00"])
def test_answer_without_a_status_costs_the_stream(status: str) -> None:
    client, found = client_after(response(1, status=status))
    assert found == [StreamReset(1, ErrorCode.PROTOCOL_ERROR)]
    assert client.stream_count == 0


def test_provisional_answers_are_skipped_but_not_for_ever() -> None:
    _client, found = client_after(response(1, status="103"), response(1, status="200"))
    assert found == [ResponseReceived(1, 200)]
    _client, found = client_after(*[response(1, status="103")] * 500)
    assert isinstance(found[-1], ConnectionTerminated)
    assert found[-1].code == ErrorCode.ENHANCE_YOUR_CALM


def given_up(first: int) -> bytes:
    """Return 300 requests, each reset before it is answered."""
    numbers = range(first, first + 600, 2)
    return b"".join(request(number) + frames.build_reset(number, 8) for number in numbers)


@pytest.mark.parametrize("is_asked_for", [True, False])
def test_requests_that_are_given_up_are_forgiven_with_time(*, is_asked_for: bool) -> None:
    server, _found = server_after(given_up(1))
    if is_asked_for:
        server.ping(b"sidestep")
    server.take_output()
    pong = frames.build_ping(b"sidestep", is_ack=True)
    found = server.receive(pong + given_up(601) + pong + given_up(1201))
    assert isinstance(found[-1], ConnectionTerminated)
    assert len([each for each in found if isinstance(each, StreamReset)]) == (
        400 if is_asked_for else 100
    )


def test_answer_to_a_stream_that_is_gone_is_nothing_and_to_none_is_a_fault() -> None:
    client, _found = client_after()
    client.reset(1, ErrorCode.CANCEL)
    assert client.receive(response(1, status="200")) == []
    assert client.receive(frame(FrameType.DATA, 0, 1, b"late")) == []
    assert client.receive(frames.build_reset(1, 8)) == []
    assert client.receive(frames.build_window_update(1, 5)) == []
    (found,) = client.receive(response(3, status="200"))
    assert isinstance(found, ConnectionTerminated)


def test_calls_for_a_stream_that_is_gone_do_nothing() -> None:
    server, _found = server_after(request(1), frames.build_reset(1, 8))
    server.take_output()
    server.respond(1, 200)
    assert server.send_some(1, b"data", 4) == 0
    server.end(1)
    server.acknowledge(1, 5)
    server.reset(1, 8)
    assert not server.has_output


def test_second_answer_is_our_defect() -> None:
    server, _found = server_after(request(1))
    server.respond(1, 200)
    with pytest.raises(LocalProtocolError, match="twice"):
        server.respond(1, 503)


def test_refusal_after_our_end_is_our_defect() -> None:
    server, _found = server_after(request(1))
    server.end(1)
    assert server.send_some(1, b"more", 4) == 0
    with pytest.raises(LocalProtocolError, match="SEND_END on a stream in HALF_CLOSED_LOCAL"):
        server.respond(1, 503)


def test_refusal_of_a_request_that_has_ended_needs_no_reset() -> None:
    server, _found = server_after(request(1, ends=True))
    server.take_output()
    server.respond(1, 503)
    assert server.stream_count == 0
    assert frames.build_reset(1, ErrorCode.NO_ERROR) not in server.take_output()


def test_stream_on_a_connection_that_takes_none_is_our_defect() -> None:
    with pytest.raises(LocalProtocolError):
        Connection(Role.SERVER).open_stream("10.0.0.1:80", {})


def test_goodbye_is_said_once() -> None:
    server, _found = server_after(request(1))
    server.take_output()
    server.drain()
    server.drain()
    assert server.take_output() == frames.build_goaway(1, ErrorCode.NO_ERROR)
    server.close()
    server.close()
    assert server.take_output() == frames.build_goaway(1, ErrorCode.NO_ERROR)


def test_draining_server_refuses_what_comes_after() -> None:
    server, _found = server_after()
    server.drain()
    server.take_output()
    assert server.receive(request(1)) == []
    assert server.take_output() == frames.build_reset(1, ErrorCode.REFUSED_STREAM)
    assert server.receive(frame(FrameType.DATA, 0, 1, b"on the way")) == []
    assert not server.is_terminated


def test_goaway_to_a_server_resets_nothing() -> None:
    server, found = server_after(request(1), frames.build_goaway(0, 0))
    assert found[-1] == GoAwayReceived(0, ErrorCode.NO_ERROR)
    assert server.stream_count == 1


def test_peer_with_small_frames_gets_small_frames() -> None:
    server, _found = server_after(request(1), frames.build_window_update(1, 100_000))
    server.receive(frames.build_window_update(0, 100_000))
    server.respond(1, 200)
    server.take_output()
    send(server, 1, b"x" * 40_000)
    server.end(1)
    written, sizes, flags = server.take_output(), [], []
    while written:
        length, frame_type, flag, _stream = frames.parse_head(memoryview(written))
        assert frame_type == FrameType.DATA
        sizes.append(length)
        flags.append(flag)
        written = written[9 + length :]
    assert sizes == [16384, 16384, 7232, 0]
    assert flags == [0, 0, 0, frames.END_STREAM]


def test_long_headers_are_sent_in_parts_that_the_peer_takes() -> None:
    pair = Pair(server_limits=Limits(frame_bytes=16384, header_list_bytes=60_000))
    pair.settle()
    # Not compressible: hpack's Huffman code has the shortest codes for a few letters only.
    pair.client.open_stream("10.0.0.1:80", {"baggage": "\x7f" * 14_000})
    pair.settle()
    assert isinstance(pair.server_events[-1], ConnectRequested)
    assert len(pair.server_events[-1].headers["baggage"]) == 14_000


def test_smaller_window_may_go_below_zero_and_come_back() -> None:
    server, _found = server_after(request(1))
    server.respond(1, 200)
    send(server, 1, b"x" * 60_000)
    assert server.receive(frames.build_settings({Setting.INITIAL_WINDOW_SIZE: 1000})) == [
        SettingsReceived()
    ]
    assert server.send_some(1, PLENTY, len(PLENTY)) == 0
    assert server.receive(frames.build_window_update(1, 59_001)) == [WindowOpened(1)]
    assert server.send_some(1, PLENTY, len(PLENTY)) == 1


def test_stream_window_beyond_what_can_be_counted_costs_the_stream() -> None:
    server, found = server_after(
        request(1), frames.build_window_update(1, 2**31 - 1), request(3),
        frames.build_window_update(3, 0),
    )  # fmt: skip
    assert StreamReset(1, ErrorCode.FLOW_CONTROL_ERROR) in found
    assert StreamReset(3, ErrorCode.PROTOCOL_ERROR) in found
    assert not server.is_terminated


def test_peer_that_breaks_the_connection_window_is_gone() -> None:
    limits = Limits(stream_window=200_000, connection_window=1000)
    server = Connection(Role.SERVER, limits)
    opening = server.take_output()
    assert frames.build_window_update(0, 0)[:9] not in opening  # nothing to add to the default
    server.receive(frames.PREFACE + frames.build_settings({}) + request(1))
    (found,) = server.receive(frame(FrameType.DATA, 0, 1, b"x" * 1001))
    assert isinstance(found, ConnectionTerminated)
    assert found.code == ErrorCode.FLOW_CONTROL_ERROR


def test_size_that_the_peer_names_for_our_header_table_is_answered_once() -> None:
    for size in (0, 4096, 2**32 - 1):
        server, _found = server_after(
            frames.build_settings({Setting.HEADER_TABLE_SIZE: size}), request(1), request(3)
        )
        server.respond(1, 200)
        # RFC 7541 §4.2: the size that we use, which is none, at the start of the next block.
        assert frame(FrameType.HEADERS, 4, 1, b"\x20\x88") in server.take_output()
        server.respond(3, 200)
        assert frame(FrameType.HEADERS, 4, 3, b"\x88") in server.take_output()


def test_data_of_a_request_is_handed_on_before_it_is_complete() -> None:
    server, _found = server_after(request(1))
    (found,) = server.receive(frames.build_head(10, FrameType.DATA, 1, 1) + b"half")
    assert isinstance(found, DataReceived)
    assert bytes(found.data) == b"half"
    assert server.receive(b"-other")[-1] == StreamEnded(1)


def test_resets_of_streams_that_were_served_never_end_the_connection() -> None:
    pair = Pair()
    for _ in range(1000):
        pair.client.reset(pair.open(), ErrorCode.CONNECT_ERROR)
        pair.settle()
    assert not pair.server.is_terminated
    assert not pair.client.is_terminated


def test_warned_client_opens_no_more_and_what_it_has_opened_is_served() -> None:
    pair = Pair()
    first = pair.open()
    pair.server.warn()
    on_the_way = pair.client.open_stream("10.0.0.1:81", {})  # before the warning arrives
    pair.settle()
    assert not pair.client.may_open
    asked = [event for event in pair.server_events if isinstance(event, ConnectRequested)]
    assert [event.stream_id for event in asked] == [first, on_the_way]
    pair.server.respond(on_the_way, 200)
    send(pair.client, first, b"still here")
    pair.settle()
    assert ResponseReceived(on_the_way, 200) in pair.client_events
    assert data_of(pair.server_events, first) == b"still here"


def sent_payloads(pair: Pair, stream_id: int, data: bytes, limit: int) -> tuple[int, bytes]:
    """Send some and return how much was taken, and what arrived for it."""
    before = len(data_of(pair.server_events, stream_id))
    taken = pair.client.send_some(stream_id, data, limit)
    pair.settle()
    return taken, data_of(pair.server_events, stream_id)[before:]


def test_some_is_sent_as_far_as_limit_and_windows_allow() -> None:
    pair = Pair(server_limits=Limits(stream_window=100))
    first = pair.open()
    assert sent_payloads(pair, first, b"abcdef", 4) == (4, b"abcd")
    assert sent_payloads(pair, first, b"abc", 4) == (3, b"abc")
    assert sent_payloads(pair, first, b"x" * 200, 1000) == (93, b"x" * 93)
    assert sent_payloads(pair, first, b"x", 1000) == (0, b"")  # the stream's window is used up
    assert pair.client.send_some(99, b"x", 1000) == 0  # there is no such stream


def test_some_is_sent_as_far_as_the_connections_window_allows() -> None:
    limits = Limits(stream_window=100_000, connection_window=0)
    pair = Pair(server_limits=limits)
    stream_id = pair.open()
    taken = pair.client.send_some(stream_id, b"x" * 100_000, 100_000)
    assert taken == frames.DEFAULT_WINDOW


def test_some_is_split_into_frames_that_the_peer_takes() -> None:
    pair = Pair(server_limits=Limits(frame_bytes=frames.DEFAULT_FRAME_BYTES))
    stream_id = pair.open()
    data = bytes(range(256)) * 200
    assert pair.client.send_some(stream_id, data, len(data)) == len(data)
    output = pair.client.take_output()
    first, frame_type, _flags, _stream_id = frames.parse_head(memoryview(output), 0)
    assert (first, frame_type) == (frames.DEFAULT_FRAME_BYTES, FrameType.DATA)
    pair.server_events += pair.server.receive(output)
    assert data_of(pair.server_events, stream_id) == data


@pytest.mark.parametrize("cut", [9, 12], ids=["after the head", "in the payload"])
@pytest.mark.parametrize("is_connected", [True, False])
def test_payload_may_come_after_its_head(cut: int, is_connected: bool) -> None:
    whole = frame(FrameType.DATA, 0, 1, b"hello")
    server, found = server_after(request(1))
    if is_connected:
        server.respond(1, 200)
    for part in (whole[:cut], whole[cut:]):
        found += server.receive(part)
    assert data_of(found, 1) == b"hello"
    assert not server.is_terminated


def test_padding_that_uses_up_the_connections_window_is_given_back() -> None:
    server, _found = server_after(request(1))
    server.take_output()
    padded = frame(FrameType.DATA, frames.PADDED, 1, b"\0" + b"x" * 1_000_000)
    for _ in range(12):
        server.acknowledge(
            1, sum(len(e.data) for e in server.receive(padded) if isinstance(e, DataReceived))
        )
    assert not server.is_terminated
    assert frames.build_head(4, FrameType.WINDOW_UPDATE, 0, 0) in server.take_output()
