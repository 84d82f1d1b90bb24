"""The agent's metrics, in Prometheus' text format, and its health, on a port of the node.

    GET /metrics           all there is
    GET /healthz/live      200 while the control process answers
    GET /healthz/ready     200 when every pod that was there at the start has been tried, else 503

Counters of the workers arrive as messages and are summed here, so they survive a worker; everything
else is read when somebody asks. Names and meanings are in docs/metrics.md; a test compares.

Called by the composition root. On loopback, if the operator does not say otherwise.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from agent.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from prometheus_client import Metric

    from agent.tunnel.counts import Counted

REQUEST_SECONDS = 5.0
REQUEST_BYTES = 8192

# name -> (help, labels); what `agent.tunnel.counts` counts under the name without prefix
COUNTERS = {
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
}


class _Read(Collector):
    """Metrics that are read when somebody asks."""

    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        return self._read()


class Metrics:
    """All metrics of one agent."""

    def __init__(self, read: Callable[[], Iterable[Metric]], is_ready: Callable[[], bool]) -> None:
        """Prepare; `read` returns the families that are known elsewhere (`families`)."""
        self._is_ready = is_ready
        self._registry = CollectorRegistry()
        self._counters = {
            name: Counter(name, text, labels, registry=self._registry)
            for name, (text, labels) in COUNTERS.items()
        }
        self._registry.register(_Read(read))
        self._server: asyncio.Server | None = None

    def add(self, counts: Counted) -> None:
        """Add what a worker has counted."""
        for name, labels, amount in counts:
            self._counters[f"sidestep_{name}"].labels(**dict(labels)).inc(amount)

    def text(self) -> bytes:
        """Return everything in the text format."""
        return generate_latest(self._registry)

    async def start(self, host: str, port: int) -> None:
        """Serve (ConfigError if the port is taken)."""
        try:
            self._server = await asyncio.start_server(self._serve, host, port, limit=REQUEST_BYTES)
        except OSError as error:
            raise ConfigError(f"--metrics-port {host}:{port}: {error.strerror}") from error

    @property
    def port(self) -> int | None:
        """The port that is served; None before `start`."""
        return self._server.sockets[0].getsockname()[1] if self._server else None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
                status, kind, body = self._answer(head)
                writer.write(
                    b"HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n"
                    b"Connection: close\r\n\r\n%s" % (status, kind, len(body), body)
                )
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # whoever asked has gone, or asked for nothing
        finally:
            writer.close()

    def _answer(self, head: bytes) -> tuple[bytes, bytes, bytes]:
        """Return status, type and body."""
        match head.split(b" ", 2)[:2]:
            case [b"GET", path] if path.partition(b"?")[0] == b"/metrics":
                return b"200 OK", CONTENT_TYPE_LATEST.encode(), self.text()
            case [b"GET", b"/healthz/live"]:
                return b"200 OK", b"text/plain", b"alive\n"
            case [b"GET", b"/healthz/ready"] if self._is_ready():
                return b"200 OK", b"text/plain", b"ready\n"
            case [b"GET", b"/healthz/ready"]:
                return b"503 Service Unavailable", b"text/plain", b"the objects are not read yet\n"
            case _:
                return b"404 Not Found", b"text/plain", b"the metrics are at /metrics\n"

    def stop(self) -> None:
        """Serve no more."""
        if self._server is not None:
            self._server.close()


def families(
    certificates: Iterable[Mapping[str, float | str | None]],
    requests: Mapping[str, int],
    pod_states: Mapping[str, int],
    enroll_failures: Mapping[str, int],
    pods: Iterable[Mapping[str, object]],
) -> Iterator[Metric]:
    """Yield the families that are read: certificates, pods, and what the guard counted.

    Args:
        certificates: `identity` and `expires`, seconds since the epoch or None.
        requests: how many requests for certificates ended, by outcome.
        pod_states: how many pods are in each state of enrollment.
        enroll_failures: how many tries to enroll a pod failed, by reason.
        pods: rows of `agent.datapath.listing.list_pods`.
    """
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
    states = GaugeMetricFamily(
        "sidestep_pods", "Pods of this node that want the mesh, by state.", labels=["state"]
    )
    for state, count in pod_states.items():
        states.add_metric([state], count)
    failures = CounterMetricFamily(
        "sidestep_enroll_failures",
        "Tries to enroll a pod that failed; each pod is tried again.",
        labels=["reason"],
    )
    for reason, count in enroll_failures.items():
        failures.add_metric([reason], count)
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
    yield from (expiry, asked, states, failures, packets, octets, dropped)


def _number(value: object) -> int:
    assert isinstance(value, int)
    return value
