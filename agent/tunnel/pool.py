"""Tunnels kept for use: one carries many streams, and a new one is dialed when all are full.

A tunnel is shared only within one source pod and identity, so that the peer's view of who connects
is exact, and only for one destination identity and address. Requests that come while a tunnel is
being dialed wait for it. An idle tunnel is closed after a while (`Bounds`).
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agent.errors import PeerRevoked, SidestepError
from agent.model.bounds import DEFAULT_BOUNDS, Bounds
from agent.model.capture import HBONE_PORT
from agent.model.flag import Failure, Flag
from agent.tunnel import tcp
from agent.tunnel.connection import Role
from agent.tunnel.counts import COUNTS
from agent.tunnel.served import log
from agent.tunnel.session import Session

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from agent.model.pod import Address
    from agent.model.workload import Workload
    from agent.tunnel.reactor import Reactor, Timer
    from agent.tunnel.served import ServedPod
    from agent.tunnel.sockets import PodSockets
    from agent.tunnel.trust import Trust

Key = tuple[str, str, str, str]  # source pod, source identity, destination, its address


@dataclass
class _Entry:
    """A tunnel that is being dialed (no session yet, or not ready) or in use."""

    session: Session | None = None
    is_ready: bool = False
    is_outdated: bool = False  # our certificate was renewed while it was dialed
    waiters: list[Callable[[Session | None, str], None]] = field(default_factory=list)
    idle: Timer | None = None


class Pool:
    """All outbound tunnels of a worker."""

    def __init__(
        self,
        reactor: Reactor,
        pod_sockets: PodSockets,
        trust: Trust,
        bounds: Bounds = DEFAULT_BOUNDS,
    ) -> None:
        self._reactor = reactor
        self._sockets = pod_sockets
        self._trust = trust
        self._bounds = bounds
        self._entries: dict[Key, list[_Entry]] = {}

    def acquire(
        self,
        served: ServedPod,
        context: ssl.SSLContext,
        workload: Workload,
        address: Address,
        on_session: Callable[[Session | None, str], None],
    ) -> None:
        """Find or dial a tunnel for one stream; `on_session` opens it at once."""
        key = (served.pod.uid, str(served.identity), workload.uid, str(address))
        entries = self._entries.setdefault(key, [])
        limit = self._bounds.streams_per_tunnel
        for entry in entries:
            if entry.is_ready and entry.session is not None:
                connection = entry.session.connection
                if connection.may_open and connection.stream_count < limit:
                    if entry.idle is not None:
                        entry.idle.cancel()
                        entry.idle = None
                    on_session(entry.session, "")
                    return
            elif not entry.is_ready and len(entry.waiters) < limit:
                entry.waiters.append(on_session)
                return
        if len(entries) >= self._bounds.tunnels_per_peer:
            on_session(
                None,
                f"all {len(entries)} tunnels to {workload.namespace}/{workload.name}"
                " are full (--tunnels-per-peer)",
            )
            return
        entry = _Entry(waiters=[on_session])
        entries.append(entry)
        self._dial(key, entry, served, context, workload, address)

    def _dial(
        self,
        key: Key,
        entry: _Entry,
        served: ServedPod,
        context: ssl.SSLContext,
        workload: Workload,
        address: Address,
    ) -> None:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        try:
            own = self._sockets.open(served.netns_fd, family)
        except (SidestepError, OSError) as error:
            self._fail(key, entry, f"no socket for a tunnel: {error}")
            return
        expected = workload.identity(self._trust.trust_domain)

        def on_connected(error: OSError | None) -> None:
            if error is not None:
                reason = f"{address}:{HBONE_PORT} cannot be reached: {error}"
                if isinstance(error, TimeoutError):
                    hint = f"{reason}; a NetworkPolicy may block it"
                    self._fail(key, entry, Failure(hint, Flag.NETWORK_POLICY))
                else:
                    self._fail(key, entry, Failure(reason, Flag.CONNECT))
                return
            entry.session = Session(
                self._reactor, own, context, Role.CLIENT, self._trust, expected, self._bounds
            )
            entry.session.on_ready = on_ready
            entry.session.on_closed = on_closed
            entry.session.on_idle = lambda _session: self._on_idle(entry)

        def on_closed(session: Session, reason: str) -> None:
            if session.refusal:
                COUNTS.add("peers_refused", direction="outbound", reason=session.refusal)
                log(
                    "tunnel refused",
                    pod=f"{served.pod.namespace}/{served.pod.name}",
                    peer=str(address),
                    code=session.refusal,
                    reason=reason,
                )
            if session.handshake_failure:
                failure = session.handshake_failure
                COUNTS.add("handshakes_failed", direction="outbound", reason=failure)
            self._fail(key, entry, Failure(reason, _flag(session)))

        def on_ready(session: Session) -> None:
            entry.is_ready = True
            waiters, entry.waiters = entry.waiters, []
            for waiter in waiters:
                if session.connection.may_open:
                    waiter(session, "")
                else:
                    self.acquire(served, context, workload, address, waiter)
            if entry.is_outdated:
                session.drain()

        tcp.connect(self._reactor, own, (str(address), HBONE_PORT), on_connected)

    def _fail(self, key: Key, entry: _Entry, reason: str) -> None:
        entries = self._entries.get(key, [])
        if entry in entries:
            entries.remove(entry)
            if not entries:
                del self._entries[key]
        if entry.idle is not None:
            entry.idle.cancel()
        waiters, entry.waiters = entry.waiters, []
        for waiter in waiters:
            waiter(None, reason)

    def count(self) -> dict[str, int]:
        """Count the tunnels by state: dialing, idle, in_use, draining."""
        counted = dict.fromkeys(("dialing", "idle", "in_use", "draining"), 0)
        for entries in self._entries.values():
            for entry in entries:
                counted[_state(entry)] += 1
        return counted

    def _on_idle(self, entry: _Entry) -> None:
        session = entry.session
        if session is None or session.is_closed:
            return
        if session.connection.is_draining:
            session.close()
        elif entry.idle is None:
            entry.idle = self._reactor.call_later(self._bounds.idle_seconds, session.close)

    def renew(self, identity: str) -> None:
        """Dial anew for new streams: there is a new certificate for `identity`."""
        for key, entries in list(self._entries.items()):
            if key[1] == identity:
                for entry in list(entries):
                    entry.is_outdated = True
                    if entry.session is not None and entry.is_ready:
                        entry.session.drain()

    def close_pod(self, uid: str) -> None:
        """Close a pod's tunnels that are idle now; the others close when they become idle."""
        for key, entries in self._entries.items():
            if key[0] == uid:
                for entry in entries:
                    if entry.session is not None and entry.is_ready:
                        entry.session.connection.is_draining = True
                        if not entry.session.channels:
                            self._reactor.call_soon(entry.session.close)


def _flag(session: Session) -> Flag:
    if session.refusal == PeerRevoked.reason:
        return Flag.REVOKED
    if session.refusal or session.peer is None:
        return Flag.TLS
    return Flag.HTTP2


def _state(entry: _Entry) -> str:
    session = entry.session
    if session is None or not entry.is_ready:
        return "dialing"
    if session.connection.is_draining:
        return "draining"
    return "in_use" if session.channels else "idle"
