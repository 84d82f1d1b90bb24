"""To the pod: tunnels on 15008, and plaintext that capture steered to 15006.

The application is dialed inside the pod with the client's own address as source, so it sees who
connects. 200 is sent when that connection stands, 503 when it does not, 400 for a request that is
not for this pod. To the peer goes a code, never a text.
"""

from __future__ import annotations

import socket
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING

from agent.model.capture import LISTENER_PORTS
from agent.tunnel import sockets, tcp
from agent.tunnel.connection import Role
from agent.tunnel.relay import Relay
from agent.tunnel.served import Access, endpoint, log
from agent.tunnel.session import Session
from agent.tunnel.tcp import TcpChannel

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from agent.model.pod import Address
    from agent.tunnel.contexts import Contexts
    from agent.tunnel.events import ConnectRequested
    from agent.tunnel.reactor import Reactor
    from agent.tunnel.served import ServedPod
    from agent.tunnel.sockets import PodSockets
    from agent.tunnel.trust import Trust


def parse_authority(authority: str) -> tuple[Address, int]:
    """Return the address and port of `:authority` (ValueError if it is not `ip:port`)."""
    host, separator, port = authority.rpartition(":")
    if not separator or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{authority!r} is not ADDRESS:PORT")
    if host.startswith("[") and host.endswith("]"):
        return IPv6Address(host[1:-1]), int(port)
    return ip_address(host), int(port)


def plain(host: str) -> Address:
    """Return an address as a listener shows it, v4-mapped as IPv4."""
    address = ip_address(host)
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


class Inbound:
    """Serves the connections accepted on 15008 and 15006."""

    def __init__(
        self,
        reactor: Reactor,
        pod_sockets: PodSockets,
        trust: Trust,
        contexts: Contexts,
    ) -> None:
        self._reactor = reactor
        self._sockets = pod_sockets
        self._trust = trust
        self._contexts = contexts

    def serve_plaintext(
        self, served: ServedPod, accepted: socket.socket, peer: tuple[str, int]
    ) -> None:
        """Take over a captured plaintext connection."""
        source = plain(peer[0])
        local_host, port = accepted.getsockname()[:2]
        address = plain(local_host)
        access = Access(
            "inbound", served.pod, endpoint(str(source), peer[1]), endpoint(str(address), port),
            "plaintext",
        )  # fmt: skip
        if port in LISTENER_PORTS:
            sockets.abort(accepted)
            access.complete("the port is the agent's own")
            return

        def on_dialed(dialed: TcpChannel | None, reason: str) -> None:
            if dialed is None:
                sockets.abort(accepted)
                access.complete(reason)
                return
            left = TcpChannel(self._reactor, accepted)
            Relay(
                left,
                dialed,
                lambda sent, received, aborted: access.complete(
                    "reset" if aborted else "ok", sent, received
                ),
            )
            left.start()
            dialed.start()

        self._dial(served, source, address, port, on_dialed)

    def serve_tunnel(
        self, served: ServedPod, accepted: socket.socket, peer: tuple[str, int]
    ) -> None:
        """Take over a tunnel."""
        source = plain(peer[0])

        def on_context(context: ssl.SSLContext | None, reason: str) -> None:
            if context is None:
                sockets.abort(accepted)
                log("tunnel refused", pod=served.pod.name, peer=str(source), reason=reason)
                return
            session = Session(self._reactor, accepted, context, Role.SERVER, self._trust)
            session.on_request = lambda session, event: self._on_request(
                served, session, event, source
            )
            session.on_closed = lambda session, reason: self._on_closed(
                served, session, source, reason
            )

        self._contexts.server(str(served.identity), on_context)

    @staticmethod
    def _on_closed(served: ServedPod, session: Session, source: Address, reason: str) -> None:
        log(
            "tunnel closed",
            pod=f"{served.pod.namespace}/{served.pod.name}",
            peer=str(source),
            peer_identity=str(session.peer) if session.peer else None,
            code=session.refusal or None,
            reason=reason,
        )

    def _on_request(
        self, served: ServedPod, session: Session, event: ConnectRequested, source: Address
    ) -> None:
        access = Access(
            "inbound", served.pod, str(source), event.authority, "hbone", str(session.peer)
        )

        def refuse(status: int, reason: str) -> None:
            session.respond(event.stream_id, status)
            access.complete(f"{status}: {reason}")

        if event.fault is not None:
            refuse(400, event.fault)
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
        channel = session.channels[event.stream_id]
        channel.pause()
        early: list[bytes] = []
        has_ended = False
        is_gone = False

        def on_early_end() -> None:
            nonlocal has_ended
            has_ended = True

        def on_early_abort() -> None:
            nonlocal is_gone
            is_gone = True

        channel.on_data = lambda data: early.append(bytes(data))
        channel.on_end = on_early_end
        channel.on_abort = on_early_abort

        def on_dialed(dialed: TcpChannel | None, reason: str) -> None:
            if is_gone:
                if dialed is not None:
                    dialed.abort()
                access.complete("reset")
            elif dialed is None:
                refuse(503, reason)
            else:
                session.respond(event.stream_id, 200)
                Relay(
                    channel,
                    dialed,
                    lambda sent, received, aborted: access.complete(
                        "reset" if aborted else "ok", sent, received
                    ),
                )
                for data in early:
                    channel.on_data(data)
                channel.resume()
                if has_ended:
                    channel.on_end()
                dialed.start()

        self._dial(served, source, address, port, on_dialed)

    def _dial(
        self,
        served: ServedPod,
        source: Address,
        address: Address,
        port: int,
        on_dialed: Callable[[TcpChannel | None, str], None],
    ) -> None:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        own = self._sockets.open(served.netns_fd, family)

        def on_connected(error: OSError | None) -> None:
            if error is None:
                on_dialed(TcpChannel(self._reactor, own), "")
            else:
                on_dialed(None, f"the application cannot be reached: {error}")

        # Not from the pod's own address: a client that is the pod itself is plain enough.
        if source not in served.pod.addresses:
            try:
                sockets.borrow_source(own, source)
            except OSError as error:
                own.close()
                on_dialed(None, f"the client's address {source} cannot be used: {error}")
                return
        tcp.connect(self._reactor, own, (str(address), port), on_connected)
