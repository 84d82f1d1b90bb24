"""The relay between two channels in memory: data, back-pressure, FIN and RST."""

from __future__ import annotations

import pytest

from agent.tunnel.buffers import HIGH_WATER
from agent.tunnel.relay import Relay
from tests.support.memory_channel import MemoryChannel


class Joined:
    """Two channels, their relay, and what it reported."""

    def __init__(self, left: int = 1 << 62, right: int = 1 << 62) -> None:
        self.left, self.right = MemoryChannel(left), MemoryChannel(right)
        self.reports: list[tuple[int, int, bool]] = []
        self.relay = Relay(self.left, self.right, lambda *report: self.reports.append(report))

    def side(self, name: str) -> tuple[MemoryChannel, MemoryChannel]:
        """Return one side and the other."""
        return (self.left, self.right) if name == "left" else (self.right, self.left)


both_ways = pytest.mark.parametrize("side", ["left", "right"])


@both_ways
def test_data_comes_out_on_the_other_side_in_order(side: str) -> None:
    joined = Joined()
    near, far = joined.side(side)
    near.on_data(b"one ")
    near.on_data(memoryview(b"two"))
    assert far.delivered == b"one two"
    assert near.delivered == b""
    assert joined.reports == []


@both_ways
def test_half_close_is_passed_on_and_the_other_direction_goes_on(side: str) -> None:
    joined = Joined()
    near, far = joined.side(side)
    near.on_data(b"question")
    near.on_end()
    assert (far.delivered, far.has_sent_end) == (b"question", True)
    assert joined.reports == []
    far.on_data(b"answer")
    assert (near.delivered, near.has_sent_end) == (b"answer", False)
    far.on_end()
    assert near.has_sent_end
    assert near.calls[-1] == far.calls[-1] == "close"
    sent, received = (8, 6) if side == "left" else (6, 8)
    assert joined.reports == [(sent, received, False)]


@both_ways
def test_end_waits_for_the_data_before_it(side: str) -> None:
    joined = Joined(**{"right" if side == "left" else "left": 3})
    near, far = joined.side(side)
    near.on_data(b"question")
    near.on_end()
    far.on_end()
    assert (far.delivered, far.has_sent_end) == (b"que", False)
    assert joined.reports == []
    assert "close" not in near.calls
    far.drain()
    assert (far.delivered, far.has_sent_end) == (b"question", True)
    assert near.calls[-1] == far.calls[-1] == "close"
    assert len(joined.reports) == 1


@both_ways
def test_slow_side_pauses_the_fast_one_once_and_draining_resumes_it(side: str) -> None:
    joined = Joined(**{"right" if side == "left" else "left": 0})
    near, far = joined.side(side)
    near.on_data(b"x" * HIGH_WATER)
    assert near.calls == []  # at the mark is not above it
    near.on_data(b"x")
    assert near.calls == ["pause"]
    near.on_data(b"x")  # was on its way already
    assert near.calls == ["pause"]
    assert far.calls == []  # the other direction is not touched
    far.on_data(b"answer")
    assert near.delivered == b"answer"
    far.drain()
    assert near.calls == ["pause", "resume"]
    assert len(far.delivered) == HIGH_WATER + 2
    far.on_drained()
    assert near.calls == ["pause", "resume"]


@both_ways
def test_reset_is_passed_on_at_once_whatever_is_buffered(side: str) -> None:
    joined = Joined(**{"right" if side == "left" else "left": 0})
    near, far = joined.side(side)
    near.on_data(b"never delivered")
    near.on_abort()
    assert near.calls == far.calls == ["abort"]
    sent, received = (15, 0) if side == "left" else (0, 15)
    assert joined.reports == [(sent, received, True)]


@both_ways
def test_end_that_comes_while_a_side_is_failing_is_no_success(side: str) -> None:
    joined = Joined()
    near, far = joined.side(side)
    near.on_end()
    near.is_broken = True
    far.on_end()
    assert joined.reports == []
    near.on_abort()
    assert [was_aborted for _sent, _received, was_aborted in joined.reports] == [True]
    assert near.calls[-1] == far.calls[-1] == "abort"


@both_ways
@pytest.mark.parametrize("other_ended", [False, True])
def test_what_was_said_before_end_and_reset_is_delivered(side: str, other_ended: bool) -> None:
    joined = Joined(**{"right" if side == "left" else "left": 3})
    near, far = joined.side(side)
    near.on_data(b"answer")
    near.on_end()
    if other_ended:
        far.on_end()
    near.on_abort()
    assert joined.reports == []
    assert "abort" not in far.calls
    far.drain()
    assert (far.delivered, far.has_sent_end, far.calls[-1]) == (b"answer", True, "hang up")
    assert [was_aborted for _sent, _received, was_aborted in joined.reports] == [True]


@both_ways
def test_reader_of_what_was_said_last_may_go_as_well(side: str) -> None:
    joined = Joined(**{"right" if side == "left" else "left": 3})
    near, far = joined.side(side)
    near.on_data(b"answer")
    near.on_end()
    near.on_abort()
    far.on_abort()
    far.on_drained()
    assert far.calls[-1] == "abort"
    assert [was_aborted for _sent, _received, was_aborted in joined.reports] == [True]


def test_reset_after_half_close_is_still_passed_on() -> None:
    joined = Joined()
    joined.left.on_end()
    joined.right.on_abort()
    assert joined.left.calls == ["abort"]
    assert joined.reports == [(0, 0, True)]


def test_nothing_is_reported_twice() -> None:
    joined = Joined()
    joined.relay.abort()
    joined.relay.abort()
    joined.left.on_end()
    joined.right.on_end()
    joined.left.on_drained()
    assert joined.reports == [(0, 0, True)]
    joined = Joined()
    joined.left.on_end()
    joined.relay.abort()
    joined.left.on_abort()  # was on its way
    assert joined.reports == [(0, 0, True)]
    joined = Joined()
    joined.left.on_end()
    joined.right.on_end()
    joined.right.on_drained()
    joined.relay.abort()
    assert joined.reports == [(0, 0, False)]
    assert "abort" not in joined.left.calls
