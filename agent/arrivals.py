"""Pods that the runtime brings and takes: what the CNI plugin's commands mean for the mesh.

    ADD     a pod that is to take part is enrolled before it starts; one that is not may pass
    DEL     unenroll, if it is the sandbox that we know of the pod
    CHECK   whether the kernel still captures the pod
    GC      DEL for each sandbox that the runtime has no more
    STATUS  whether ADD could be served

At ADD the API server does not know the pod's address yet, and the follower may not even know the
pod: so the plugin's word is taken for the addresses, and the API server is asked for the pod at
once if the state has not got it. Without an answer in time ADD fails, and the kubelet tries again:
a pod does not start outside the mesh because nobody could say whether it belongs there.

A static pod, from a file of the kubelet's, is the exception: the API server itself may run in one.
It is enrolled here if the state has it already, else when the API server tells of it.

ADD may come again for the same sandbox, or for a new one of the same pod; DEL may come late, often,
or never. What counts is which sandbox of a pod came last.

Called by `agent.cni`; the composition root makes it and completes each state with what it knows.
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from agent import netns
from agent.errors import KubernetesError, SandboxNotFound, SidestepError
from agent.state.arrival import complete, find_pod, pods_of
from cni.protocol import CniError, Code, Request

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from agent.discovery.source import Source
    from agent.model.pod import Address, LocalPod
    from agent.model.starting import StartingPod
    from agent.roster import Roster
    from agent.state.store import Snapshot

log = logging.getLogger(__name__)
# Less than the plugin waits, so that it can say what the matter is.
KNOWLEDGE_SECONDS = 10.0
ASK_AGAIN_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Sandbox:
    """One sandbox of a pod, as ADD brought it."""

    container_id: str  # empty: an agent before us enrolled it
    addresses: tuple[Address, ...]


class Arrivals:
    """The sandboxes of this node's pods in the mesh."""

    def __init__(
        self,
        node: str,
        source: Source,
        roster: Roster,
        on_arrived: Callable[[StartingPod], LocalPod],
        on_left: Callable[[str], None],
        on_outdated: Callable[[], None],
    ) -> None:
        """Know none yet.

        `on_arrived(pod)` makes a pod known at its addresses and returns what to enroll;
        `on_left(uid)` is for one whose sandbox has ended; `on_outdated()` asks for the last state
        once more, since a pod was enrolled by the state before it.
        """
        self._node = node
        self._source = source
        self._roster = roster
        self._on_arrived = on_arrived
        self._on_left = on_left
        self._on_outdated = on_outdated
        self._told: Snapshot | None = None
        self._has_told = asyncio.Event()  # replaced at each new state
        self._sandboxes: dict[str, Sandbox] = {}
        # Pods whose sandbox has ended, though the state may still have it, and their addresses in
        # it. A pod at another address has a new sandbox, which was made past the plugin.
        self._gone: dict[str, frozenset[Address]] = {}
        # Pods in the mesh that the API server was asked for and the follower has not come to yet,
        # however long that takes: a watch may be silent for minutes. DEL ends it as well.
        self._unseen: dict[str, StartingPod] = {}

    # -- for the composition root -------------------------------------------------------------

    def complete(self, told: Snapshot) -> Snapshot:
        """Return a state with what is known here, and forget what the state has settled."""
        if not (self._sandboxes or self._gone or self._unseen):
            return told
        known = pods_of(told, self._node)
        self._unseen = {uid: pod for uid, pod in self._unseen.items() if uid not in known}
        known |= self._unseen
        self._gone = {
            uid: ended
            for uid, ended in self._gone.items()
            if uid in known and ended.issuperset(known[uid].workload.addresses)
        }
        self._sandboxes = {uid: box for uid, box in self._sandboxes.items() if uid in known}
        arrived = [known[uid].at(box.addresses) for uid, box in self._sandboxes.items()]
        return complete(told, self._node, arrived, self._gone)

    async def inherit(self, pods: Iterable[LocalPod]) -> None:
        """Know pods that an agent before us brought, and that the state has not, or not whole.

        Raises:
            KubernetesError: whether there is such a pod is not known.
        """

        async def find(pod: LocalPod) -> StartingPod | None:
            named = Request("ADD", namespace=pod.namespace, name=pod.name, uid=pod.uid)
            # The state may be older than what the agent before us went by.
            return self._known(named) or await self._ask(named, self._has_told)

        brought = list(pods)
        # All at once: the agent before us waits.
        for pod, found in zip(brought, await asyncio.gather(*map(find, brought)), strict=True):
            if found is not None and found.local is not None:
                self._sandboxes[pod.uid] = Sandbox("", pod.addresses)
                self._on_arrived(found.at(pod.addresses))

    def on_enforced(self, told: Snapshot) -> None:
        """Go on with what waits for a newer state: its policies are in force."""
        self._told = told
        self._has_told.set()
        self._has_told = asyncio.Event()

    # -- for the plugin -----------------------------------------------------------------------

    async def serve(self, request: Request) -> Callable[[], Awaitable[None]] | None:
        """Do what the plugin is asked for (CniError); return what is left to do afterwards."""
        match request.command:
            case "ADD":
                return await self._add(request)
            case "DEL":
                await self._delete(request)
            case "CHECK":
                await self._check(request)
            case "GC":
                await self._collect(request)
            case _:
                self._require_ready()
        return None

    async def _add(self, request: Request) -> Callable[[], Awaitable[None]] | None:
        if _is_static(request):
            known = self._known_static(request)
            if known is None:
                log.info("a static pod starts outside the mesh", extra=_named(request))
                return None
            pod = known
        else:
            pod = await self._find(request)
        uid = pod.uid
        if pod.local is None:
            # What an earlier sandbox of it left here holds no more, should it join later on.
            self._sandboxes.pop(uid, None)
            self._gone.pop(uid, None)
            return None
        if not request.addresses:
            raise CniError(
                Code.INVALID_CONFIG,
                f"{request.namespace}/{request.name} wants the mesh, and prevResult has no "
                "address of it: put the plugin that gives addresses before sidestep in the list",
            )
        told, before = self._told, self._sandboxes.get(uid)
        self._sandboxes[uid] = brought = Sandbox(request.container_id, request.addresses)
        self._gone.pop(uid, None)
        wanted = self._on_arrived(pod.at(request.addresses))
        try:
            await self._roster.bring(wanted, Path(request.netns))
        except SidestepError as error:
            if self._sandboxes.get(uid) is brought:  # and no later ADD has one of the pod
                self._forget_failed(uid, before)
            raise CniError(Code.TRY_AGAIN_LATER, f"{error}{_hint(error)}") from error
        if self._told is not told:
            self._on_outdated()
        return partial(self._roster.settle, uid)

    def _forget_failed(self, uid: str, before: Sandbox | None) -> None:
        if before is not None and self._roster.cookie(uid) is not None:
            self._sandboxes[uid] = before
            return
        # It has no sandbox that works: nothing to look for until the next one. The state never had
        # the addresses of this one.
        self._forget(uid, ())

    def _forget(self, uid: str, ended: tuple[Address, ...]) -> None:
        self._sandboxes.pop(uid, None)
        self._unseen.pop(uid, None)
        told = None if self._told is None else pods_of(self._told, self._node).get(uid)
        self._gone[uid] = frozenset((*ended, *(told.workload.addresses if told else ())))
        self._on_left(uid)

    async def _find(self, request: Request) -> StartingPod:
        """Return the pod, from the state or from the API server (CniError)."""
        problem = "the agent has not heard of it"
        try:
            async with asyncio.timeout(KNOWLEDGE_SECONDS):
                while True:
                    newer = self._has_told
                    if (found := self._known(request)) is not None:
                        return found
                    try:
                        asked = await self._ask(request, newer)
                    except KubernetesError as error:
                        problem = str(error)
                        asked = None
                    if asked is not None:
                        return asked
                    try:
                        async with asyncio.timeout(ASK_AGAIN_SECONDS):
                            await newer.wait()
                    except TimeoutError:
                        continue
        except TimeoutError as error:
            raise CniError(
                Code.TRY_AGAIN_LATER,
                f"whether {request.namespace}/{request.name} ({request.uid}) takes part in the "
                f"mesh is not known after {KNOWLEDGE_SECONDS:.0f} s: {problem}. Is the API server "
                "reachable from the agent?",
            ) from error

    def _known(self, request: Request) -> StartingPod | None:
        if self._told is None:
            return None
        found = find_pod(self._told, self._node, partial(_is_meant, request))
        return found or self._unseen.get(request.uid)

    def _known_static(self, request: Request) -> StartingPod | None:
        """Return a static pod that is to take part, by the name that the API server has for it."""
        if self._told is None:
            return None
        name = (request.namespace, request.name)
        found = find_pod(self._told, self._node, lambda _uid, *named: named == name)
        if found is None or found.local is None or found.local.node_uid != request.uid:
            return None
        return found

    async def _ask(self, request: Request, newer: asyncio.Event) -> StartingPod | None:
        """Ask the API server, unless a newer state comes first."""

        async def ask() -> StartingPod | KubernetesError | None:
            try:
                return await self._source.ask_for_pod(request.namespace, request.name)
            except KubernetesError as error:
                return error

        async with asyncio.TaskGroup() as tasks:
            asking, waiting = tasks.create_task(ask()), tasks.create_task(newer.wait())
            await asyncio.wait((asking, waiting), return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            asking.cancel()
        found = None if asking.cancelled() else asking.result()
        if isinstance(found, KubernetesError):
            raise found
        if found is None or found.node != self._node:
            return None
        if not _is_meant(request, found.uid, found.workload.namespace, found.workload.name):
            return None
        if found.local is not None:
            self._unseen[found.uid] = found
        return found

    async def _delete(self, request: Request) -> None:
        uid = request.uid
        if not uid or _is_static(request):
            uid = self._uid_of(request.container_id)
        sandbox = self._sandboxes.get(uid)
        if sandbox is not None and sandbox.container_id:
            if sandbox.container_id != request.container_id:
                return  # of a sandbox before the one that the pod has now
        elif not self._is_enrolled_in(uid, request.netns):
            return
        await self._take_out(uid)

    def _uid_of(self, container_id: str) -> str:
        for uid, sandbox in self._sandboxes.items():
            if sandbox.container_id == container_id:
                return uid
        return ""

    def _is_enrolled_in(self, uid: str, path: str) -> bool:
        """Whether a pod that an agent before us may have brought is enrolled in that namespace."""
        cookie = self._roster.cookie(uid)
        return cookie is not None and cookie == _cookie_of(path)

    async def _take_out(self, uid: str) -> None:
        sandbox = self._sandboxes.get(uid)
        self._forget(uid, sandbox.addresses if sandbox else ())
        await self._roster.take_out(uid)

    async def _check(self, request: Request) -> None:
        pod = self._known_static(request) if _is_static(request) else await self._find(request)
        if pod is None or pod.local is None:
            return
        cookie = _cookie_of(request.netns)
        problem = self._roster.problem(pod.uid)
        if not problem and self._roster.cookie(pod.uid) != cookie:
            problem = f"it is captured in another network namespace than {request.netns}"
        if problem:
            raise CniError(
                Code.NOT_CAPTURED,
                f"{request.namespace}/{request.name} is not captured: {problem}. See `sidestep "
                "pods` and the agent's log; the agent tries again by itself",
            )

    async def _collect(self, request: Request) -> None:
        ended = [
            uid
            for uid, sandbox in self._sandboxes.items()
            if sandbox.container_id and sandbox.container_id not in request.valid_containers
        ]
        for uid in ended:
            await self._take_out(uid)

    def _require_ready(self) -> None:
        if self._told is None:
            raise CniError(
                Code.NOT_AVAILABLE,
                "the agent does not know the cluster's state yet; is the API server reachable "
                "from it?",
            )


def _is_meant(request: Request, uid: str, namespace: str, name: str) -> bool:
    """Whether a pod is the one of a request: by uid, since names are used again."""
    if request.uid:
        return uid == request.uid
    return (namespace, name) == (request.namespace, request.name)


def _is_static(request: Request) -> bool:
    """Whether a pod comes from a file of the kubelet's: its uid is a hash, and not the API's.

    The API server may not even run before such pods do, and knows them by another uid.
    """
    return request.uid != "" and "-" not in request.uid


def _cookie_of(path: str) -> int | None:
    try:
        netns_fd = netns.open_netns(Path(path))
    except OSError:
        return None
    try:
        return netns.netns_cookie(netns_fd)
    except SidestepError:
        return None
    finally:
        os.close(netns_fd)


def _hint(error: SidestepError) -> str:
    if isinstance(error, SandboxNotFound):
        return (
            ". Either the sandbox is gone already, or the agent does not see the node's network "
            "namespaces: mount /run/netns into it with mountPropagation HostToContainer"
        )
    return ""


def _named(request: Request) -> dict[str, str]:
    return {"pod": f"{request.namespace}/{request.name}", "uid": request.uid}
