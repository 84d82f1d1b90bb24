"""The agent's metrics: what is added and what is read, as text; and the page that lists them."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent.errors import ConfigError
from agent.metrics import COUNTERS, Metrics, families

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client import Metric

POD = {
    "pod": "shop/cart-0",
    **{f"{way}_{what}": 1 for way in ("outbound", "inbound") for what in ("packets", "bytes")},
    **{f"dropped_{reason}": 2 for reason in ("plaintext", "spoofed", "fragment")},
}


def read() -> Iterable[Metric]:
    certificates: list[dict[str, float | str | None]] = [
        {"identity": "spiffe://td/ns/a/sa/b", "expires": 1700000000.0},
        {"identity": "spiffe://td/ns/a/sa/c", "expires": None},
    ]
    return families(
        certificates,
        {"issued": 3, "authority_unreachable": 1},
        {"enrolled": 2},
        {"enroll_failed": 4},
        [POD],
    )


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_counts_of_workers_are_summed() -> None:
    metrics = Metrics(read, lambda: True)
    labels = (("direction", "inbound"), ("reason", "certificate_expired"))
    for _ in range(2):
        metrics.add((("peers_refused", labels, 3),))
    key = ("sidestep_peers_refused_total", frozenset(labels))
    assert samples(metrics)[key] == 6


def test_what_is_read_is_there() -> None:
    found = samples(Metrics(read, lambda: True))

    def value(name: str, **labels: str) -> float:
        return found[f"sidestep_{name}", frozenset(labels.items())]

    expiry = "certificate_expiry_timestamp_seconds"
    assert value(expiry, identity="spiffe://td/ns/a/sa/b") == 1700000000
    assert value(expiry, identity="spiffe://td/ns/a/sa/c") == 0
    assert value("certificate_requests_total", outcome="authority_unreachable") == 1
    assert value("pods", state="enrolled") == 2
    assert value("enroll_failures_total", reason="enroll_failed") == 4
    assert value("pod_bytes_total", pod="shop/cart-0", direction="inbound") == 1
    assert value("pod_dropped_packets_total", pod="shop/cart-0", reason="spoofed") == 2


def test_page_lists_exactly_the_metrics() -> None:
    page = (Path(__file__).parents[3] / "docs/metrics.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([\w, ]+) \|", page, re.MULTILINE)
    listed = {name: (kind, tuple(labels.split(", "))) for name, kind, labels in rows}
    counters = {name: ("counter", labels) for name, (_text, labels) in COUNTERS.items()}
    others = {family.name: (family.type, tuple(family.samples[0].labels)) for family in read()}
    assert listed == counters | others


@pytest.mark.parametrize(
    ("request_", "starts", "contains"),
    [
        (b"GET /metrics HTTP/1.1\r\n\r\n", b"HTTP/1.1 200 OK\r\n", b"sidestep_pods{"),
        (b"GET / HTTP/1.1\r\n\r\n", b"HTTP/1.1 404 Not Found\r\n", b"at /metrics"),
        (b"GET /healthz/live HTTP/1.1\r\n\r\n", b"HTTP/1.1 200 OK\r\n", b"alive"),
        (b"GET /healthz/ready HTTP/1.1\r\n\r\n", b"HTTP/1.1 200 OK\r\n", b"ready"),
        (b"\r\n\r\n", b"HTTP/1.1 404 Not Found\r\n", b"at /metrics"),
        (b"x" * 100_000, b"", b""),
        (b"GET /metr", b"", b""),
    ],
)
def test_port_answers_and_survives_nonsense(
    request_: bytes, starts: bytes, contains: bytes
) -> None:
    async def run() -> bytes:
        metrics = Metrics(read, lambda: True)
        await metrics.start("127.0.0.1", 0)
        assert metrics.port is not None
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", metrics.port)
            writer.write(request_)
            writer.write_eof()
            try:
                answer = await reader.read()
            except ConnectionError:
                answer = b""
            writer.close()
            return answer
        finally:
            metrics.stop()

    answer = asyncio.run(run())
    assert answer.startswith(starts)
    assert contains in answer


def test_agent_that_has_not_read_the_objects_is_not_ready() -> None:
    async def run() -> bytes:
        metrics = Metrics(read, lambda: False)
        await metrics.start("127.0.0.1", 0)
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", metrics.port)
            writer.write(b"GET /healthz/ready HTTP/1.1\r\n\r\n")
            answer = await reader.read()
            writer.close()
            return answer
        finally:
            metrics.stop()

    assert asyncio.run(run()).startswith(b"HTTP/1.1 503 Service Unavailable\r\n")


def test_port_that_is_taken_is_named() -> None:
    async def run() -> None:
        first, second = Metrics(read, lambda: True), Metrics(read, lambda: True)
        await first.start("127.0.0.1", 0)
        assert first.port is not None
        try:
            with pytest.raises(
                ConfigError, match=f"--metrics-port 127.0.0.1:{first.port}: .*in use"
            ):
                await second.start("127.0.0.1", first.port)
        finally:
            first.stop()

    asyncio.run(run())
