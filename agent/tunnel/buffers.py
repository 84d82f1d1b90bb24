"""The bytes that a worker holds for readers who are slower than writers, and how many it may. Pure.

Each connection is bounded already (relay.HIGH_WATER, a stream's window), but a pod has many, and a
worker many pods. So who keeps bytes tells its pod's `Share`, and a pod is full that keeps

    a quarter of what the worker may keep, or
    as many bytes as are still free, if that is less

until it keeps no more than three quarters of that; and never with less than one high water. So two
pods cost the others nothing at all, however many of their connections stall, and those who are more
leave to the next one half of what is still free. Of a full pod, and of no other,

    new connections are refused
    who still reads reads little at once, and stops at the first byte that cannot be passed on
    a tunnel with a stalled reader is not read at all: TCP makes the peer wait
    after five seconds connections are reset: all that moved nothing in that time, and while there
    is no room then tunnels whose peer takes nothing, and the largest of the others

A tunnel that is not read does not see its peer's answers to pings, which is one more reason for the
five seconds. There is one account for each worker process, as there is one memory.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

# Bytes buffered for a slow side before the fast one pauses. What is buffered was copied, so a
# bulk flow pauses after one read that did not go through.
HIGH_WATER = 64 * 1024
# A bytes object of one byte takes 40: what is smaller than this is joined.
JOINED_BYTES = 16 * 1024
FULL_SECONDS = 5.0
PARTS = 4  # of what the worker may keep a pod gets one
FULL = "the pod's slow readers hold as many bytes as they may (--process-buffer-bytes)"


def _nothing() -> None:
    pass


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
    """The account of a worker.

    Who has a clock and a log sets the callbacks: `on_full(pod)`, `on_relieved(pod, how many
    connections ended)`.
    """

    def __init__(self) -> None:
        self.held = 0
        self.call_later: Callable[[float, Callable[[], None]], object] = lambda _s, _c: None
        self.on_full: Callable[[str], None] = lambda _pod: None
        self.on_relieved: Callable[[str, int], None] = lambda _pod, _count: None
        self._limit = 1 << 62
        self._is_scarce = False  # less than a part is free, so each pod's room hangs on all others
        self._shares: dict[Share, None] = {}  # of pods that keep something

    def set_limit(self, limit: int) -> None:
        """Allow so many bytes in all."""
        self._limit = limit

    def change(self, share: Share, by: int) -> None:
        """Say that a pod keeps more bytes, or fewer (called by its share)."""
        was_scarce = self._is_scarce
        self.held += by
        free = self._limit - self.held
        self._is_scarce = free * PARTS < self._limit
        room = max(HIGH_WATER, min(self._limit // PARTS, free))
        self._shares[share] = None
        for each in list(self._shares) if was_scarce or self._is_scarce else (share,):
            each.review(room)
        if not share.held:
            self._shares.pop(share, None)


BUFFERS = Buffers()


class Share:
    """What one pod keeps of it; `pod` names it in the log."""

    def __init__(self, pod: str, buffers: Buffers = BUFFERS) -> None:
        self.held = 0
        self.is_full = False
        self.high_water = HIGH_WATER  # what a relay allows now
        self._pod = pod
        self._buffers = buffers
        self._holders: dict[Holder, None] = {}
        self._unmoved: dict[Holder, None] = {}  # who has passed nothing on since it is full
        self._waiting: dict[Callable[[], None], None] = {}
        self._episode = 0

    def change(self, holder: Holder, by: int) -> None:
        """Say that a holder keeps more bytes, or fewer; its `buffered` is the new number."""
        self.held += by
        if holder.buffered:
            self._holders[holder] = None
        else:
            self._holders.pop(holder, None)
        if by < 0:
            self._unmoved.pop(holder, None)
        self._buffers.change(self, by)

    def wait_room(self, callback: Callable[[], None]) -> None:
        """Call back once, when there is room again."""
        self._waiting[callback] = None

    def review(self, room: int) -> None:
        """Be full or not, with so many bytes for each pod (called by the worker's account)."""
        if self.is_full:
            if not self.held or self.held * 4 <= room * 3:
                self._end()
        elif self.held and self.held >= room:
            self._begin()

    def _begin(self) -> None:
        self.is_full, self.high_water = True, 0
        self._unmoved = dict(self._holders)
        self._episode += 1
        episode = self._episode
        self._buffers.call_later(FULL_SECONDS, lambda: self._relieve(episode))
        self._buffers.on_full(self._pod)

    def _relieve(self, episode: int) -> None:
        if not self.is_full or episode != self._episode:
            return
        unmoved, count = self._unmoved, 0

        def rank(holder: Holder) -> tuple[bool, bool, int]:
            return holder not in unmoved, holder.is_shared, -holder.buffered

        for holder in sorted(self._holders, key=rank):
            # All that stall: those that were left would fill it again at once.
            is_stalled = holder in unmoved and not holder.is_shared
            if holder in self._holders and (is_stalled or self.is_full):
                holder.give_up()  # another one may end with it
                count += 1
        self._buffers.on_relieved(self._pod, count)

    def _end(self) -> None:
        self.is_full, self.high_water = False, HIGH_WATER
        waiting, self._waiting = self._waiting, {}
        for callback in waiting:
            callback()


class Backlog(deque[bytearray | memoryview]):
    """Copies of what waits to be passed on, in pieces that take little more than is in them.

    Small ones are joined, but nothing is added to one that was passed on in part: who took a view
    of it may still refer to that.
    """

    __slots__ = ()

    def keep(self, data: bytes | memoryview) -> None:
        """Copy to the end."""
        last = self[-1] if self else None
        if type(last) is bytearray and len(last) < JOINED_BYTES:
            last += data
        else:
            self.append(bytearray(data))

    def pass_on(self, size: int) -> None:
        """Forget the beginning of the first piece, or all of it."""
        piece = memoryview(self[0])
        if size == len(piece):
            self.popleft()
            return
        rest = piece[size:]
        # A view of a little would hold all of what it is a part of.
        is_little = len(rest) * 2 < memoryview(rest.obj).nbytes
        self[0] = bytearray(rest) if is_little else rest


class Kept:
    """Bytes of a connection that has nobody yet to pass them to; `on_give_up` ends it.

    `take` is the end of it: no callback is kept, since that refers to who keeps this.
    """

    is_shared = False

    def __init__(self, share: Share, on_give_up: Callable[[], None]) -> None:
        self.buffered = 0
        self._share = share
        self._on_give_up = on_give_up
        self._parts = Backlog()

    def keep(self, data: bytes | memoryview) -> None:
        """Keep a copy."""
        self._parts.keep(data)
        self.buffered += len(data)
        self._share.change(self, len(data))

    def take(self) -> list[memoryview]:
        """Return all, and keep nothing."""
        self._on_give_up = _nothing
        parts, self._parts = self._parts, Backlog()
        held, self.buffered = self.buffered, 0
        self._share.change(self, -held)
        return [memoryview(part) for part in parts]

    def give_up(self) -> None:
        """Forget them, and end the connection."""
        on_give_up = self._on_give_up
        self.take()
        on_give_up()
