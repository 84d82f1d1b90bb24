"""A TCP socket as a channel, and the non-blocking connect that makes one."""

from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING

from agent.tunnel import lingering, sockets
from agent.tunnel.buffers import Backlog
from agent.tunnel.reactor import BROKEN, READ, WRITE

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.tunnel.buffers import Share
    from agent.tunnel.reactor import Reactor

READ_BYTES = 512 * 1024
# A flow that fills this is read into the shared buffer next time. A small message is cheaper as
# bytes of its own: nobody has to copy it to keep it.
SMALL_BYTES = 2048
CONNECT_SECONDS = 10.0

# A worker has one thread, and `on_data` keeps no view of it.
_scratch = memoryview(bytearray(READ_BYTES))


def _nothing() -> None:
    pass


def _no_data(_data: bytes | memoryview) -> None:
    raise AssertionError("a channel was read that is not joined")


class TcpChannel:
    """Implements relay.Channel. Reads nothing until `start`.

    Whatever ends it but `close` is a reset, the death of this process too: an application must not
    take what arrived until then for all.
    """

    is_shared = False

    def __init__(self, reactor: Reactor, own: socket.socket, share: Share) -> None:
        self.share = share
        self.on_data: Callable[[bytes | memoryview], None] = _no_data
        self.on_end = self.on_abort = self.on_drained = _nothing
        self._reactor = reactor
        self._socket = own
        self._fd = own.fileno()
        sockets.reset_on_close(own, is_reset=True)
        self._pending = Backlog()
        self.buffered = 0
        self._wants_read = False
        self._has_read_all = False
        self._is_large = False
        self._ends = self._has_ended = False
        self._is_closed = self.is_broken = False
        self._is_detached = True  # the reactor does not know the socket
        self._watched = 0

    def start(self) -> None:
        """Read from now on: the callbacks are set."""
        self._wants_read = True
        self._update()

    def _update(self) -> None:
        wanted = (READ if self._wants_read and not self._has_read_all else 0) | (
            WRITE if self._pending else 0
        )
        if self._is_closed:
            return
        if self._is_detached:
            if wanted:
                self._is_detached = False
                self._watched = wanted
                self._reactor.watch(self._fd, wanted, self._on_ready)
        elif wanted != self._watched:
            self._watched = wanted
            self._reactor.change(self._fd, wanted)

    def _on_ready(self, ready: int) -> None:
        if ready & WRITE:
            self._flush()
        if ready & READ and self._wants_read and not self._is_closed:
            self._read()
        if ready & BROKEN and not ready & READ and not self._is_closed:
            # RST while we do not read: what came before it, be it an end, is lost with it.
            if self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self._fail()
            elif not self._watched:
                # Both FINs have passed and we do not read now: epoll would report it for ever. Who
                # was resumed since this was reported hears of it again, and then reads.
                self._reactor.forget(self._fd)
                self._is_detached = True

    def _read(self) -> None:
        try:
            if self._is_large and not self.share.is_full:
                size = self._socket.recv_into(_scratch)
                data: bytes | memoryview = _scratch[:size]
            else:
                data = self._socket.recv(SMALL_BYTES)
                size = len(data)
        except BlockingIOError:
            return
        except OSError:
            self._fail()
            return
        if size:
            self._is_large = size >= SMALL_BYTES
            self.on_data(data)
        else:
            self._has_read_all = True
            self._update()
            self.on_end()

    def write(self, data: bytes | memoryview) -> None:
        """Send now what the socket takes, keep a copy of the rest."""
        if self._is_closed:
            return
        if not self._pending:
            try:
                sent = self._socket.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._fail()
                return
            if sent == len(data):
                return
            data = data[sent:]
        self._pending.keep(data)
        self.buffered += len(data)
        self.share.change(self, len(data))
        self._update()

    def _flush(self) -> None:
        while self._pending:
            data = self._pending[0]
            try:
                sent = self._socket.send(data)
            except BlockingIOError:
                return
            except OSError:
                self._fail()
                return
            self.buffered -= sent
            self.share.change(self, -sent)
            self._pending.pass_on(sent)
            if sent < len(data):
                return
        self._update()
        self._end_if_due()
        self.on_drained()

    def finish(self) -> None:
        """Send FIN after what is buffered."""
        self._ends = True
        self._end_if_due()

    def _end_if_due(self) -> None:
        if self._ends and not self._pending and not self._has_ended and not self._is_closed:
            self._has_ended = True
            try:
                self._socket.shutdown(socket.SHUT_WR)
            except OSError:
                self._fail()

    def pause(self) -> None:
        """Stop reading; TCP's window does the rest."""
        self._wants_read = False
        self._update()

    def resume(self) -> None:
        """Read again."""
        self._wants_read = True
        self._update()

    def _fail(self) -> None:
        # Not from within a caller's write: it may be in the middle of its own bookkeeping.
        if not self._is_closed:
            self.is_broken = True
            self._reactor.call_soon(self.on_abort)
            self.abort()

    def give_up(self) -> None:
        """End with a reset at both sides: there is no room for what is buffered."""
        self._fail()

    def abort(self) -> None:
        """Close with RST."""
        if not self._is_closed:
            self._end()
            self._pending.clear()
            held, self.buffered = self.buffered, 0
            self.share.change(self, -held)
            sockets.abort(self._socket)

    def hang_up(self) -> None:
        """Close with RST, after the application's kernel has taken all."""
        if self._is_closed or not sockets.unacknowledged(self._socket):
            self.abort()
        else:
            self._end()
            sockets.reset_on_close(self._socket, is_reset=False)
            lingering.linger(self._reactor, self._socket, _nothing)

    def close(self) -> None:
        """Close; both directions have ended."""
        if not self._is_closed:
            self._end()
            sockets.reset_on_close(self._socket, is_reset=False)
            self._socket.close()

    def _end(self) -> None:
        self._is_closed = True
        self._reactor.forget(self._fd)
        # Whoever they belong to refers to us: without them all of a connection goes at once, and
        # the collector of cyclic garbage has nothing to do (docs/performance.md).
        self.on_data = _no_data
        self.on_end = self.on_abort = self.on_drained = _nothing


def connect(
    reactor: Reactor,
    own: socket.socket,
    destination: tuple[str, int],
    on_done: Callable[[OSError | None], None],
) -> Callable[[], None]:
    """Connect without blocking; `on_done` gets None, or why it failed (the socket is closed).

    What is returned gives up waiting: then the socket is closed, and `on_done` not called. It does
    nothing once there is nothing to wait for, though `on_done` may still be about to be called.
    """

    try:
        number = own.connect_ex(destination)
        if number == errno.EINPROGRESS:
            # To an application on this machine it stands by now, and asking again says so.
            number = own.connect_ex(destination)
    except OSError as error:
        number = error.errno or errno.EINVAL
    if number == 0:
        reactor.call_soon(lambda: on_done(None))
        return _nothing

    def stop_waiting() -> None:
        timer.cancel()
        reactor.forget(own.fileno())

    def settle(error: OSError | None) -> None:
        stop_waiting()
        if error is not None:
            own.close()
        on_done(error)

    def give_up() -> None:
        stop_waiting()
        own.close()

    def on_ready(_ready: int) -> None:
        number = own.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        settle(OSError(number, os.strerror(number)) if number else None)

    def on_timeout() -> None:
        settle(TimeoutError(errno.ETIMEDOUT, f"no answer in {CONNECT_SECONDS:g} s"))

    timer = reactor.call_later(CONNECT_SECONDS, on_timeout)
    if number in (errno.EINPROGRESS, errno.EALREADY):
        reactor.watch(own.fileno(), WRITE, on_ready)
    else:
        failed = OSError(number, os.strerror(number))
        reactor.call_soon(lambda: settle(failed))
        return _nothing
    return give_up
