"""What happened to pods, as Kubernetes Events: one for each problem, however often it occurs. Pure.

    first time                    a new Event
    again, by and by              its series: how often so far, and when last
    not for FINISHED_SECONDS      forgotten; the next time is a new Event

Each pod has a budget of writes, a burst and then one every five minutes, as client-go has for each
object: a problem with an ever changing message, or a pod that fails all the time, does not flood
the API server. What the budget does not allow is counted, and said with the next write.

Called by `pod_events`; times are seconds of a clock that never goes back.
"""

from __future__ import annotations

from dataclasses import dataclass, field

BURST_WRITES = 25
SECONDS_PER_WRITE = 300.0
FINISHED_SECONDS = 360.0
MOST_SERIES = 1000


@dataclass(frozen=True, slots=True)
class Occurrence:
    """What happened to a pod."""

    namespace: str
    pod: str
    uid: str
    reason: str
    note: str


@dataclass(slots=True)
class Series:
    """One problem of one pod, and how far its Event has been written."""

    what: Occurrence
    first: float
    last: float
    count: int = 0
    written: int = 0


@dataclass(slots=True)
class _Budget:
    """A token bucket."""

    at: float
    writes: float = field(default=BURST_WRITES)

    def refill(self, now: float) -> None:
        self.writes = min(BURST_WRITES, self.writes + (now - self.at) / SECONDS_PER_WRITE)
        self.at = now


class Occurrences:
    """All problems that are not over."""

    def __init__(self) -> None:
        # Both in the order of the last occurrence.
        self._series: dict[Occurrence, Series] = {}
        self._budgets: dict[str, _Budget] = {}

    def add(self, what: Occurrence, now: float) -> None:
        """Count an occurrence."""
        series = self._series.pop(what, None)
        if series is None or now - series.last > FINISHED_SECONDS:
            series = Series(what, now, now)
        series.count += 1
        series.last = now
        self._series[what] = series
        budget = self._budgets.pop(what.uid, None) or _Budget(now)
        self._budgets[what.uid] = budget
        self._forget(now)

    def due(self, now: float) -> Series | None:
        """Return what may be written now, if anything."""
        for series in self._series.values():
            if series.count > series.written:
                budget = self._budgets[series.what.uid]
                budget.refill(now)
                if budget.writes >= 1:
                    return series
        return None

    def next_due(self, now: float) -> float | None:
        """Return in how many seconds something may be written; None if nothing waits."""
        waits = [
            max(0.0, (1 - self._budgets[series.what.uid].writes) * SECONDS_PER_WRITE)
            + self._budgets[series.what.uid].at
            - now
            for series in self._series.values()
            if series.count > series.written
        ]
        return max(0.0, min(waits)) if waits else None

    def wrote(self, series: Series, count: int) -> None:
        """Take note that a series has been written as having `count` occurrences."""
        series.written = count
        budget = self._budgets.get(series.what.uid)
        if budget is not None:
            budget.writes -= 1

    def _forget(self, now: float) -> None:
        for what, series in list(self._series.items()):
            is_over = now - series.last > FINISHED_SECONDS and series.count == series.written
            if is_over or len(self._series) > MOST_SERIES:
                del self._series[what]
        named = {what.uid for what in self._series}
        full = BURST_WRITES * SECONDS_PER_WRITE
        for uid, budget in list(self._budgets.items()):
            is_unused = uid not in named and now - budget.at > full
            if is_unused or (uid not in named and len(self._budgets) > MOST_SERIES):
                del self._budgets[uid]
