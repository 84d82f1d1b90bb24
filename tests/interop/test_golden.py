"""Header sets as they are on the wire, byte for byte: ours, and what an Envoy 1.40 sent."""

from __future__ import annotations

import pytest

from agent.tunnel import frames
from agent.tunnel.connection import Connection, Role
from agent.tunnel.events import ConnectRequested, Event, ResponseReceived

AUTHORITY = "10.244.2.3:8080"

# An Envoy as a client: SETTINGS, a window, two CONNECTs to one place, of which the second is an
# index into the table that the first has filled.
ENVOY_CLIENT = bytes.fromhex(
    "00001e040000000000000200000000000100001000000800000000000300000400000401000000"
    "000004080000000000017f0001"
    "0000160104000000014207434f4e4e454354418b0817134d2e25d9b8f01e07"
    "000000040100000000"
    "000002010400000003bfbe"
)
ENVOY_THIRD = bytes.fromhex("000002010400000005bfbe")
# An Envoy as a server: 200 with a date and `server: envoy`, then 503.
ENVOY_SERVER = bytes.fromhex(
    "000018040000000000000100001000000800000001000300000400000401000000"
    "000000040100000000"
    "000004080000000000017f0001"
    "00001f010400000001886196df697e94134a693f75040138a085700d5c0b8a62d1bf76842d5dcfeb"
    "00001501040000000348033530330f0d0239385f87497ca58ae819aac1c0"
)
OUR_CONNECT = (
    "000071010400000001"
    "0207434f4e4e454354"  # :method CONNECT
    "010f31302e3234342e322e333a38303830"  # :authority
    "0007626167676167652b6b38732e6e616d6573706163652e6e616d653d73686f702c"  # baggage
    "6b38732e706f642e6e616d653d636c69656e74"
    "0009666f7277617264656416666f723d2231302e3234342e312e323a343030303022"  # forwarded
)


# INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE; then ENABLE_PUSH of 0 of a client, or
# MAX_CONCURRENT_STREAMS of a server; and the connection's window.
COMMON = "0004002000000005001000000006000040" + "00"
WINDOW = "000004080000000000" + "00ff0001"
OUR_OPENINGS = {
    Role.CLIENT: (
        "505249202a20485454502f322e300d0a0d0a534d0d0a0d0a"
        "000018040000000000" + COMMON + "000200000000" + WINDOW
    ),
    Role.SERVER: "000018040000000000" + COMMON + "0003000000c8" + WINDOW,
}


def client() -> Connection:
    made = Connection(Role.CLIENT)
    made.receive(frames.build_settings({}))
    made.take_output()
    return made


@pytest.mark.parametrize("role", Role)
def test_our_opening(role: Role) -> None:
    assert Connection(role).take_output().hex() == OUR_OPENINGS[role]


def test_our_connect() -> None:
    connection = client()
    baggage = "k8s.namespace.name=shop,k8s.pod.name=client"
    headers = {"baggage": baggage, "forwarded": 'for="10.244.1.2:40000"'}
    connection.open_stream(AUTHORITY, headers)
    assert connection.take_output().hex() == OUR_CONNECT


def test_our_answers() -> None:
    server = Connection(Role.SERVER)
    server.receive(frames.PREFACE + ENVOY_CLIENT)
    server.take_output()
    server.respond(1, 200)
    # The Envoy named a size for our header table: 0 in answer, once (RFC 7541 §4.2).
    assert server.take_output().hex() == "0000020104000000012088"
    server.respond(3, 401)
    expected = "0000050105000000030803343031" + "00000403000000000300000000"
    assert server.take_output().hex() == expected
    server.receive(ENVOY_THIRD)
    server.respond(5, 503)
    # END_STREAM, and RST_STREAM(NO_ERROR): no more of the request is wanted (RFC 9113 §8.1).
    expected = "0000050105000000050803353033" + "00000403000000000500000000"
    assert server.take_output().hex() == expected


def test_connect_of_an_envoy() -> None:
    found = Connection(Role.SERVER).receive(frames.PREFACE + ENVOY_CLIENT)
    requests = [event for event in found if isinstance(event, ConnectRequested)]
    wanted = {":method": "CONNECT", ":authority": AUTHORITY}
    assert [(event.stream_id, event.headers) for event in requests] == [(1, wanted), (3, wanted)]
    assert [event.fault for event in requests] == [None, None]


def test_answers_of_an_envoy() -> None:
    connection = client()
    connection.open_stream(AUTHORITY, {})
    connection.open_stream("10.244.2.3:9", {})
    found: list[Event] = connection.receive(ENVOY_SERVER)
    answers = [event for event in found if isinstance(event, ResponseReceived)]
    assert answers == [ResponseReceived(1, 200), ResponseReceived(3, 503)]


def test_some_is_what_windows_and_limit_allow() -> None:
    connection = client()
    stream_id = connection.open_stream(AUTHORITY, {})
    connection.take_output()
    data = bytes(100_000)
    assert connection.send_some(stream_id, data, 10) == 10
    assert connection.take_parts() == [frames.build_data_head(10, 0, stream_id), data[:10]]
    assert connection.send_some(stream_id, data, 1 << 20) == frames.DEFAULT_WINDOW - 10
    sizes = [len(part) for part in connection.take_parts()]
    assert sizes == [9, 16384, 9, 16384, 9, 16384, 9, 16373]
    assert connection.send_some(stream_id, data, 1 << 20) == 0
    assert connection.send_some(stream_id + 2, data, 1 << 20) == 0
