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
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

from agent import netns, sock_diag
from agent.datapath.direct import FlowEnds, Flows, Verdicts, live_flows
from agent.errors import NetlinkError
from agent.model.identity import SpiffeId
from agent.tunnel.served import endpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from agent.datapath.direct import DirectFlow, FlowEnd
    from agent.datapath.pins import Pins
    from agent.datapath.ring import Batch
    from agent.model.pod import Address, LocalPod
    from agent.tunnel.counts import Counted

log = logging.getLogger(__name__)
# Ends are read together: one wake-up for many, so that the kernel's speed is not ours.
GATHER_SECONDS = 0.1
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
        self._on_ends()
        self._listen()

    def stop(self) -> None:
        """Log no more; open connections go on."""
        asyncio.get_running_loop().remove_reader(self._ends.fd)
        if self._reading is not None:
            self._reading.cancel()
        self._on_ends()
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
            self.renew()  # it may have gone direct until now

    def remove_pod(self, netns_cookie: int) -> None:
        """Let a pod go; its open connections go on.

        Its verdicts do not: the namespace may come back as somebody else's.
        """
        self.renew()
        self._gone.add(netns_cookie)
        self._forget_gone()

    def renew(self) -> None:
        """Make every verdict void: each next connection is judged again."""
        self._verdicts.renew()

    def close_unless(self, passes: Callable[[DirectFlow, LocalPod, LocalPod], bool]) -> int:
        """Close the open connections that do not pass any more; return how many.

        `passes` gets a connection, the pod that opened it and the one that serves it. A connection
        whose pods are not both known any more is closed: nobody can say that it passes.
        """
        refused = []
        for flow in list(live_flows(self._pins)):
            source = self._pods.get(flow.source_cookie)
            destination = self._pods.get(flow.destination_cookie)
            if not (source and destination and passes(flow, source, destination)):
                refused.append(flow)
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
            log.info("direct connections not logged, too many at once", extra={"count": count})
        if batch:
            self._count(batch)
            self._forget_gone()

    def _count(self, batch: Batch) -> None:
        sent, received, resets = self._ends.totals(batch)
        labels = (("direction", "outbound"), ("path", "direct"))
        ended = {"ok": len(batch) - resets, "reset": resets}
        self._on_counts(
            (
                *(("connections", (*labels, ("outcome", name)), ended[name]) for name in ended),
                ("sent_bytes", labels, sent),
                ("received_bytes", labels, received),
            )
        )

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
        source = self._pods.get(flow.source_cookie)
        destination = self._pods.get(flow.destination_cookie)
        log.info(
            "connection complete",
            extra={
                "direction": "outbound",
                "pod": source and f"{source.namespace}/{source.name}",
                "source": endpoint(str(flow.source), flow.source_port),
                "destination": endpoint(str(flow.destination), flow.destination_port),
                "path": "direct",
                "peer_identity": destination and self._identity(destination),
                "bytes_sent": end.sent,
                "bytes_received": end.received,
                "duration_ms": round(end.seconds * 1000, 1),
                "result": "reset" if end.was_reset else "ok",
            },
        )

    def _identity(self, pod: LocalPod) -> str:
        return str(SpiffeId(self._trust_domain, pod.namespace, pod.service_account))


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
