"""The control process: build the parts, follow the state, stop in order.

    discovery -> workers know the mesh -> policies in force -> pods captured -> ready

Stopping unenrolls every pod, so that none is left captured with nobody listening; what an agent
that was killed left is taken over, or taken away.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from agent import briefing, readiness
from agent.admin import Admin
from agent.arrivals import Arrivals
from agent.cni import PluginServer
from agent.credentials import Credentials
from agent.datapath import links, listing, pins, records
from agent.datapath.services import ServiceMaps
from agent.direct import DirectPath
from agent.enforcement import Enforcement
from agent.errors import MapError, RequestRefused, SidestepError
from agent.fleet import Fleet
from agent.kubelet import Probers
from agent.metrics import Metrics, families
from agent.model.identity import SpiffeId
from agent.model.pod import Exclusions
from agent.roster import Roster
from agent.state.arrival import complete
from agent.state.explanation import Explainer
from agent.state.store import Snapshot
from agent.sweep import forget_exceptions, sweep
from agent.tunnel import messages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client import Metric

    from agent.discovery.source import Source
    from agent.fleet import Told
    from agent.model.pod import LocalPod
    from agent.model.starting import StartingPod
    from agent.settings import Settings
    from agent.tunnel.counts import Counted

log = logging.getLogger(__name__)


class Agent:
    """One node's agent."""

    def __init__(self, settings: Settings, source: Source) -> None:
        self._settings = settings
        self._source = source
        self._pins = pins.load(settings.pin_root)
        self._pins.hold()
        forget_exceptions(self._pins)
        self._services = ServiceMaps(self._pins)
        self._direct = DirectPath(self._pins, settings.trust_domain, self._add_counts)
        self._enforcement = Enforcement(settings.node, settings.trust_domain)
        self._snapshot = Snapshot()
        self._told = Snapshot()  # by the source, which knows less of this node's pods than we
        self._desired: dict[str, LocalPod] = {}
        self._stop = asyncio.Event()
        self._is_ready = False
        self._tell_watchers: Callable[[], None] = lambda: None
        self._fleet = Fleet(
            self._introduction,
            lambda identity: self._credentials.hurry(identity),
            self._add_counts,
            lambda: self._tell_watchers(),
        )
        self._credentials = Credentials(settings, self._fleet, lambda: self._tell_watchers())
        self._roster = Roster(
            self._pins,
            settings.pod_cgroups,
            self._fleet,
            self._direct,
            source,
            self._enforcement.plaintext_ports,
        )
        self._arrivals = Arrivals(
            settings.node, source, self._roster, self._on_arrived, self._on_left
        )
        self._plugin_server = PluginServer(
            settings.run_directory / "cni.sock", self._arrivals, self._add_counts
        )
        self._metrics = Metrics(self._read_metrics, lambda: self._is_ready)
        self._admin = Admin(
            settings.run_directory / "agent.sock",
            self._describe,
            {"policies": self._list_policies, "explain": self._explain},
        )

    async def run(self) -> None:
        """Run until SIGTERM or SIGINT."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        links.attach_cgroup(self._pins, links.cgroup_root())
        self._direct.start()
        self._fleet.start(self._settings.worker_count)
        await self._admin.start()
        await self._plugin_server.start()
        if self._settings.metrics_port:
            await self._metrics.start(self._settings.metrics_host, self._settings.metrics_port)
        try:
            await self._follow()
        finally:
            # First: a pod that comes now waits for the next agent, instead of starting uncaptured.
            await self._plugin_server.stop()
            self._shut_down()
            await self._source.close()

    async def _follow(self) -> None:
        snapshots: asyncio.Queue[Snapshot | None] = asyncio.Queue(maxsize=1)

        async def read() -> None:
            async for snapshot in self._source.watch(self._stop):
                await snapshots.put(snapshot)
            await snapshots.put(None)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(read())
            tasks.create_task(self._keep_certificates(tasks))
            if self._settings.kubelet_cgroup is not None:
                probers = Probers(self._pins.maps["ss_probers"], self._settings.kubelet_cgroup)
                tasks.create_task(probers.follow(self._stop))
            while True:
                try:
                    async with asyncio.timeout_at(self._roster.next_retry()):
                        snapshot = await snapshots.get()
                except TimeoutError:
                    snapshot = self._told
                if snapshot is None:
                    return
                await self._apply(snapshot)

    async def _apply(self, told: Snapshot) -> None:
        self._told = told
        snapshot = self._arrivals.complete(told)
        for message in briefing.changes(self._snapshot, snapshot):
            self._fleet.tell(message)
        try:
            self._services.apply(records.service_ports(snapshot.services))
        except MapError as error:
            # Those that are missing go through the agent, which knows them all.
            log.warning("services are not all in the kernel", extra={"error": str(error)})
        self._snapshot = snapshot
        await self._enforce(snapshot)
        self._arrivals.on_enforced(told)
        snapshot = self._snapshot  # pods may have come and gone meanwhile
        self._desired = {
            pod.uid: self._with_settings(pod)
            for pod in snapshot.local_pods.get(self._settings.node, ())
        }
        # Asked for before the pods are enrolled, so that the first connection need not wait.
        identities = {self._identity(pod) for pod in self._desired.values()}
        self._credentials.want(identities)
        self._correct_words(snapshot)
        await self._roster.apply(self._desired, {each.uid for each in snapshot.workloads})
        self._credentials.forget_others(identities)
        if not self._is_ready:
            self._sweep()
            self._is_ready = True
            readiness.notify()
        await self._admin.changed()

    def _with_settings(self, pod: LocalPod) -> LocalPod:
        return replace(
            pod,
            exclusions=_joined(self._settings.exclusions, pod.exclusions),
            may_go_direct=pod.may_go_direct and self._settings.has_direct_path,
        )

    def _on_arrived(self, pod: StartingPod) -> LocalPod:
        """Make known a pod that the runtime brings, and return what is to be enrolled."""
        assert pod.local is not None
        self._snapshot = complete(self._snapshot, self._settings.node, [pod])
        self._fleet.tell(messages.PutWorkload(pod.workload))
        self._enforcement.learn(pod.workload)
        wanted = self._desired[pod.uid] = self._with_settings(pod.local)
        self._credentials.want({self._identity(wanted)})
        return wanted

    def _on_left(self, uid: str) -> None:
        """Forget a pod whose sandbox has ended; its address may be another's next."""
        self._snapshot = complete(self._snapshot, self._settings.node, [], {uid})
        self._desired.pop(uid, None)
        self._fleet.tell(messages.RemoveWorkload(uid))

    def _introduction(self) -> Iterator[Told]:
        settings = self._settings
        yield (
            messages.Configure(
                str(self._pins.directory), settings.trust_domain, settings.trust_domain_aliases
            ),
            [],
        )
        yield from self._credentials.introduction()
        for message in itertools.chain(
            briefing.introduce(self._snapshot), self._enforcement.introduction()
        ):
            yield message, []
        yield from self._roster.introduction()

    def _correct_words(self, snapshot: Snapshot) -> None:
        """Take back what an agent that did not end in order said of pods of this node."""
        known = self._desired.keys() | self._roster.captured()
        for workload in snapshot.workloads:
            is_ours = workload.node == self._settings.node and workload.is_hbone
            if is_ours and workload.uid not in known:
                self._source.publish(workload, None)

    def _identity(self, pod: LocalPod) -> SpiffeId:
        return SpiffeId(self._settings.trust_domain, pod.namespace, pod.service_account)

    async def _keep_certificates(self, tasks: asyncio.TaskGroup) -> None:
        def tell_watchers() -> None:
            tasks.create_task(self._admin.changed())

        def on_revoked() -> None:
            tasks.create_task(self._enforce_revoked())

        self._tell_watchers = tell_watchers
        try:
            await self._credentials.run(self._stop, on_revoked)
        finally:
            self._tell_watchers = lambda: None

    async def _enforce_revoked(self) -> None:
        """Bring a changed list of revoked certificates into force, as policies are."""
        self._credentials.tell_revoked()
        await self._fleet.wait_in_force()
        # The direct path shows no certificate: each next connection shows one again, and what an
        # identity without a good one has open is closed.
        self._direct.renew()
        revoked = self._credentials.keeper.revoked_identities()
        self._direct.close_unless(
            lambda _flow, source, destination: revoked.isdisjoint(
                (self._identity(source), self._identity(destination))
            )
        )

    async def _enforce(self, snapshot: Snapshot) -> None:
        """Bring changed policies into force, in the workers and then on the direct path."""
        told = self._enforcement.change(snapshot)
        if not told:
            return
        for message in told:
            self._fleet.tell(message)
        await self._fleet.wait_in_force()
        self._roster.guard()
        # Only now: what a worker still allowed by the old policies is void with the new generation.
        self._direct.renew()
        closed = self._direct.close_unless(self._enforcement.passes)
        log.info("policies in force", extra={"closed_direct_connections": closed})

    def _sweep(self) -> None:
        try:
            for uid in sweep(self._pins, self._desired, self._settings.pod_cgroups):
                log.info("what an agent before left of a pod is taken away", extra={"uid": uid})
        except (SidestepError, OSError) as error:
            log.error(
                "not all that an agent before left is taken away", extra={"error": str(error)}
            )

    # -- questions ----------------------------------------------------------------------------

    def _list_policies(self, _arguments: dict[str, Any]) -> object:
        refused: list[dict[str, object]] = [
            {
                "policy": problem.named,
                "does": None,
                "state": "refused",
                "for": None,
                "rules": None,
                "pods": [],
                "warnings": [f"{problem.path}: {problem.detail}"],
            }
            for problem in self._source.problems
            if problem.named.split(" ")[0] in ("AuthorizationPolicy", "PeerAuthentication")
        ]
        return refused + self._enforcement.list_policies(self._snapshot)

    def _explain(self, arguments: dict[str, Any]) -> object:
        explainer = Explainer(
            self._snapshot,
            self._enforcement.rulebook,
            self._settings.trust_domain,
            self._settings.exclusions,
            self._settings.has_direct_path,
        )
        try:
            source, destination = str(arguments["source"]), str(arguments["destination"])
            port = int(arguments["port"])
        except (LookupError, TypeError, ValueError) as error:
            raise RequestRefused("explain needs source, destination and port") from error
        return [each.row() for each in explainer.explain(source, destination, port)]

    def _describe(self) -> dict[str, object]:
        return {
            "ready": self._is_ready,
            "node": self._settings.node,
            "pods": [
                {
                    "uid": status.pod.uid,
                    "namespace": status.pod.namespace,
                    "name": status.pod.name,
                    "state": status.state,
                    "reason": status.reason,
                    "detail": status.detail,
                }
                for status in self._roster.statuses.values()
            ],
            "workers": [{"pid": pid} for pid in self._fleet.pids],
            "identity": self._credentials.describe(),
        }

    def _add_counts(self, counts: Counted) -> None:
        self._metrics.add(counts)

    def _read_metrics(self) -> Iterable[Metric]:
        keeper = self._credentials.keeper
        counters = keeper.counters
        requests = {"issued": counters.issued, **counters.failed}
        states = Counter(status.state for status in self._roster.statuses.values())
        pods = listing.list_pods(self._pins.directory)
        return families(keeper.expiries(), requests, states, self._roster.failures, pods)

    def _shut_down(self) -> None:
        self._stop.set()
        self._roster.release_all()
        self._fleet.stop()
        self._admin.stop()
        self._metrics.stop()
        self._direct.stop()
        self._pins.close()


def _joined(common: Exclusions, own: Exclusions) -> Exclusions:
    return Exclusions(
        common.outbound_ports | own.outbound_ports,
        tuple(dict.fromkeys(common.outbound_networks + own.outbound_networks)),
        common.inbound_ports | own.inbound_ports,
    )
