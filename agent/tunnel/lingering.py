"""The last moments of a connection that was closed in order: what was said last arrives.

Who closes a socket that its peer still writes to answers with RST. The peer's next write fails, and
many then drop what they have not read yet: the end of a stream that was complete (RFC 9112 §9.6
tells of the same in HTTP/1.1).
"""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from agent.tunnel import sockets
from agent.tunnel.reactor import READ

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.tunnel.reactor import Reactor

STALL_SECONDS = 5.0
MOST_STALLS = 12  # a peer that sends for ever is left after a minute
READ_BYTES = 64 * 1024

_dropped = bytearray(READ_BYTES)


def linger(reactor: Reactor, own: socket.socket, on_gone: Callable[[], None]) -> None:
    """Say FIN, read until the peer says it too, and close; `on_gone` is called after that.

    Owns the socket from now on; the reactor must not know it any more. A peer that takes and sends
    nothing from one look to the next is not waited for: five seconds, or ten if it lives, since it
    acknowledges the FIN.
    """
    _Goodbye(reactor, own, on_gone).say()


class _Goodbye:
    def __init__(self, reactor: Reactor, own: socket.socket, on_gone: Callable[[], None]) -> None:
        self._reactor = reactor
        self._socket = own
        self._on_gone = on_gone
        self._looks_left = MOST_STALLS
        self._seen = sockets.progress(own)
        self._timer = reactor.call_later(STALL_SECONDS, self._look)

    def say(self) -> None:
        with suppress(OSError):  # reset by the peer, which is told by reading as well
            self._socket.shutdown(socket.SHUT_WR)
        self._reactor.watch(self._socket.fileno(), READ, self._on_ready)

    def _look(self) -> None:
        self._looks_left -= 1
        before, self._seen = self._seen, sockets.progress(self._socket)
        if self._looks_left and self._seen != before:
            self._timer = self._reactor.call_later(STALL_SECONDS, self._look)
        else:
            self._end()

    def _on_ready(self, _ready: int) -> None:
        try:
            # TCP drops the bytes in the kernel (tcp(7)).
            is_over = not self._socket.recv_into(_dropped, READ_BYTES, socket.MSG_TRUNC)
        except BlockingIOError:
            return
        except OSError:
            is_over = True
        if is_over:
            self._end()

    def _end(self) -> None:
        self._timer.cancel()
        self._reactor.forget(self._socket.fileno())
        self._socket.close()
        self._on_gone()
