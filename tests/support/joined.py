"""A tunnel between two sessions, and both ends of its streams: real TLS over real sockets."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from agent.tunnel.connection import Role
from agent.tunnel.events import ConnectRequested
from agent.tunnel.reactor import Reactor
from tests.support.loop import run_until
from tests.support.tunnel import Witness, make_session
from tests.support.wire import tcp_pair

if TYPE_CHECKING:
    import socket
    import ssl

    from agent.tunnel.stream_channel import StreamChannel


class Tunnel:
    """A client and a server joined by a pair of sockets."""

    def __init__(
        self,
        client_context: ssl.SSLContext,
        server_context: ssl.SSLContext,
        ends: tuple[socket.socket, socket.socket] | None = None,
    ) -> None:
        self.reactor = Reactor()
        ours, theirs = ends or tcp_pair()
        self.client = Witness(make_session(self.reactor, ours, client_context, Role.CLIENT))
        self.server = Witness(make_session(self.reactor, theirs, server_context, Role.SERVER))

    def until(self, condition: Callable[[], object]) -> None:
        run_until(self.reactor, condition)

    def wait_ready(self) -> Tunnel:
        self.until(lambda: self.client.is_ready and self.server.is_ready)
        return self

    def open(self, status: int = 200) -> tuple[Stream, Stream]:
        """Open a stream that the server answers; both ends of it."""
        answers: list[int] = []
        stream_id = self.client.session.open_stream("10.0.0.1:80", {"baggage": "a=b"})
        near = Stream(self.client.session.channels[stream_id])
        near.channel.on_response = answers.append
        self.until(lambda: self.server.requests)
        (request,) = self.server.requests
        self.server.requests.clear()
        assert isinstance(request, ConnectRequested)
        assert (request.authority, request.headers["baggage"]) == ("10.0.0.1:80", "a=b")
        far = Stream(self.server.session.channels[stream_id])
        self.server.session.respond(stream_id, status)
        self.until(lambda: answers)
        assert answers == [status]
        return near, far


Join = Callable[..., Tunnel]


class Stream:
    """One end of a stream with what it reported."""

    def __init__(self, channel: StreamChannel) -> None:
        self.channel = channel
        self.received = bytearray()
        self.seen: list[str] = []
        channel.on_data = self.received.extend
        channel.on_end = lambda: self.seen.append("end")
        channel.on_abort = lambda: self.seen.append("abort")
        channel.on_drained = lambda: self.seen.append("drained")
