"""Follow all objects of one kind: list, then watch from there; once more from the list on 410.

Theory of operation. `version` is where the watch stands. While there is none, the kind is listed in
pages, and what the list no longer has is removed only after its last page: what still holds is
never torn down. A watch that ends is opened again at the version that it reached. Bookmarks move it
on while nothing changes, so that it seldom is too old; when it is (410, also inside the stream),
the kind is listed again. Anything else is tried again, more and more rarely, and what is known
stays. Definitions that are not installed count as no objects, and are asked for again and again.

Each follower is a thread with one connection, since the client blocks. It hands each object to the
sink and keeps none, so a burst costs time and no memory. Called by `kubernetes`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from agent.discovery.api import StatusError
from agent.discovery.watch import GONE, Body, Changed, Deleted, Failed, Progressed, Stream
from agent.errors import KubernetesError

if TYPE_CHECKING:
    import urllib3

    from agent.discovery.api import Api

log = logging.getLogger(__name__)
FORBIDDEN = 403
NOT_FOUND = 404
WHOLE = "application/json"
PAGE_OBJECTS = 250
WATCH_SECONDS = (300, 600)  # spread, so that agents do not all come at once
# Bookmarks come about once a minute; a stream that is silent for longer is dead.
SILENCE_SECONDS = 130.0
FIRST_RETRY_SECONDS = 0.2
LONGEST_RETRY_SECONDS = 30.0
ABSENT_SECONDS = 5.0
# A server that starts may not serve a kind yet that it has: policies must not go because of that.
BELIEVED_ABSENT_SECONDS = 30.0
SHORTEST_WATCH_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Resource:
    """One kind, and where the API server has it; of several versions the first that is served."""

    kind: str
    plural: str
    versions: tuple[str, ...]
    may_be_absent: bool = False
    may_be_forbidden: bool = False  # then it is as if there were none
    is_metadata_enough: bool = False  # of objects whose status is large, and changes all the time

    def path(self, version: str) -> str:
        """Return where all objects of the kind are, at one of the versions."""
        return f"/{'apis' if '/' in version else 'api'}/{version}/{self.plural}"


class Sink(Protocol):
    """Who takes the objects; called from the followers' threads."""

    def put(self, body: Body) -> str:
        """Take a new or changed object and return how it is named."""
        ...

    def remove(self, body: Body) -> None:
        """Forget an object."""
        ...

    def keep_only(self, kind: str, named: set[str]) -> None:
        """Forget all other objects of a kind: all were listed."""
        ...


class Follower(threading.Thread):
    """Follows one kind until it is stopped."""

    def __init__(self, api: Api, resource: Resource, sink: Sink) -> None:
        # It may be blocked in a connect; that must not keep the process.
        super().__init__(name=f"follow-{resource.plural}", daemon=True)
        self._api = api
        self._resource = resource
        self._sink = sink
        self._served = 0
        self._version: str | None = None
        self._absent_since: float | None = None
        self._told: Literal["nothing", "objects", "absence"] = "nothing"
        self._failures = 0
        self._is_stopped = threading.Event()
        self._lock = threading.Lock()
        self._response: urllib3.BaseHTTPResponse | None = None

    def stop(self) -> None:
        """End soon, whatever it waits for."""
        with self._lock:
            self._is_stopped.set()
            if self._response is not None:
                _shut_down(self._response)

    def run(self) -> None:
        """List and watch, again and again."""
        while not self._is_stopped.is_set():
            try:
                if self._version is None:
                    self._list()
                self._watch(self._version or "")
            except KubernetesError as error:
                if not self._is_stopped.is_set():
                    self._is_stopped.wait(self._handle(error))
            except Exception:
                # A defect. A thread that ended would leave the kind as it is, and nobody knew.
                log.exception("the API server's answer was not understood; list again")
                self._version = None
                self._is_stopped.wait(LONGEST_RETRY_SECONDS)

    def _handle(self, error: KubernetesError) -> float:
        """Decide what an error means, and return for how long to wait."""
        status = error.status if isinstance(error, StatusError) else 0
        if status == GONE:
            log.info("list again", extra={"kind": self._resource.kind, "detail": str(error)})
            self._version = None
        elif (status == NOT_FOUND and self._resource.may_be_absent) or (
            status == FORBIDDEN and self._resource.may_be_forbidden
        ):
            return self._handle_absence()
        if self._failures == 1:
            log.warning(
                "a kind cannot be followed; what is known of it stays in force",
                extra={
                    "kind": self._resource.kind,
                    "reason": error.reason,
                    "detail": str(error),
                },
            )
        self._failures += 1
        longest = FIRST_RETRY_SECONDS * 2.0 ** min(self._failures, 10)
        spread = min(longest, LONGEST_RETRY_SECONDS) * random.uniform(0.5, 1.0)
        return max(spread, error.retry_after if isinstance(error, StatusError) else 0.0)

    def _handle_absence(self) -> float:
        self._version = None
        self._served += 1
        if self._served % len(self._resource.versions):
            return 0.0
        now = time.monotonic()
        if self._absent_since is None:
            self._absent_since = now
            log.info("kind is not installed, or not for us", extra={"kind": self._resource.kind})
        is_believed = now - self._absent_since >= BELIEVED_ABSENT_SECONDS
        if self._told == "nothing" or (self._told == "objects" and is_believed):
            self._sink.keep_only(self._resource.kind, set())
            self._told = "absence"
        return ABSENT_SECONDS

    @property
    def _path(self) -> str:
        versions = self._resource.versions
        return self._resource.path(versions[self._served % len(versions)])

    def _accept(self, form: str) -> str:
        if not self._resource.is_metadata_enough:
            return WHOLE
        return f"{WHOLE};as={form};g=meta.k8s.io;v=v1"

    def _identify(self, body: Body) -> Body:
        # The items of a list do not say what they are.
        versions = self._resource.versions
        body["apiVersion"] = versions[self._served % len(versions)]
        body["kind"] = self._resource.kind
        return body

    def _list(self) -> None:
        query = {"limit": str(PAGE_OBJECTS)}
        named: set[str] = set()
        while True:
            page = self._get_page(query)
            for body in page["items"] or ():
                named.add(self._sink.put(self._identify(body)))
            query["continue"] = page["metadata"].get("continue") or ""
            if not query["continue"]:
                break
        self._sink.keep_only(self._resource.kind, named)
        self._told = "objects"
        self._version = page["metadata"]["resourceVersion"]
        self._absent_since = None
        self._recover()
        log.info("listed", extra={"kind": self._resource.kind, "count": len(named)})

    def _get_page(self, query: dict[str, str]) -> Body:
        accept = self._accept("PartialObjectMetadataList")
        with (
            self._api.get(self._path, query, accept=accept) as response,
            _Interruptible(self, response),
        ):
            data = response.read()
        try:
            page: Body = json.loads(data)
            page["metadata"]["resourceVersion"], page["items"]
        except (LookupError, TypeError, ValueError) as error:
            raise KubernetesError(f"{self._path}: half an answer, or none: {error}") from error
        return page

    def _watch(self, version: str) -> None:
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(random.randint(*WATCH_SECONDS)),
        }
        began = time.monotonic()
        stream = Stream()
        with (
            self._api.get(
                self._path, query, SILENCE_SECONDS, self._accept("PartialObjectMetadata")
            ) as response,
            _Interruptible(self, response),
        ):
            for chunk in response.stream(decode_content=True):
                try:
                    events = stream.feed(chunk)
                except ValueError as error:
                    raise KubernetesError(f"{self._path}: {error}") from error
                for event in events:
                    self._take(event)
        if time.monotonic() - began < SHORTEST_WATCH_SECONDS:
            raise KubernetesError(f"{self._path}: the watch ended at once")

    def _take(self, event: Changed | Deleted | Progressed | Failed) -> None:
        match event:
            case Failed():
                raise StatusError(f"{self._path}: watch: {event.message}", event.code)
            case Changed():
                self._sink.put(self._identify(event.body))
            case Deleted():
                self._sink.remove(self._identify(event.body))
            case Progressed():
                pass
        self._version = event.version
        self._recover()

    def _recover(self) -> None:
        if self._failures > 1:
            log.info("the kind is followed again", extra={"kind": self._resource.kind})
        self._failures = 0


def _shut_down(response: urllib3.BaseHTTPResponse) -> None:
    with contextlib.suppress(OSError, ValueError):  # it ended by itself
        response.shutdown()


class _Interruptible:
    """While inside, `stop` of the follower ends the reading of the response."""

    def __init__(self, follower: Follower, response: urllib3.BaseHTTPResponse) -> None:
        self._follower = follower
        self._response = response

    def __enter__(self) -> None:
        follower = self._follower
        with follower._lock:
            follower._response = self._response
            if follower._is_stopped.is_set():
                _shut_down(self._response)

    def __exit__(self, *_error: object) -> None:
        with self._follower._lock:
            self._follower._response = None
