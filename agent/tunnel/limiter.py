"""How many lines of a kind may be written: so many a second, what is beyond is counted. Pure."""

from __future__ import annotations


class Limiter:
    """A bucket that holds one second's worth of lines, and is full at first."""

    def __init__(self, a_second: int) -> None:
        """Let `a_second` lines pass each second; 0 lets all pass."""
        self._rate = a_second
        self._left = float(a_second)
        self._at = 0.0
        self._suppressed = 0

    def may_pass(self, now: float) -> bool:
        """Say whether one more line may be written now, in seconds of any steady clock."""
        if not self._rate:
            return True
        self._left = min(float(self._rate), self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1:
            self._suppressed += 1
            return False
        self._left -= 1
        return True

    def take_suppressed(self) -> int:
        """Return how many did not pass since the last call."""
        suppressed, self._suppressed = self._suppressed, 0
        return suppressed
