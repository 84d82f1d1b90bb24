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
from typing import TYPE_CHECKING, Protocol

from agent.errors import SidestepError
from agent.model.bounds import DEFAULT_BOUNDS, Bounds
from agent.model.capture import OUTBOUND_PORT
from agent.model.endpoint import endpoint, parse_address
from agent.model.flag import Flag
from agent.tunnel import sockets, tcp
from agent.tunnel.frames import ErrorCode
from agent.tunnel.labels import service_name
from agent.tunnel.relay import Relay
from agent.tunnel.served import refusal
from agent.tunnel.tcp import TcpChannel

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Sequence

    from agent.model.capture import Origin
    from agent.model.pod import Address
    from agent.model.workload import Workload
    from agent.tunnel.access import Access, Ledger
    from agent.tunnel.contexts import Contexts
    from agent.tunnel.mesh import Mesh, Route
    from agent.tunnel.pool import Pool
    from agent.tunnel.reactor import Reactor, Timer
    from agent.tunnel.relay import Channel
    from agent.tunnel.served import ServedPod
    from agent.tunnel.session import Session
    from agent.tunnel.sockets import PodSockets
    from agent.tunnel.stream_channel import StreamChannel

# A tunnel may end while a request is on its way: the peer restarts, or says GOAWAY. Nothing of the
# application was sent before the answer, so the request may be made again.
TRIES = 3
# A peer like us dials its application for half of this (tcp.CONNECT_SECONDS) and then says 503.
ANSWER_SECONDS = 2 * tcp.CONNECT_SECONDS
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
        source = parse_address(host)
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
        standpoint = self._mesh.standpoint(served.pod.uid)
        choose = partial(_choose, origin.endpoint)
        route = self._mesh.resolve(origin.address, origin.port, choose, standpoint)
        if route is None:
            sockets.abort(accepted)
            access.complete("the service has no ready endpoint")
            return
        if route.service is not None:
            access.service = service_name(route.service.namespace, route.service.name)
        if route.unreachable:
            sockets.abort(accepted)
            access.complete(route.unreachable)
        elif route.workload is None:
            self._pass_through(served, accepted, route, access)
        else:
            self._tunnel(served, accepted, route, route.workload, access)

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
        sockets.keep_alive(dialed)

        def on_connected(error: OSError | None) -> None:
            if error is not None:
                sockets.abort(accepted)
                access.complete(f"connect failed: {error}")
                return
            left = TcpChannel(self._reactor, accepted, served.share)
            right = TcpChannel(self._reactor, dialed, served.share)
            _join(access, left, right)
            left.start()
            right.start()

        tcp.connect(self._reactor, dialed, (str(route.address), route.port), on_connected)

    def _tunnel(
        self,
        served: ServedPod,
        accepted: socket.socket,
        route: Route,
        workload: Workload,
        access: Access,
    ) -> None:
        authority = endpoint(str(route.address), route.port)
        access.tunnel_to(workload, route.address, authority)
        _Request(
            self._reactor,
            self._contexts,
            self._pool,
            self._direct_path,
            served,
            accepted,
            route,
            workload,
            access,
            authority,
        ).ask()


class _Request:
    """A captured connection on its way to its peer: a CONNECT, made again if nobody heard it."""

    def __init__(
        self,
        reactor: Reactor,
        contexts: Contexts,
        pool: Pool,
        direct_path: DirectPath,
        served: ServedPod,
        accepted: socket.socket,
        route: Route,
        workload: Workload,
        access: Access,
        authority: str,
    ) -> None:
        self._reactor = reactor
        self._contexts = contexts
        self._pool = pool
        self._direct_path = direct_path
        self._served = served
        self._accepted = accepted
        self._route = route
        self._workload = workload
        self._access = access
        self._authority = authority
        self._headers = _headers(served, access)
        self._tries_left = TRIES
        # Of the try that is under way, once it has a tunnel.
        self._grant: Callable[[], None] | None
        self._session: Session
        self._channel: StreamChannel
        self._asked_at: float
        self._silence: Timer

    def ask(self) -> None:
        """Make the CONNECT as soon as there are a certificate and a tunnel for it."""
        self._tries_left -= 1
        self._contexts.client(str(self._served.identity), self._on_context)

    def _on_context(self, context: ssl.SSLContext | None, reason: str) -> None:
        if context is None:
            self._refuse(reason, Flag.IDENTITY)
        else:
            address = self._route.address
            self._pool.acquire(self._served, context, self._workload, address, self._on_session)

    def _on_session(self, session: Session | None, reason: str) -> None:
        if session is None:
            self._refuse(reason)
            return
        served, route = self._served, self._route
        self._access.prove(str(served.identity), str(session.peer))
        uid = self._workload.uid
        self._grant = self._direct_path.candidate(served, uid, route.address, route.port)
        self._session = session
        stream_id = session.open_stream(self._authority, self._headers)
        self._channel = session.channels[stream_id]
        self._channel.on_abort = self._on_abort
        self._channel.on_response = self._on_response
        self._asked_at = time.monotonic()
        self._wait_for_answer()

    def _wait_for_answer(self) -> None:
        self._silence = self._reactor.call_later(ANSWER_SECONDS, self._on_silence)

    def _on_silence(self) -> None:
        if self._session.heard_at < self._asked_at:  # on a slow link it may not be there yet
            self._wait_for_answer()
        else:
            self._channel.abort(ErrorCode.CANCEL)
            self._refuse(f"the peer did not answer in {ANSWER_SECONDS:g} s")

    def _on_abort(self) -> None:
        self._silence.cancel()
        was_heard = self._channel.reset_code not in (None, ErrorCode.REFUSED_STREAM)
        if was_heard or not self._tries_left:
            self._refuse("the peer reset the stream before it answered")
        else:
            # Later: the session that ends now is still in the pool.
            self._reactor.call_soon(self.ask)

    def _on_response(self, status: int) -> None:
        self._silence.cancel()
        if status != 200:
            self._channel.abort()
            if status == 401:
                self._refuse(DENIED, Flag.DENIED)
            else:
                self._refuse(f"the peer answered {status}")
            return
        if self._grant is not None:
            with suppress(SidestepError):  # the next one comes through here as well
                self._grant()
        left = TcpChannel(self._reactor, self._accepted, self._served.share)
        _join(self._access, left, self._channel)
        left.start()

    def _refuse(self, reason: str, flag: Flag = Flag.CONNECT) -> None:
        sockets.abort(self._accepted)
        self._access.complete(reason, flag=flag)


def _headers(served: ServedPod, access: Access) -> dict[str, str]:
    baggage = f"k8s.namespace.name={served.pod.namespace},k8s.pod.name={served.pod.name}"
    service = f";host={access.service.hostname}" if access.service else ""
    return {"baggage": baggage, "forwarded": f'for="{access.source}"{service}'}


def _join(access: Access, left: Channel, right: Channel) -> None:
    """Relay until the connection ends."""

    def on_done(sent: int, received: int, was_aborted: bool) -> None:
        access.complete("reset" if was_aborted else "ok", sent, received)

    access.establish(Relay(left, right, on_done))
