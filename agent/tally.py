"""Counters by name and labels, as sums of what workers tell; pure.

A series whose subject is gone is forgotten some time after it last changed, so that what comes and
goes in a cluster does not stay in the agent, nor in whoever scrapes it, for ever. Who is gone says
the owner; the time in between lets a last scrape see the last value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from agent.tunnel.counts import Counted, Labels


class Tally:
    """Sums by name and labels."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[Labels, int]] = {}
        self._changed: dict[tuple[str, Labels], float] = {}

    def add(self, counts: Counted, now: float) -> None:
        """Add amounts; `now` is of a clock that never goes back, in seconds."""
        for name, labels, amount in counts:
            sums = self._sums.setdefault(name, {})
            sums[labels] = sums.get(labels, 0) + amount
            self._changed[name, labels] = now

    def take(self) -> Counted:
        """Return and forget everything."""
        taken = tuple(
            (name, labels, amount)
            for name, sums in self._sums.items()
            for labels, amount in sums.items()
        )
        self._sums.clear()
        self._changed.clear()
        return taken

    def of(self, name: str) -> Iterator[tuple[Labels, int]]:
        """Yield the series of one name."""
        yield from self._sums.get(name, {}).items()

    def expire(self, before: float, is_gone: Callable[[Labels], bool]) -> int:
        """Forget what has not changed since `before` and whose subject is gone; return how many."""
        stale = [
            (name, labels)
            for (name, labels), changed in self._changed.items()
            if changed < before and is_gone(labels)
        ]
        for name, labels in stale:
            del self._changed[name, labels]
            del self._sums[name][labels]
        return len(stale)
