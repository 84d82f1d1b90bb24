"""The event loop over real pipes and sockets."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from agent.tunnel.reactor import BROKEN, READ, WRITE, Reactor
from tests.support.loop import run_rounds, run_until

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with ExitStack() as stack:
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        stack.enter_context(theirs)
        yield ours, theirs


def test_descriptor_is_reported_when_it_is_ready(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    reactor, seen = Reactor(), list[int]()
    reactor.watch(ours.fileno(), READ, seen.append)
    run_rounds(reactor, 3)
    assert seen == []
    theirs.send(b"x")
    run_until(reactor, lambda: seen)
    assert seen == [READ]


def test_change_reports_other_events_and_forget_none(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    reactor, seen = Reactor(), list[int]()
    reactor.watch(ours.fileno(), READ, seen.append)
    theirs.send(b"x")
    reactor.change(ours.fileno(), WRITE)
    run_until(reactor, lambda: seen)
    assert seen[0] == WRITE
    reactor.forget(ours.fileno())
    reactor.forget(ours.fileno())  # twice is harmless
    seen.clear()
    run_rounds(reactor, 3)
    assert seen == []


def test_end_of_the_other_side_is_reported_whatever_is_watched(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    reactor, seen = Reactor(), list[int]()
    reactor.watch(ours.fileno(), 0, seen.append)
    theirs.close()
    run_until(reactor, lambda: seen)
    assert seen[0] & BROKEN


def test_descriptor_that_another_callback_forgot_is_not_reported() -> None:
    # Both are ready in one round; the first to be called closes the other.
    reactor, called = Reactor(), list[int]()
    ends = [os.pipe() for _ in range(2)]
    readers = [reader for reader, _writer in ends]

    def on_ready(own: int) -> None:
        called.append(own)
        for reader in readers:
            reactor.forget(reader)

    for reader, writer in ends:
        os.write(writer, b"x")
        reactor.watch(reader, READ, lambda _ready, own=reader: on_ready(own))  # type: ignore[misc]
    run_rounds(reactor, 3)
    for end in ends:
        for fd in end:
            os.close(fd)
    assert len(called) == 1


def test_what_was_reported_of_a_descriptor_is_not_for_the_next_one_of_its_number() -> None:
    reactor, stale = Reactor(), list[int]()
    with ExitStack() as stack:
        ends = [stack.enter_context(each) for _ in range(3) for each in socket.socketpair()]
        first, second, silent = ends[::2]

        def replace(_ready: int) -> None:
            reactor.forget(first.fileno())
            reactor.forget(second.fileno())
            os.dup2(silent.fileno(), second.fileno())
            reactor.watch(second.fileno(), READ, stale.append)

        reactor.watch(first.fileno(), READ, replace)
        reactor.watch(second.fileno(), READ, lambda _ready: None)
        for other in ends[1:4:2]:
            other.send(b"x")
        run_rounds(reactor, 3)
        assert stale == []
        ends[5].send(b"x")
        run_until(reactor, lambda: stale)


def test_call_next_runs_before_the_next_descriptor_has_its_turn() -> None:
    reactor, seen = Reactor(), list[str]()
    with ExitStack() as stack:
        ends = [stack.enter_context(each) for _ in range(2) for each in socket.socketpair()]
        for own, other in zip(ends[::2], ends[1::2], strict=True):
            other.send(b"x")

            def on_ready(_ready: int, own: socket.socket = own) -> None:
                seen.append("ready")
                own.recv(1)
                reactor.call_soon(lambda: seen.append("soon"))
                reactor.call_next(lambda: seen.append("next"))

            reactor.watch(own.fileno(), READ, on_ready)
        run_until(reactor, lambda: seen.count("soon") == 2)
    assert seen == ["ready", "next", "ready", "next", "soon", "soon"]


def test_timers_fire_in_order_of_their_time() -> None:
    reactor, fired = Reactor(), list[str]()
    reactor.call_later(0.02, lambda: fired.append("late"))
    reactor.call_later(0.01, lambda: fired.append("early"))
    canceled = reactor.call_later(0.0, lambda: fired.append("never"))
    reactor.call_later(0.0, lambda: fired.append("first"))
    reactor.call_later(0.0, lambda: fired.append("second"))
    canceled.cancel()
    reactor.call_later(0.03, reactor.stop)
    reactor.run()  # waits in epoll for each: nothing else is there to do
    assert fired == ["first", "second", "early", "late"]


def test_call_soon_runs_in_the_next_round_and_lets_input_through(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    reactor, seen = Reactor(), list[str]()

    def again() -> None:
        seen.append("again")
        if seen.count("again") < 5:
            reactor.call_soon(again)

    def on_ready(_ready: int) -> None:
        seen.append("input")
        ours.recv(1)

    reactor.watch(ours.fileno(), READ, on_ready)
    theirs.send(b"x")
    reactor.call_soon(again)
    run_until(reactor, lambda: seen.count("again") == 5)
    assert seen[:3] == ["input", "again", "again"]


def test_stop_ends_the_run_after_the_round() -> None:
    reactor, seen = Reactor(), list[str]()
    reactor.call_soon(reactor.stop)
    reactor.call_soon(lambda: seen.append("same round"))
    reactor.run()
    assert seen == ["same round"]


def test_cancelled_timers_go_long_before_they_are_due() -> None:
    reactor, seen = Reactor(), list[str]()
    kept = [reactor.call_later(0.0, lambda: seen.append("kept")) for _ in range(10)]
    for _ in range(10_000):
        reactor.call_later(300.0, lambda: seen.append("cancelled")).cancel()
        assert len(reactor._timers) <= 10 + 2 * 64
    kept[0].cancel()
    run_until(reactor, lambda: len(seen) >= 9)
    assert seen == ["kept"] * 9
    kept[1].cancel()  # after it has fired: nothing to forget
    assert reactor._cancelled <= len(reactor._timers)
