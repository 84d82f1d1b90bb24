"""Connections through a real tunnel in one process: application, relay, TLS, relay, application."""

from __future__ import annotations

import socket
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from agent.tunnel.buffers import BUFFERS, Buffers
from agent.tunnel.connection import Role
from agent.tunnel.relay import Relay
from agent.tunnel.tcp import TcpChannel
from tests.support.loop import run_until
from tests.support.tunnel import CLIENT, SERVER, Witness, end_sessions, make_session

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agent.tunnel.buffers import Share
    from agent.tunnel.events import ConnectRequested
    from agent.tunnel.reactor import Reactor
    from agent.tunnel.session import Session
    from agent.tunnel.stream_channel import StreamChannel
    from tests.support.tunnel import Authority


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a TCP connection; they do not block."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs = listener.accept()[0]
    for each in (ours, theirs):
        each.setblocking(False)
        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return ours, theirs


class Wire:
    """A tunnel over TCP, and the applications' ends of what goes through it."""

    def __init__(
        self, reactor: Reactor, authority: Authority, stack: ExitStack, share: Share
    ) -> None:
        self.reactor = reactor
        self.share = share  # of both pods
        self._stack = stack
        ours, theirs = tcp_pair()
        contexts = authority.context(CLIENT, Role.CLIENT), authority.context(SERVER, Role.SERVER)
        self.client = Witness(make_session(reactor, ours, contexts[0], Role.CLIENT, share=share))
        self.server = Witness(make_session(reactor, theirs, contexts[1], Role.SERVER, share=share))
        self.server.session.on_request = self._on_request
        self.ended: list[tuple[int, int, bool]] = []  # of relays, client and server side
        self._far: list[socket.socket] = []
        stack.callback(end_sessions, reactor, (self.client.session, self.server.session))
        run_until(reactor, lambda: self.client.is_ready and self.server.is_ready)

    def _on_request(self, session: Session, event: ConnectRequested) -> None:
        application, own = tcp_pair()
        session.respond(event.stream_id, 200)
        self._join(session.channels[event.stream_id], own)
        self._far.append(self._stack.enter_context(application))

    def _join(self, channel: StreamChannel, own: socket.socket) -> None:
        tcp = TcpChannel(self.reactor, own, self.share)
        Relay(tcp, channel, lambda *report: self.ended.append(report))
        tcp.start()

    def connect(self) -> tuple[socket.socket, socket.socket]:
        """Open a connection; the client's end and the server's end."""
        near, own = tcp_pair()
        self._stack.enter_context(near)
        stream_id = self.client.session.open_stream("10.0.0.1:80", {})
        channel = self.client.session.channels[stream_id]
        answers: list[int] = []

        def on_response(status: int) -> None:
            answers.append(status)
            self._join(channel, own)

        channel.on_response = on_response
        run_until(self.reactor, lambda: answers)
        return near, self._far.pop()


@contextmanager
def buffer_limit(reactor: Reactor, limit: int) -> Iterator[None]:
    """Let this process buffer so many bytes, of which a pod gets a part; none must be left.

    The account begins anew: other tests have left channels that nobody closed.
    """
    BUFFERS.__dict__.update(vars(Buffers()))
    BUFFERS.set_limit(limit)
    BUFFERS.call_later = reactor.call_later
    try:
        yield
        assert BUFFERS.held == 0
    finally:
        BUFFERS.set_limit(1 << 62)
