"""The control side of the direct path: who speaks, when verdicts become void, what is logged.

Workers write verdicts and the kernel joins the pods; here connections that no longer pass are
closed, and those that ended are logged like any other. A pod that left is known as long as a
connection of it is open.

Called by the composition root. Does not judge: it asks whoever does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from functools import cache, lru_cache, partial
from itertools import groupby
from typing import TYPE_CHECKING

from agent import netns, sock_diag
from agent.datapath.direct import DirectFlow, FlowEnds, Flows, Subject, Totals, Verdicts, live_flows
from agent.errors import MapError, NetlinkError
from agent.line_log import log as log_line
from agent.loglines import ACCESS
from agent.model.endpoint import endpoint
from agent.model.flag import Flag
from agent.model.identity import SpiffeId
from agent.model.open_connection import OpenConnection
from agent.model.workload import Workload
from agent.tunnel.labels import Party, build_labels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from agent.datapath.direct import FlowEnd, Verdict
    from agent.datapath.pins import Pins
    from agent.datapath.ring import Batch
    from agent.model.pod import Address, LocalPod
    from agent.sock_diag import TcpSocket
    from agent.tunnel.counts import Counted, Labels

    Judge = Callable[[Subject, LocalPod, LocalPod], bool]

log = logging.getLogger(__name__)
REPORTERS = ("source", "destination")  # this agent speaks for both ends
# Ends are read together: one wake-up for many, so that the kernel's speed is not ours.
GATHER_SECONDS = 0.1
AFTER_ERROR_SECONDS = 10.0  # one that stays is logged each time
LINES_AT_ONCE = 100  # of the access log for each reading; what is beyond is counted


class DirectPath:
    """The direct connections of this node."""

    def __init__(self, pins: Pins, trust_domain: str, on_counts: Callable[[Counted], None]) -> None:
        self._pins = pins
        self._on_counts = on_counts
        self._trust_domain = trust_domain
        self._verdicts = Verdicts(pins.maps["ss_verdicts"], pins.maps["ss_generation"])
        self._ends = FlowEnds(pins)
        self._flows = Flows(pins)
        self._pods: dict[int, LocalPod] = {}
        self._workloads: Mapping[str, Workload] = {}
        self._netns_fds: dict[int, int] = {}
        self._gone: set[int] = set()
        self._reading: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin with no verdicts: what an agent before us allowed may not hold any more."""
        self.renew()
        self._listen()

    def _listen(self) -> None:
        asyncio.get_running_loop().add_reader(self._ends.fd, self._on_readable)

    def _on_readable(self) -> None:
        # The kernel wakes us for the first end only, until all of them were read.
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._ends.fd)
        self._reading = loop.call_later(GATHER_SECONDS, self._read_and_listen)

    def _read_and_listen(self) -> None:
        seconds = AFTER_ERROR_SECONDS
        try:
            self._on_ends()
            seconds = 0.0
        finally:  # whatever it was, which the loop logs: the ends that follow are read
            self._reading = asyncio.get_running_loop().call_later(seconds, self._listen)

    def stop(self) -> None:
        """Log no more; open connections go on."""
        asyncio.get_running_loop().remove_reader(self._ends.fd)
        if self._reading is not None:
            self._reading.cancel()
        try:
            self._on_ends()
        except MapError as error:
            # Whoever hands over, or ends, goes on without what these connections would have told.
            log.error("the last direct connections are not logged", extra={"error": str(error)})
        self.close()

    def close(self) -> None:
        """Give the descriptors back; open connections go on."""
        self._ends.close()
        for cookie in list(self._pods):
            self._drop(cookie)

    def add_pod(self, netns_cookie: int, pod: LocalPod, netns_fd: int) -> None:
        """Know an enrolled pod; `netns_fd` stays the caller's."""
        self._gone.discard(netns_cookie)
        if netns_cookie not in self._netns_fds:
            self._netns_fds[netns_cookie] = os.dup(netns_fd)
        self._pods[netns_cookie] = pod
        if not pod.may_go_direct:
            self.renew(_any)  # it may have gone direct until now

    def name_workloads(self, workloads: Mapping[str, Workload]) -> None:
        """Know the pods' labels and owners, by uid, for metrics."""
        self._workloads = workloads

    def remove_pod(self, netns_cookie: int) -> None:
        """Let a pod go; its open connections go on.

        Its verdicts do not: the namespace may come back as somebody else's.
        """
        self._gone.add(netns_cookie)
        self.renew(_any)
        self._forget_gone()

    def renew(self, passes: Judge | None = None) -> None:
        """Make every verdict void, but those that hold by `passes`, as `close_unless` asks it.

        What is void is judged again by the next connection. A connection whose SYN leaves just now
        needs one to follow: it has gone past the agent already, and waits for a verdict (flow.h).
        """
        self._verdicts.renew()
        if passes is not None:
            self._verdicts.carry_over(partial(self._holds, passes))

    def _holds(self, passes: Judge, verdict: Verdict) -> bool:
        cookies = (verdict.source_cookie, verdict.destination_cookie)
        if not self._gone.isdisjoint(cookies):
            return False
        source, destination = map(self._pods.get, cookies)
        if not (source and destination and source.may_go_direct and destination.may_go_direct):
            return False
        ends = [
            [each for each in pod.addresses if each.version == verdict.version]
            for pod in (source, destination)
        ]
        if [len(addresses) for addresses in ends] != [1, 1]:
            return False  # a policy may speak of one of them
        ((own,), (other,)) = ends
        subject = Subject(cookies[0], own, cookies[1], other, verdict.destination_port)
        return passes(subject, source, destination)

    def close_unless(self, passes: Judge) -> int:
        """Close the open connections that do not pass any more; return how many.

        `passes` gets what connections are about, the pod that opened them and the one that serves
        them; it is asked once for all that are about the same. A connection whose pods are not both
        known any more is closed: nobody can say that it passes.
        """

        @cache
        def may_stay(subject: Subject) -> bool:
            source = self._pods.get(subject.source_cookie)
            destination = self._pods.get(subject.destination_cookie)
            return bool(source and destination and passes(subject, source, destination))

        refused = [flow for flow in live_flows(self._pins) if not may_stay(flow.subject)]
        return len(self._close(refused)) if refused else 0

    def _close(self, refused: list[DirectFlow]) -> set[DirectFlow]:
        """Close both ends, and let nothing of these connections pass the guard any more.

        The client's pod may hold back the RST of its end, or speak on by a raw socket: so the
        server's end is closed by itself, and what the guard remembers is forgotten.
        """
        closed: set[DirectFlow] = set()
        for cookie, flows in _grouped(refused, lambda flow: flow.source_cookie):
            closed |= self._destroy(cookie, _close_clients, flows)
        for cookie, flows in _grouped(refused, lambda flow: flow.destination_cookie):
            closed |= self._destroy(cookie, _close_servers, flows)
        for flow in closed:
            self._flows.forget(flow)
        return closed

    def _destroy(
        self,
        cookie: int,
        destroy: Callable[[list[DirectFlow]], set[DirectFlow]],
        flows: list[DirectFlow],
    ) -> set[DirectFlow]:
        netns_fd = self._netns_fds.get(cookie)
        if netns_fd is None:
            return set()  # of another agent, or of one before us whose pod is not ours any more
        try:
            return netns.run_in(netns_fd, partial(destroy, flows))
        except NetlinkError as error:
            log.error("direct connections were not closed", extra={"error": str(error)})
            return set()

    # -- ends ---------------------------------------------------------------------------------

    def _on_ends(self) -> None:
        batch = self._ends.read()
        for sample in batch.samples(LINES_AT_ONCE):
            self._log(self._ends.parse(sample))
        if len(batch) > LINES_AT_ONCE:
            count = len(batch) - LINES_AT_ONCE
            text = "connections not logged, too many at once"
            log_line(text, level="warning", scope=ACCESS, count=count)
        if batch:
            self._count(batch)
            self._forget_gone()

    def _count(self, batch: Batch) -> None:
        counts: list[tuple[str, Labels, int]] = []
        every = Totals()
        for (source, destination), found in self._ends.totals(batch).items():
            every.connections += found.connections
            every.resets += found.resets
            every.sent += found.sent
            every.received += found.received
            for reporter in REPORTERS:
                ends = self._party(source), self._party(destination)
                labels = build_labels(reporter, *ends, None, Flag.NONE, is_tls=False)
                counts += [
                    ("istio_tcp_connections_opened", labels, found.connections),
                    ("istio_tcp_connections_closed", labels, found.connections),
                    # Istio's names: what came from the client was received.
                    ("istio_tcp_received_bytes", labels, found.sent),
                    ("istio_tcp_sent_bytes", labels, found.received),
                ]
        labels = (("direction", "outbound"), ("path", "direct"))
        ended = {"ok": every.connections - every.resets, "reset": every.resets}
        self._on_counts(
            (
                *(("connections", (*labels, ("outcome", name)), ended[name]) for name in ended),
                ("sent_bytes", labels, every.sent),
                ("received_bytes", labels, every.received),
                *counts,
            )
        )

    def _party(self, cookie: int) -> Party:
        pod = self._pods.get(cookie)
        if pod is None:
            return Party()
        return Party(self._workloads.get(pod.uid) or _bare(pod), self._identity(pod))

    def _forget_gone(self) -> None:
        unused = self._gone.copy()
        if unused:
            for flow in live_flows(self._pins):
                unused -= {flow.source_cookie, flow.destination_cookie}
        for cookie in unused:
            self._drop(cookie)

    def _drop(self, cookie: int) -> None:
        self._gone.discard(cookie)
        del self._pods[cookie]
        os.close(self._netns_fds.pop(cookie))

    def _log(self, end: FlowEnd) -> None:
        flow = end.flow
        source, destination = map(self._pods.get, (flow.source_cookie, flow.destination_cookie))
        target = endpoint(str(flow.destination), flow.destination_port)
        fields = {
            "src.addr": endpoint(str(flow.source), flow.source_port),
            "src.workload": source and source.name,
            "src.namespace": source and source.namespace,
            "src.identity": source and self._identity(source),
            "dst.addr": target,
            "dst.workload": destination and destination.name,
            "dst.namespace": destination and destination.namespace,
            "dst.identity": destination and self._identity(destination),
            "dst.original": target,
            "direction": "outbound",
            "path": "direct",
            "bytes_sent": end.sent,
            "bytes_recv": end.received,
            "duration": f"{end.seconds * 1000:.1f}ms",
            "result": "reset" if end.was_reset else "ok",
            "response_flags": Flag.NONE.value,
        }
        log_line("connection complete", level="info", scope=ACCESS, **fields)

    def gauge(self) -> tuple[str, Labels, int]:
        """Count the connections that are open now, as workers count theirs."""
        count = sum(1 for flow in live_flows(self._pins) if flow.source_cookie in self._pods)
        return "connections_open", (("path", "direct"), ("reporter", "source")), count

    @property
    def lost(self) -> int:
        """How many ends the kernel could not tell since it began."""
        value = (self._pins.maps["ss_lost"].get({"value": 0}) or {"value": 0})["value"]
        assert isinstance(value, int)
        return value

    def list_connections(self) -> list[OpenConnection]:
        """List the connections that are open now, with the bytes that their client's end tells."""
        flows = list(live_flows(self._pins))
        now = time.monotonic_ns()
        found = []
        for cookie, grouped in _grouped(flows, lambda flow: flow.source_cookie):
            sockets = self._sockets_of(cookie)
            found += [self._listed(flow, sockets.get(flow.socket_cookie), now) for flow in grouped]
        return [connection for connection in found if connection is not None]

    def _sockets_of(self, cookie: int) -> dict[int, TcpSocket]:
        netns_fd = self._netns_fds.get(cookie)
        if netns_fd is None:
            return {}
        try:
            listed = netns.run_in(netns_fd, lambda: list(sock_diag.list_tcp(with_bytes=True)))
        except NetlinkError as error:
            log.warning("bytes of direct connections are not known", extra={"error": str(error)})
            return {}
        return {found.cookie: found for found in listed}

    def _listed(self, flow: DirectFlow, end: TcpSocket | None, now: int) -> OpenConnection | None:
        source = self._pods.get(flow.source_cookie)
        destination = self._pods.get(flow.destination_cookie)
        if source is None:
            return None  # of another agent
        target = endpoint(str(flow.destination), flow.destination_port)
        return OpenConnection(
            namespace=source.namespace,
            pod=source.name,
            direction="outbound",
            path="direct",
            state="open",
            source=endpoint(str(flow.source), flow.source_port),
            original=target,
            destination=target,
            service=None,
            source_pod=f"{source.namespace}/{source.name}",
            destination_pod=f"{destination.namespace}/{destination.name}" if destination else None,
            source_identity=self._identity(source),
            destination_identity=self._identity(destination) if destination else None,
            policy=None,
            sent=end.sent if end else None,
            received=end.received if end else None,
            age_seconds=round((now - flow.began_ns) / 1e9, 1),
        )

    def _identity(self, pod: LocalPod) -> str:
        return _identity(self._trust_domain, pod.namespace, pod.service_account)


@lru_cache(maxsize=1024)  # few pods speak much
def _identity(trust_domain: str, namespace: str, service_account: str) -> str:
    return str(SpiffeId(trust_domain, namespace, service_account))


def _any(_subject: Subject, _source: LocalPod, _destination: LocalPod) -> bool:
    return True


def _bare(pod: LocalPod) -> Workload:
    """Return what is known of a pod without its object."""
    return Workload(
        pod.uid, pod.namespace, pod.name, "", pod.service_account, pod.addresses, is_hbone=True
    )


def _grouped(
    flows: list[DirectFlow], key: Callable[[DirectFlow], int]
) -> Iterator[tuple[int, list[DirectFlow]]]:
    for cookie, found in groupby(sorted(flows, key=key), key):
        yield cookie, list(found)


def _ends(flow: DirectFlow) -> tuple[tuple[Address, int], tuple[Address, int]]:
    return (flow.source, flow.source_port), (flow.destination, flow.destination_port)


def _close_clients(flows: list[DirectFlow]) -> set[DirectFlow]:
    closed = {flow for flow in flows if sock_diag.destroy_tcp(*_ends(flow), flow.socket_cookie)}
    # Rarely any is left: one that has just ended, or is bound to an interface, whoever bound it.
    left = {flow.socket_cookie: flow for flow in flows if flow not in closed}
    for found in list(sock_diag.list_tcp()) if left else ():
        if (flow := left.get(found.cookie)) and sock_diag.destroy_found(found):
            closed.add(flow)
    return closed


def _close_servers(flows: list[DirectFlow]) -> set[DirectFlow]:
    wanted = {_ends(flow): flow for flow in flows}
    closed = set()
    for found in list(sock_diag.list_tcp()):
        if (flow := wanted.get((found.remote, found.local))) and sock_diag.destroy_found(found):
            closed.add(flow)
    return closed
