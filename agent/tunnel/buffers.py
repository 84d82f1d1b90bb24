"""The bytes that a worker holds for readers who are slower than writers, and how many it may. Pure.

Each connection's own share is bounded already (relay.HIGH_WATER, a stream's window), but a worker
has many connections. So who keeps bytes says how many, and when all together are as many as the
worker may keep, it is full until a quarter is free again:

    new connections are refused
    who still reads reads little at once, and stops at the first byte that cannot be passed on
    a tunnel with a stalled reader is not read at all: TCP makes the peer wait
    after five seconds connections are reset until there is room: those first that moved nothing in
    that time, the largest of them before others; then tunnels whose peer takes nothing

A tunnel that is not read does not see its peer's answers to pings, which is one more reason for the
five seconds. There is one account for each worker process, as there is one memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

# Bytes buffered for a slow side before the fast one pauses. What is buffered was copied, so a
# bulk flow pauses after one read that did not go through.
HIGH_WATER = 64 * 1024
FULL_SECONDS = 5.0
FULL = "the worker buffers as many bytes as it may for slow readers (--process-buffer-bytes)"


class Holder(Protocol):
    """Who keeps bytes; `is_shared` if several connections end with it."""

    is_shared: bool

    @property
    def buffered(self) -> int:
        """How many, in bytes."""
        ...

    def give_up(self) -> None:
        """Forget them, and end what they belong to; says so by `change`."""
        ...


class Buffers:
    """The account. Who has a clock and a log sets the callbacks: `on_relieved(how many ended)`."""

    def __init__(self) -> None:
        self.held = 0
        self.is_full = False
        self.high_water = HIGH_WATER  # what a relay allows now
        self.call_later: Callable[[float, Callable[[], None]], object] = lambda _s, _c: None
        self.on_full: Callable[[], None] = lambda: None
        self.on_relieved: Callable[[int], None] = lambda _count: None
        self._limit = 1 << 62
        self._holders: dict[Holder, None] = {}
        self._unmoved: dict[Holder, None] = {}  # who has passed nothing on since it is full
        self._waiting: dict[Callable[[], None], None] = {}
        self._episode = 0

    def set_limit(self, limit: int) -> None:
        """Allow so many bytes in all."""
        self._limit = limit

    def change(self, holder: Holder, by: int) -> None:
        """Say that a holder keeps more bytes, or fewer; its `buffered` is the new number."""
        self.held += by
        if holder.buffered:
            self._holders[holder] = None
        else:
            self._holders.pop(holder, None)
        if by < 0:
            self._unmoved.pop(holder, None)
            if self.is_full and not self._has_no_room():
                self._end()
        elif self.held >= self._limit and not self.is_full:
            self._begin()

    def wait_room(self, callback: Callable[[], None]) -> None:
        """Call back once, when there is room again."""
        self._waiting[callback] = None

    def _has_no_room(self) -> bool:
        return self.held * 4 > self._limit * 3

    def _begin(self) -> None:
        self.is_full, self.high_water = True, 0
        self._unmoved = dict(self._holders)
        self._episode += 1
        episode = self._episode
        self.call_later(FULL_SECONDS, lambda: self._relieve(episode))
        self.on_full()

    def _relieve(self, episode: int) -> None:
        if not self.is_full or episode != self._episode:
            return
        unmoved, count = self._unmoved, 0

        def rank(holder: Holder) -> tuple[bool, bool, int]:
            return holder not in unmoved, holder.is_shared, -holder.buffered

        for holder in sorted(self._holders, key=rank):
            if (
                self._has_no_room() and holder in self._holders
            ):  # it may have ended with another one
                holder.give_up()
                count += 1
        self.on_relieved(count)

    def _end(self) -> None:
        self.is_full, self.high_water = False, HIGH_WATER
        waiting, self._waiting = self._waiting, {}
        for callback in waiting:
            callback()


BUFFERS = Buffers()


class Kept:
    """Bytes of a connection that has nobody yet to pass them to; `on_give_up` ends it."""

    is_shared = False

    def __init__(self, on_give_up: Callable[[], None]) -> None:
        self.buffered = 0
        self._on_give_up = on_give_up
        self._parts: list[bytes] = []

    def keep(self, data: bytes | memoryview) -> None:
        """Keep a copy."""
        self._parts.append(bytes(data))
        self.buffered += len(data)
        BUFFERS.change(self, len(data))

    def take(self) -> list[bytes]:
        """Return all, and keep nothing."""
        parts, self._parts = self._parts, []
        held, self.buffered = self.buffered, 0
        BUFFERS.change(self, -held)
        return parts

    def give_up(self) -> None:
        """Forget them, and end the connection."""
        self.take()
        self._on_give_up()
