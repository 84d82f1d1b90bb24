"""To the pod: tunnels on 15008, and plaintext that capture steered to 15006.

The application is dialed inside the pod with the client's own address as source, so it sees who
connects. 200 is sent when that connection stands, 503 when it does not, 400 for a request that is
not for this pod, 401 for one that policy denies; plaintext that is denied is reset. To the peer
goes a code, never a text.

Every connection is registered at the gate before it is judged, and closed when a change of policy
denies it, whether the application has been reached yet or not.
"""

from __future__ import annotations

import errno
import socket
from functools import partial
from ipaddress import IPv6Address
from typing import TYPE_CHECKING

from agent.errors import SidestepError
from agent.line_log import log
from agent.loglines import TUNNEL
from agent.model.bounds import DEFAULT_BOUNDS, Bounds
from agent.model.capture import HBONE_PORT, LISTENER_PORTS, REPLY_MARK
from agent.model.condition import Connection
from agent.model.endpoint import endpoint, parse_address
from agent.tunnel import sockets, tcp
from agent.tunnel.buffers import FULL, Kept
from agent.tunnel.connection import Role
from agent.tunnel.counts import COUNTS
from agent.tunnel.relay import Relay
from agent.tunnel.served import TOO_MANY, refusal
from agent.tunnel.session import Session
from agent.tunnel.tcp import TcpChannel

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from agent.model.pod import Address
    from agent.model.verdict import Verdict
    from agent.tunnel.access import Access, Ledger
    from agent.tunnel.buffers import Share
    from agent.tunnel.contexts import Contexts
    from agent.tunnel.events import ConnectRequested
    from agent.tunnel.gate import Admission, Gate
    from agent.tunnel.reactor import Reactor, Timer
    from agent.tunnel.relay import Channel
    from agent.tunnel.served import ServedPod
    from agent.tunnel.sockets import PodSockets
    from agent.tunnel.trust import Trust


LONGEST_HOST = 253  # of a name in DNS
LONGEST_AUTHORITY = LONGEST_HOST + len(":65535")  # as much is logged of what a peer says
# Tunnels whose peers have not proved who they are, of all pods of a worker and of one of them. Each
# may hold some 80 KiB (session.HANDSHAKE_BYTES), and whoever reaches the pod can open them.
MOST_HANDSHAKES = 4096
MOST_HANDSHAKES_OF_POD = 1024
CROWDED_OUT = "newer tunnels took the place of one whose peer had not proved who it is"
# Of the idle time: our peers close their idle tunnels themselves, and before we do.
IDLE_TURN = 1.5


def parse_authority(authority: str) -> tuple[Address, int]:
    """Return the address and port of `:authority` (ValueError if it is not `ip:port`)."""
    if len(authority) > LONGEST_AUTHORITY:
        raise ValueError(f"{authority[:LONGEST_AUTHORITY]!r}... is too long for ADDRESS:PORT")
    host, separator, port = authority.rpartition(":")
    if not separator or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{authority!r} is not ADDRESS:PORT")
    if host.startswith("[") and host.endswith("]"):
        return IPv6Address(host[1:-1]), int(port)
    return parse_address(host), int(port)


def forwarded_host(forwarded: str) -> str | None:
    """Return the host that a peer's `forwarded` header names (RFC 7239): the service asked for."""
    for part in forwarded.split(";"):
        name, _, value = part.strip().partition("=")
        if name.lower() == "host" and len(value) <= LONGEST_HOST:
            return value.strip('"')
    return None


def plain(host: str) -> Address:
    """Return an address as a listener shows it, v4-mapped as IPv4."""
    address = parse_address(host)
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


class Inbound:
    """Serves the connections accepted on 15008 and 15006."""

    def __init__(
        self,
        reactor: Reactor,
        pod_sockets: PodSockets,
        trust: Trust,
        contexts: Contexts,
        gate: Gate,
        ledger: Ledger,
        bounds: Bounds = DEFAULT_BOUNDS,
    ) -> None:
        self._reactor = reactor
        self._sockets = pod_sockets
        self._trust = trust
        self._contexts = contexts
        self._gate = gate
        self._ledger = ledger
        self._bounds = bounds
        self.tunnels = 0  # that are open, or on the way
        self._handshakes: dict[Session, ServedPod] = {}  # the oldest first
        self._idle_timers: dict[Session, Timer] = {}

    def serve_plaintext(
        self, served: ServedPod, accepted: socket.socket, peer: tuple[str, int]
    ) -> None:
        """Take over a captured plaintext connection."""
        source = plain(peer[0])
        local_host, port = accepted.getsockname()[:2]
        address = plain(local_host)
        ends = endpoint(str(source), peer[1]), endpoint(str(address), port)
        if port in LISTENER_PORTS:
            sockets.abort(accepted)
            self._ledger.refuse(served, "inbound", *ends, f"port {port} is the agent's own")
            return
        access = self._ledger.inbound(served, ends[0], source, ends[1], "plaintext")
        if reason := refusal(served, self._bounds):
            sockets.abort(accepted)
            access.complete(reason)
            return
        if accepted.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == REPLY_MARK:
            # Inherited from the SYN, which is our own: to serve it would dial it once more.
            sockets.abort(accepted)
            access.complete("no room in ss_agent_flows for a connection to the application")
            return
        admission = self._gate.admit(served.pod.uid, Connection(source, None, address, port))
        dial = _Dial()

        def refuse(reason: str) -> None:
            dial.give_up()
            sockets.abort(accepted)
            _complete(admission, access, reason)

        if not admission.verdict.is_allowed:
            refuse(str(admission.verdict))
            return
        admission.on_revoked = lambda verdict: refuse(f"closed: {verdict}")

        def on_dialed(dialed: TcpChannel | None, reason: str) -> None:
            if not admission.verdict.is_allowed:
                if dialed is not None:
                    dialed.abort()
            elif dialed is None:
                refuse(reason)
            else:
                left = TcpChannel(self._reactor, accepted, served.share)
                _join(admission, access, left, dialed)
                left.start()
                dialed.start()

        self._dial(served, source, address, port, dial, on_dialed)

    def serve_tunnel(
        self, served: ServedPod, accepted: socket.socket, peer: tuple[str, int]
    ) -> None:
        """Take over a tunnel."""
        source = plain(peer[0])

        def on_context(context: ssl.SSLContext | None, reason: str) -> None:
            if served.tunnels >= self._bounds.connections_per_pod:
                context, reason = None, TOO_MANY
            if context is None:
                sockets.abort(accepted)
                ends = endpoint(str(source), peer[1]), endpoint(served.pod.name, HBONE_PORT)
                self._ledger.refuse(served, "inbound", *ends, reason)
                return
            session = Session(
                self._reactor,
                accepted,
                context,
                Role.SERVER,
                self._trust,
                served.share,
                bounds=self._bounds,
            )
            self.tunnels += 1
            served.tunnels += 1
            self._handshakes[session] = served
            served.handshakes += 1
            session.on_ready = partial(self._on_ready, served)
            session.on_request = lambda session, event: self._on_request(
                served, session, event, source
            )
            session.on_closed = lambda session, reason: self._on_closed(
                served, session, source, reason
            )
            self._crowd_out(served)

        self._contexts.server(str(served.identity), on_context)

    def _crowd_out(self, served: ServedPod) -> None:
        """End the oldest tunnel of nobody, if there are too many: who means it needs no time."""
        is_of_pod = served.handshakes > MOST_HANDSHAKES_OF_POD
        if is_of_pod or len(self._handshakes) > MOST_HANDSHAKES:
            oldest = next(
                session
                for session, pod in self._handshakes.items()
                if pod is served or not is_of_pod
            )
            oldest.fail(CROWDED_OUT, "handshake_crowded_out")

    def _on_ready(self, served: ServedPod, session: Session) -> None:
        self._has_settled(served, session)
        self._watch_idle(session)

    def _has_settled(self, served: ServedPod, session: Session) -> None:
        """The peer has proved who it is, or will not do so any more."""
        del self._handshakes[session]
        served.handshakes -= 1

    def _watch_idle(self, session: Session, before: int | None = None) -> None:
        """Close a tunnel that carries nothing from one look, which found `before`, to the next."""
        found = None if session.channels else session.connection.last_peer_stream_id
        if found is not None and found == before:
            del self._idle_timers[session]
            session.close()
            return
        self._idle_timers[session] = self._reactor.call_later(
            IDLE_TURN * self._bounds.idle_seconds, partial(self._watch_idle, session, found)
        )

    def _on_closed(self, served: ServedPod, session: Session, source: Address, reason: str) -> None:
        self.tunnels -= 1
        served.tunnels -= 1
        if session.peer is None:
            self._has_settled(served, session)
        if session in self._idle_timers:
            self._idle_timers.pop(session).cancel()
        if session.refusal:
            COUNTS.add("peers_refused", direction="inbound", reason=session.refusal)
        if session.handshake_failure:
            failure = session.handshake_failure
            COUNTS.add("handshakes_failed", direction="inbound", reason=failure)
        level = "warning" if session.refusal else "info"
        if self._ledger.may_log(level, TUNNEL):
            log(
                "tunnel closed",
                level=level,
                pod=f"{served.pod.namespace}/{served.pod.name}",
                peer=str(source),
                peer_identity=str(session.peer) if session.peer else None,
                code=session.refusal or None,
                reason=reason,
            )

    def _on_request(
        self, served: ServedPod, session: Session, event: ConnectRequested, source: Address
    ) -> None:
        target = event.authority[:LONGEST_AUTHORITY]
        access = self._ledger.inbound(served, str(source), source, target, "hbone")
        access.hbone_target = target
        access.prove(str(served.identity), str(session.peer))
        access.service = self._ledger.known_service(
            forwarded_host(event.headers.get("forwarded", ""))
        )

        def refuse(status: int, reason: str) -> None:
            session.respond(event.stream_id, status)
            access.complete(f"{status}: {reason}")

        if event.fault is not None:
            refuse(400, event.fault[:LONGEST_AUTHORITY])
            return
        try:
            address, port = parse_authority(event.authority)
        except ValueError as error:
            refuse(400, str(error))
            return
        if address not in served.pod.addresses:
            refuse(400, f"{address} is not an address of this pod")
            return
        if port in LISTENER_PORTS:
            refuse(503, f"port {port} is the agent's own")
            return
        if reason := refusal(served, self._bounds):
            refuse(503, reason)
            return
        connection = Connection(source, session.peer, address, port)
        admission = self._gate.admit(served.pod.uid, connection)
        request = _Request(session, event.stream_id, admission, access, served.share)
        if not admission.verdict.is_allowed:
            request.refuse(401, str(admission.verdict))
            return
        request.wait()
        self._dial(served, source, address, port, request.dial, request.on_dialed)

    def _dial(
        self,
        served: ServedPod,
        source: Address,
        address: Address,
        port: int,
        dial: _Dial,
        on_dialed: Callable[[TcpChannel | None, str], None],
        *,
        is_any_port: bool = False,
    ) -> None:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        try:
            own = self._sockets.open(served.netns_fd, family)
        except (SidestepError, OSError) as error:
            on_dialed(None, f"no socket for the application: {error}")
            return

        def on_connected(error: OSError | None) -> None:
            dial.on_give_up = None
            if error is None:
                on_dialed(TcpChannel(self._reactor, own, served.share), "")
            elif error.errno == errno.EADDRNOTAVAIL and not is_any_port and not dial.is_over:
                self._dial(served, source, address, port, dial, on_dialed, is_any_port=True)
            else:
                on_dialed(None, f"the application cannot be reached: {error}")

        # Not from the pod's own address: a client that is the pod itself is plain enough.
        if source not in served.pod.addresses:
            try:
                if is_any_port:
                    sockets.borrow_source(own, source)
                else:
                    self._sockets.borrow_source(own, source)
            except OSError as error:
                own.close()
                on_dialed(None, f"the client's address {source} cannot be used: {error}")
                return
        dial.on_give_up = tcp.connect(self._reactor, own, (str(address), port), on_connected)


class _Dial:
    """An application that is being dialed, until it answers or nobody waits for it any more."""

    def __init__(self) -> None:
        self.is_over = False
        self.on_give_up: Callable[[], None] | None = None

    def give_up(self) -> None:
        """Wait no more."""
        self.is_over = True
        if self.on_give_up is not None:
            self.on_give_up()


class _Request:
    """A CONNECT that waits for its application; what comes meanwhile is kept."""

    def __init__(
        self,
        session: Session,
        stream_id: int,
        admission: Admission,
        access: Access,
        share: Share,
    ) -> None:
        self._session = session
        self._stream_id = stream_id
        self._admission = admission
        self._access = access
        self.dial = _Dial()
        self._early = Kept(share, self._on_full)
        self._has_ended = False  # at the client's side
        self._is_gone = False

    def wait(self) -> None:
        """Keep what comes from now on; call `on_dialed` next."""
        self._admission.on_revoked = self._on_revoked
        channel = self._session.channels[self._stream_id]
        channel.pause()
        channel.on_data = self._early.keep
        channel.on_end = self._on_end
        channel.on_abort = self._on_abort

    def on_dialed(self, dialed: TcpChannel | None, reason: str) -> None:
        """Join the application, or say that it cannot be reached."""
        if self._is_gone:
            if dialed is not None:
                dialed.abort()
        elif dialed is None:
            self.refuse(503, reason)
        else:
            self._session.respond(self._stream_id, 200)
            channel = self._session.channels[self._stream_id]
            _join(self._admission, self._access, channel, dialed)
            channel.resume()  # before the relay may pause it
            for data in self._early.take():
                channel.on_data(data)
            if self._has_ended:
                channel.on_end()
            dialed.start()

    def refuse(self, status: int, reason: str) -> None:
        """Answer, and wait no more."""
        self._wait_no_more()
        self._session.respond(self._stream_id, status)
        _complete(self._admission, self._access, f"{status}: {reason}")

    def _on_full(self) -> None:
        self.refuse(503, FULL)

    def _on_revoked(self, verdict: Verdict) -> None:
        self.refuse(401, f"closed: {verdict}")

    def _on_end(self) -> None:
        self._has_ended = True

    def _on_abort(self) -> None:
        self._wait_no_more()
        _complete(self._admission, self._access, "reset")

    def _wait_no_more(self) -> None:
        self._is_gone = True
        self.dial.give_up()
        self._early.take()


def _join(admission: Admission, access: Access, left: Channel, right: Channel) -> None:
    """Relay until the connection ends, or policy ends it."""

    def on_done(sent: int, received: int, was_aborted: bool) -> None:
        result = "reset" if was_aborted else "ok"
        if not admission.verdict.is_allowed:
            result = f"closed: {admission.verdict}"
        _complete(admission, access, result, sent, received)

    relay = Relay(left, right, on_done)
    access.verdict = admission.verdict
    access.establish(relay)
    admission.on_revoked = lambda _verdict: relay.abort()


def _complete(
    admission: Admission, access: Access, result: str, sent: int = 0, received: int = 0
) -> None:
    admission.end()
    access.verdict = admission.verdict
    access.complete(result, sent, received)
