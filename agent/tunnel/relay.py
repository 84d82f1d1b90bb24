"""Join two channels: what one reads the other writes, with back-pressure, FIN and RST intact.

A channel is one end of a byte stream, a TCP socket or a stream of a tunnel. The relay knows no
sockets; it is the whole of half-close and reset semantics:

    data        written to the other side; a side that cannot write pauses the other's reading
    end (FIN)   passed on when all data before it is written; the other direction goes on
    abort (RST) passed on at once, whatever is still buffered; but of a side that had ended before
                all that it said is passed on first, since it only wants to hear no more (a server
                that answers before the request is over: RFC 9113 §8.1)
    both ended  both closed

Buffers are bounded: a paused TCP socket is not read, a paused stream is not acknowledged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.tunnel.buffers import Share


class Channel(Protocol):
    """One end of a byte stream, driven by callbacks that the relay sets."""

    share: Share  # of the pod that the connection is of

    on_data: Callable[[bytes | memoryview], None]  # a view is valid during the call only
    on_end: Callable[[], None]
    on_abort: Callable[[], None]
    on_drained: Callable[[], None]

    is_broken: bool  # it has failed, and is about to say so by `on_abort`

    @property
    def buffered(self) -> int:
        """Bytes accepted by `write` and not yet passed on."""
        ...

    def write(self, data: bytes | memoryview) -> None:
        """Pass on or buffer."""
        ...

    def finish(self) -> None:
        """Send FIN after what is buffered."""
        ...

    def pause(self) -> None:
        """Stop reading, as far as the protocol lets us."""
        ...

    def resume(self) -> None:
        """Read again."""
        ...

    def abort(self) -> None:
        """End at once with RST; nothing is called back any more, and no callback is kept."""
        ...

    def close(self) -> None:
        """Give everything back after both directions ended, as `abort` does."""
        ...

    def hang_up(self) -> None:
        """End like `abort`, as far as nothing that was written is lost by it."""
        ...


class Relay:
    """Two joined channels; `on_done(sent, received, was_aborted)` is called once.

    `sent` counts bytes from `left` to `right`.
    """

    def __init__(
        self, left: Channel, right: Channel, on_done: Callable[[int, int, bool], None]
    ) -> None:
        self._left, self._right = left, right
        self._on_done = on_done
        self.sent = self.received = 0
        self._left_ended = self._right_ended = False
        self._is_done = self._was_reset = False
        self._is_left_paused = self._is_right_paused = False
        left.on_data, right.on_data = self._on_left_data, self._on_right_data
        left.on_end, right.on_end = self._on_left_end, self._on_right_end
        left.on_abort, right.on_abort = self._on_left_abort, self._on_right_abort
        left.on_drained, right.on_drained = self._on_left_drained, self._on_right_drained

    def _on_left_data(self, data: bytes | memoryview) -> None:
        self.sent += len(data)
        self._right.write(data)
        if not self._is_left_paused and self._right.buffered > self._right.share.high_water:
            self._is_left_paused = True
            self._left.pause()

    def _on_right_data(self, data: bytes | memoryview) -> None:
        self.received += len(data)
        self._left.write(data)
        if not self._is_right_paused and self._left.buffered > self._left.share.high_water:
            self._is_right_paused = True
            self._right.pause()

    def _on_left_drained(self) -> None:
        if self._is_right_paused:
            self._is_right_paused = False
            self._right.resume()
        self._finish_if_done()

    def _on_right_drained(self) -> None:
        if self._is_left_paused:
            self._is_left_paused = False
            self._left.resume()
        self._finish_if_done()

    def _on_left_end(self) -> None:
        self._left_ended = True
        self._right.finish()
        self._finish_if_done()

    def _on_right_end(self) -> None:
        self._right_ended = True
        self._left.finish()
        self._finish_if_done()

    def _on_left_abort(self) -> None:
        self._end_after(self._right, had_ended=self._left_ended, has_ended=self._right_ended)

    def _on_right_abort(self) -> None:
        self._end_after(self._left, had_ended=self._right_ended, has_ended=self._left_ended)

    def _end_after(self, other: Channel, *, had_ended: bool, has_ended: bool) -> None:
        """End when `other` has got what a side had said (`had_ended`: all) that is gone now."""
        if self._was_reset or not had_ended or (has_ended and not other.buffered):
            self.abort()
        elif not self._is_done:
            self._was_reset = True
            self._left_ended = self._right_ended = True  # nobody is heard any more
            other.pause()
            self._finish_if_done()

    def _finish_if_done(self) -> None:
        left, right = self._left, self._right
        if not (self._left_ended and self._right_ended) or self._is_done:
            return
        if left.buffered or right.buffered:
            return
        if self._was_reset:
            self._is_done = True
            left.hang_up()
            right.hang_up()
            self._on_done(self.sent, self.received, True)
        elif not (left.is_broken or right.is_broken):
            self._is_done = True
            left.close()
            right.close()
            self._on_done(self.sent, self.received, False)

    def abort(self) -> None:
        """Reset both sides."""
        if not self._is_done:
            self._is_done = True
            self._left.abort()
            self._right.abort()
            self._on_done(self.sent, self.received, True)
