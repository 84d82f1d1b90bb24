"""A pod's listener, which several workers share: accepts in turns, and never in vain for ever.

A process that has no descriptor left, or a kernel without memory, cannot accept; the connection
stays in the queue, and the listener stays readable. So a listener rests for a moment then: another
worker may serve what waits, or we do once something has ended. What can be accepted and not served
is the concern of `serve`.
"""

from __future__ import annotations

import errno
import select
from typing import TYPE_CHECKING

from agent.tunnel.reactor import READ

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from agent.tunnel.reactor import Reactor

    Serve = Callable[[socket.socket, tuple[str, int]], None]

# Then others have their turn, and the requests that these make leave (session.HEADERS_TOGETHER).
ACCEPTS_PER_TURN = 4
QUEUE_LENGTH = 2048  # more than a listener keeps
REST_SECONDS = 0.1
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Listening:
    """Owns the socket, and passes on what it accepts, until `close`.

    `on_failed(error)` is called when accepting begins to fail, and not again before it has worked.
    """

    def __init__(
        self,
        reactor: Reactor,
        own: socket.socket,
        serve: Serve,
        on_failed: Callable[[OSError], None],
    ) -> None:
        self.socket = own
        self._reactor = reactor
        self._serve = serve
        self._on_failed = on_failed
        self._is_failing = self._is_closed = False
        own.setblocking(False)
        self._watch()

    def _watch(self) -> None:
        if not self._is_closed:
            # Workers share the listener: one of them is enough for one connection.
            events = READ | select.EPOLLEXCLUSIVE
            self._reactor.watch(
                self.socket.fileno(), events, lambda _ready: self._accept(ACCEPTS_PER_TURN)
            )

    def _accept(self, limit: int) -> None:
        for _ in range(limit):
            try:
                accepted, peer = self.socket.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in EXHAUSTED:
                    self._rest(error)
                elif error.errno == errno.EINVAL:
                    # The pod has closed it (SOCK_DESTROY): it would be readable for ever.
                    self._reactor.forget(self.socket.fileno())
                    self._on_failed(error)
                # Any other error is one of the connection, which has left the queue (accept(2)).
                return
            self._is_failing = False
            accepted.setblocking(False)
            self._serve(accepted, (peer[0], peer[1]))  # IPv6 has two numbers more

    def _rest(self, error: OSError) -> None:
        if not self._is_failing:
            self._is_failing = True
            self._on_failed(error)
        self._reactor.forget(self.socket.fileno())
        self._reactor.call_later(REST_SECONDS, self._watch)

    def serve_queue(self) -> None:
        """Accept all that waits now."""
        self._accept(QUEUE_LENGTH)

    def close(self) -> None:
        """Accept nothing more."""
        self._is_closed = True
        self._reactor.forget(self.socket.fileno())
        self.socket.close()
