"""What moves on a connection, as evidence of a peer that may still answer."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from agent.tunnel import sockets
from agent.tunnel.life_signs import MOST_STALLS, LifeSigns
from tests.support.waiting import wait_until
from tests.support.wire import tcp_pair

if TYPE_CHECKING:
    from collections.abc import Iterator

PING = b"ping"


class Watched:
    """A socket that is looked at, and its peer."""

    def __init__(self) -> None:
        self.own, self.peer = tcp_pair()
        self.signs = LifeSigns(self.own)

    def looks(self, count: int, *, hears: bool = True) -> list[bool]:
        return [self.signs.is_over(hears=hears) for _ in range(count)]

    def wait_taken(self) -> None:
        wait_until(lambda: sockets.unacknowledged(self.own) == 0)


@pytest.fixture
def watched() -> Iterator[Watched]:
    made = Watched()
    with made.own, made.peer:
        yield made


def test_peer_that_does_nothing_is_given_up(watched: Watched) -> None:
    watched.own.send(PING)
    watched.wait_taken()
    watched.signs.expect_answer(0)
    assert watched.looks(MOST_STALLS) == [False] * (MOST_STALLS - 1) + [True]


def test_bytes_of_the_peer_begin_the_wait_anew(watched: Watched) -> None:
    watched.signs.expect_answer(0)
    watched.looks(MOST_STALLS - 1)
    watched.peer.send(b"x")
    watched.own.setblocking(True)
    watched.own.recv(1)
    assert watched.looks(MOST_STALLS)[-2:] == [False, False]
    assert watched.looks(1) == [True]


def test_bytes_that_are_taken_count_until_the_ping_is(watched: Watched) -> None:
    watched.own.send(b"before")
    watched.wait_taken()
    unsent = b"in between" + PING
    watched.signs.expect_answer(len(unsent))
    for byte in unsent:
        watched.looks(MOST_STALLS - 1)
        watched.own.send(bytes((byte,)))
        watched.wait_taken()
        assert watched.looks(1) == [False]
    watched.looks(MOST_STALLS - 1)
    watched.own.send(b"after it")
    watched.wait_taken()
    assert watched.looks(1) == [True]


def test_what_the_socket_has_and_the_peer_has_not_is_before_the_ping(watched: Watched) -> None:
    watched.peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sent = 0
    while True:
        try:
            sent += watched.own.send(bytes(65536))
        except BlockingIOError:
            break
    watched.signs.expect_answer(0)
    watched.looks(MOST_STALLS - 1)
    watched.peer.setblocking(True)
    for _ in range(3):
        before = sockets.progress(watched.own)
        while sockets.progress(watched.own) == before:
            watched.peer.recv(65536)
        assert not any(watched.looks(MOST_STALLS - 1))


def test_who_hears_no_answer_waits_while_its_own_bytes_are_taken(watched: Watched) -> None:
    watched.signs.expect_answer(0)
    watched.looks(MOST_STALLS - 1, hears=False)
    watched.own.send(b"after it")
    watched.wait_taken()
    watched.looks(MOST_STALLS - 1, hears=False)
    watched.peer.send(b"x")
    watched.own.setblocking(True)
    watched.own.recv(1)
    assert watched.looks(2, hears=False) == [False, True]
