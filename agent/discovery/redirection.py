"""Say on the pods themselves whether they are captured: the annotation that peers and istiod read.

A merge patch of pods/status, so the agent needs no right to change a pod. Its uid goes along: a pod
that took over the name is not touched. What cannot be written is tried again, each pod for itself.
What is ordered once more was taken away by somebody else, and is written once more.

Called by `kubernetes`; the writing is done in a thread, and nobody waits for it.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent.discovery.api import StatusError
from agent.discovery.translate import REDIRECTION
from agent.errors import KubernetesError

if TYPE_CHECKING:
    from agent.discovery.api import Api

log = logging.getLogger(__name__)
NOT_FOUND, CONFLICT = 404, 409
CONFLICTS_OF_A_UID = 2
FIRST_RETRY_SECONDS = 0.2
LONGEST_RETRY_SECONDS = 30.0
# Until then a state that lacks what was written may only be late. Also keeps the peace with whoever
# takes it away again and again.
LATENESS_SECONDS = 5.0


@dataclass(slots=True)
class _Order:
    namespace: str
    name: str
    redirection: str | None
    due: float = 0.0
    failures: int = 0
    is_repeated: bool = False  # of what is written already, as far as we know


class RedirectionWriter(threading.Thread):
    """Writes what was said last of each pod."""

    def __init__(self, api: Api) -> None:
        super().__init__(name="redirection", daemon=True)
        self._api = api
        self._orders: dict[str, _Order] = {}
        self._written: dict[str, tuple[str, float]] = {}  # and when
        self._changed = threading.Condition()
        self._is_closed = False

    def publish(self, uid: str, namespace: str, name: str, redirection: str | None) -> None:
        """Order the annotation to be written; None takes it away."""
        with self._changed:
            order = self._orders.get(uid)
            if order is not None and order.redirection == redirection:
                return
            new = self._orders[uid] = _Order(namespace, name, redirection)
            written = self._written.get(uid)
            # Not if there is another order: that one may be under way.
            if order is None and written is not None and written[0] == redirection:
                new.is_repeated = True
                new.due = written[1] + LATENESS_SECONDS
            self._changed.notify_all()

    def close(self, patience_seconds: float) -> None:
        """End when all is written, or the time is up."""
        with self._changed:
            self._changed.wait_for(
                lambda: all(order.is_repeated for order in self._orders.values()), patience_seconds
            )
            self._is_closed = True
            self._changed.notify_all()

    def run(self) -> None:
        """Write until closed."""
        while (found := self._next()) is not None:
            self._write(*found)

    def _next(self) -> tuple[str, _Order] | None:
        with self._changed:
            while not self._is_closed:
                now = time.monotonic()
                ready = min(self._orders.items(), key=lambda item: item[1].due, default=None)
                if ready is not None and ready[1].due <= now:
                    return ready
                self._changed.wait(None if ready is None else ready[1].due - now)
        return None

    def _write(self, uid: str, order: _Order) -> None:
        path = f"/api/v1/namespaces/{order.namespace}/pods/{order.name}/status"
        metadata = {"uid": uid, "annotations": {REDIRECTION: order.redirection}}
        redirection = order.redirection
        try:
            self._api.patch(path, {"metadata": metadata})
        except KubernetesError as error:
            status = error.status if isinstance(error, StatusError) else 0
            # A conflict may also be one of writers; a uid that differs does so again.
            is_gone = status == CONFLICT and order.failures >= CONFLICTS_OF_A_UID
            if not is_gone and status != NOT_FOUND:
                self._postpone(order, error)
                return
            redirection = None
        with self._changed:
            if redirection is None:
                self._written.pop(uid, None)
            else:
                self._written[uid] = redirection, time.monotonic()
            if self._orders.get(uid) is order:
                del self._orders[uid]
            self._changed.notify_all()

    def _postpone(self, order: _Order, error: KubernetesError) -> None:
        if order.failures == 0:
            log.warning(
                "a pod's annotation is not written",
                extra={
                    "pod": f"{order.namespace}/{order.name}",
                    "reason": error.reason,
                    "detail": str(error),
                },
            )
        with self._changed:
            wait = min(FIRST_RETRY_SECONDS * 2.0 ** min(order.failures, 10), LONGEST_RETRY_SECONDS)
            order.failures += 1
            order.due = time.monotonic() + wait
