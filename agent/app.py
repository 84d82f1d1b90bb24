"""The control process: build the parts, follow the state, stop in order.

    discovery -> workers know the mesh -> policies in force -> pods captured -> ready

An agent that ends leaves its pods captured, with nobody listening: closed, until the next one takes
over what is there, or takes away what is no longer wanted. Where the next one comes first, it gets
the listeners themselves (`agent.handover`), and this one serves what is open until that has ended.
Only `sidestep uninstall`, or the deletion of the agents' DaemonSet, takes the pods out.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
import logging
import os
import signal
import socket
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from agent import briefing, logs, readiness, readings, web
from agent.admin import Admin
from agent.answers import VERSION, Answers
from agent.arrivals import Arrivals
from agent.cni import PluginServer
from agent.credentials import Credentials
from agent.datapath import links, pins, records
from agent.datapath.services import ServiceMaps
from agent.direct import DirectPath
from agent.elders import Elders, socket_name
from agent.enforcement import Enforcement
from agent.errors import MapError, SidestepError
from agent.fleet import Fleet
from agent.handover import SOCKET_NAME, HandoverServer, Predecessor, PredecessorGone
from agent.inspection import Inspection
from agent.kubelet import Probers
from agent.loglines import parse_levels
from agent.metrics import Metrics, understood
from agent.model.identity import SpiffeId
from agent.model.pod import Exclusions
from agent.pages import Pages
from agent.roster import Roster
from agent.state.arrival import complete
from agent.state.store import Snapshot
from agent.sweep import forget_exceptions, sweep
from agent.tunnel import messages
from agent.upkeep import Upkeep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from agent.discovery.source import Source
    from agent.fleet import Told
    from agent.metrics import Place
    from agent.model.pod import LocalPod
    from agent.model.starting import StartingPod
    from agent.settings import Settings
    from agent.tunnel.counts import Counted

log = logging.getLogger(__name__)
COUNT_SECONDS = 1.0  # between two messages with counts
STOP_SECONDS = 2.0  # for short connections to end, when nobody takes over


class Departure(enum.Enum):
    """Why an agent ends."""

    STOPPED = enum.auto()
    SUCCEEDED = enum.auto()
    UNINSTALLED = enum.auto()


class Agent:
    """One node's agent."""

    def __init__(self, settings: Settings, source: Source) -> None:
        self._settings = settings
        self._is_in_office = False  # the node's agent: none before us, none after us
        self._show_office()  # the file that an agent before us left would speak for us
        self._source = source
        self._predecessor = Predecessor.find(settings.run_directory / SOCKET_NAME)
        self._pins = pins.load(settings.pin_root)
        if self._predecessor is None:
            self._pins.hold()
        self._services = ServiceMaps(self._pins)
        self._direct = DirectPath(self._pins, settings.trust_domain, self._add_counts)
        self._enforcement = Enforcement(settings.node, settings.trust_domain)
        self._snapshot = Snapshot()
        self._told = Snapshot()  # by the source, which knows less of this node's pods than we
        self._desired: dict[str, LocalPod] = {}
        self._stop = asyncio.Event()
        self._told_to_end = asyncio.Event()
        self._snapshots: asyncio.Queue[Snapshot | None] = asyncio.Queue(maxsize=1)
        self._has_news = asyncio.Event()  # there is one in the queue
        self._departure: asyncio.Future[Departure] = asyncio.get_running_loop().create_future()
        self._is_ready = False
        self._levels = settings.log_levels
        self._places: set[Place] = set()
        self._passing = asyncio.Lock()  # one pass over the pods at a time
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
            self._on_pod_gone,
        )
        self._arrivals = Arrivals(
            settings.node,
            source,
            self._roster,
            self._on_arrived,
            self._on_left,
            self._follow_again,
        )
        self._plugin_server = PluginServer(
            settings.run_directory / "cni.sock", self._arrivals, self._add_counts
        )
        self._inspection = Inspection(
            self._pins,
            self._roster,
            lambda: records.service_ports(self._snapshot.services, settings.node),
            links.cgroup_root(),
            wanted=self._wanted,
        )
        self._upkeep = Upkeep(
            self._inspection,
            self._roster.turn,
            lambda: self._is_ready and not self._passing.locked(),
            settings.upkeep_seconds,
            self._add_counts,
            self._on_contested,
        )
        self._contested = ""
        self._metrics = Metrics(
            lambda: readings.read(
                self._fleet,
                self._roster,
                self._direct,
                self._elders,
                self._credentials,
                self._pins.directory,
                VERSION,
            ),
            lambda: self._places,
        )
        self._elders = Elders(
            settings.run_directory,
            lambda counts: self._add_counts(understood(counts)),
            self._on_elders_gone,
        )
        self._answers = Answers(
            settings,
            source,
            self._inspection,
            self._fleet,
            self._roster,
            self._direct,
            self._elders,
            self._enforcement,
            self._credentials,
            lambda: self._snapshot,
            lambda: self._is_ready,
            lambda: self._contested,
            lambda: str(self._levels),
            self._metrics.text,
            self._passing,
        )
        pages = Pages(
            self._answers.pending,
            self._answers.dump_config,
            lambda: str(self._levels),
            self._set_levels,
            self._fleet,
        )
        self._pages = web.Server(pages.routes())
        self._admin = Admin(
            settings.run_directory / "agent.sock",
            self._answers.describe,
            self._answers.table(),
            pages.routes(),
        )
        self._handover = HandoverServer(
            settings.run_directory / SOCKET_NAME,
            self._roster.turn,
            lambda: ([self._pins.lock, *self._elders.fds], self._roster.heritage()),
            lambda: self._depart_once(Departure.SUCCEEDED),
            lambda: self._depart_once(Departure.UNINSTALLED),
        )

    async def run(self) -> None:
        """Run until SIGTERM or SIGINT, or until a successor serves all that is open.

        Who would be started anew stays for the signal in that case as well.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        self._bind_ports()
        links.attach_cgroup(self._pins, links.cgroup_root())
        self._fleet.start(self._settings.worker_count)
        try:
            await self._follow()
        except BaseExceptionGroup as group:
            _raise_ours(group)
            raise
        finally:
            await self._plugin_server.stop()
            self._shut_down()
            await self._source.close()
            self._handover.forget()
        if self._settings.is_restarted and self._departure.result() is Departure.SUCCEEDED:
            await self._stay()

    async def _stay(self) -> None:
        """Wait, with nothing left to do, for the signal or for the successor's end.

        Started anew, this one would take over from its own successor. Only when that has ended
        is it wanted again.
        """
        log.info("succeeded, and nothing is open any more; waiting to be told to end")
        async with asyncio.TaskGroup() as tasks:
            told = tasks.create_task(self._told_to_end.wait())
            alone = tasks.create_task(self._handover.wait_until_alone())
            await asyncio.wait((told, alone), return_when=asyncio.FIRST_COMPLETED)
            told.cancel()
            alone.cancel()

    async def _follow(self) -> None:
        async def put(snapshot: Snapshot | None) -> None:
            await self._snapshots.put(snapshot)
            self._has_news.set()

        async def read() -> None:
            async for snapshot in self._source.watch(self._stop):
                await put(snapshot)
            await put(None)

        async with asyncio.TaskGroup() as tasks:
            if self._predecessor is None:
                await self._take_office(tasks)
            tasks.create_task(read())
            tasks.create_task(self._depart())
            tasks.create_task(self._give_counts())
            tasks.create_task(self._keep_certificates(tasks))
            if self._settings.kubelet_cgroup is not None:
                probers = Probers(self._pins.maps["ss_probers"], self._settings.kubelet_cgroup)
                tasks.create_task(probers.follow(self._stop))
            while True:
                try:
                    async with asyncio.timeout_at(self._next_retry()):
                        snapshot = await self._snapshots.get()
                    self._has_news.clear()
                except TimeoutError:
                    snapshot = self._told
                if snapshot is None:
                    self._handover.close()
                    return
                async with self._passing:
                    await self._apply(snapshot, tasks)

    def _follow_again(self) -> None:
        """Have one more pass by the last state; where a newer one waits, there is one anyway."""
        if self._snapshots.empty():
            self._snapshots.put_nowait(self._told)

    def _next_retry(self) -> float | None:
        """Return when to try a pod that failed again; never, once this agent leaves."""
        return None if self._departure.done() else self._roster.next_retry()

    # -- office -------------------------------------------------------------------------------

    def _bind_ports(self) -> None:
        """Have the node's ports, to serve them once in office (ConfigError).

        Before anything else, so that an agent which cannot have them is nobody's successor.
        """
        settings, is_successor = self._settings, self._predecessor is not None
        if settings.metrics_port:
            self._metrics.bind(
                settings.metrics_host, settings.metrics_port, is_successor=is_successor
            )
        if settings.admin_port:
            self._pages.bind(settings.admin_port, "--admin-port", is_successor=is_successor)

    async def _take_office(self, tasks: asyncio.TaskGroup) -> None:
        """Begin with what only one agent can do at a time."""
        self._is_in_office = True
        self._direct.start()
        await self._admin.start()
        await self._metrics.start()
        await self._pages.start()
        await self._plugin_server.start()
        self._handover.start(tasks)
        self._show_office()
        if self._settings.upkeep_seconds:
            tasks.create_task(self._upkeep.run())

    def _leave_office(self) -> None:
        if self._is_in_office:
            self._is_in_office = False
            self._handover.stop()
            self._elders.stop()  # whoever comes watches them
            self._admin.step_aside(
                self._settings.run_directory / socket_name(os.getpid()), self._answers.last_table()
            )
            self._metrics.stop()
            self._pages.stop()
            self._direct.stop()
            self._show_office()

    def _show_office(self) -> None:
        """Have the file that says so exist while this is the node's agent."""
        if self._settings.office_file is not None:
            if self._is_in_office:
                self._settings.office_file.touch()
            else:
                self._settings.office_file.unlink(missing_ok=True)

    async def _succeed(
        self, predecessor: Predecessor, identities: set[SpiffeId], tasks: asyncio.TaskGroup
    ) -> bool:
        """Take over from the agent that runs; False if there is news to follow first."""
        # Until there is a certificate for each pod everything stays as it is, however long; news
        # may be that a pod for which there is none has gone.
        waiting: list[asyncio.Future[Any]] = [
            tasks.create_task(self._credentials.wait_complete(identities)),
            tasks.create_task(predecessor.wait_gone()),
            tasks.create_task(self._has_news.wait()),
            asyncio.shield(self._departure),
        ]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for each in waiting:
            each.cancel()
        if self._has_news.is_set() or self._departure.done():
            return False
        self._predecessor = None
        try:
            lock, elders, heritage = await predecessor.begin()
            self._pins.hold(lock)
            for fd in elders:
                self._elders.add(socket.socket(fileno=fd))
            self._roster.wait_for_elders(True)
            captured = [each.pod for each, _fds in heritage if not each.is_draining]
            await self._arrivals.inherit(pod for pod in captured if pod.uid not in self._desired)
            self._roster.inherit(heritage, self._desired)
            await self._fleet.wait_in_force()
            await predecessor.commit()
            self._elders.add(predecessor.connection)
        except PredecessorGone:
            log.warning("the agent before this one has ended before it had handed over")
            predecessor.connection.close()
            if self._pins.lock < 0:
                self._pins.hold()
        except SidestepError:
            self._roster.abandon()
            raise
        finally:
            predecessor.close()
        self._roster.wait_for_elders(bool(self._elders.fds))
        await self._take_office(tasks)
        log.info("taken over from the agent before this one", extra={"pid": predecessor.pid})
        return True

    def _on_signal(self) -> None:
        self._told_to_end.set()
        self._depart_once(Departure.STOPPED)

    def _on_elders_gone(self) -> None:
        self._roster.wait_for_elders(False)
        self._tell_watchers()

    def _depart_once(self, departure: Departure) -> None:
        if self._departure.done():
            return
        self._departure.set_result(departure)
        self._upkeep.stop()
        # First: a pod that comes now waits for the next agent, instead of starting uncaptured.
        self._plugin_server.close()
        if departure is Departure.SUCCEEDED:
            self._leave_office()
            self._roster.abandon()
            self._pins.let_go_links()
        else:
            self._handover.withhold()

    async def _depart(self) -> None:
        departure = await self._departure
        if departure is Departure.STOPPED and await self._source.is_withdrawn():
            departure = Departure.UNINSTALLED
        seconds = float(self._settings.drain_seconds)
        log.info("leaving", extra={"why": departure.name.lower()})
        if departure is Departure.UNINSTALLED:
            self._let_pods_pass()
            async with self._roster.turn:
                self._roster.release_all()
            began = asyncio.get_running_loop().time()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._roster.wait_drained()
            seconds -= asyncio.get_running_loop().time() - began
        elif departure is Departure.STOPPED:
            async with self._roster.turn:
                self._roster.abandon()
            seconds = STOP_SECONDS
        is_done = await self._fleet.retire(seconds, has_successor=departure is Departure.SUCCEEDED)
        if not is_done:
            log.warning(
                "the time to drain is over, what is left is cut", extra={"seconds": seconds}
            )
        self._roster.drop_all()
        self._stop.set()

    def _let_pods_pass(self) -> None:
        """Have the CNI plugin ask nobody about pods that start from now on."""
        record = self._settings.plugin_record
        if record is not None:
            try:
                record.unlink(missing_ok=True)
            except OSError as error:
                log.error(
                    "pods that start here will fail: the plugin still asks for an agent",
                    extra={"file": str(record), "error": str(error)},
                )

    async def _give_counts(self) -> None:
        """Once another agent has taken over, give it what is counted here, to the end."""
        if await asyncio.shield(self._departure) is not Departure.SUCCEEDED:
            return
        is_over = False
        while not is_over:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(COUNT_SECONDS):
                    is_over = await self._stop.wait()
            self._add_counts(await self._handover.give(self._metrics.take()))

    async def _apply(self, told: Snapshot, tasks: asyncio.TaskGroup) -> None:
        self._told = told
        snapshot = self._arrivals.complete(told)
        for message in briefing.changes(self._snapshot, snapshot):
            self._fleet.tell(message)
        self._snapshot = snapshot
        self._places = {(each.namespace, each.owner or each.name) for each in snapshot.workloads}
        node = self._settings.node
        self._direct.name_workloads(
            {each.uid: each for each in snapshot.workloads if each.node == node}
        )
        await self._enforce(snapshot)
        # What is kept for slow workers is bounded by this: newer snapshots wait, and are one then.
        await self._fleet.wait_taken()
        self._arrivals.on_enforced(told)
        snapshot = self._snapshot  # pods may have come and gone meanwhile
        self._desired = {
            pod.uid: self._with_settings(pod)
            for pod in snapshot.local_pods.get(self._settings.node, ())
        }
        # Asked for before the pods are enrolled, so that the first connection need not wait.
        identities = {self._identity(pod) for pod in self._desired.values()}
        self._credentials.want(identities)
        if self._predecessor is not None:
            if await self._succeed(self._predecessor, identities, tasks):
                await self._apply(told, tasks)  # with the pods that came without an address yet
            return
        if not self._departure.done():
            await self._apply_to_pods(snapshot)
            self._forget_certificates()
        await self._admin.changed()

    def _forget_certificates(self) -> None:
        """Keep those of the pods here; one that leaves still answers who has not heard of it."""
        leaving = (each.pod for each in self._roster.draining())
        pods = (*self._desired.values(), *leaving)
        self._credentials.forget_others({self._identity(pod) for pod in pods})

    def _on_pod_gone(self) -> None:
        self._forget_certificates()
        self._tell_watchers()

    async def _apply_to_pods(self, snapshot: Snapshot) -> None:
        try:
            self._services.apply(records.service_ports(snapshot.services, self._settings.node))
        except MapError as error:
            # Those that are missing go through the agent, which knows them all.
            log.warning("services are not all in the kernel", extra={"error": str(error)})
        self._correct_words(snapshot)
        await self._roster.apply(self._desired, {each.uid for each in snapshot.workloads})
        if not self._is_ready:
            self._sweep()
            self._is_ready = True
            readiness.notify()

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
                str(self._pins.directory),
                settings.trust_domain,
                settings.trust_domain_aliases,
                settings.bounds,
            ),
            [],
        )
        yield self._how_to_log(), []
        yield from self._credentials.introduction()
        for message in itertools.chain(
            briefing.introduce(self._snapshot), self._enforcement.introduction()
        ):
            yield message, []
        yield from self._roster.introduction()

    def _how_to_log(self) -> messages.SetLogging:
        settings = self._settings
        return messages.SetLogging(
            settings.log_format.value, str(self._levels), settings.access_log_lines
        )

    def _set_levels(self, text: str) -> None:
        """Log by other levels from now on (ConfigError)."""
        self._levels = parse_levels(text, self._levels)
        logs.set_up(self._settings.log_format, self._levels)
        self._fleet.tell(self._how_to_log())
        log.info("log levels changed", extra={"levels": str(self._levels)})

    def _correct_words(self, snapshot: Snapshot) -> None:
        """Have the state say of pods of this node what is so.

        An agent that did not end in order leaves words behind, and others may take ours away.
        """
        known = self._desired.keys() | self._roster.captured()
        for workload in snapshot.workloads:
            if workload.node != self._settings.node:
                continue
            if workload.is_hbone and workload.uid not in known:
                self._source.publish(workload, None)
            status = self._roster.statuses.get(workload.uid)
            if not workload.is_hbone and status is not None and status.state == "enrolled":
                self._source.publish(workload, "enabled")

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
        if not self._is_in_office:
            return
        # The direct path shows no certificate: each next connection shows one again, and what an
        # identity without a good one has open is closed.
        self._direct.renew()
        revoked = self._credentials.keeper.revoked_identities()
        self._direct.close_unless(
            lambda _subject, source, destination: revoked.isdisjoint(
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
        if not self._is_in_office:
            return
        self._roster.guard()
        # Only now: what a worker still allowed by the old policies is void with the new generation.
        self._direct.renew(self._enforcement.passes)
        closed = self._direct.close_unless(self._enforcement.passes)
        log.info("policies in force", extra={"closed_direct_connections": closed})

    def _wanted(self) -> set[str]:
        """Name the pods that are to be in the mesh, also those whose addresses nobody has told yet.

        An agent before us may have brought those.
        """
        starting = (
            pod.uid
            for pod in self._snapshot.starting
            if pod.node == self._settings.node and pod.local is not None
        )
        return {*self._desired, *starting}

    def _sweep(self) -> None:
        try:
            forget_exceptions(self._pins, self._roster.exceptions())
            for uid in sweep(self._pins, self._wanted(), self._settings.pod_cgroups):
                log.info("what an agent before left of a pod is taken away", extra={"uid": uid})
        except (SidestepError, OSError) as error:
            log.error(
                "not all that an agent before left is taken away", extra={"error": str(error)}
            )

    def _on_contested(self, texts: dict[str | None, str]) -> None:
        self._contested = texts.get(None, "")
        self._roster.contest({pod: text for pod, text in texts.items() if pod is not None})
        self._tell_watchers()

    def _add_counts(self, counts: Counted) -> None:
        self._metrics.add(counts)

    def _shut_down(self) -> None:
        self._stop.set()
        self._leave_office()
        self._admin.stop()
        self._elders.stop()
        self._roster.abandon()
        self._fleet.stop()
        self._pins.close()


def _raise_ours(group: BaseExceptionGroup[BaseException]) -> None:
    """Raise the first of our errors in a group of nothing else: the command line knows those."""
    ours, others = group.split(SidestepError)
    if ours is None or others is not None:
        return
    first: BaseException = ours
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    raise first


def _joined(common: Exclusions, own: Exclusions) -> Exclusions:
    return Exclusions(
        common.outbound_ports | own.outbound_ports,
        tuple(dict.fromkeys(common.outbound_networks + own.outbound_networks)),
        common.inbound_ports | own.inbound_ports,
    )
