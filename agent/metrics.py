"""The agent's metrics, in Prometheus' text format, on a port of the node.

    GET /metrics               all there is
    GET /stats/prometheus      the same, as for Istio

Counters of the workers arrive as messages and are summed here, so they survive a worker; everything
else is read when somebody asks. Names and meanings are in docs/metrics.md; a test compares.

A series that is about a workload which is gone is forgotten some minutes after it last changed.

Called by the composition root. On loopback, if the operator does not say otherwise.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from agent import web
from agent.tally import Tally
from agent.tunnel.labels import NAMES, UNKNOWN

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping

    from prometheus_client import Metric

    from agent.tunnel.counts import Counted, Labels

EXPIRE_SECONDS = 600.0  # after its last change, a series of what is gone
EXPIRE_EVERY_SECONDS = 60.0  # though nobody scrapes
# name -> (help, labels); what `agent.tunnel.counts` counts under the name without our prefix
COUNTERS = {
    "istio_tcp_connections_opened": ("TCP connections opened, as each end sees them.", NAMES),
    "istio_tcp_connections_closed": ("TCP connections closed, failed ones too.", NAMES),
    "istio_tcp_connections_failed": (
        "TCP connections that failed; response_flags says how.",
        NAMES,
    ),
    "istio_tcp_received_bytes": ("Bytes from clients to servers.", NAMES),
    "istio_tcp_sent_bytes": ("Bytes from servers to clients.", NAMES),
    "sidestep_connections": (
        "Connections that ended, by direction as the pod sees it, path and outcome.",
        ("direction", "path", "outcome"),
    ),
    "sidestep_sent_bytes": ("Bytes from clients to servers.", ("direction", "path")),
    "sidestep_received_bytes": ("Bytes from servers to clients.", ("direction", "path")),
    "sidestep_connections_denied": ("Connections that a policy denied.", ("policy",)),
    "sidestep_cni_requests": (
        "Requests of the CNI plugin, by command and code of the answer; 0 is success.",
        ("command", "code"),
    ),
    "sidestep_peers_refused": (
        "Tunnels refused because the peer did not prove what it must.",
        ("direction", "reason"),
    ),
    "sidestep_repairs": (
        "Things that were missing in the kernel, or wrong, and were put right without being asked.",
        ("kind", "outcome"),
    ),
    "sidestep_handshakes_failed": (
        "Tunnels that ended before both sides had proved who they are, by reason.",
        ("direction", "reason"),
    ),
}
# The same for what workers have at this moment, summed over them.
GAUGES = {
    "istio_tcp_sockets_open": ("Connections that are open and pass a worker.", ("reporter",)),
    "sidestep_connections_open": ("Connections that are open, by path.", ("path", "reporter")),
    "sidestep_buffered_bytes": ("Bytes that workers keep for slow readers.", ()),
    "sidestep_tunnels": (
        "Tunnels by the state of the pool: dialing, idle, in_use, draining.",
        ("direction", "state"),
    ),
}
ENDS = ("source", "destination")
PATHS = ("/metrics", "/stats/prometheus")

Place = tuple[str, str]  # namespace, workload


def full_name(name: str) -> str:
    """Return the metric's name of a count or gauge of a worker."""
    return name if name.startswith("istio_") else f"sidestep_{name}"


def understood(counts: Counted) -> Counted:
    """Leave out what an agent of another version counts and this one does not expose."""
    known = (COUNTERS | GAUGES).items()
    expected = {name: set(labels) for name, (_text, labels) in known}
    return tuple(
        (name, labels, amount)
        for name, labels, amount in counts
        if expected.get(full_name(name)) == {label for label, _value in labels}
    )


class _Read(Collector):
    """Metrics that are made when somebody asks."""

    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        return self._read()


class Metrics:
    """All metrics of one agent."""

    def __init__(
        self,
        read: Callable[[], Awaitable[Iterable[Metric]]],
        places: Callable[[], Collection[Place]],
    ) -> None:
        """Prepare.

        `read` returns the families that are known elsewhere (`families`), `places()` the workloads
        that there are.
        """
        self._tally = Tally()
        self._next_expiry = 0.0
        self._read = read
        self._places = places
        self._found: list[Metric] = []
        self._registry = CollectorRegistry()
        self._registry.register(_Read(self._counted))
        self._registry.register(_Read(lambda: self._found))
        ProcessCollector(registry=self._registry)
        self._lock = asyncio.Lock()
        self._server = web.Server({("GET", path): self._page for path in PATHS})

    def add(self, counts: Counted) -> None:
        """Add what a worker has counted."""
        now = time.monotonic()
        self._tally.add(counts, now)
        if now >= self._next_expiry:
            self._expire()

    def take(self) -> Counted:
        """Return all that was counted, and count from the start: another agent goes on with it."""
        return self._tally.take()

    async def text(self) -> bytes:
        """Return everything in the text format."""
        async with self._lock:  # what was read belongs to one answer
            self._expire()
            self._found = list(await self._read())
            return generate_latest(self._registry)

    def bind(self, host: str, port: int, *, is_successor: bool = False) -> None:
        """Take the port, as `web.Server` does (ConfigError)."""
        self._server.bind(port, "--metrics-port", host, is_successor=is_successor)

    async def start(self) -> None:
        """Serve GET /metrics, if a port was bound."""
        await self._server.start()

    @property
    def port(self) -> int | None:
        """The port that was bound; None before `bind`."""
        return self._server.port

    def stop(self) -> None:
        """Serve no more."""
        self._server.stop()

    async def _page(self, _query: web.Query) -> web.Response:
        return web.Response(await self.text(), content_type=CONTENT_TYPE_LATEST)

    def _counted(self) -> Iterator[Metric]:
        for name, (text, labels) in COUNTERS.items():
            family = CounterMetricFamily(name, text, labels=labels)
            for pairs, amount in self._tally.of(name.removeprefix("sidestep_")):
                found = dict(pairs)
                family.add_metric([found[label] for label in labels], amount)
            yield family

    def _expire(self) -> None:
        now, places = time.monotonic(), self._places()
        self._next_expiry = now + EXPIRE_EVERY_SECONDS
        self._tally.expire(now - EXPIRE_SECONDS, lambda labels: is_gone(labels, places))


def is_gone(labels: Labels, places: Collection[Place]) -> bool:
    """Say whether a series is about a workload that there is no more."""
    found = dict(labels)
    if "reporter" not in found:
        return False
    ends = [(found[f"{end}_workload_namespace"], found[f"{end}_workload"]) for end in ENDS]
    return any(end not in places and end != (UNKNOWN, UNKNOWN) for end in ends)


def gauge_families(answers: Iterable[Counted]) -> Iterator[Metric]:
    """Yield what workers have at this moment, summed."""
    sums: dict[tuple[str, Labels], int] = {}
    for answer in answers:
        for name, labels, value in answer:
            key = (full_name(name), labels)
            sums[key] = sums.get(key, 0) + value
    for name, (text, names) in GAUGES.items():
        family = GaugeMetricFamily(name, text, labels=names)
        for (found_name, pairs), value in sums.items():
            if found_name == name:
                given = dict(pairs)
                family.add_metric([given[label] for label in names], value)
        yield family


def families(
    certificates: Iterable[Mapping[str, float | str | None]],
    requests: Mapping[str, int],
    statuses: Iterable[tuple[str, str, str, str]],
    enroll_failures: Mapping[str, int],
    pods: Iterable[Mapping[str, object]],
    captures: Iterable[Mapping[str, object]],
    maps: Iterable[Mapping[str, object]],
    workers: tuple[int, int],
    lost_flow_ends: int,
    version: str,
) -> Iterator[Metric]:
    """Yield the families that are read: certificates, pods, maps, and what the guard counted.

    Args:
        certificates: `identity` and `expires`, seconds since the epoch or None.
        requests: how many requests for certificates ended, by outcome.
        statuses: namespace, pod, state of enrollment, and reason for each pod that wants the mesh.
        enroll_failures: how many tries to enroll a pod failed, by reason.
        pods: rows of `agent.datapath.listing.list_pods`.
        captures: rows of the map ss_captures, as `agent.datapath.listing.dump_map` lists them.
        maps: rows of `agent.datapath.listing.list_maps`.
        workers: how many run, and how many were replaced since the start.
        lost_flow_ends: ends of direct connections that the kernel could not tell.
        version: of Sidestep.
    """
    yield from _certificates(certificates, requests)
    yield from _enrollment(list(statuses), enroll_failures)
    yield from _guard(pods)
    connects = CounterMetricFamily(
        "sidestep_pod_captures",
        "New connections of a pod, by what the kernel decided.",
        labels=["pod", "direction", "decision"],
    )
    for row in captures:
        labels = [str(row[name]) for name in ("pod", "direction", "decision")]
        connects.add_metric(labels, _number(row["connections"]))
    yield connects
    entries = GaugeMetricFamily("sidestep_map_entries", "Entries of a BPF map.", labels=["map"])
    most = GaugeMetricFamily(
        "sidestep_map_max_entries", "How many entries a BPF map can have.", labels=["map"]
    )
    for row in maps:
        if row["entries"] is not None and row["type"] != "array":  # an array is always full
            entries.add_metric([str(row["name"])], _number(row["entries"]))
            most.add_metric([str(row["name"])], _number(row["max_entries"]))
    running, replaced = workers
    yield from (entries, most)
    yield GaugeMetricFamily("sidestep_workers", "Worker processes that run.", value=running)
    yield CounterMetricFamily(
        "sidestep_workers_replaced", "Worker processes that died.", value=replaced
    )
    yield CounterMetricFamily(
        "sidestep_lost_flow_ends",
        "Ends of direct connections that the kernel could not tell: they are not counted.",
        value=lost_flow_ends,
    )
    build = GaugeMetricFamily("istio_build", "Version.", labels=["component", "tag"])
    build.add_metric(["sidestep", version], 1)
    yield build


def _certificates(
    certificates: Iterable[Mapping[str, float | str | None]], requests: Mapping[str, int]
) -> Iterator[Metric]:
    expiry = GaugeMetricFamily(
        "sidestep_certificate_expiry_timestamp_seconds",
        "When the certificate in use ends; 0 if there is none.",
        labels=["identity"],
    )
    for row in certificates:
        expiry.add_metric([str(row["identity"])], float(row["expires"] or 0))
    asked = CounterMetricFamily(
        "sidestep_certificate_requests",
        "Requests to the CA that ended: issued, or the reason of the failure.",
        labels=["outcome"],
    )
    for outcome, count in requests.items():
        asked.add_metric([outcome], count)
    yield from (expiry, asked)


def _enrollment(
    statuses: list[tuple[str, str, str, str]], enroll_failures: Mapping[str, int]
) -> Iterator[Metric]:
    states = GaugeMetricFamily(
        "sidestep_pods", "Pods of this node that want the mesh, by state.", labels=["state"]
    )
    each = GaugeMetricFamily(
        "sidestep_pod_enrollment",
        "1 for the state of each pod of this node that wants the mesh.",
        labels=["namespace", "pod", "state", "reason"],
    )
    counted = dict.fromkeys(("pending", "enrolled", "failed"), 0)
    for namespace, pod, state, reason in statuses:
        counted[state] = counted.get(state, 0) + 1
        each.add_metric([namespace, pod, state, reason], 1)
    for state, count in counted.items():
        states.add_metric([state], count)
    # The names that dashboards of ambient mesh know.
    active = GaugeMetricFamily(
        "workload_manager_active_proxy_count", "Pods in the mesh.", value=counted["enrolled"]
    )
    pending = GaugeMetricFamily(
        "workload_manager_pending_proxy_count",
        "Pods that want to be in the mesh.",
        value=len(statuses) - counted["enrolled"],
    )
    failures = CounterMetricFamily(
        "sidestep_enroll_failures",
        "Tries to enroll a pod that failed; each pod is tried again.",
        labels=["reason"],
    )
    for reason, count in enroll_failures.items():
        failures.add_metric([reason], count)
    yield from (states, each, failures, active, pending)


def _guard(pods: Iterable[Mapping[str, object]]) -> Iterator[Metric]:
    packets = CounterMetricFamily(
        "sidestep_pod_packets", "Packets that passed a pod's link.", labels=["pod", "direction"]
    )
    octets = CounterMetricFamily(
        "sidestep_pod_bytes", "Bytes that passed a pod's link.", labels=["pod", "direction"]
    )
    dropped = CounterMetricFamily(
        "sidestep_pod_dropped_packets", "Packets that the guard dropped.", labels=["pod", "reason"]
    )
    for pod in pods:
        name = str(pod["pod"])
        for direction in ("outbound", "inbound"):
            packets.add_metric([name, direction], _number(pod[f"{direction}_packets"]))
            octets.add_metric([name, direction], _number(pod[f"{direction}_bytes"]))
        for reason in ("plaintext", "spoofed", "fragment"):
            dropped.add_metric([name, reason], _number(pod[f"dropped_{reason}"]))
    yield from (packets, octets, dropped)


def _number(value: object) -> int:
    assert isinstance(value, int)
    return value
