"""What a worker accepts of its peers, and the tunnels that rest on it.

Every tunnel whose peer has proved itself is known here until it closes. So a revocation closes
those that it hits, and each is drained before its peer's certificate ends: no new streams, those
that are open go on, and whoever opens the next one dials anew.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from agent.errors import PeerRevoked
from agent.identity.verify import Part, require_identity, require_trust_domain, verify_peer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from agent.errors import UntrustedPeer
    from agent.identity.verify import Peer
    from agent.model.identity import SpiffeId
    from agent.tunnel.reactor import Reactor, Timer

# Of the time that a peer's certificate had left when the tunnel was made.
DRAIN_AFTER = 0.9
LONGEST_NAP_SECONDS = 5.0  # certificates end by the wall clock, which may be set meanwhile


class Tunnel(Protocol):
    """A tunnel as seen from here."""

    @property
    def proof(self) -> Peer | None:
        """What the peer's certificate proved."""
        ...

    def drain(self) -> None:
        """Take no new streams."""
        ...

    def refuse(self, error: UntrustedPeer) -> None:
        """Close at once."""
        ...

    def close_if_idle(self) -> None:
        """Close if no stream is open."""
        ...


class Trust:
    """One per worker."""

    def __init__(self, reactor: Reactor, trust_domain: str, aliases: Iterable[str] = ()) -> None:
        self.trust_domain = trust_domain
        self._reactor = reactor
        self._trust_domains = frozenset({trust_domain, *aliases})
        self._revoked: frozenset[bytes] = frozenset()
        self._drain_at: dict[Tunnel, float] = {}
        self._timer: Timer | None = None
        self._timer_at = 0.0

    def verify(self, certificate: bytes | None, expected: SpiffeId | None) -> Peer:
        """Check a peer: who dials names whom it expects, who is dialed expects none.

        Raises:
            UntrustedPeer: one of its kinds.
        """
        part = Part.CLIENT if expected is None else Part.SERVER
        peer = verify_peer(certificate, part, self._revoked, time.time())
        if expected is None:
            require_trust_domain(peer, self._trust_domains)
        else:
            require_identity(peer, expected)
        return peer

    def admit(self, tunnel: Tunnel) -> None:
        """Watch over a tunnel whose peer is verified."""
        assert tunnel.proof is not None
        now = time.time()
        self._drain_at[tunnel] = now + DRAIN_AFTER * max(0.0, tunnel.proof.expires - now)
        self._schedule()

    def leave(self, tunnel: Tunnel) -> None:
        """Forget a tunnel that is closed."""
        self._drain_at.pop(tunnel, None)

    def revoke(self, fingerprints: frozenset[bytes]) -> None:
        """Replace the list of revoked certificates; tunnels that rest on one are closed."""
        self._revoked = fingerprints
        for tunnel in list(self._drain_at):
            if tunnel.proof is not None and tunnel.proof.fingerprint in fingerprints:
                tunnel.refuse(
                    PeerRevoked(f"the peer's certificate {tunnel.proof.serial:x} is revoked")
                )

    def drain_all(self) -> None:
        """Take no new streams on any tunnel; each is asked once, however often this is called."""
        for tunnel, due in list(self._drain_at.items()):
            if due < float("inf"):
                self._drain_at[tunnel] = float("inf")
                tunnel.drain()

    def close_idle(self) -> None:
        """Close the tunnels that carry nothing."""
        for tunnel in list(self._drain_at):
            tunnel.close_if_idle()

    def _schedule(self) -> None:
        # One timer for all, since a cancelled one stays in the reactor until its time.
        due = min(self._drain_at.values(), default=None)
        if due is None or (self._timer is not None and self._timer_at <= due):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = due
        seconds = min(max(0.0, due - time.time()), LONGEST_NAP_SECONDS)
        self._timer = self._reactor.call_later(seconds, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        now = time.time()
        for tunnel in [tunnel for tunnel, due in self._drain_at.items() if due <= now]:
            self._drain_at[tunnel] = float("inf")  # once; a revocation may still hit it
            tunnel.drain()
        if min(self._drain_at.values(), default=float("inf")) < float("inf"):
            self._schedule()
