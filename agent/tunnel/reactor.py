"""The event loop of a worker: epoll, callbacks, timers.

A plain loop costs a third of asyncio for each small message, and a worker moves bytes for a living
(docs/decisions/0003-plain-epoll-workers.md). Single-threaded; a callback that raises ends only
what it serves, since callers wrap what they serve.
"""

from __future__ import annotations

import heapq
import itertools
import select
import time
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

READ, WRITE = select.EPOLLIN, select.EPOLLOUT
EVENTS_PER_ROUND = 256
FEW_TIMERS = 64
BROKEN = select.EPOLLERR | select.EPOLLHUP


class Timer:
    """A call in the future; `cancel` makes it not happen."""

    __slots__ = ("_on_cancelled", "callback")

    def __init__(self, callback: Callable[[], None], on_cancelled: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback
        self._on_cancelled = on_cancelled

    def cancel(self) -> None:
        if self.callback is not None:
            self.callback = None
            self._on_cancelled()


class Reactor:
    """Calls back when a descriptor is ready or a time has come."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._fresh: set[int] = set()  # watched since epoll was asked
        self._timers: list[tuple[float, int, Timer]] = []
        self._cancelled = 0  # of those timers
        self._order = itertools.count()
        self._soon: deque[Callable[[], None]] = deque()
        self._next: deque[Callable[[], None]] = deque()
        self._is_running = False

    def watch(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Call `callback(ready events)` when `fd` is ready."""
        self._epoll.register(fd, events)
        self._callbacks[fd] = callback
        self._fresh.add(fd)

    def change(self, fd: int, events: int) -> None:
        """Watch `fd` for other events."""
        self._epoll.modify(fd, events)

    def forget(self, fd: int) -> None:
        """Stop watching `fd`; do it before closing it."""
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call once, after `seconds`."""
        timer = Timer(callback, self._on_cancelled)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), timer))
        return timer

    def _on_cancelled(self) -> None:
        # Most timers are cancelled long before they are due, one for each connection. They go when
        # they are more than half of all, so that a cancellation costs the same however many there
        # are. In place: `run` holds the list.
        self._cancelled += 1
        if self._cancelled > FEW_TIMERS and self._cancelled * 2 > len(self._timers):
            self._timers[:] = [each for each in self._timers if each[2].callback is not None]
            heapq.heapify(self._timers)
            self._cancelled = 0

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call once, in the next round."""
        self._soon.append(callback)

    def call_next(self, callback: Callable[[], None]) -> None:
        """Call once, before the next descriptor of this round has its turn."""
        self._next.append(callback)

    def run(self) -> None:
        """Run until `stop`."""
        self._is_running = True
        poll, callbacks, soon, timers = self._epoll.poll, self._callbacks, self._soon, self._timers
        following, fresh = self._next, self._fresh
        while self._is_running:
            if soon:
                patience = 0.0
            elif timers:
                patience = max(0.0, timers[0][0] - time.monotonic())
            else:
                patience = -1.0
            fresh.clear()
            for fd, ready in poll(patience, EVENTS_PER_ROUND):
                # Another callback may have forgotten it, and a new socket have its number: what was
                # reported is not of that one.
                callback = callbacks.get(fd)
                if callback is not None and fd not in fresh:
                    callback(ready)
                    while following:
                        following.popleft()()
            for _ in range(len(soon)):
                soon.popleft()()
                while following:
                    following.popleft()()
            if timers and timers[0][0] <= time.monotonic():
                self._fire()

    def _fire(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            callback, timer.callback = timer.callback, None
            if callback is None:
                self._cancelled -= 1
            else:
                callback()

    def stop(self) -> None:
        """Make `run` return after this round."""
        self._is_running = False
