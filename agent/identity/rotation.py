"""When to ask for which certificate. Pure: no clock, `now` is a parameter (seconds).

Rules:
    one request at a time for an identity, however many ask; at most eight in all
    a waiting connection goes before a pod that merely started, and that before a renewal
    renewal at half of the rest of the validity, plus or minus a tenth, so that nodes do not all
    ask at once
    after a failure 0.5 s, doubled up to 150 s, plus or minus a fifth; a success of any identity
    shows that the CA is back, and ends the waiting of those whom it had not answered; while an old
    certificate is valid, no wait is longer than half of what it has left
    a certificate stays in use while it is valid, whatever happens to its renewal
    a clock that was set back makes everything due that was decided before: what was issued then may
    not be valid yet, and a wait would be as much longer

Called by `keeper`: `take` what is due, tell how it went, and come back at `next_due`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.model.identity import SpiffeId

MOST_IN_FLIGHT = 8
FIRST_BACKOFF_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 150.0
BACKOFF_JITTER = 0.2
# A clock may be set back by so much without notice: certificates begin two minutes in the past.
BACK_SECONDS = 60.0
RENEWAL_JITTER = 0.1


class Urgency(enum.IntEnum):
    """Why a certificate is wanted; the smallest first."""

    WAITING = 0
    PREFETCH = 1
    RENEWAL = 2


@dataclass(slots=True)
class Entry:
    """What is known of one identity. `due` is when it is asked for next, as of `decided`."""

    urgency: Urgency
    due: float
    decided: float
    expires: float | None = None
    failures: int = 0
    reason: str = ""
    detail: str = ""
    failed_at: float | None = None

    def state(self, now: float) -> str:
        """Name the state, in the words of ambient mesh."""
        if self.expires is not None and self.expires > now:
            return "Available"
        return f"Unavailable: {self.reason}" if self.reason else "Initializing"

    def is_due(self, now: float) -> bool:
        """Whether it is to be asked for."""
        return self.due <= now or now < self.decided - BACK_SECONDS


class Rotation:
    """All identities of a node. `random` gives numbers from 0 to 1."""

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random
        self._entries: dict[SpiffeId, Entry] = {}
        self._in_flight: set[SpiffeId] = set()

    @property
    def entries(self) -> dict[SpiffeId, Entry]:
        """What is known, by identity."""
        return self._entries

    def want(self, identity: SpiffeId, urgency: Urgency, now: float) -> None:
        """Ask for an identity, or make it more urgent; what is there and valid is enough."""
        entry = self._entries.get(identity)
        if entry is None:
            self._entries[identity] = Entry(urgency, now, now)
        elif entry.expires is None or entry.expires <= now:
            entry.urgency = min(entry.urgency, urgency)

    def forget(self, identity: SpiffeId) -> None:
        """Nobody has the identity any more; an answer that still comes is dropped."""
        self._entries.pop(identity, None)

    def take(self, now: float) -> list[SpiffeId]:
        """Return whom to ask for now; each must be told of by `on_issued` or `on_failed`."""
        due = [
            (entry.urgency, entry.due, order, identity)
            for order, (identity, entry) in enumerate(self._entries.items())
            if entry.is_due(now) and identity not in self._in_flight
        ]
        free = MOST_IN_FLIGHT - len(self._in_flight)
        taken = [identity for *_rank, identity in sorted(due, key=lambda item: item[:3])[:free]]
        self._in_flight.update(taken)
        return taken

    def next_due(self) -> float | None:
        """Return when `take` will next have something; None if only an event can change that."""
        if len(self._in_flight) >= MOST_IN_FLIGHT:
            return None
        times = [
            entry.due
            for identity, entry in self._entries.items()
            if identity not in self._in_flight
        ]
        return min(times, default=None)

    def on_issued(self, identity: SpiffeId, expires: float, now: float) -> bool:
        """Take note of a certificate; False if nobody wants it any more."""
        self._in_flight.discard(identity)
        for other in self._entries.values():
            if other.reason == "authority_unavailable":
                other.due = min(other.due, now)
        entry = self._entries.get(identity)
        if entry is None:
            return False
        entry.expires = expires
        entry.urgency = Urgency.RENEWAL
        entry.failures, entry.reason, entry.detail, entry.failed_at = 0, "", "", None
        half = max(0.0, expires - now) / 2
        entry.due, entry.decided = now + half * self._jittered(RENEWAL_JITTER), now
        return True

    def on_failed(self, identity: SpiffeId, reason: str, detail: str, now: float) -> None:
        """Take note of a failure; the old certificate stays."""
        self._in_flight.discard(identity)
        entry = self._entries.get(identity)
        if entry is None:
            return
        backoff = min(FIRST_BACKOFF_SECONDS * 2 ** min(entry.failures, 20), LONGEST_BACKOFF_SECONDS)
        backoff *= self._jittered(BACKOFF_JITTER)
        if entry.expires is not None and entry.expires > now:
            # Not past the end of what is in use: it is tried again while there is time.
            backoff = min(backoff, max((entry.expires - now) / 2, FIRST_BACKOFF_SECONDS))
        entry.failures += 1
        entry.reason, entry.detail, entry.failed_at = reason, detail, now
        entry.due, entry.decided = now + min(backoff, LONGEST_BACKOFF_SECONDS), now

    def _jittered(self, share: float) -> float:
        return 1 + share * (2 * self._random() - 1)
