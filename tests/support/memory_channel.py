"""A relay's channel in memory: the test plays the far end, and what the relay did is written down.

`capacity` bytes go out at once and the rest is buffered, as with a socket whose peer does not read;
`drain` is the peer that reads again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent.tunnel.buffers import Share

if TYPE_CHECKING:
    from collections.abc import Callable


def _unset(*_arguments: object) -> None:
    raise AssertionError("the channel was not joined")


class MemoryChannel:
    """Implements relay.Channel."""

    def __init__(self, capacity: int = 1 << 62) -> None:
        self.on_data: Callable[[bytes | memoryview], None] = _unset
        self.on_end: Callable[[], None] = _unset
        self.on_abort: Callable[[], None] = _unset
        self.on_drained: Callable[[], None] = _unset
        self.share = Share("shop/memory")
        self.capacity = capacity
        self.delivered = b""  # what the far end has received
        self.has_sent_end = False  # the far end has received FIN
        self.is_broken = False
        self.calls: list[str] = []
        self._pending = b""
        self._ends = False

    @property
    def buffered(self) -> int:
        return len(self._pending)

    def write(self, data: bytes | memoryview) -> None:
        assert not self._ends, "data after FIN"
        self._pending += bytes(data)
        self._move()

    def finish(self) -> None:
        self.calls.append("finish")
        self._ends = True
        self._move()

    def _move(self) -> None:
        room = max(0, self.capacity - len(self.delivered))
        self.delivered += self._pending[:room]
        self._pending = self._pending[room:]
        self.has_sent_end = self._ends and not self._pending

    def drain(self) -> None:
        """Let everything out, as a peer does that reads again."""
        self.capacity = 1 << 62
        self._move()
        self.on_drained()

    def pause(self) -> None:
        self.calls.append("pause")

    def resume(self) -> None:
        self.calls.append("resume")

    def abort(self) -> None:
        self.calls.append("abort")

    def close(self) -> None:
        self.calls.append("close")

    def hang_up(self) -> None:
        self.calls.append("hang up")
