"""From the pod: a captured connection to its destination, through a tunnel where there is one.

The original destination comes from the map that sockops wrote before the SYN left. A connection
without one did not come from capture (somebody dialed 15001 himself) and is reset.
"""

from __future__ import annotations

import random
import socket
import time
from contextlib import suppress
from functools import partial
from ipaddress import ip_address
from typing import TYPE_CHECKING, Protocol

from agent.errors import SidestepError
from agent.model.bounds import DEFAULT_BOUNDS, Bounds
from agent.model.capture import OUTBOUND_PORT
from agent.model.endpoint import endpoint
from agent.model.flag import Flag
from agent.tunnel import sockets, tcp
from agent.tunnel.frames import ErrorCode
from agent.tunnel.labels import ServiceName
from agent.tunnel.relay import Relay
from agent.tunnel.served import refusal
from agent.tunnel.tcp import TcpChannel

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Sequence

    from agent.model.capture import Origin
    from agent.model.pod import Address
    from agent.model.service import Service
    from agent.tunnel.access import Access, Ledger
    from agent.tunnel.contexts import Contexts
    from agent.tunnel.mesh import Mesh, Route
    from agent.tunnel.pool import Pool
    from agent.tunnel.reactor import Reactor, Timer
    from agent.tunnel.served import ServedPod
    from agent.tunnel.session import Session
    from agent.tunnel.sockets import PodSockets

# A tunnel may end while a request is on its way: the peer restarts, or says GOAWAY. Nothing of the
# application was sent before the answer, so the request may be made again.
TRIES = 3
# A peer like us dials its application for half of this (tcp.CONNECT_SECONDS) and then says 503.
ANSWER_SECONDS = 2 * tcp.CONNECT_SECONDS
CLUSTER_DOMAIN = "cluster.local"
DENIED = "the peer answered 401: denied by a policy at the destination"


class OriginalDestinations(Protocol):
    """Knows where captured connections wanted to go."""

    def lookup(self, netns_cookie: int, address: Address, port: int) -> Origin | None:
        """Return what the connection from `address`:`port` in a pod asked for; None if unknown."""
        ...


def _choose(
    wanted: tuple[Address, int] | None, endpoints: Sequence[tuple[Address, int]]
) -> tuple[Address, int]:
    """Follow the kernel's choice while it is one of the endpoints."""
    return wanted if wanted and wanted in endpoints else random.choice(endpoints)


def _named(service: Service) -> ServiceName:
    hostname = f"{service.name}.{service.namespace}.svc.{CLUSTER_DOMAIN}"
    return ServiceName(service.namespace, service.name, hostname)


class DirectPath(Protocol):
    """Lets later connections between two pods of this node go without the agent."""

    def candidate(
        self, source: ServedPod, destination_uid: str, address: Address, port: int
    ) -> Callable[[], None] | None:
        """Return what to call once the destination has allowed the connection; None if it may not.

        Ask before the destination is asked: what was allowed before a change of policy is void.
        """
        ...


class Outbound:
    """Serves the connections accepted on 15001."""

    def __init__(
        self,
        reactor: Reactor,
        pod_sockets: PodSockets,
        origins: OriginalDestinations,
        mesh: Mesh,
        pool: Pool,
        contexts: Contexts,
        direct_path: DirectPath,
        ledger: Ledger,
        bounds: Bounds = DEFAULT_BOUNDS,
    ) -> None:
        self._reactor = reactor
        self._sockets = pod_sockets
        self._origins = origins
        self._mesh = mesh
        self._pool = pool
        self._contexts = contexts
        self._direct_path = direct_path
        self._ledger = ledger
        self._bounds = bounds

    def serve(self, served: ServedPod, accepted: socket.socket, peer: tuple[str, int]) -> None:
        """Take over one accepted connection."""
        host, port = peer
        source = ip_address(host)
        origin = self._origins.lookup(served.netns_cookie, source, port)
        if origin is None:
            own_host, own_port = accepted.getsockname()[:2]
            sockets.abort(accepted)
            self._ledger.refuse(
                served,
                "outbound",
                endpoint(host, port),
                endpoint(own_host, own_port),
                f"no captured connection: the pod dialed port {OUTBOUND_PORT} itself",
            )
            return
        access = self._ledger.outbound(served, (source, port), (origin.address, origin.port))
        if reason := refusal(served, self._bounds):
            sockets.abort(accepted)
            access.complete(reason)
            return
        network = self._mesh.network(served.pod.uid)
        choose = partial(_choose, origin.endpoint)
        route = self._mesh.resolve(origin.address, origin.port, choose, network)
        if route is None:
            sockets.abort(accepted)
            access.complete("the service has no ready endpoint")
            return
        if route.service is not None:
            access.service = _named(route.service)
        if route.unreachable:
            sockets.abort(accepted)
            access.complete(route.unreachable)
        elif route.workload is None:
            self._pass_through(served, accepted, route, access)
        else:
            self._tunnel(served, accepted, route, access)

    def _pass_through(
        self, served: ServedPod, accepted: socket.socket, route: Route, access: Access
    ) -> None:
        family = socket.AF_INET if route.address.version == 4 else socket.AF_INET6
        access.destination = endpoint(str(route.address), route.port)
        try:
            dialed = self._sockets.open(served.netns_fd, family)
        except (SidestepError, OSError) as error:
            sockets.abort(accepted)
            access.complete(f"no socket for the destination: {error}")
            return

        def on_connected(error: OSError | None) -> None:
            if error is not None:
                sockets.abort(accepted)
                access.complete(f"connect failed: {error}")
                return
            left = TcpChannel(self._reactor, accepted, served.share)
            right = TcpChannel(self._reactor, dialed, served.share)
            relay = Relay(
                left,
                right,
                lambda sent, received, aborted: access.complete(
                    "reset" if aborted else "ok", sent, received
                ),
            )
            access.establish(relay)
            left.start()
            right.start()

        tcp.connect(self._reactor, dialed, (str(route.address), route.port), on_connected)

    def _tunnel(
        self, served: ServedPod, accepted: socket.socket, route: Route, access: Access
    ) -> None:
        workload = route.workload
        assert workload is not None
        access.tunnel_to(workload, route.address, route.port)
        authority = endpoint(str(route.address), route.port)
        baggage = f"k8s.namespace.name={served.pod.namespace},k8s.pod.name={served.pod.name}"
        service = f";host={access.service.hostname}" if access.service else ""
        headers = {"baggage": baggage, "forwarded": f'for="{access.source}"{service}'}

        tries_left = TRIES - 1

        def refuse(reason: str, flag: Flag = Flag.CONNECT) -> None:
            sockets.abort(accepted)
            access.complete(reason, flag=flag)

        def acquire() -> None:
            self._contexts.client(str(served.identity), on_context)

        def on_session(session: Session | None, reason: str) -> None:
            if session is None:
                refuse(reason)
                return
            access.prove(str(served.identity), str(session.peer))
            grant = self._direct_path.candidate(served, workload.uid, route.address, route.port)
            stream_id = session.open_stream(authority, headers)
            channel = session.channels[stream_id]

            asked_at = time.monotonic()
            silence: Timer

            def on_silence() -> None:
                nonlocal silence
                if session.heard_at < asked_at:  # on a slow link the request may not be there yet
                    silence = self._reactor.call_later(ANSWER_SECONDS, on_silence)
                else:
                    channel.abort(ErrorCode.CANCEL)
                    refuse(f"the peer did not answer in {ANSWER_SECONDS:g} s")

            silence = self._reactor.call_later(ANSWER_SECONDS, on_silence)

            def on_abort() -> None:
                nonlocal tries_left
                silence.cancel()
                was_heard = channel.reset_code not in (None, ErrorCode.REFUSED_STREAM)
                if was_heard or not tries_left:
                    refuse("the peer reset the stream before it answered")
                    return
                tries_left -= 1
                # Later: the session that ends now is still in the pool.
                self._reactor.call_soon(acquire)

            channel.on_abort = on_abort

            def on_response(status: int) -> None:
                silence.cancel()
                if status != 200:
                    channel.on_abort = lambda: None
                    channel.abort()
                    if status == 401:
                        refuse(DENIED, Flag.DENIED)
                    else:
                        refuse(f"the peer answered {status}")
                    return
                if grant is not None:
                    with suppress(SidestepError):  # the next one comes through here as well
                        grant()
                left = TcpChannel(self._reactor, accepted, served.share)
                relay = Relay(
                    left,
                    channel,
                    lambda sent, received, aborted: access.complete(
                        "reset" if aborted else "ok", sent, received
                    ),
                )
                access.establish(relay)
                left.start()

            channel.on_response = on_response

        def on_context(context: ssl.SSLContext | None, reason: str) -> None:
            if context is None:
                refuse(reason, Flag.IDENTITY)
            else:
                self._pool.acquire(served, context, workload, route.address, on_session)

        self._contexts.client(str(served.identity), on_context)
