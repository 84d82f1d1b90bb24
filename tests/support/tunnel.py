"""Both ends of tunnels in one process: real certificates, real TLS, one reactor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agent.identity.local import LocalAuthority
from agent.model.bounds import DEFAULT_BOUNDS, Bounds
from agent.model.identity import SpiffeId
from agent.tunnel import tls
from agent.tunnel.buffers import Share
from agent.tunnel.connection import Role
from agent.tunnel.messages import PutCertificate
from agent.tunnel.session import Session
from agent.tunnel.trust import Trust
from tests.support.loop import run_until

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import Iterable
    from pathlib import Path

    from agent.tunnel.events import ConnectRequested
    from agent.tunnel.reactor import Reactor

TRUST_DOMAIN = "cluster.local"
CLIENT = SpiffeId(TRUST_DOMAIN, "shop", "client")
SERVER = SpiffeId(TRUST_DOMAIN, "shop", "server")


class Authority:
    """Makes TLS contexts of identities that trust each other."""

    def __init__(self, directory: Path) -> None:
        self._authority = LocalAuthority.create(directory, TRUST_DOMAIN)

    def certificate(self, identity: SpiffeId) -> PutCertificate:
        issued = self._authority.issue(identity)
        return PutCertificate(str(identity), issued.chain, issued.key, issued.roots)

    def context(self, identity: SpiffeId, role: Role) -> ssl.SSLContext:
        return tls.build_context(self.certificate(identity), is_server=role is Role.SERVER)


def make_session(
    reactor: Reactor,
    own: socket.socket,
    context: ssl.SSLContext,
    role: Role,
    bounds: Bounds = DEFAULT_BOUNDS,
    share: Share | None = None,
) -> Session:
    """Start one end of a tunnel on a connected socket."""
    own.setblocking(False)
    expected = SERVER if role is Role.CLIENT else None
    trust = Trust(reactor, TRUST_DOMAIN)
    share = share or Share("shop/pod")
    return Session(reactor, own, context, role, trust, share, expected, bounds)


def end_sessions(reactor: Reactor, sessions: Iterable[Session]) -> None:
    """End those that are open, and wait for those that were closed in order and still linger."""
    ended = list(sessions)
    for each in ended:
        each.fail("the test is over")
    run_until(reactor, lambda: all(each._socket.fileno() < 0 for each in ended))


@dataclass
class Witness:
    """What a session reported."""

    session: Session
    is_ready: bool = False
    reasons: list[str] = field(default_factory=list)
    requests: list[ConnectRequested] = field(default_factory=list)
    idle: int = 0

    def __post_init__(self) -> None:
        self.session.on_ready = self._on_ready
        self.session.on_closed = lambda _session, reason: self.reasons.append(reason)
        self.session.on_request = lambda _session, event: self.requests.append(event)
        self.session.on_idle = self._on_idle

    def _on_ready(self, _session: Session) -> None:
        assert not self.is_ready
        self.is_ready = True

    def _on_idle(self, _session: Session) -> None:
        self.idle += 1
