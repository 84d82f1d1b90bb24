"""Any chunking of the bytes gives the same events; no bytes make the core raise."""

from __future__ import annotations

import itertools

import hpack
from hypothesis import given
from hypothesis import strategies as st

from agent.tunnel import frames
from agent.tunnel.connection import Connection, Limits, Role
from agent.tunnel.events import DataReceived, Event
from agent.tunnel.frames import FrameType
from tests.support.pair import Pair, data_of

GOOD_START = frames.PREFACE + frames.build_settings({})


def joined(found: list[Event]) -> list[object]:
    """Return the events with neighboring data of one stream as one."""
    result: list[object] = []
    for event in found:
        if not isinstance(event, DataReceived):
            result.append(event)
        elif result and isinstance(result[-1], tuple) and result[-1][0] == event.stream_id:
            result[-1] = (event.stream_id, result[-1][1] + bytes(event.data))
        else:
            result.append((event.stream_id, bytes(event.data)))
    return result


def feed(data: bytes, cuts: list[int]) -> tuple[list[object], bytes]:
    server = Connection(Role.SERVER, Limits(stream_window=3000, connection_window=70_000))
    found: list[Event] = []
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    for start, end in itertools.pairwise(places):
        found += server.receive(data[start:end])
    return joined(found), server.take_output()


frame_bytes = st.builds(
    lambda kind, flags, stream, payload: (
        frames.build_head(len(payload), kind, flags, stream) + payload
    ),
    st.one_of(st.sampled_from(list(FrameType)), st.integers(0, 255)),
    st.one_of(st.sampled_from([0, 1, 4, 5, 8, 9]), st.integers(0, 255)),
    st.integers(0, 7),
    st.binary(max_size=40),
)


@st.composite
def conversations(draw: st.DrawFn) -> bytes:
    """The bytes of a client that opens streams, sends, ends and resets, and some noise."""
    client = Connection(Role.CLIENT)
    client.receive(frames.build_settings({}))
    data = client.take_output()
    opened: list[int] = []
    for _ in range(draw(st.integers(0, 8))):
        step = draw(st.sampled_from(["open", "send", "end", "reset", "ping", "noise"]))
        if step == "open":
            opened.append(
                client.open_stream("10.0.0.1:80", {"baggage": "x" * draw(st.integers(0, 99))})
            )
        elif step == "ping":
            client.ping(b"12345678")
        elif step == "noise":
            data += client.take_output() + draw(frame_bytes)
        elif opened:
            stream_id = opened[-1]
            if step == "reset":
                client.reset(stream_id, 8)
            else:
                client.send_some(stream_id, b"z" * 2000, draw(st.integers(0, 2000)))
                if step == "end":
                    client.end(stream_id)
            if step != "send":
                opened.pop()
        data += client.take_output()
    return data


@given(conversations(), st.lists(st.integers(0, 100_000), max_size=40))
def test_chunking_does_not_change_the_events(data: bytes, cuts: list[int]) -> None:
    assert feed(data, cuts) == feed(data, [])


@given(st.lists(frame_bytes, max_size=20), st.lists(st.integers(0, 1000), max_size=20))
def test_no_bytes_make_the_core_raise(parts: list[bytes], cuts: list[int]) -> None:
    feed(GOOD_START + b"".join(parts), cuts)


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 5000)), max_size=40))
def test_credit_is_never_negative_and_every_byte_arrives(steps: list[tuple[int, int]]) -> None:
    pair = Pair(server_limits=Limits(stream_window=4000, connection_window=70_000))
    stream_id = pair.open()
    sent = taken = 0
    for size, take in steps:
        sent += pair.client.send_some(stream_id, b"b" * size, size)
        pair.settle()
        arrived = len(data_of(pair.server_events, stream_id))
        assert arrived == sent
        consumed = min(take, arrived - taken)
        taken += consumed
        pair.server.acknowledge(stream_id, consumed)
        pair.settle()
        assert sent - taken <= 4000


BLOCKS = [
    hpack.Encoder().encode([(":method", "CONNECT"), (":authority", "a:1")]),
    hpack.Encoder().encode([(":status", "200")]),
]
# Each frame is right by itself; only their order may be wrong.
well_formed = st.builds(
    lambda kind, ends, stream, payload: (
        frames.build_head(len(payload), kind, frames.END_HEADERS * (kind == 1) | ends, stream)
        + payload
    ),
    st.sampled_from([FrameType.HEADERS, FrameType.DATA]),
    st.integers(0, 1),
    st.sampled_from([1, 3]),
    st.sampled_from(BLOCKS),
) | st.builds(frames.build_reset, st.sampled_from([1, 3]), st.just(8))


@given(st.sampled_from(Role), st.lists(well_formed, max_size=12))
def test_no_order_of_frames_makes_the_core_raise(role: Role, parts: list[bytes]) -> None:
    connection = Connection(role)
    connection.receive(GOOD_START if role is Role.SERVER else frames.build_settings({}))
    if role is Role.CLIENT:
        connection.open_stream("10.0.0.1:80", {})
        connection.open_stream("10.0.0.1:80", {})
    for part in parts:
        connection.receive(part)
