"""Tunnels kept for use: one carries many streams, and a new one is dialed when all are full.

A tunnel is shared only within one source pod and identity, so that the peer's view of who connects
is exact, and only for one destination, network and address. Requests that come while a tunnel is
being dialed wait for it. An idle tunnel is closed after a while (`Bounds`).

A tunnel in use that takes no new streams any more (its peer says GOAWAY, a certificate ends or was
renewed) has the next one dialed before anybody asks for it.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agent.errors import PeerRevoked, SidestepError
from agent.line_log import log
from agent.loglines import TUNNEL
from agent.model.bounds import DEFAULT_BOUNDS, Bounds
from agent.model.capture import HBONE_PORT
from agent.model.flag import Failure, Flag
from agent.tunnel import tcp
from agent.tunnel.connection import Role
from agent.tunnel.counts import COUNTS
from agent.tunnel.session import Session

if TYPE_CHECKING:
    import ssl

    from agent.model.pod import Address
    from agent.model.workload import Workload
    from agent.tunnel.contexts import Contexts
    from agent.tunnel.reactor import Reactor, Timer
    from agent.tunnel.served import ServedPod
    from agent.tunnel.sockets import PodSockets
    from agent.tunnel.trust import Trust

# A tunnel without a stream is in use for so long after its last one: who opens one connection after
# the other has none open in between.
IN_USE_SECONDS = 10.0

# So many tunnels in a row may take no stream at all before who waits is refused: a peer that is
# replaced says GOAWAY once, one that says it with its first settings would be dialed for ever.
VAIN_DIALS = 3

OnSession = Callable[["Session | None", str], None]
# Source pod, source identity, destination, its network and address.
Key = tuple[str, str, str, str, str]


@dataclass
class _Entry:
    """A tunnel that is being dialed (no session yet, or not ready) or in use."""

    session: Session | None = None
    context: ssl.SSLContext | None = None  # that it is dialed with
    is_ready: bool = False
    is_outdated: bool = False  # our certificate was renewed while it was dialed
    is_last: bool = False  # its pod has left
    was_used: bool = False
    idle_since: float = 0.0
    waiters: list[tuple[OnSession, int]] = field(default_factory=list)  # and its vain dials
    idle: Timer | None = None


class Pool:
    """All outbound tunnels of a worker."""

    def __init__(
        self,
        reactor: Reactor,
        pod_sockets: PodSockets,
        trust: Trust,
        contexts: Contexts,
        may_log: Callable[[str, str], bool],
        bounds: Bounds = DEFAULT_BOUNDS,
    ) -> None:
        self._reactor = reactor
        self._sockets = pod_sockets
        self._trust = trust
        self._contexts = contexts
        self._may_log = may_log
        self._bounds = bounds
        self._entries: dict[Key, list[_Entry]] = {}
        self.is_retiring = False  # tunnels that end have no successor

    def acquire(
        self,
        served: ServedPod,
        context: ssl.SSLContext,
        workload: Workload,
        address: Address,
        on_session: OnSession,
        vain_dials: int = 0,
    ) -> None:
        """Find or dial a tunnel for one stream; `on_session` opens it at once.

        `vain_dials` counts the tunnels that it has waited for already.
        """
        identity = str(served.identity)
        key = (served.pod.uid, identity, workload.uid, workload.network, str(address))
        entries = self._entries.setdefault(key, [])
        limit = self._bounds.streams_per_tunnel
        for entry in entries:
            if entry.is_ready and entry.session is not None:
                connection = entry.session.connection
                if connection.may_open and connection.stream_count < limit:
                    if entry.idle is not None:
                        entry.idle.cancel()
                        entry.idle = None
                    entry.was_used = True
                    on_session(entry.session, "")
                    return
            elif not entry.is_ready and len(entry.waiters) < limit:
                entry.waiters.append((on_session, vain_dials))
                return
        # Those that drain are full for good, and end by themselves.
        count = sum(_state(entry) != "draining" for entry in entries)
        if count >= self._bounds.tunnels_per_peer:
            on_session(
                None,
                f"all {count} tunnels to {workload.namespace}/{workload.name}"
                " are full (--tunnels-per-peer)",
            )
            return
        entry = _Entry(waiters=[(on_session, vain_dials)])
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
        entry.context = context
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
                self._reactor,
                own,
                context,
                Role.CLIENT,
                self._trust,
                served.share,
                expected,
                self._bounds,
            )
            entry.session.on_ready = on_ready
            entry.session.on_closed = on_closed
            entry.session.on_idle = lambda _session: self._on_idle(entry)
            entry.session.on_draining = lambda _session: self._replace(
                key, entry, served, workload, address
            )

        def on_closed(session: Session, reason: str) -> None:
            if session.refusal:
                COUNTS.add("peers_refused", direction="outbound", reason=session.refusal)
                if self._may_log("info", TUNNEL):
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

        def wait(waiter: OnSession, vain: int) -> None:
            # With the certificate of now: there may be a new one since this dial began.
            def on_context(context: ssl.SSLContext | None, reason: str) -> None:
                if context is None:
                    waiter(None, reason)
                else:
                    self.acquire(served, context, workload, address, waiter, vain)

            self._contexts.client(str(served.identity), on_context)

        def on_ready(session: Session) -> None:
            entry.is_ready = True
            waiters, entry.waiters = entry.waiters, []
            for waiter, vain_dials in waiters:
                if session.connection.may_open:
                    entry.was_used = True
                    waiter(session, "")
                    continue
                # One that took others is full, which says nothing of the next.
                vain = 0 if entry.was_used else vain_dials + 1
                if vain < VAIN_DIALS:
                    wait(waiter, vain)
                else:
                    reason = f"the peer took no stream on {vain} tunnels in a row"
                    waiter(None, Failure(reason, Flag.HTTP2))
            if entry.is_outdated or entry.is_last:
                session.drain()
            elif not session.channels:
                self._on_idle(entry)

        tcp.connect(self._reactor, own, (str(address), HBONE_PORT), on_connected)

    def _replace(
        self, key: Key, entry: _Entry, served: ServedPod, workload: Workload, address: Address
    ) -> None:
        """Dial the next tunnel, if this one is in use and nobody has dialed one yet."""
        entries = self._entries.get(key, [])
        if self.is_retiring or entry.is_last or not _is_in_use(entry):
            return
        if any(_state(other) != "draining" for other in entries):
            return
        successor = _Entry()
        entries.append(successor)

        def on_context(context: ssl.SSLContext | None, reason: str) -> None:
            if successor.is_last:
                self._fail(key, successor, "the pod has left the mesh")
            elif context is None:
                self._fail(key, successor, reason)
            else:
                self._dial(key, successor, served, context, workload, address)

        self._contexts.client(str(served.identity), on_context)

    def _fail(self, key: Key, entry: _Entry, reason: str) -> None:
        entries = self._entries.get(key, [])
        if entry in entries:
            entries.remove(entry)
            if not entries:
                del self._entries[key]
        if entry.idle is not None:
            entry.idle.cancel()
        waiters, entry.waiters = entry.waiters, []
        for waiter, _vain_dials in waiters:
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
            entry.idle_since = time.monotonic()
            entry.idle = self._reactor.call_later(self._bounds.idle_seconds, session.close)

    def renew(self, identity: str) -> None:
        """Dial anew for new streams: there is a new certificate for `identity`."""
        for key, entries in list(self._entries.items()):
            if key[1] == identity:
                for entry in list(entries):
                    if entry.context is None or self._contexts.is_current(identity, entry.context):
                        continue  # it waited for this certificate
                    entry.is_outdated = True
                    if entry.session is not None and entry.is_ready:
                        entry.session.drain()

    def close_pod(self, uid: str) -> None:
        """Close a pod's tunnels that are idle now; the others close when they become idle."""
        for key, entries in self._entries.items():
            if key[0] == uid:
                for entry in entries:
                    entry.is_last = True
                    if entry.session is not None and entry.is_ready:
                        entry.session.connection.is_draining = True
                        if not entry.session.channels:
                            self._reactor.call_soon(entry.session.close)


def _is_in_use(entry: _Entry) -> bool:
    if entry.session is not None and entry.session.channels:
        return True
    return entry.was_used and time.monotonic() - entry.idle_since < IN_USE_SECONDS


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
