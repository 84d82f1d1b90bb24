"""The record of a connection: listed, counted and logged, each once; floods are cut."""

from __future__ import annotations

import json
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import pytest

from agent.line_log import LOG
from agent.loglines import Levels
from agent.model.flag import Failure, Flag
from agent.model.identity import SpiffeId
from agent.model.pod import LocalPod
from agent.model.verdict import Basis, Verdict
from agent.model.workload import Workload
from agent.tunnel import access
from agent.tunnel.access import Ledger
from agent.tunnel.counts import Counts
from agent.tunnel.mesh import Mesh
from agent.tunnel.reactor import Reactor
from agent.tunnel.served import ServedPod

if TYPE_CHECKING:
    from agent.tunnel.access import Access

CART4, STOCK4 = ip_address("10.0.0.1"), ip_address("10.0.0.2")
CART = Workload("u-1", "shop", "cart", "east", "cart", (CART4,), is_hbone=True)
STOCK = Workload("u-2", "shop", "stock", "west", "stock", (STOCK4,), is_hbone=True)
POD = LocalPod("u-1", "shop", "cart", "cart", (CART4,))
OWN, PEER = "spiffe://td/ns/shop/sa/cart", "spiffe://td/ns/shop/sa/stock"


class Carried:
    sent, received = 0, 0


class Setup:
    def __init__(self) -> None:
        self.reactor = Reactor()
        mesh = Mesh()
        mesh.put_workload(CART)
        mesh.put_workload(STOCK)
        self.ledger = Ledger(self.reactor, mesh)
        self.served = ServedPod(POD, SpiffeId("td", "shop", "cart"), -1, 1)

    def outbound(self, port: int = 40000) -> Access:
        return self.ledger.outbound(self.served, (CART4, port), (STOCK4, 80))

    def tunnel(self) -> tuple[Access, Carried]:
        opened = self.outbound()
        opened.tunnel_to(STOCK, STOCK4, f"{STOCK4}:80")
        opened.prove(OWN, PEER)
        carried = Carried()
        opened.establish(carried)
        return opened, carried


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    fresh = Counts()
    monkeypatch.setattr(access, "COUNTS", fresh)
    return fresh


@pytest.fixture
def setup() -> Setup:
    return Setup()


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def taken(counts: Counts) -> dict[tuple[str, str], int]:
    """Return what was counted, by name and response flags (or outcome)."""
    found: dict[tuple[str, str], int] = {}
    for name, labels, amount in counts.take():
        its = dict(labels)
        key = (name, its.get("response_flags", its.get("outcome", "")))
        found[key] = found.get(key, 0) + amount
    return found


def test_connection_is_listed_until_it_ends_and_counted_as_it_goes(
    setup: Setup, counts: Counts, capsys: pytest.CaptureFixture[str]
) -> None:
    opened, carried = setup.tunnel()
    assert taken(counts) == {("istio_tcp_connections_opened", "-"): 1}
    carried.sent, carried.received = 10, 5
    ((row,), last) = setup.ledger.list(0, 10, None, None)
    assert last == 0
    assert (row.sent, row.received, row.path, row.state) == (10, 5, "hbone", "open")
    assert (row.source_identity, row.destination_identity) == (OWN, PEER)
    assert (row.destination, row.original) == ("10.0.0.2:80", "10.0.0.2:80")
    opened.count_now()
    opened.count_now()
    assert taken(counts) == {
        ("sent_bytes", ""): 10,
        ("received_bytes", ""): 5,
        ("istio_tcp_received_bytes", "-"): 10,
        ("istio_tcp_sent_bytes", "-"): 5,
    }
    opened.complete("ok", 12, 5)
    found = taken(counts)
    assert found["istio_tcp_received_bytes", "-"] == 2
    assert found["istio_tcp_connections_closed", "-"] == 1
    assert found["connections", "ok"] == 1
    assert ("istio_tcp_connections_opened", "-") not in found
    assert setup.ledger.list(0, 10, None, None) == ([], 0)
    (entry,) = lines(capsys)
    assert (entry["level"], entry["bytes_sent"], entry["bytes_recv"]) == ("info", 12, 5)
    assert (entry["dst.addr"], entry["dst.hbone_addr"]) == ("10.0.0.2:15008", "10.0.0.2:80")
    assert (entry["src.workload"], entry["dst.workload"]) == ("cart", "stock")


@pytest.mark.parametrize(
    ("result", "flag", "expected"),
    [
        ("no endpoint", Flag.CONNECT, "CONNECT"),
        (Failure("no answer", Flag.NETWORK_POLICY), Flag.CONNECT, "NETWORK_POLICY"),
        ("denied there", Flag.DENIED, "DENY"),
    ],
)
def test_failure_is_an_error_with_its_flag(
    setup: Setup, counts: Counts, capsys: pytest.CaptureFixture[str],
    result: str, flag: Flag, expected: str,
) -> None:  # fmt: skip
    setup.outbound().complete(result, flag=flag)
    found = taken(counts)
    assert found["istio_tcp_connections_opened", "-"] == 1
    assert found["istio_tcp_connections_failed", expected] == 1
    assert found["connections", "failed"] == 1
    (entry,) = lines(capsys)
    assert (entry["level"], entry["error"]) == ("error", result)
    assert entry["response_flags"] == expected


def test_inbound_connection_shows_the_pods_view_and_its_verdict(
    setup: Setup, counts: Counts, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = setup.ledger.inbound(setup.served, "10.0.0.2:4", STOCK4, "10.0.0.1:80", "hbone")
    opened.prove(OWN, PEER)
    opened.verdict = Verdict(False, Basis.NO_WORKLOAD)
    opened.complete("401: denied", 3, 7)
    (entry,) = lines(capsys)
    assert (entry["src.identity"], entry["dst.identity"]) == (PEER, OWN)
    assert (entry["bytes_sent"], entry["bytes_recv"]) == (7, 3)
    assert (entry["verdict"], entry["response_flags"]) == ("deny", "DENY")
    found = taken(counts)
    assert found["connections", "denied"] == 1
    assert found["connections_denied", ""] == 1


def test_connections_are_listed_in_parts_and_by_pod(setup: Setup, counts: Counts) -> None:
    opened = [setup.outbound(port) for port in range(5)]
    listed: list[str] = []
    after, parts = 0, 0
    while True:
        found, after = setup.ledger.list(after, 2, None, None)
        listed += [row.source for row in found]
        parts += 1
        if not after:
            break
    assert listed == [f"10.0.0.1:{port}" for port in range(5)]
    assert parts == 3
    assert setup.ledger.list(0, 9, "bank", None) == ([], 0)
    assert len(setup.ledger.list(0, 9, "shop", "cart")[0]) == 5
    assert setup.ledger.count() == {("source", "tcp"): 5}
    for each in opened:
        each.complete("ok")
    assert setup.ledger.count() == {}


def test_flood_is_cut_and_its_rest_counted(
    setup: Setup, counts: Counts, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(access, "REPORT_SECONDS", 0.01)
    setup.ledger.set_limit(3)
    for _ in range(10):
        setup.ledger.refuse(setup.served, "inbound", "1.2.3.4:5", "10.0.0.1:15006", "no")
    setup.reactor.call_later(0.1, setup.reactor.stop)
    setup.reactor.run()
    *first, last = lines(capsys)
    assert [entry["message"] for entry in first] == ["connection failed"] * 3
    assert last["message"] == "connections not logged, too many at once"
    assert last["count"] == 7


def test_start_is_logged_if_that_is_wanted_and_takes_no_line_if_not(
    setup: Setup, counts: Counts, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    setup.ledger.set_limit(1)
    setup.tunnel()[0].complete("ok")
    assert [entry["message"] for entry in lines(capsys)] == ["connection complete"]
    setup.ledger.set_limit(2)
    monkeypatch.setattr(LOG, "levels", Levels("info", (("access", "debug"),)))
    setup.tunnel()[0].complete("ok")
    assert [entry["message"] for entry in lines(capsys)] == [
        "connection opened",
        "connection complete",
    ]


def test_bytes_of_long_connections_are_counted_now_and_then(
    setup: Setup, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "FLUSH_SECONDS", 0.01)
    _opened, carried = setup.tunnel()
    carried.sent = 100
    setup.reactor.call_later(0.1, setup.reactor.stop)
    setup.reactor.run()
    assert taken(counts)["istio_tcp_received_bytes", "-"] == 100
