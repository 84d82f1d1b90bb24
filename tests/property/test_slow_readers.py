"""Readers that are slower than writers: what they cost others, and what they cost the worker.

Everything is real but the network between: sockets, TLS, relays, both ends of the tunnel.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import pytest

from agent.tunnel import buffers as buffers_module
from agent.tunnel.buffers import BUFFERS, PARTS, Share
from agent.tunnel.reactor import Reactor
from tests.support.loop import run_rounds, run_until
from tests.support.stalled import Stalled
from tests.support.tunnel import Authority
from tests.support.wire import Wire, buffer_limit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Ends = tuple[socket.socket, socket.socket]
MIB = 1 << 20
BLOCK = os.urandom(MIB)
QUIET_ROUNDS = 100
TCP_CLOSE = 7  # net/tcp_states.h


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def make_wire(authority: Authority) -> Iterator[Callable[..., Wire]]:
    """Make tunnels that are served by one worker; of one pod, if no other one is named."""
    with ExitStack() as stack:
        reactor = Reactor()
        shares: dict[str, Share] = {}

        def make(pod: str = "shop/stalling") -> Wire:
            share = shares.setdefault(pod, Share(pod))
            return Wire(reactor, authority, stack, share)

        yield make


class Flood:
    """Connections whose clients send all they can, and whose servers do not read."""

    def __init__(self, wires: list[Wire], count: int) -> None:
        self.reactor = wires[0].reactor
        self.ends: list[Ends] = [wire.connect() for wire in wires for _ in range(count)]
        self.sent = [0] * len(self.ends)
        self._before = BUFFERS.held
        self.peak = 0  # of what is buffered for them

    def run(self) -> None:
        """Send until nothing moves any more."""
        quiet = 0

        def push() -> bool:
            nonlocal quiet
            before = sum(self.sent)
            for number, (near, _far) in enumerate(self.ends):
                try:
                    self.sent[number] += near.send(BLOCK[self.sent[number] % MIB :])
                except BlockingIOError:
                    continue
            self.peak = max(self.peak, BUFFERS.held - self._before)
            quiet = 0 if sum(self.sent) > before else quiet + 1
            return quiet > QUIET_ROUNDS

        run_until(self.reactor, push)

    def read_all(self) -> None:
        """Let the servers read: all that was sent arrives, as it was."""
        received = [bytearray() for _ in self.ends]
        open_ends = dict(enumerate(self.ends))
        for near, _far in self.ends:
            near.shutdown(socket.SHUT_WR)

        def read() -> bool:
            for number, (_near, far) in list(open_ends.items()):
                with suppress(BlockingIOError):
                    while data := far.recv(MIB):
                        received[number] += data
                    del open_ends[number]
            return not open_ends

        run_until(self.reactor, read)
        for found, sent in zip(received, self.sent, strict=True):
            whole, rest = divmod(sent, MIB)
            assert found == BLOCK * whole + BLOCK[:rest]


def is_full(wire: Wire) -> bool:
    return wire.share.is_full


def exchange(reactor: Reactor, ends: Ends) -> float:
    """Send a word and have it echoed; return the seconds."""
    near, far = ends
    began = time.perf_counter()
    near.send(b"word")

    def hand_on(source: socket.socket, sink: socket.socket | None) -> bool:
        try:
            data = source.recv(64)
        except BlockingIOError:
            return False
        assert data == b"word"
        if sink is not None:
            sink.send(data)
        return True

    run_until(reactor, lambda: hand_on(far, far))
    run_until(reactor, lambda: hand_on(near, None))
    return time.perf_counter() - began


def transfer(reactor: Reactor, ends: Ends, size: int) -> float:
    """Send so much; return the bytes a second."""
    near, far = ends
    sent = received = 0
    began = time.perf_counter()

    def move() -> bool:
        nonlocal sent, received
        with suppress(BlockingIOError):
            sent += near.send(memoryview(BLOCK)[: size - sent]) if sent < size else 0
        try:
            while True:
                received += len(far.recv(MIB))
        except BlockingIOError:
            return received == size

    run_until(reactor, move)
    return size / (time.perf_counter() - began)


def test_stalled_readers_hold_up_nobody_else_in_their_tunnel(
    make_wire: Callable[..., Wire],
) -> None:
    wire = make_wire()
    bystander = wire.connect()

    def measure() -> tuple[float, float]:
        waits = [exchange(wire.reactor, bystander) for _ in range(100)]
        return statistics.median(waits), transfer(wire.reactor, bystander, 32 * MIB)

    measure()
    wait, rate = measure()
    flood = Flood([wire], 8)
    flood.run()
    assert min(flood.sent) > MIB  # all of them have filled what they may
    stalled_wait, stalled_rate = measure()
    print(f"word {wait * 1e6:.0f} us, beside stalled readers {stalled_wait * 1e6:.0f} us;"  # noqa: T201
          f" {rate / 1e6:.0f} MB/s, then {stalled_rate / 1e6:.0f} MB/s")  # fmt: skip
    assert stalled_wait < 3 * wait
    assert stalled_rate > rate / 3


def test_stalled_readers_together_cost_what_the_worker_may_keep(
    make_wire: Callable[..., Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffers_module, "FULL_SECONDS", 60.0)  # of a machine that is busy
    wires = [make_wire(), make_wire()]
    with buffer_limit(wires[0].reactor, PARTS * 4 * MIB):
        flood = Flood(wires, 10)
        flood.run()
        assert is_full(wires[0])
        # What may be beyond: the last large read, and what the tunnels had taken until then.
        assert 4 * MIB <= flood.peak < 7 * MIB
        flood.read_all()
        assert not is_full(wires[0])
        assert [wire.ended for wire in wires] == [[], []]
        for _near, far in flood.ends:
            far.shutdown(socket.SHUT_WR)
        run_until(wires[0].reactor, lambda: len(wires[0].ended) == len(wires[1].ended) == 20)
        assert not any(was_aborted for wire in wires for _, _, was_aborted in wire.ended)


def test_without_a_limit_they_cost_more(make_wire: Callable[..., Wire]) -> None:
    """Else the test above proved nothing."""
    wires = [make_wire(), make_wire()]
    flood = Flood(wires, 10)
    flood.run()
    assert flood.peak > 8 * MIB


def test_readers_that_stay_stalled_are_reset_until_there_is_room(
    make_wire: Callable[..., Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffers_module, "FULL_SECONDS", 0.3)
    wire, other = make_wire(), make_wire()
    with buffer_limit(wire.reactor, PARTS * 64 * MIB):
        bystanders = wire.connect(), other.connect()
        flood = Flood([wire], 5)
        flood.run()
        assert not is_full(wire)
        # Only now, when all are at rest: who has moved since it is full stalls not yet.
        BUFFERS.set_limit(PARTS * 4 * MIB)
        Stalled(wire.share).keep(1)
        assert is_full(wire)
        exchange(wire.reactor, bystanders[1])  # of another tunnel: it goes on all the while
        run_until(wire.reactor, lambda: wire.ended)
        assert all(was_aborted for _, _, was_aborted in wire.ended)
        assert not is_full(wire)
        exchange(wire.reactor, bystanders[0])
        # all of them: what was left would fill it again
        run_until(wire.reactor, lambda: all(is_reset(near) for near, _far in flood.ends))
        wire.client.session.fail("the test is over")
        run_until(wire.reactor, lambda: len(wire.ended) == 12)
        run_rounds(wire.reactor, 3)


def is_reset(own: socket.socket) -> bool:
    """Tell it as often as it is asked: the error itself is told once."""
    state = own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    return state == TCP_CLOSE


def test_peers_that_take_nothing_cost_their_tunnels_once_there_is_no_room(
    make_wire: Callable[..., Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffers_module, "FULL_SECONDS", 0.3)
    wires, other = [make_wire() for _ in range(5)], make_wire()
    with buffer_limit(other.reactor, PARTS * 2 * MIB):
        bystander = other.connect()
        flood = Flood(wires, 2)
        for wire in wires:
            wire.reactor.forget(wire.server.session._fd)
            wire.client.session._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
            wire.server.session._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        flood.run()
        assert is_full(other)
        assert flood.peak < 3 * MIB
        tunnels = [wire.client.session for wire in wires]
        assert sum(len(each._unsent) + each._outgoing.pending for each in tunnels) < 3 * MIB
        run_until(other.reactor, lambda: not is_full(other))
        exchange(other.reactor, bystander)
        for wire in wires:
            wire.client.session.fail("the test is over")
            wire.server.session.fail("the test is over")
        run_until(other.reactor, lambda: all(len(wire.ended) == 4 for wire in wires))


@pytest.mark.parametrize(("count", "own"), [(2, 1), (5, 0)])
def test_pods_whose_readers_stall_cost_no_other_pod_anything(
    make_wire: Callable[..., Wire], monkeypatch: pytest.MonkeyPatch, count: int, own: int
) -> None:
    """Two leave room for a stalled reader of the other's own, five hold all that there is."""
    monkeypatch.setattr(buffers_module, "FULL_SECONDS", 60.0)  # nobody is reset meanwhile
    victim = make_wire("shop/victim")
    stalling = [make_wire(f"shop/stalling-{number}") for number in range(count)]
    with buffer_limit(victim.reactor, 32 * MIB):
        bystander = victim.connect()
        rate_before = transfer(victim.reactor, bystander, 32 * MIB)
        floods = [Flood([victim], own), *(Flood([wire], 10) for wire in stalling)]
        for flood in floods:
            flood.run()
        assert all(is_full(wire) for wire in stalling)
        assert BUFFERS.held < (32 + 3 * count) * MIB  # each as above
        assert not is_full(victim)
        waits = [exchange(victim.reactor, ends) for ends in (bystander, victim.connect())]
        rate = transfer(victim.reactor, bystander, 32 * MIB)
        print(f"words {[f'{wait * 1e6:.0f} us' for wait in waits]}, {rate / rate_before:.2f}")  # noqa: T201
        assert max(waits) < 1.0
        assert rate > rate_before / 3
        assert not is_full(victim)
        for flood in floods:
            flood.read_all()
        for wire in (victim, *stalling):
            wire.client.session.fail("the test is over")
            wire.server.session.fail("the test is over")
        run_until(victim.reactor, lambda: len(victim.ended) == 4 + 2 * own)
        run_rounds(victim.reactor, 3)
