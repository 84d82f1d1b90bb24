"""State from a cluster's API server: one follower for each kind, one translator for all.

The first snapshot comes when every kind has been listed; until then nothing is said, so that an
agent which starts while the API server is away changes nothing on its node. Later on the server's
absence is only an absence of news. Changes that come close together make one snapshot.

Called by the composition roots. Nothing here blocks the event loop but the work on a snapshot.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import threading
import time
from typing import TYPE_CHECKING
from urllib.parse import quote

from agent.discovery.api import Api, StatusError
from agent.discovery.cluster import connect
from agent.discovery.follow import Follower, Resource
from agent.discovery.occurrences import Occurrence
from agent.discovery.pod_events import PodEventWriter
from agent.discovery.policies import DEFAULT_ROOT_NAMESPACE
from agent.discovery.redirection import RedirectionWriter
from agent.discovery.reporting import log_problems
from agent.discovery.rollout import is_deleted
from agent.discovery.translate import ObjectProblem, SourcedObject, Translator, describe
from agent.errors import KubernetesError
from agent.model.enrollment import DEFAULT_RULES, EnrollmentRules

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from agent.discovery.watch import Body
    from agent.model.pod import LocalPod
    from agent.model.starting import StartingPod
    from agent.model.workload import Workload
    from agent.state.store import Snapshot

ORIGIN = "cluster"
SECURITY = ("security.istio.io/v1", "security.istio.io/v1beta1")
NETWORKING = tuple(f"networking.istio.io/{each}" for each in ("v1", "v1beta1", "v1alpha3"))
PODS = Resource("Pod", "pods", ("v1",))
RESOURCES = (
    PODS,
    Resource("Namespace", "namespaces", ("v1",)),
    # Only metrics say where a node is: an agent that may not know goes on without.
    Resource("Node", "nodes", ("v1",), may_be_forbidden=True, is_metadata_enough=True),
    Resource("Service", "services", ("v1",)),
    Resource("EndpointSlice", "endpointslices", ("discovery.k8s.io/v1",)),
    Resource("ServiceEntry", "serviceentries", NETWORKING, may_be_absent=True),
    Resource("WorkloadEntry", "workloadentries", NETWORKING, may_be_absent=True),
    Resource("AuthorizationPolicy", "authorizationpolicies", SECURITY, may_be_absent=True),
    Resource("PeerAuthentication", "peerauthentications", SECURITY, may_be_absent=True),
)
# The work on a snapshot grows with the cluster: a pause of a multiple of it bounds its share of a
# core, and no change waits for longer than the longest pause.
PAUSE_SECONDS = 0.02
PAUSE_MULTIPLE = 4.0
LONGEST_PAUSE_SECONDS = 0.5
log = logging.getLogger(__name__)
PATIENCE_SECONDS = 3.0
FORBIDDEN = 403
GONE = (401, 404)  # our account, or the DaemonSet
# A little more than an API server remembers a token whose account has gone.
REMEMBERED_SECONDS = 12.0
BELIEVED_SECONDS, ASK_AGAIN_SECONDS = 10.0, 1.0
ONE_POD_SECONDS = 5.0
# A list of 10,000 pods takes a tenth longer than with 100,000. But of pyroute2, whose every
# connection is garbage, so many would be 15 MiB that lie here once 45 pods have come and gone.
GARBAGE_OBJECTS = 10_000


class KubernetesSource:
    """The cluster, as one agent or the CA follows it."""

    def __init__(
        self,
        api: Api,
        root_namespace: str = DEFAULT_ROOT_NAMESPACE,
        rules: EnrollmentRules = DEFAULT_RULES,
        resources: Iterable[Resource] = RESOURCES,
        daemonset: tuple[str, str] | None = None,
    ) -> None:
        """Follow nothing yet; `daemonset` is the namespace and name of the agents' own."""
        self._daemonset = daemonset
        self._resources = tuple(resources)
        self._translator = Translator(root_namespace, rules)
        self._problems: dict[str, ObjectProblem] = {}
        self._lock = threading.Lock()
        self._unlisted = {resource.kind for resource in self._resources}
        self._changed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._followers = [Follower(api, resource, self) for resource in self._resources]
        self._api = api
        self._writer = RedirectionWriter(api)
        self._events = PodEventWriter(api)
        self.problems: tuple[ObjectProblem, ...] = ()

    @classmethod
    def open(
        cls,
        root_namespace: str = DEFAULT_ROOT_NAMESPACE,
        rules: EnrollmentRules = DEFAULT_RULES,
        resources: Iterable[Resource] = RESOURCES,
        daemonset: tuple[str, str] | None = None,
    ) -> KubernetesSource:
        """Find the cluster that this process is in (KubernetesError).

        Also has the process look for cyclic garbage more rarely: JSON has none, and looking for it
        took a third of the time in which lists are read.
        """
        gc.set_threshold(GARBAGE_OBJECTS)
        api = Api(connect().configuration)
        return cls(api, root_namespace, rules, resources, daemonset)

    async def watch(self, stop: asyncio.Event) -> AsyncIterator[Snapshot]:
        """Yield what the cluster says, now and after each change, until `stop`."""
        self._loop = asyncio.get_running_loop()
        for follower in self._followers:
            follower.start()
        self._writer.start()
        self._events.start()
        latest: Snapshot | None = None
        try:
            while True:
                await _wait_any(self._changed, stop)
                if stop.is_set():
                    return
                self._changed.clear()
                began = time.monotonic()
                snapshot = self._read()
                if snapshot is not None and snapshot != latest:
                    latest = snapshot
                    yield snapshot
                pause = PAUSE_SECONDS + PAUSE_MULTIPLE * (time.monotonic() - began)
                try:
                    async with asyncio.timeout(min(pause, LONGEST_PAUSE_SECONDS)):
                        await stop.wait()
                except TimeoutError:
                    continue
        finally:
            for follower in self._followers:
                follower.stop()

    def _read(self) -> Snapshot | None:
        with self._lock:
            if self._unlisted:
                return None
            problems = tuple(self._problems.values())
            snapshot = self._translator.snapshot()
        log_problems(self.problems, problems)
        self.problems = problems
        return snapshot

    async def ask_for_pod(self, namespace: str, name: str) -> StartingPod | None:
        """Ask the API server for one pod, which the follower may not have yet (KubernetesError)."""
        return await asyncio.to_thread(self._ask_for_pod, namespace, name)

    def _ask_for_pod(self, namespace: str, name: str) -> StartingPod | None:
        # A list of one: `get` would be one more right.
        path = f"/api/v1/namespaces/{quote(namespace, safe='')}/pods"
        query = {"fieldSelector": f"metadata.name={name}"}
        with self._api.get(path, query, ONE_POD_SECONDS) as response:
            data = response.read()
        try:
            items = json.loads(data)["items"] or ()
        except (LookupError, TypeError, ValueError) as error:
            raise KubernetesError(f"{path}: half an answer, or none: {error}") from error
        with self._lock:
            for body in items:
                return self._translator.judge(body)
        return None

    def publish(self, pod: LocalPod | Workload, redirection: str | None) -> None:
        """Say on the pod whether it is captured, soon; None takes it back."""
        self._writer.publish(pod.uid, pod.namespace, pod.name, redirection)

    def report(self, pod: LocalPod, reason: str, note: str) -> None:
        """Say on the pod why it is not captured, as an Event."""
        word = "".join(part.capitalize() for part in reason.split("_"))
        self._events.report(Occurrence(pod.namespace, pod.name, pod.uid, word, note))

    async def is_withdrawn(self) -> bool:
        """Say whether the agents' DaemonSet is deleted; no, if nobody answers soon.

        Where our own account has gone, so does all that was installed with it. That it or the
        DaemonSet has gone is believed when nothing else is said for a while: a server that cannot
        look the account up answers the same.
        """
        if self._daemonset is None:
            return False
        loop = asyncio.get_running_loop()
        until = loop.time() + REMEMBERED_SECONDS
        gone_since: float | None = None
        while True:
            try:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    return await asyncio.to_thread(is_deleted, self._api, *self._daemonset)
            except (KubernetesError, TimeoutError) as error:
                now = loop.time()
                status = error.status if isinstance(error, StatusError) else None
                if status in GONE:
                    gone_since = gone_since or now
                    if now - gone_since >= BELIEVED_SECONDS:
                        return True
                elif status == FORBIDDEN and now <= until:
                    # Where all is deleted our rights may go before our account does, and a
                    # refusal alone says nothing: a server that starts refuses everybody.
                    gone_since = None
                else:
                    log.warning(
                        "whether agents are to come again is not known",
                        extra={"error": str(error)},
                    )
                    return False
            await asyncio.sleep(ASK_AGAIN_SECONDS)

    async def close(self) -> None:
        """Wait, but not for long, until all that was published is written."""
        self._events.close()
        await asyncio.to_thread(self._writer.close, PATIENCE_SECONDS)

    # -- called by the followers --------------------------------------------------------------

    def put(self, body: Body) -> str:
        """Take a new or changed object and return its name."""
        named = describe(body)
        with self._lock:
            before = self._translator.changes
            problem = self._translator.put(SourcedObject(ORIGIN, body))
            is_new = self._problems.pop(named, None) is not None or problem is not None
            if problem is not None:
                self._problems[named] = problem
            is_told = not self._unlisted and (is_new or self._translator.changes != before)
        if is_told:
            self._tell()
        return named

    def remove(self, body: Body) -> None:
        """Forget an object."""
        with self._lock:
            self._forget(describe(body))
        self._tell()

    def keep_only(self, kind: str, named: set[str]) -> None:
        """Forget the other objects of a kind."""
        with self._lock:
            known = self._translator.names(kind)
            known |= {each for each in self._problems if each.startswith(f"{kind} ")}
            for each in known - named:
                self._forget(each)
            self._unlisted.discard(kind)
        self._tell()

    def _forget(self, named: str) -> None:
        self._translator.remove(named)
        self._problems.pop(named, None)

    def _tell(self) -> None:
        loop = self._loop
        if loop is not None and not loop.is_closed() and not self._changed.is_set():
            loop.call_soon_threadsafe(self._changed.set)


async def _wait_any(*events: asyncio.Event) -> None:
    async with asyncio.TaskGroup() as tasks:
        waiting = [tasks.create_task(event.wait()) for event in events]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for each in waiting:
            each.cancel()
