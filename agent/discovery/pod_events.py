"""Say on a pod what is wrong with it: a Kubernetes Event, which `kubectl describe pod` shows.

    POST  /apis/events.k8s.io/v1/namespaces/<namespace>/events          the first time
    PATCH .../events/<name>   {series: {count, lastObservedTime}}       when it happens again

How often is up to `occurrences`. An Event is a help and no more: what the API server refuses is
dropped after a few tries, what does not reach it is tried again, more and more rarely.

Called by `kubernetes`; the writing is done in a thread, and nobody waits for it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from agent.discovery.api import StatusError
from agent.discovery.occurrences import Occurrence, Occurrences, Series
from agent.errors import KubernetesError

if TYPE_CHECKING:
    from agent.discovery.api import Api

log = logging.getLogger(__name__)
CONTROLLER = "sidestep.io/agent"
ACTION = "Enroll"
# Limits of the API: of a note, a reporting instance, and what a name leaves beside its suffix.
NOTE_BYTES = 1024
INSTANCE_CHARACTERS = 128
POD_CHARACTERS = 230
NOT_FOUND, TOO_MANY = 404, 429
REFUSALS, MOST_REFUSALS = (401, 403), 5
FIRST_RETRY_SECONDS = 0.5
LONGEST_RETRY_SECONDS = 60.0


class PodEventWriter(threading.Thread):
    """Writes what was reported of pods."""

    def __init__(self, api: Api) -> None:
        super().__init__(name="pod-events", daemon=True)
        self._api = api
        self._occurrences = Occurrences()
        self._changed = threading.Condition()
        self._is_closed = False
        self._failures = 0
        self._has_warned = False

    def report(self, what: Occurrence) -> None:
        """Take note of what happened; it is written soon."""
        with self._changed:
            self._occurrences.add(what, time.monotonic())
            self._changed.notify_all()

    def close(self) -> None:
        """Write no more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def run(self) -> None:
        """Write until closed."""
        while (series := self._next()) is not None:
            count = series.count
            try:
                self._write(series, count)
            except KubernetesError as error:
                if self._is_worth_another_try(error):
                    self._wait_after(error)
                    continue
                self._warn(error)
            self._failures = 0
            with self._changed:
                self._occurrences.wrote(series, count)

    def _next(self) -> Series | None:
        with self._changed:
            while not self._is_closed:
                now = time.monotonic()
                series = self._occurrences.due(now)
                if series is not None:
                    return series
                self._changed.wait(self._occurrences.next_due(now))
        return None

    def _write(self, series: Series, count: int) -> None:
        path = f"/apis/events.k8s.io/v1/namespaces/{series.what.namespace}/events"
        name = _name_of(series)
        again = {"count": count, "lastObservedTime": _clock(series.last)}
        if series.written:
            try:
                self._api.patch(f"{path}/{name}", {"series": again})
            except StatusError as error:
                if error.status != NOT_FOUND:  # else it has expired, and is made anew
                    raise
            else:
                return
        body = _describe(series, name)
        if count > 1:
            body["series"] = again
        self._api.create(path, body)

    def _is_worth_another_try(self, error: KubernetesError) -> bool:
        if not isinstance(error, StatusError) or error.status >= 500 or error.status == TOO_MANY:
            return True
        # A server that starts refuses, for a moment, also who has the right.
        return error.status in REFUSALS and self._failures < MOST_REFUSALS

    def _wait_after(self, error: KubernetesError) -> None:
        wait = min(FIRST_RETRY_SECONDS * 2.0 ** min(self._failures, 10), LONGEST_RETRY_SECONDS)
        if isinstance(error, StatusError):
            wait = max(wait, error.retry_after)
        self._failures += 1
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed, wait)

    def _warn(self, error: KubernetesError) -> None:
        # A pod's namespace that goes is no news; a right that is missing is, once.
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "an Event is not written; later ones may not be either",
                extra={"reason": error.reason, "detail": str(error)},
            )


def _name_of(series: Series) -> str:
    """Name an Event as other components do: the pod, and the time when it began."""
    began = int(_wall_seconds(series.first) * 1e6)
    return f"{series.what.pod[:POD_CHARACTERS].rstrip('-.')}.{began:x}"


def _describe(series: Series, name: str) -> dict[str, Any]:
    what = series.what
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "namespace": what.namespace,
        "name": what.pod,
        "uid": what.uid,
    }
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"namespace": what.namespace, "name": name},
        "type": "Warning",
        "reason": what.reason,
        "action": ACTION,
        "note": what.note.encode()[:NOTE_BYTES].decode(errors="ignore"),
        "regarding": pod,
        "eventTime": _clock(series.first),
        "reportingController": CONTROLLER,
        "reportingInstance": os.uname().nodename[:INSTANCE_CHARACTERS],
    }


# One for the whole life of the process: an Event's name must not change with the clock.
_MONOTONIC_AT_ZERO = time.time() - time.monotonic()


def _wall_seconds(monotonic: float) -> float:
    return _MONOTONIC_AT_ZERO + monotonic


def _clock(monotonic: float) -> str:
    moment = datetime.fromtimestamp(_wall_seconds(monotonic), UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
