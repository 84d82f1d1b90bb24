"""Tunnels rest on their peers' certificates: they drain in time, and a revocation closes them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from agent.identity.verify import Peer
from agent.tunnel.reactor import Reactor
from agent.tunnel.trust import DRAIN_AFTER, Trust
from tests.support.loop import run_rounds, run_until
from tests.support.tunnel import CLIENT, TRUST_DOMAIN

if TYPE_CHECKING:
    from agent.errors import UntrustedPeer


class Recorded:
    """A tunnel that notes what it is told."""

    def __init__(self, mark: bytes, seconds: float) -> None:
        self.proof: Peer | None = Peer(CLIENT, 1, time.time() + seconds, mark)
        self.drained_at: list[float] = []
        self.refused: list[str] = []
        self.closed = 0

    def drain(self) -> None:
        self.drained_at.append(time.time())

    def close_if_idle(self) -> None:
        self.closed += 1

    def refuse(self, error: UntrustedPeer) -> None:
        self.refused.append(error.reason)


def test_each_tunnel_is_drained_once_before_its_peers_certificate_ends() -> None:
    reactor = Reactor()
    trust = Trust(reactor, TRUST_DOMAIN)
    late, early, later = Recorded(b"a", 0.4), Recorded(b"b", 0.2), Recorded(b"c", 3600)
    for tunnel in (late, early, later):
        trust.admit(tunnel)
    run_until(reactor, lambda: early.drained_at)
    assert not late.drained_at
    run_until(reactor, lambda: late.drained_at)
    for tunnel, seconds in ((early, 0.2), (late, 0.4)):
        assert tunnel.proof is not None
        (drained_at,) = tunnel.drained_at
        assert drained_at < tunnel.proof.expires
        assert drained_at > tunnel.proof.expires - seconds * (1 - DRAIN_AFTER) - 0.01
    run_rounds(reactor, 3)
    assert not later.drained_at


def test_tunnel_that_left_is_not_drained() -> None:
    reactor = Reactor()
    trust = Trust(reactor, TRUST_DOMAIN)
    gone, there = Recorded(b"a", 0.1), Recorded(b"b", 0.2)
    for tunnel in (gone, there):
        trust.admit(tunnel)
    trust.leave(gone)
    trust.leave(gone)
    run_until(reactor, lambda: there.drained_at)
    assert not gone.drained_at


def test_revocation_closes_whom_it_hits_and_nobody_else_also_after_the_drain() -> None:
    reactor = Reactor()
    trust = Trust(reactor, TRUST_DOMAIN)
    hit, spared = Recorded(b"hit", 0.05), Recorded(b"spared", 3600)
    for tunnel in (hit, spared):
        trust.admit(tunnel)
    run_until(reactor, lambda: hit.drained_at)
    trust.revoke(frozenset({b"hit", b"other"}))
    assert hit.refused == ["peer_revoked"]
    assert spared.refused == []


def test_all_tunnels_are_drained_once_however_often_that_is_asked() -> None:
    trust = Trust(Reactor(), TRUST_DOMAIN)
    first, second = Recorded(b"a", 3600), Recorded(b"b", 3600)
    trust.admit(first)
    trust.drain_all()
    trust.admit(second)  # its handshake ended meanwhile
    trust.drain_all()
    assert (len(first.drained_at), len(second.drained_at)) == (1, 1)
    trust.leave(first)
    trust.close_idle()
    assert (first.closed, second.closed) == (0, 1)
