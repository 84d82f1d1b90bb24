"""How long to go on against another writer of the same file. Pure.

Each time that our entry was taken away is a strike. Some are nothing: a CNI is upgraded, or writes
its file at each start. Who strikes on and on keeps the file for himself, and then each of our
writes makes the runtime read everything anew: so the wait grows, and after a bound we stop, until
nobody has touched the entry for long.
"""

from __future__ import annotations

FIRST_WAIT_SECONDS = 0.1
MOST_STRIKES = 6
WINDOW_SECONDS = 120.0
TRUCE_SECONDS = 900.0


class Contention:
    """Strikes of the last time; `now` is any clock that goes forward, in seconds."""

    def __init__(self) -> None:
        self._strikes: list[float] = []
        self.gave_up_at: float | None = None

    def strike(self, now: float) -> float | None:
        """Return how long to wait before the entry is put back; None: not any more."""
        if self.gave_up_at is not None and now - self.gave_up_at < TRUCE_SECONDS:
            return None
        self.gave_up_at = None
        self._strikes = [each for each in self._strikes if now - each < WINDOW_SECONDS]
        self._strikes.append(now)
        if len(self._strikes) > MOST_STRIKES:
            self.gave_up_at = now
            self._strikes.clear()
            return None
        return 0.0 if len(self._strikes) == 1 else FIRST_WAIT_SECONDS * 2 ** len(self._strikes)

    @property
    def strikes(self) -> int:
        """How often the entry was taken away, lately."""
        return len(self._strikes)
