"""Closing in order: the peer gets all of it, and nobody is waited for in vain."""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING

import pytest

from agent.tunnel import lingering, sockets
from agent.tunnel.lingering import MOST_STALLS, linger
from agent.tunnel.reactor import Reactor
from tests.support.loop import run_rounds, run_until
from tests.support.wire import tcp_pair

if TYPE_CHECKING:
    from collections.abc import Iterator


class Closing:
    """A socket that is closed in order, and its peer."""

    def __init__(self) -> None:
        self.reactor = Reactor()
        ours, self.peer = tcp_pair()
        ours.send(b"the last words")
        self.fd = ours.fileno()
        self.gone: list[bool] = []
        linger(self.reactor, ours, lambda: self.gone.append(True))

    def wait_gone(self) -> None:
        run_until(self.reactor, lambda: self.gone)
        assert self.gone == [True]
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(self.fd)


@pytest.fixture
def closing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Closing]:
    monkeypatch.setattr(lingering, "STALL_SECONDS", 0.1)
    made = Closing()
    with made.peer:
        yield made


def test_peer_that_still_writes_is_not_reset_and_reads_all(closing: Closing) -> None:
    for _ in range(3):
        closing.peer.send(b"x" * 100_000)
        run_rounds(closing.reactor, 5)
    assert not closing.gone
    assert closing.peer.recv(64) == b"the last words"
    assert closing.peer.recv(64) == b""
    closing.peer.shutdown(socket.SHUT_WR)
    closing.wait_gone()


def test_peer_that_has_reset_is_not_waited_for(closing: Closing) -> None:
    sockets.abort(closing.peer)
    run_rounds(closing.reactor, 5)
    closing.wait_gone()
    reset, peer = tcp_pair()
    sockets.abort(peer)
    linger(closing.reactor, reset, lambda: closing.gone.append(True))
    run_until(closing.reactor, lambda: len(closing.gone) == 2)


def test_peer_that_does_nothing_is_left(closing: Closing) -> None:
    begun = time.monotonic()
    closing.wait_gone()
    assert time.monotonic() - begun < 3 * lingering.STALL_SECONDS


def test_peer_that_goes_on_for_ever_is_left(closing: Closing) -> None:
    begun = time.monotonic()

    def send() -> None:
        if not closing.gone:
            closing.peer.send(b"and another thing")
            closing.reactor.call_later(lingering.STALL_SECONDS / 10, send)

    send()
    closing.wait_gone()
    assert time.monotonic() - begun > (MOST_STALLS - 1) * lingering.STALL_SECONDS
