"""One stream of a tunnel as a relay's channel: what waits for its window, and how it ends.

Pure: the tunnel (`Carrier`) does the I/O and says what has come.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from agent.tunnel.buffers import Backlog
from agent.tunnel.frames import ErrorCode

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.tunnel.buffers import Share
    from agent.tunnel.connection import Connection


def _nothing() -> None:
    pass


def _drop(_data: bytes | memoryview) -> None:
    """Before the stream is joined nothing is read of it."""


def _ignore(_status: int) -> None:
    pass


class Carrier(Protocol):
    """The tunnel as its streams see it."""

    share: Share
    connection: Connection

    def send(self, stream_id: int, data: bytes | memoryview) -> int:
        """Put what may go now of `data` into the output and return how much that is."""
        ...

    def end(self, stream_id: int) -> None:
        """Put END_STREAM into the output."""
        ...

    def wants_write(self) -> None:
        """Write at the end of this round."""
        ...

    def write_now(self) -> None:
        """Write at once."""
        ...

    def read_again(self) -> None:
        """Go on reading if that was stopped."""
        ...

    def forget_stream(self, stream_id: int) -> None:
        """Deliver no more events of a stream."""
        ...


class StreamChannel:
    """Implements relay.Channel; `on_response(status)` is called once, with a CONNECT's answer."""

    is_shared = False
    is_broken = False  # a stream that fails says so at once

    def __init__(self, session: Carrier, stream_id: int) -> None:
        self.on_data: Callable[[bytes | memoryview], None] = _drop
        self.on_end: Callable[[], None] = _nothing
        self.on_abort: Callable[[], None] = _nothing
        self.on_drained: Callable[[], None] = _nothing
        self.on_response: Callable[[int], None] = _ignore
        self.share = session.share
        self._session = session
        self._stream_id = stream_id
        self._pending = Backlog()
        self.buffered = 0
        self.reset_code: int | None = None  # what the peer said when it reset the stream
        self.is_paused = False
        self._unacknowledged = 0
        self._ends = self._has_ended = False
        self.has_received_end = False
        self._is_closed = False

    @property
    def has_ended(self) -> bool:
        """Whether both ENDs have passed: the peer's to us, and ours into the tunnel's output."""
        return self.has_received_end and self._has_ended

    def write(self, data: bytes | memoryview) -> None:
        """Send what the windows allow, keep a copy of the rest."""
        if self._is_closed:
            return
        if self._pending:
            self._keep(data)
            return
        session = self._session
        size = len(data)
        sent = session.send(self._stream_id, data)
        if sent < size:
            self._keep(data[sent:])
        if type(data) is memoryview:
            session.write_now()
        else:
            session.wants_write()

    def _keep(self, data: bytes | memoryview) -> None:
        self._pending.keep(data)
        self.buffered += len(data)
        self.share.change(self, len(data))

    def flush(self) -> None:
        """Send what is pending as far as it may go; called when a window opens."""
        session = self._session
        had_pending = bool(self._pending)
        while self._pending:
            data = memoryview(self._pending[0])
            sent = session.send(self._stream_id, data)
            self.buffered -= sent
            self.share.change(self, -sent)
            self._pending.pass_on(sent)
            if sent < len(data):
                break
        if not self._pending and self._ends and not self._has_ended and not self._is_closed:
            self._has_ended = True
            session.end(self._stream_id)
        session.wants_write()
        if had_pending and not self._pending:
            self.on_drained()

    def finish(self) -> None:
        """Send END_STREAM after what is buffered."""
        self._ends = True
        self.flush()

    def pause(self) -> None:
        """Acknowledge no more: the peer stops at the stream's window."""
        self.is_paused = True

    def resume(self) -> None:
        """Acknowledge what was taken meanwhile."""
        self.is_paused = False
        self._acknowledge()
        self._session.wants_write()
        self._session.read_again()

    def answered(self, status: int) -> None:
        """Take the answer to our CONNECT; there is one (called by the session)."""
        on_response, self.on_response = self.on_response, _ignore
        on_response(status)

    def received(self, data: memoryview) -> None:
        """Take bytes off the stream (called by the session)."""
        self._unacknowledged += len(data)
        self.on_data(data)
        if not self.is_paused:
            self._acknowledge()

    def _acknowledge(self) -> None:
        if self._unacknowledged and not self._is_closed:
            self._session.connection.acknowledge(self._stream_id, self._unacknowledged)
            self._unacknowledged = 0

    def abort(self, code: int = ErrorCode.CONNECT_ERROR) -> None:
        """Reset the stream; CONNECT_ERROR is what a TCP RST becomes (RFC 9113 §8.5)."""
        if not self._is_closed:
            self._end()
            self._pending.clear()
            held, self.buffered = self.buffered, 0
            self.share.change(self, -held)
            self._session.connection.reset(self._stream_id, code)
            self._session.forget_stream(self._stream_id)

    def fail(self) -> None:
        """End and say so: the peer has reset the stream, or the tunnel is gone."""
        on_abort = self.on_abort
        self.abort()
        on_abort()

    def give_up(self) -> None:
        """End with a reset at both sides: there is no room for what is buffered."""
        self.fail()

    def hang_up(self) -> None:
        """Say after our END that we hear no more; the peer may have ended as well."""
        self.abort(ErrorCode.NO_ERROR)

    def close(self) -> None:
        """Both directions have ended."""
        if not self._is_closed:
            self._end()
            self._session.forget_stream(self._stream_id)

    def _end(self) -> None:
        self._is_closed = True
        # As in tcp.py: they refer to what refers to us.
        self.on_data, self.on_response = _drop, _ignore
        self.on_end = self.on_abort = self.on_drained = _nothing
