"""The agent's metrics: what is added and what is read, as text; and the page that lists them."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent.errors import ConfigError
from agent.metrics import (
    COUNTERS,
    EXPIRE_SECONDS,
    Metrics,
    families,
    gauge_families,
    is_gone,
    understood,
)
from agent.model.flag import Flag
from agent.model.workload import Workload
from agent.tunnel.labels import NAMES, Party, build_labels

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client import Metric

    from agent.metrics import Place
    from agent.tunnel.counts import Counted, Labels

POD = {
    "pod": "shop/cart-0",
    **{f"{way}_{what}": 1 for way in ("outbound", "inbound") for what in ("packets", "bytes")},
    **{f"dropped_{reason}": 2 for reason in ("plaintext", "spoofed", "fragment")},
}


STATUSES = [
    ("shop", "cart-0", "enrolled", ""),
    ("shop", "cart-1", "failed", "enroll_failed"),
]
CAPTURES: list[dict[str, object]] = [
    {"pod": "shop/cart-0", "direction": "outbound", "decision": "captured", "connections": 9}
]
MAPS: list[dict[str, object]] = [
    {"name": "ss_pods", "type": "hash", "entries": 2, "max_entries": 1024},
    {"name": "ss_exempt", "type": "sk_storage", "entries": None, "max_entries": None},
    {"name": "ss_meta", "type": "array", "entries": 1, "max_entries": 1},
]
GAUGED: list[Counted] = [
    (("tunnels", (("direction", "inbound"), ("state", "in_use")), 2), ("buffered_bytes", (), 7)),
    (
        ("tunnels", (("direction", "inbound"), ("state", "in_use")), 3),
        ("istio_tcp_sockets_open", (("reporter", "source"),), 4),
        ("connections_open", (("path", "hbone"), ("reporter", "source")), 4),
    ),
]
SHOP = {("shop", "cart"), ("shop", "stock")}


async def read() -> Iterable[Metric]:
    certificates: list[dict[str, float | str | None]] = [
        {"identity": "spiffe://td/ns/a/sa/b", "expires": 1700000000.0},
        {"identity": "spiffe://td/ns/a/sa/c", "expires": None},
    ]
    requests = {"issued": 3, "authority_unreachable": 1}
    return [
        *gauge_families(GAUGED),
        *families(
            certificates,
            requests,
            STATUSES,
            {"enroll_failed": 4},
            [POD],
            CAPTURES,
            MAPS,
            (2, 1),
            5,
            "1.2.3",
        ),
    ]


def make(places: set[Place] | None = None) -> Metrics:
    return Metrics(read, lambda: SHOP if places is None else places)


def common(reporter: str = "source") -> Labels:
    """Labels of a connection from shop/cart to shop/stock."""

    def workload(name: str) -> Workload:
        return Workload(name, "shop", name, "east", name, (), is_hbone=True)

    ends = Party(workload("cart")), Party(workload("stock"))
    return build_labels(reporter, *ends, None, Flag.NONE)


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(asyncio.run(metrics.text()).decode())
        for sample in family.samples
    }


def test_counts_of_workers_are_summed() -> None:
    metrics = make()
    labels = (("direction", "inbound"), ("reason", "certificate_expired"))
    for _ in range(2):
        metrics.add((("peers_refused", labels, 3),))
    key = ("sidestep_peers_refused_total", frozenset(labels))
    assert samples(metrics)[key] == 6


def test_counts_of_another_version_are_left_out() -> None:
    direction, path = ("direction", "inbound"), ("path", "hbone")
    good = (
        ("sent_bytes", (direction, path), 3),
        ("connections_open", (path, ("reporter", "source")), 1),
    )
    others = (
        ("sent_bytes", (direction,), 3),
        ("sent_bytes", (direction, path, ("pod", "cart")), 3),
        ("sent_words", (direction, path), 3),
    )
    assert understood((*others, *good)) == good


def test_what_is_read_is_there() -> None:
    found = samples(make())

    def value(name: str, **labels: str) -> float:
        return found[f"sidestep_{name}", frozenset(labels.items())]

    expiry = "certificate_expiry_timestamp_seconds"
    assert value(expiry, identity="spiffe://td/ns/a/sa/b") == 1700000000
    assert value(expiry, identity="spiffe://td/ns/a/sa/c") == 0
    assert value("certificate_requests_total", outcome="authority_unreachable") == 1
    assert value("pods", state="enrolled") == 1
    assert value("pod_enrollment", namespace="shop", pod="cart-1", state="failed",
                 reason="enroll_failed") == 1  # fmt: skip
    assert value("pod_captures_total", pod="shop/cart-0", direction="outbound",
                 decision="captured") == 9  # fmt: skip
    assert value("map_entries", map="ss_pods") == 2
    assert value("map_max_entries", map="ss_pods") == 1024
    assert ("sidestep_map_entries", frozenset({("map", "ss_meta")})) not in found
    assert value("tunnels", direction="inbound", state="in_use") == 5
    assert value("buffered_bytes") == 7
    assert value("workers_replaced_total") == 1
    assert value("lost_flow_ends_total") == 5
    assert found["istio_build", frozenset({("component", "sidestep"), ("tag", "1.2.3")})] == 1
    assert value("enroll_failures_total", reason="enroll_failed") == 4
    assert value("pod_bytes_total", pod="shop/cart-0", direction="inbound") == 1
    assert value("pod_dropped_packets_total", pod="shop/cart-0", reason="spoofed") == 2


def test_series_of_what_is_gone_are_forgotten_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places = {("shop", "cart"), ("shop", "stock")}
    metrics = make(places)
    metrics.add((("istio_tcp_connections_opened", common(), 1),))
    key = ("istio_tcp_connections_opened_total", frozenset(common()))
    places.remove(("shop", "stock"))
    assert samples(metrics)[key] == 1  # for a last scrape
    monkeypatch.setattr("agent.metrics.EXPIRE_SECONDS", -1.0)
    assert key not in samples(metrics)


def test_series_of_what_is_gone_are_forgotten_though_nobody_scrapes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1.0
    monkeypatch.setattr("agent.metrics.time", SimpleNamespace(monotonic=lambda: now))
    metrics = make(places=set())
    gone: Counted = (("istio_tcp_connections_opened", common(), 1),)
    other: Counted = (("connections_denied", (("policy", "p"),), 1),)
    metrics.add(gone)
    now += EXPIRE_SECONDS + 1
    metrics.add(other)
    assert metrics.take() == other


def test_adding_seldom_looks_for_what_is_gone() -> None:
    looks = 0

    def places() -> set[Place]:
        nonlocal looks
        looks += 1
        return SHOP

    metrics = Metrics(read, places)
    for _ in range(10):
        metrics.add((("istio_tcp_connections_opened", common(), 1),))
    assert looks == 1


@pytest.mark.parametrize(
    ("labels", "places", "expected"),
    [
        (common(), SHOP, False),
        (common(), {("shop", "cart")}, True),
        (common(), {("shop", "stock")}, True),
        (build_labels("source", Party(), Party(), None, Flag.NONE), set(), False),
        ((("policy", "p"),), set(), False),
    ],
)
def test_who_is_gone(labels: Labels, places: set[Place], expected: bool) -> None:
    assert is_gone(labels, places) is expected


def test_page_lists_exactly_the_metrics() -> None:
    page = (Path(__file__).parents[3] / "docs/metrics.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([\w, ]*?) ?\|", page, re.MULTILINE)
    listed = {name: (kind, _named(labels)) for name, kind, labels in rows}
    counters = {name: ("counter", labels) for name, (_text, labels) in COUNTERS.items()}
    others = {
        family.name: (family.type, tuple(family.samples[0].labels))
        for family in asyncio.run(_all())
        if family.samples
    }
    assert listed == counters | others


async def _all() -> list[Metric]:
    return list(await read())


def _named(labels: str) -> tuple[str, ...]:
    """Read the labels of a row; the page says `common` for Istio's many."""
    return NAMES if labels == "common" else tuple(labels.split(", ")) if labels else ()


@pytest.mark.parametrize(
    ("request_", "starts", "contains"),
    [
        (b"GET /metrics HTTP/1.1\r\n\r\n", b"HTTP/1.1 200 OK\r\n", b"sidestep_pods{"),
        (b"GET / HTTP/1.1\r\n\r\n", b"HTTP/1.1 404 Not Found\r\n", b"/metrics"),
        (b"x" * 100_000, b"", b""),
        (b"GET /metr", b"", b""),
    ],
)
def test_port_answers_and_survives_nonsense(
    request_: bytes, starts: bytes, contains: bytes
) -> None:
    async def run() -> bytes:
        metrics = make()
        metrics.bind("127.0.0.1", 0)
        await metrics.start()
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


def test_port_that_is_taken_is_named() -> None:
    async def run() -> None:
        first, second = make(), make()
        first.bind("127.0.0.1", 0)
        await first.start()
        assert first.port is not None
        try:
            with pytest.raises(ConfigError, match=f"--metrics-port {first.port}: .*in use"):
                second.bind("127.0.0.1", first.port)
        finally:
            first.stop()

    asyncio.run(run())
