"""A TCP socket as a channel, over real connections on loopback."""

from __future__ import annotations

import errno
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from agent.tunnel import sockets, tcp
from agent.tunnel.buffers import Share
from agent.tunnel.reactor import READ, Reactor
from agent.tunnel.sockets import LINGER_RESET
from agent.tunnel.tcp import TcpChannel
from tests.support.allocated import allocated
from tests.support.loop import count_rounds, run_rounds, run_until

if TYPE_CHECKING:
    from collections.abc import Iterator


class End:
    """A channel with all that it reported, and the socket on the other end of its connection."""

    def __init__(self, reactor: Reactor, own: socket.socket, peer: socket.socket) -> None:
        self.reactor = reactor
        self.own = own
        self.peer = peer
        self.channel = TcpChannel(reactor, own, Share("shop/client-0"))
        self.received = b""
        self.seen: list[str] = []
        self.channel.on_data = self._on_data
        self.channel.on_end = lambda: self.seen.append("end")
        self.channel.on_abort = lambda: self.seen.append("abort")
        self.channel.on_drained = lambda: self.seen.append("drained")

    def _on_data(self, data: bytes | memoryview) -> None:
        self.received += bytes(data)

    def reset_by_peer(self) -> None:
        self.peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
        self.peer.close()

    def fill(self) -> int:
        """Write until the socket takes no more; return how much was written."""
        written = 0
        while not self.channel.buffered:
            self.channel.write(b"x" * 65536)
            written += 65536
        return written

    def read_peer(self, count: int) -> bytes:
        """Read from the peer's end while the channel writes."""
        self.peer.setblocking(False)
        parts: list[bytes] = []

        def has_all() -> bool:
            try:
                parts.append(self.peer.recv(1 << 20))
            except BlockingIOError:
                return False
            return sum(len(part) for part in parts) >= count

        run_until(self.reactor, has_all)
        return b"".join(parts)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


@pytest.fixture
def end(listener: socket.socket) -> Iterator[End]:
    with ExitStack() as stack:
        own = stack.enter_context(socket.create_connection(listener.getsockname()))
        peer = stack.enter_context(listener.accept()[0])
        own.setblocking(False)
        peer.settimeout(5)
        yield End(Reactor(), own, peer)


def test_nothing_is_read_before_start(end: End) -> None:
    end.peer.send(b"early")
    run_rounds(end.reactor, 3)
    assert end.received == b""
    end.channel.start()
    run_until(end.reactor, lambda: end.received == b"early")


def test_fin_is_reported_once_and_leaves_the_other_direction(end: End) -> None:
    end.channel.start()
    end.peer.send(b"question")
    end.peer.shutdown(socket.SHUT_WR)
    run_until(end.reactor, lambda: end.seen)
    end.channel.write(b"answer")
    end.channel.finish()
    run_rounds(end.reactor, 3)
    assert (end.received, end.seen) == (b"question", ["end"])
    assert end.peer.recv(10) == b"answer"
    assert end.peer.recv(10) == b""


def test_what_the_socket_does_not_take_is_kept_in_order_and_drained(end: End) -> None:
    written = end.fill()
    end.channel.write(b"last")
    end.channel.finish()
    assert 0 < end.channel.buffered <= 65536 + 4
    assert end.seen == []
    everything = end.read_peer(written + 4)
    assert everything == b"x" * written + b"last"
    assert end.channel.buffered == 0
    assert end.seen == ["drained"]
    assert end.peer.recv(1) == b""  # FIN, after the data


def test_small_messages_that_nobody_reads_cost_little_more_than_is_in_them(end: End) -> None:
    written = end.fill()
    before = end.channel.buffered
    messages = [b"%d " % number for number in range(20_000)]

    def write() -> None:
        for message in messages:
            end.channel.write(memoryview(message))  # as they come out of a tunnel

    assert allocated(write) < (end.channel.buffered - before) * 1.5
    tail = b"".join(messages)
    assert end.read_peer(written + len(tail))[-len(tail) :] == tail


def test_paused_channel_reads_nothing_and_goes_on(end: End) -> None:
    end.channel.start()
    end.channel.pause()
    end.peer.send(b"wait")
    run_rounds(end.reactor, 3)
    assert end.received == b""
    end.channel.resume()
    run_until(end.reactor, lambda: end.received == b"wait")


def test_abort_is_a_reset_at_the_peer_and_forgets_what_is_buffered(end: End) -> None:
    end.fill()
    end.channel.abort()
    end.channel.abort()
    with pytest.raises(ConnectionResetError):
        end.read_peer(1 << 62)
    assert end.seen == []
    end.channel.write(b"nobody")
    end.channel.finish()
    end.channel.resume()
    end.channel.close()


@pytest.mark.parametrize("is_paused", [False, True])
def test_reset_of_the_peer_is_reported_once(end: End, is_paused: bool) -> None:
    end.channel.start()
    if is_paused:
        end.channel.pause()
    end.reset_by_peer()
    run_until(end.reactor, lambda: end.seen)
    run_rounds(end.reactor, 3)
    assert end.seen == ["abort"]
    assert end.own.fileno() == -1


def test_reset_that_a_write_meets_is_reported_after_that_write(end: End) -> None:
    end.reset_by_peer()
    end.channel.write(b"into nothing")
    assert end.seen == []  # the caller of write is not called back from within it
    run_until(end.reactor, lambda: end.seen)
    assert end.seen == ["abort"]


def test_reset_that_a_finish_meets_is_reported(end: End) -> None:
    end.reset_by_peer()
    end.channel.finish()
    run_until(end.reactor, lambda: end.seen)
    assert end.seen == ["abort"]


def test_reset_while_data_is_buffered_is_reported(end: End) -> None:
    end.fill()
    end.reset_by_peer()
    run_until(end.reactor, lambda: end.seen)
    assert end.seen == ["abort"]


def test_both_fins_while_paused_keep_the_loop_at_rest(end: End) -> None:
    # epoll reports EPOLLHUP for such a socket for ever, whatever is watched.
    end.channel.start()
    end.channel.pause()
    end.channel.finish()
    end.peer.send(b"unread")
    end.peer.shutdown(socket.SHUT_WR)
    assert count_rounds(end.reactor, 0.1) < 10
    assert end.seen == []
    end.channel.resume()
    run_until(end.reactor, lambda: end.seen)
    assert (end.received, end.seen) == (b"unread", ["end"])


def test_resume_between_the_report_of_both_fins_and_its_callback_is_not_lost(end: End) -> None:
    end.channel.start()
    end.channel.pause()
    end.channel.finish()
    run_rounds(end.reactor, 3)  # the peer's ACK makes it a candidate, before the other one
    with ExitStack() as stack:
        first, other = (stack.enter_context(each) for each in socket.socketpair())
        other.send(b"x")

        def resume(_ready: int) -> None:
            end.reactor.forget(first.fileno())
            end.channel.resume()

        end.reactor.watch(first.fileno(), READ, resume)  # is ready before the channel's socket
        end.peer.send(b"unread")
        end.peer.shutdown(socket.SHUT_WR)
        run_until(end.reactor, lambda: end.seen)
    assert (end.received, end.seen) == (b"unread", ["end"])


def test_closed_channel_sends_fin_and_says_nothing_more(end: End) -> None:
    end.channel.start()
    end.channel.close()
    end.channel.close()
    assert end.peer.recv(1) == b""
    run_rounds(end.reactor, 3)
    assert end.seen == []


def test_hanging_up_is_a_reset_once_all_has_arrived(end: End) -> None:
    end.channel.start()
    end.channel.write(b"answer")
    end.channel.finish()
    run_until(end.reactor, lambda: not sockets.unacknowledged(end.own))
    end.channel.hang_up()
    assert end.peer.recv(100) == b"answer"
    with pytest.raises(BrokenPipeError):  # after a FIN; the first one would pass without a RST
        end.peer.send(b"more")


def test_hanging_up_loses_nothing(end: End) -> None:
    end.peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 15)
    end.own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    end.channel.start()
    end.channel.write(bytes(1 << 17))
    end.channel.finish()
    assert not end.channel.buffered
    end.peer.send(b"not read")  # for which closing the socket would be a reset
    end.channel.hang_up()
    received = 0
    while data := end.peer.recv(1 << 16):
        received += len(data)
    assert received == 1 << 17
    end.peer.close()
    run_until(end.reactor, lambda: end.own.fileno() < 0)


def test_channel_that_was_not_joined_says_so(end: End) -> None:
    with pytest.raises(AssertionError, match="that is not joined"):
        TcpChannel(Reactor(), end.own, Share("shop/client-0")).on_data(b"x")


# -- connect ------------------------------------------------------------------------------------


class Attempt:
    """One connect and its outcome."""

    def __init__(self, destination: tuple[str, int], family: int = socket.AF_INET) -> None:
        self.reactor = Reactor()
        self.own = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self.outcomes: list[OSError | None] = []
        tcp.connect(self.reactor, self.own, destination, self.outcomes.append)

    def wait(self) -> OSError | None:
        assert self.outcomes == []  # never from within connect
        run_until(self.reactor, lambda: self.outcomes)
        run_rounds(self.reactor, 3)
        (outcome,) = self.outcomes
        return outcome


def test_connection_that_stands_is_no_error(listener: socket.socket) -> None:
    attempt = Attempt(listener.getsockname())
    assert attempt.wait() is None
    with listener.accept()[0] as peer, attempt.own:
        peer.send(b"x")
        assert attempt.own.recv(1) == b"x"


def test_refused_connection_tells_why_and_is_closed(listener: socket.socket) -> None:
    destination = listener.getsockname()
    listener.close()
    attempt = Attempt(destination)
    outcome = attempt.wait()
    assert isinstance(outcome, OSError)
    assert outcome.errno == errno.ECONNREFUSED
    assert attempt.own.fileno() == -1


@pytest.mark.parametrize("destination", [("255.255.255.255", 1), ("::1", 1)])
def test_destination_that_cannot_be_dialed_is_reported_too(destination: tuple[str, int]) -> None:
    attempt = Attempt(destination)
    assert isinstance(attempt.wait(), OSError)
    assert attempt.own.fileno() == -1


def test_silence_ends_with_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "CONNECT_SECONDS", 0.05)
    with ExitStack() as stack:
        # A queue that is full answers no SYN.
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(2):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        attempt = Attempt(full.getsockname())
        outcome = attempt.wait()
    assert isinstance(outcome, TimeoutError)
    assert "no answer in 0.05 s" in str(outcome)


def test_connection_that_stands_outlives_the_deadline(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp, "CONNECT_SECONDS", 0.05)
    attempt = Attempt(listener.getsockname())
    with attempt.own:
        assert attempt.wait() is None
        attempt.reactor.call_later(0.1, attempt.reactor.stop)
        attempt.reactor.run()
        assert attempt.outcomes == [None]
        assert attempt.own.fileno() != -1


def test_connection_whose_holder_dies_is_reset_and_not_ended(end: End) -> None:
    end.peer.settimeout(5)
    end.own.close()  # as the kernel does for a process that is gone
    with pytest.raises(ConnectionResetError):
        end.peer.recv(1)


def test_connection_that_has_ended_both_ways_is_not_reset(end: End) -> None:
    end.peer.settimeout(5)
    end.channel.start()
    end.channel.write(b"last")
    end.channel.finish()
    end.peer.shutdown(socket.SHUT_WR)
    run_until(end.reactor, lambda: "end" in end.seen)
    end.channel.close()
    assert end.peer.recv(10) == b"last"
    assert end.peer.recv(10) == b""
