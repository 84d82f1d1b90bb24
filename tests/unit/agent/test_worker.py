"""A worker waits for nobody while it serves, and what it has promised is delivered at its end."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import pytest

from agent import worker as worker_module
from agent.tunnel import messages
from agent.tunnel.connection import Role
from agent.tunnel.counts import COUNTS
from agent.tunnel.session import Session
from agent.worker import MOST_UNSENT, Worker
from tests.support.loop import PATIENCE_SECONDS, run_until
from tests.support.tunnel import CLIENT, SERVER, Authority, Witness, make_session
from tests.support.waiting import wait_until
from tests.support.wire import tcp_pair

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TURN_SECONDS = 0.05
PEERS = 2000  # counts of so many take more than a socket holds


@pytest.mark.parametrize("has_successor", [True, False])
def test_worker_that_retires_waits_for_its_tunnels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_successor: bool
) -> None:
    """One may hold the last bytes of a connection that is complete for both applications."""
    monkeypatch.setattr(Session, "open_count", 0)
    authority = Authority(tmp_path)
    ours, theirs = tcp_pair()
    own, control = socket.socketpair()
    with own, control:
        worker = Worker(own)
        reactor = worker._reactor
        client = Witness(
            make_session(reactor, ours, authority.context(CLIENT, Role.CLIENT), Role.CLIENT)
        )
        server = Witness(
            make_session(reactor, theirs, authority.context(SERVER, Role.SERVER), Role.SERVER)
        )
        run_until(reactor, lambda: client.is_ready and server.is_ready)
        worker._retire(has_successor)
        enough = reactor.call_later(0.3, reactor.stop)
        reactor.run()
        assert enough.callback is None  # so it was this that stopped it
        client.session.close()
        too_long = reactor.call_later(PATIENCE_SECONDS, reactor.stop)
        reactor.run()
        assert too_long.callback is not None
        assert Session.open_count == 0


class BusyWorker:
    """A worker in a thread of its own that counts all the time, and how often it could."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self.worker = Worker(channel)
        self.turns = 0
        self._later = self.worker._reactor.call_later
        self._later(TURN_SECONDS, self._turn)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.worker.run()
        self._channel.close()  # as the end of its process does

    def _turn(self) -> None:
        for peer in range(PEERS):
            COUNTS.put("opened", (("source", f"spiffe://cluster.local/ns/shop/sa/client-{peer}"),))
        self.turns += 1
        self._later(TURN_SECONDS, self._turn)

    def wait_turns(self, count: int) -> None:
        """Wait until it had more turns (AssertionError if it has stopped)."""
        wanted = self.turns + count
        wait_until(lambda: self.turns >= wanted, what="it has stopped")

    def stop(self) -> None:
        self.worker._reactor.call_later(0, self.worker._reactor.stop)

    def join(self) -> None:
        self._thread.join(PATIENCE_SECONDS)
        assert not self._thread.is_alive()


class Control:
    """The control process's end of a worker's channel."""

    def __init__(self, channel: socket.socket) -> None:
        self._inbox = messages.Inbox(channel)
        self.put = messages.Outbox(channel).put

    def receive(self) -> messages.ToWorker | messages.FromWorker | None:
        """Wait for the next message; None at the end."""
        try:
            while (received := self._inbox.receive()) is None:
                pass
        except ConnectionError:
            return None
        return received[0]


@contextmanager
def busy_worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[BusyWorker, Control]]:
    """Run a worker that counts all the time."""
    monkeypatch.setattr(worker_module, "COUNT_SECONDS", TURN_SECONDS)
    COUNTS.take()  # what other tests have left
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.settimeout(PATIENCE_SECONDS)
        busy = BusyWorker(theirs)
        try:
            yield busy, Control(ours)
        finally:
            ours.close()
            busy.join()
            COUNTS.take()


def test_control_process_that_reads_nothing_stops_no_byte_and_misses_no_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with busy_worker(monkeypatch) as (busy, control):
        busy.wait_turns(20)
        assert len(busy.worker._outbox) == 1
        busy.stop()  # what is kept is sent at the end as well
        counted = 0
        while (message := control.receive()) is not None:
            assert isinstance(message, messages.PutCounts)
            counted += sum(count for _name, _labels, count in message.counts)
        assert counted == busy.turns * PEERS


def test_control_process_that_tells_very_much_and_reads_nothing_is_heard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else each would wait until the other has read."""
    with busy_worker(monkeypatch) as (busy, control):
        busy.wait_turns(5)
        for number in range(2000):
            control.put(messages.RemoveWorkload(f"uid-{number}"))
        control.put(messages.Ask(1))
        while not isinstance(message := control.receive(), messages.Ready):
            assert isinstance(message, messages.PutCounts)
        assert message.number == 1


def test_questions_whose_answers_nobody_reads_wait_and_are_answered_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = 3000
    with busy_worker(monkeypatch) as (busy, control):

        def ask() -> None:
            for number in range(count):
                control.put(messages.Ask(number))

        asker = threading.Thread(target=ask)
        asker.start()
        busy.wait_turns(10)
        assert len(busy.worker._outbox) == MOST_UNSENT
        answered: list[int] = []
        while len(answered) < count:
            message = control.receive()
            if isinstance(message, messages.Ready):
                answered.append(message.number)
        assert answered == list(range(count))
        asker.join()


def test_certificate_is_asked_for_once_while_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    with busy_worker(monkeypatch) as (busy, control):
        busy.wait_turns(10)
        for identity in ("first", "second") * 3:
            busy.worker._reactor.call_later(0, partial(busy.worker._ask_for, identity))
        busy.wait_turns(3)
        control.put(messages.Ask(1))
        needed: list[str] = []
        while not isinstance(message := control.receive(), messages.Ready):
            if isinstance(message, messages.NeedCertificate):
                needed.append(message.identity)
        assert needed == ["first", "second"]
