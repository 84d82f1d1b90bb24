"""A stream of a real tunnel as a channel: bytes, both ends, windows, resets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from agent.tunnel.connection import Limits
from agent.tunnel.frames import ErrorCode
from tests.support.allocated import allocated
from tests.support.loop import run_rounds

if TYPE_CHECKING:
    from tests.support.joined import Tunnel


def test_stream_carries_bytes_and_ends_both_ways(tunnel: Tunnel) -> None:
    near, far = tunnel.open()
    near.channel.write(b"question")
    near.channel.finish()
    tunnel.until(lambda: far.seen)
    assert (bytes(far.received), far.seen) == (b"question", ["end"])
    far.channel.write(b"answer")
    far.channel.finish()
    tunnel.until(lambda: "end" in near.seen)
    assert bytes(near.received) == b"answer"
    near.channel.close()
    far.channel.close()
    assert (tunnel.client.idle, tunnel.server.idle) == (1, 1)
    assert tunnel.client.session.channels == {}


@pytest.mark.parametrize("side", ["client", "server"])
def test_reset_of_one_end_is_told_to_the_other(tunnel: Tunnel, side: str) -> None:
    near, far = tunnel.open() if side == "client" else reversed(tunnel.open())
    near.channel.abort()
    near.channel.abort()
    near.channel.write(b"nobody")
    near.channel.resume()
    tunnel.until(lambda: far.seen)
    assert far.seen == ["abort"]
    assert near.seen == []
    assert tunnel.client.session.channels == tunnel.server.session.channels == {}


def test_reader_that_pauses_stops_the_writer_at_the_window(tunnel: Tunnel) -> None:
    near, far = tunnel.open()
    far.channel.pause()
    window = Limits().stream_window
    data = b"".join(number.to_bytes(4, "big") for number in range(window // 2))  # two windows
    near.channel.write(data)
    tunnel.until(lambda: len(far.received) == window)
    run_rounds(tunnel.reactor, 10)
    assert len(far.received) == window
    assert near.channel.buffered == len(data) - window
    assert near.seen == []
    far.channel.resume()
    tunnel.until(lambda: len(far.received) == len(data))
    assert bytes(far.received) == data
    assert near.seen == ["drained"]


def test_stalled_stream_stalls_no_other(tunnel: Tunnel) -> None:
    stalled, stalled_end = tunnel.open()
    other, other_end = tunnel.open()
    stalled_end.channel.pause()
    stalled.channel.write(b"x" * (8 << 20))
    other.channel.write(b"y" * (8 << 20))
    tunnel.until(lambda: len(other_end.received) == 8 << 20)
    assert stalled.channel.buffered == (8 << 20) - Limits().stream_window


def test_bytes_and_an_answer_before_the_stream_is_joined_are_dropped(tunnel: Tunnel) -> None:
    stream_id = tunnel.client.session.open_stream("10.0.0.1:80", {})
    tunnel.client.session.channels[stream_id].write(b"early")
    tunnel.client.session.channels[stream_id].finish()
    tunnel.until(lambda: tunnel.server.requests)
    tunnel.server.session.respond(stream_id, 200)
    run_rounds(tunnel.reactor, 5)
    assert tunnel.client.reasons == tunnel.server.reasons == []


def test_views_leave_at_once_and_what_has_no_room_is_kept_in_order(tunnel: Tunnel) -> None:
    near, far = tunnel.open()
    window = Limits().stream_window
    buffer = bytearray(b"x" * window + b"y" * 100)
    near.channel.write(memoryview(buffer))
    assert near.channel.buffered == near.channel.share.held == 100
    buffer[:] = bytes(len(buffer))  # the view was of a buffer that the next reader needs
    near.channel.write(b"z")
    assert near.channel.buffered == 101
    near.channel.finish()
    tunnel.until(lambda: far.seen)
    assert bytes(far.received) == b"x" * window + b"y" * 100 + b"z"
    assert near.channel.share.held == 0


def test_small_messages_that_nobody_reads_cost_little_more_than_is_in_them(
    tunnel: Tunnel,
) -> None:
    near, far = tunnel.open()
    far.channel.pause()
    window = Limits().stream_window
    near.channel.write(bytes(window))
    messages = [b"%d " % number for number in range(20_000)]

    def write() -> None:
        for message in messages:
            near.channel.write(message)

    assert allocated(write) < near.channel.buffered * 1.5
    far.channel.resume()
    tunnel.until(lambda: not near.channel.buffered and len(far.received) > window)
    tail = b"".join(messages)
    tunnel.until(lambda: len(far.received) == window + len(tail))
    assert far.received[window:] == tail


def test_channel_that_gives_up_is_reset_at_both_ends(tunnel: Tunnel) -> None:
    near, far = tunnel.open()
    far.channel.pause()
    near.channel.write(bytes(2 * Limits().stream_window))
    assert near.channel.share.held
    near.channel.give_up()
    assert near.seen == ["abort"]
    assert near.channel.buffered == near.channel.share.held == 0
    tunnel.until(lambda: far.seen)
    assert far.seen == ["abort"]


def test_channel_that_is_closed_takes_nothing_more(tunnel: Tunnel) -> None:
    near, _far = tunnel.open()
    near.channel.close()
    near.channel.close()
    near.channel.write(b"nobody")
    near.channel.abort()
    assert tunnel.client.idle == 1
    assert near.channel.buffered == 0


def test_hanging_up_after_the_own_end_says_so_behind_it(tunnel: Tunnel) -> None:
    near, far = tunnel.open()
    far.channel.write(b"answer")
    far.channel.finish()
    far.channel.hang_up()
    tunnel.until(lambda: "abort" in near.seen)
    assert (bytes(near.received), near.seen) == (b"answer", ["end", "abort"])
    assert near.channel.reset_code == ErrorCode.NO_ERROR
    assert far.seen == []
