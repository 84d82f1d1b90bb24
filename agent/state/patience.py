"""How soon to mend what is taken away again and again. Pure.

What breaks once is mended at once. What breaks on and on has somebody behind it: then each time
makes the next one wait longer, up to a bound, so that neither side keeps the node busy; and the
thing is *contested*, which is to be said. When it has held for a while, all is forgotten.

Called by `agent.upkeep`; times are seconds of a clock that never goes back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable

Key = TypeVar("Key", bound="Hashable")
FREE_TRIES = 5  # in a row, before the first wait
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 2.0, 30.0
TRUCE_SECONDS = 60.0  # longer than any wait, so that who waits is not forgotten


@dataclass(slots=True)
class _Case:
    tries: int
    last: float
    due: float


class Patience(Generic[Key]):
    """What was mended in the last time, and how often."""

    def __init__(self) -> None:
        self._cases: dict[Key, _Case] = {}

    def is_due(self, key: Key, now: float) -> bool:
        """Whether to mend a thing now."""
        return key not in self._cases or now >= self._cases[key].due

    def note(self, key: Key, now: float) -> None:
        """Take note that a thing was mended, or that it was tried."""
        before = self._cases.get(key, _Case(0, now, now))
        tries = before.tries + 1 if now - before.last <= TRUCE_SECONDS else 1
        doubled = tries - FREE_TRIES - 1
        wait = 0.0 if doubled < 0 else FIRST_WAIT_SECONDS * 2.0 ** min(doubled, 10)
        self._cases[key] = _Case(tries, now, now + min(wait, LONGEST_WAIT_SECONDS))

    def contested(self, now: float) -> dict[Key, int]:
        """Return what was mended too often, and how often; forget what has held."""
        self._cases = {
            key: case for key, case in self._cases.items() if now - case.last <= TRUCE_SECONDS
        }
        return {key: case.tries for key, case in self._cases.items() if case.tries > FREE_TRIES}
