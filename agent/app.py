"""The control process: build the parts, follow the state, stop in order.

    discovery -> diff -> enroll / unenroll -> tell the workers -> publish

One pod's failure is that pod's: it is logged, shown by the admin socket, and tried again when the
pod changes or some time has passed. Stopping unenrolls every pod, so that none is left captured
with nobody listening; what an agent that was killed left is taken over, or taken away.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from agent import readiness, sandbox
from agent.admin import Admin
from agent.datapath import links, listing, pins, records
from agent.datapath.services import ServiceMaps
from agent.direct import DirectPath
from agent.enforcement import Enforcement
from agent.enroll import Enrollment, enroll, hand_over, release, set_strict, unenroll
from agent.errors import MapError, RequestRefused, SandboxNotFound, SidestepError
from agent.identity.client import AuthorityClient
from agent.identity.keeper import CertificateKeeper
from agent.kubelet import Probers
from agent.metrics import Metrics, families
from agent.model.capture import HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT
from agent.model.identity import SpiffeId, parse_spiffe_id
from agent.model.pod import Exclusions
from agent.state.diff import Enroll, Unenroll, diff
from agent.state.explanation import Explainer
from agent.state.store import Snapshot
from agent.sweep import forget_exceptions, sweep
from agent.tunnel import messages
from agent.workers import WorkerProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from prometheus_client import Metric

    from agent.discovery.translate import ObjectProblem
    from agent.identity.issuer import Certificate
    from agent.model.pod import LocalPod
    from agent.model.workload import Workload
    from agent.settings import Settings
    from agent.tunnel.counts import Counted

log = logging.getLogger(__name__)
RETRY_SECONDS = 1.0
LONGEST_RETRY_SECONDS = 30.0


@dataclass
class PodStatus:
    """How one pod of this node fares."""

    pod: LocalPod
    state: str  # pending, enrolled, failed
    reason: str = ""
    detail: str = ""
    failures: int = 0
    retry_at: float | None = None  # of the event loop's clock


@dataclass
class Draining:
    """A pod that has left, and the workers that still have connections to it."""

    enrollment: Enrollment
    workers: set[WorkerProcess]


class Source(Protocol):
    """Where state comes from, and where is said which pods are captured."""

    @property
    def problems(self) -> tuple[ObjectProblem, ...]:
        """What cannot be used at the moment."""
        ...

    def watch(self, stop: asyncio.Event) -> AsyncIterator[Snapshot]:
        """Yield the state now and after each change, until `stop`."""
        ...

    def publish(self, pod: LocalPod | Workload, redirection: str | None) -> None:
        """Say for all whether a pod is captured (enabled) or will be (pending); None: it is not."""
        ...

    async def close(self) -> None:
        """Bring to an end what was published."""
        ...


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
        self._desired: dict[str, LocalPod] = {}
        self._enrolled: dict[str, Enrollment] = {}
        self._draining: dict[str, Draining] = {}
        self._statuses: dict[str, PodStatus] = {}
        self._wanted: set[SpiffeId] = set()
        self._workers: list[WorkerProcess] = []
        self._stop = asyncio.Event()
        self._is_ready = False
        asked = settings.authority
        self._client = AuthorityClient(
            asked.address, asked.server_name, asked.token, asked.roots, asked.lifetime_seconds
        )
        self._keeper = CertificateKeeper(self._client, asked.roots, settings.revoked, random.random)
        self._keeper.on_certificate = self._on_certificate
        self._keeper.on_change = lambda: self._tell_watchers()
        self._tell_watchers: Callable[[], None] = lambda: None
        self._metrics = Metrics(self._read_metrics)
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
        for _ in range(self._settings.worker_count):
            self._add_worker()
        await self._admin.start()
        if self._settings.metrics_port:
            await self._metrics.start(self._settings.metrics_port)
        try:
            await self._follow()
        finally:
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
                due = [status.retry_at for status in self._statuses.values() if status.retry_at]
                try:
                    async with asyncio.timeout_at(min(due, default=None)):
                        snapshot = await snapshots.get()
                except TimeoutError:
                    snapshot = self._snapshot
                if snapshot is None:
                    return
                await self._apply(snapshot)

    async def _apply(self, snapshot: Snapshot) -> None:
        self._tell_mesh(self._snapshot, snapshot)
        try:
            self._services.apply(records.service_ports(snapshot.services))
        except MapError as error:
            # Those that are missing go through the agent, which knows them all.
            log.warning("services are not all in the kernel", extra={"error": str(error)})
        self._snapshot = snapshot
        await self._enforce(snapshot)
        common = self._settings.exclusions
        self._desired = {
            pod.uid: replace(
                pod,
                exclusions=_joined(common, pod.exclusions),
                may_go_direct=pod.may_go_direct and self._settings.has_direct_path,
            )
            for pod in snapshot.local_pods.get(self._settings.node, ())
        }
        # Asked for before the pods are enrolled, so that the first connection need not wait.
        wanted = {self._identity(pod) for pod in self._desired.values()}
        for identity in wanted - self._wanted:
            self._keeper.want(identity, is_waiting=False)
        for uid in self._statuses.keys() - self._desired.keys() - self._enrolled.keys():
            self._source.publish(self._statuses.pop(uid).pod, None)
        self._correct_words(snapshot)
        alive = {workload.uid for workload in snapshot.workloads}
        for uid in self._draining.keys() - alive:
            self._let_go(self._draining.pop(uid).enrollment)
        observed = {uid: enrollment.pod for uid, enrollment in self._enrolled.items()}
        for step in diff(self._desired, observed):
            match step:
                case Unenroll():
                    self._unenroll(step.uid)
                case Enroll() if self._is_due(step.pod):
                    await self._enroll(step.pod)
                case Enroll():
                    pass
        for identity in self._wanted - wanted:
            self._keeper.forget(identity)
            for worker in self._workers:
                worker.send(messages.RemoveCertificate(str(identity)))
        self._wanted = wanted
        if not self._is_ready:
            self._sweep()
            self._is_ready = True
            readiness.notify()
        await self._admin.changed()

    def _correct_words(self, snapshot: Snapshot) -> None:
        """Take back what an agent that did not end in order said of pods of this node."""
        for workload in snapshot.workloads:
            is_ours = workload.node == self._settings.node and workload.is_hbone
            if is_ours and workload.uid not in self._desired and workload.uid not in self._enrolled:
                self._source.publish(workload, None)

    def _identity(self, pod: LocalPod) -> SpiffeId:
        return SpiffeId(self._settings.trust_domain, pod.namespace, pod.service_account)

    async def _keep_certificates(self, tasks: asyncio.TaskGroup) -> None:
        def tell_watchers() -> None:
            tasks.create_task(self._admin.changed())

        def on_revoked(_fingerprints: frozenset[bytes]) -> None:
            tasks.create_task(self._enforce_revoked())

        self._tell_watchers = tell_watchers
        self._keeper.on_revoked = on_revoked
        try:
            await self._keeper.run(self._stop)
        finally:
            self._tell_watchers = lambda: None
            await self._client.close()

    def _on_certificate(self, issued: Certificate, roots: bytes) -> None:
        message = messages.PutCertificate(str(issued.identity), issued.chain, issued.key, roots)
        for worker in self._workers:
            worker.send(message)

    async def _enforce_revoked(self) -> None:
        """Bring a changed list of revoked certificates into force, as policies are."""
        for worker in self._workers:
            self._tell_revoked(worker)
        for worker in list(self._workers):
            await worker.wait_in_force()
        # The direct path shows no certificate: each next connection shows one again, and what an
        # identity without a good one has open is closed.
        self._direct.renew()
        revoked = self._keeper.revoked_identities()
        self._direct.close_unless(
            lambda _flow, source, destination: revoked.isdisjoint(
                (self._identity(source), self._identity(destination))
            )
        )

    def _tell_revoked(self, worker: WorkerProcess) -> None:
        fd = os.memfd_create("revoked", os.MFD_CLOEXEC)
        try:
            with os.fdopen(os.dup(fd), "wb") as file:
                file.write(b"".join(sorted(self._keeper.revoked)))
            worker.send(messages.PutRevoked(), [fd])
        finally:
            os.close(fd)

    async def _enforce(self, snapshot: Snapshot) -> None:
        """Bring changed policies into force, in the workers and then on the direct path."""
        told = self._enforcement.change(snapshot)
        if not told:
            return
        for worker in self._workers:
            for message in told:
                worker.send(message)
        for worker in list(self._workers):
            await worker.wait_in_force()
        for enrollment in self._enrolled.values():
            self._guard(enrollment)
        # Only now: what a worker still allowed by the old policies is void with the new generation.
        self._direct.renew()
        closed = self._direct.close_unless(self._enforcement.passes)
        log.info("policies in force", extra={"closed_direct_connections": closed})

    def _guard(self, enrollment: Enrollment) -> None:
        """Hold plaintext that is not captured off a STRICT pod, too."""
        ports = self._enforcement.plaintext_ports(enrollment.pod)
        if enrollment.pod.bypasses_inbound:
            ports = None  # it wants plaintext that nobody looked at
        try:
            set_strict(
                self._pins, enrollment, is_strict=ports is not None, but=ports or frozenset()
            )
        except MapError as error:
            fields = {"pod": f"{enrollment.pod.namespace}/{enrollment.pod.name}"}
            log.error(
                "the guard does not know the pod's mode", extra=fields | {"error": str(error)}
            )

    def _sweep(self) -> None:
        try:
            for uid in sweep(self._pins, self._desired, self._settings.pod_cgroups):
                log.info("what an agent before left of a pod is taken away", extra={"uid": uid})
        except (SidestepError, OSError) as error:
            log.error(
                "not all that an agent before left is taken away", extra={"error": str(error)}
            )

    def _is_due(self, pod: LocalPod) -> bool:
        """Whether to try a pod now: it is new or changed, or has waited after a failure."""
        status = self._statuses.get(pod.uid)
        if status is None or status.pod != pod or status.retry_at is None:
            return True
        return status.retry_at <= asyncio.get_running_loop().time()

    async def _enroll(self, pod: LocalPod) -> None:
        netns_fd = -1
        fields = {"pod": f"{pod.namespace}/{pod.name}"}
        try:
            netns_fd = sandbox.open_netns(pod, self._settings.pod_cgroups)
            await self._take_back(pod.uid)
            enrollment = enroll(self._pins, pod, netns_fd)
        except SidestepError as error:
            if netns_fd >= 0:
                os.close(netns_fd)
            state = "pending" if isinstance(error, SandboxNotFound) else "failed"
            before = self._statuses.get(pod.uid)
            failures = before.failures + 1 if before else 1
            wait = min(RETRY_SECONDS * 2 ** (failures - 1), LONGEST_RETRY_SECONDS)
            # A sandbox is on its way; of anything else each failure makes the next try later.
            wait = RETRY_SECONDS if state == "pending" else wait
            retry_at = asyncio.get_running_loop().time() + wait
            self._statuses[pod.uid] = PodStatus(
                pod, state, error.reason, str(error), failures, retry_at
            )
            self._source.publish(pod, "pending")
            if before is None or before.detail != str(error):
                log.warning("pod not enrolled", extra=fields | {"error": str(error)})
            return
        self._enrolled[pod.uid] = enrollment
        self._guard(enrollment)
        self._direct.add_pod(enrollment.netns_cookie, pod, netns_fd)
        for worker in self._workers:
            self._tell_pod(worker, enrollment)
        for worker in list(self._workers):
            await worker.wait_in_force()
        self._statuses[pod.uid] = PodStatus(pod, "enrolled")
        self._source.publish(pod, "enabled")
        log.info("pod enrolled", extra=fields)

    def _unenroll(self, uid: str) -> None:
        """Take a pod out: at once if it is gone, else when its connections have ended."""
        enrollment = self._enrolled.pop(uid)
        pod = enrollment.pod
        self._source.publish(pod, None)
        self._direct.remove_pod(enrollment.netns_cookie)
        self._statuses.pop(uid, None)
        is_alive = any(workload.uid == uid for workload in self._snapshot.workloads)
        if is_alive and not self._stop.is_set():
            try:
                release(enrollment)
            except (SidestepError, OSError) as error:
                # Its other steps are done, and the other pods are not affected.
                fields = {"pod": f"{pod.namespace}/{pod.name}", "error": str(error)}
                log.error("pod not unenrolled cleanly", extra=fields)
            self._draining[uid] = Draining(enrollment, set(self._workers))
            for worker in self._workers:
                worker.send(messages.DrainPod(uid))
        else:
            self._let_go(enrollment)
        log.info("pod unenrolled", extra={"pod": f"{pod.namespace}/{pod.name}"})

    async def _take_back(self, uid: str) -> None:
        """Free 15008 of a pod that comes back while it drains; its connections go on."""
        draining = self._draining.pop(uid, None)
        if draining is None:
            return
        for worker in self._workers:
            worker.send(messages.RemovePod(uid))
        for worker in list(self._workers):
            await worker.wait_in_force()
        hand_over(draining.enrollment)
        os.close(draining.enrollment.netns_fd)

    def _on_drained(self, worker: WorkerProcess, uid: str) -> None:
        draining = self._draining.get(uid)
        if draining is None:
            return
        draining.workers.discard(worker)
        if not draining.workers:
            del self._draining[uid]
            self._let_go(draining.enrollment)

    def _let_go(self, enrollment: Enrollment) -> None:
        """Undo all that is left of an enrollment."""
        fields = {"pod": f"{enrollment.pod.namespace}/{enrollment.pod.name}"}
        for worker in self._workers:
            worker.send(messages.RemovePod(enrollment.pod.uid))
        try:
            unenroll(enrollment)
            log.info("pod has nothing of ours any more", extra=fields)
        except (SidestepError, OSError) as error:
            log.error("pod not unenrolled cleanly", extra=fields | {"error": str(error)})
        finally:
            os.close(enrollment.netns_fd)

    # -- workers ------------------------------------------------------------------------------

    def _add_worker(self) -> None:
        worker = WorkerProcess(
            self._on_worker_exit, self._on_needed, self._on_drained, self._add_counts
        )
        self._workers.append(worker)
        settings = self._settings
        worker.send(
            messages.Configure(
                str(self._pins.directory), settings.trust_domain, settings.trust_domain_aliases
            )
        )
        self._tell_revoked(worker)
        for issued, roots in self._keeper.certificates():
            worker.send(
                messages.PutCertificate(str(issued.identity), issued.chain, issued.key, roots)
            )
        for workload in self._snapshot.workloads:
            worker.send(messages.PutWorkload(workload))
        for service in self._snapshot.services:
            worker.send(messages.PutService(service))
        for message in self._enforcement.introduction():
            worker.send(message)
        for enrollment in self._enrolled.values():
            self._tell_pod(worker, enrollment)

    def _on_needed(self, identity: str) -> None:
        found = parse_spiffe_id(identity)
        if found in self._wanted:  # else its last pod went meanwhile
            self._keeper.want(found, is_waiting=True)

    def _on_worker_exit(self, worker: WorkerProcess) -> None:
        worker.stop()
        self._workers.remove(worker)
        for uid in list(self._draining):
            self._on_drained(worker, uid)
        if not self._stop.is_set():
            log.error(
                "worker died and is replaced",
                extra={"pid": worker.pid, "exit_code": worker.process.returncode},
            )
            self._add_worker()
            self._tell_watchers()

    @staticmethod
    def _tell_pod(worker: WorkerProcess, enrollment: Enrollment) -> None:
        listeners = [
            (port, listener.fileno())
            for port, found in (
                (OUTBOUND_PORT, enrollment.outbound),
                (INBOUND_PORT, enrollment.inbound),
                (HBONE_PORT, enrollment.hbone),
            )
            for listener in found
        ]
        ports = tuple(port for port, _fd in listeners)
        message = messages.AddPod(enrollment.pod, enrollment.netns_cookie, ports)
        worker.send(message, [enrollment.netns_fd, *(fd for _port, fd in listeners)])

    def _tell_mesh(self, before: Snapshot, after: Snapshot) -> None:
        known = {workload.uid: workload for workload in before.workloads}
        wanted = {workload.uid: workload for workload in after.workloads}
        services = {(service.namespace, service.name): service for service in before.services}
        wanted_services = {(service.namespace, service.name): service for service in after.services}
        told: list[messages.ToWorker] = []
        told += [messages.RemoveWorkload(uid) for uid in known.keys() - wanted.keys()]
        told += [
            messages.PutWorkload(workload)
            for uid, workload in wanted.items()
            if known.get(uid) != workload
        ]
        told += [messages.RemoveService(*key) for key in services.keys() - wanted_services.keys()]
        told += [
            messages.PutService(service)
            for key, service in wanted_services.items()
            if services.get(key) != service
        ]
        for worker in self._workers:
            for message in told:
                worker.send(message)

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

    # -- end ----------------------------------------------------------------------------------

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
                for status in self._statuses.values()
            ],
            "workers": [{"pid": worker.pid} for worker in self._workers],
            "identity": self._keeper.describe(),
        }

    def _add_counts(self, counts: Counted) -> None:
        self._metrics.add(counts)

    def _read_metrics(self) -> Iterable[Metric]:
        counters = self._keeper.counters
        requests = {"issued": counters.issued, **counters.failed}
        states = Counter(status.state for status in self._statuses.values())
        pods = listing.list_pods(self._pins.directory)
        return families(self._keeper.expiries(), requests, states, pods)

    def _shut_down(self) -> None:
        self._stop.set()
        for uid in list(self._enrolled):
            self._unenroll(uid)
        for draining in self._draining.values():
            self._let_go(draining.enrollment)
        for worker in self._workers:
            worker.stop()
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
