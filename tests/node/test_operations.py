"""A running lab as the person on call sees it: connections, metrics, logs, pages, archive."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import tarfile
import time
from contextlib import ExitStack
from functools import partial
from http.client import HTTPConnection
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from agent import netns
from agent.admin import Admin
from agent.errors import AgentRunning
from agent.lab.lab import Lab
from agent.model.capture import HBONE_PORT, OUTBOUND_PORT
from agent.question import ask
from tests.support.labs import PodEnd, is_alive, wait_for_entry
from tests.support.prometheus import prometheus
from tests.support.queries import (
    RULES,
    dashboard_queries,
    grouping_of,
    metrics_of,
    rule_queries,
    shown_labels,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from agent.lab.cluster import LabNode

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

COMPLETE, OPENED = "connection complete", "connection opened"
SECONDS = 10.0
Sample = dict[str, set[str]]
# How the queries of panels end that show pods in trouble, and nothing else.
TROUBLE = ('{state!="enrolled"} == 1', "sidestep_pod_dropped_packets_total[5m])) > 0")


def pod(name: str, node: str, owner: str = "") -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name, "namespace": "shop", "labels": {"app": name}}
    if owner:
        metadata["labels"] |= {"pod-template-hash": "abc12"}
        metadata["ownerReferences"] = [
            {"kind": "ReplicaSet", "name": f"{owner}-abc12", "controller": True}
        ]
    spec = {"nodeName": node, "serviceAccountName": name}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


CLUSTER = [
    {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": "east", "labels": {"topology.kubernetes.io/zone": "eu-1"}},
    },
    {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "west"}},
    {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": "shop", "labels": {"istio.io/dataplane-mode": "ambient"}},
    },
    pod("client", "east", "front"),
    pod("neighbor", "east"),
    pod("server", "west"),
    {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "not-9999", "namespace": "shop"},
        "spec": {
            "action": "DENY",
            "selector": {"matchLabels": {"app": "server"}},
            "rules": [{"to": [{"operation": {"ports": ["9999"]}}]}],
        },
    },
    {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"clusterIP": "10.96.0.10", "ports": [{"name": "web", "port": 80}]},
    },
    {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "addressType": "IPv4",
        "metadata": {
            "name": "web-1",
            "namespace": "shop",
            "labels": {"kubernetes.io/service-name": "web"},
        },
        "endpoints": [{"addresses": ["10.244.2.4"], "conditions": {"ready": True}}],
        "ports": [{"name": "web", "port": 9000}],
    },
]


class Watched:
    """The lab, its nodes, and a program in each pod."""

    def __init__(self, lab: Lab, stack: ExitStack) -> None:
        self.lab = lab
        self.east, self.west = lab.cluster().nodes
        self.client = PodEnd(lab, "client", stack)
        self.neighbor = PodEnd(lab, "neighbor", stack)
        self.server = PodEnd(lab, "server", stack)

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "agent.cli", *arguments, "--lab", self.lab.name]
        return subprocess.run(line, capture_output=True, text=True, check=False)

    def rows(self, *arguments: str, code: int = 0) -> list[dict[str, Any]]:
        done = self.command(*arguments, "-o", "json")
        assert done.returncode == code, done.stderr
        return list(json.loads(done.stdout))

    def page(
        self, path: str, node: LabNode | None = None, method: str = "GET", port: int = 15000,
        **fields: str,
    ) -> tuple[int, bytes]:  # fmt: skip
        """Ask an agent on its node's own loopback."""
        fd = netns.open_netns(self.lab.node_netns(node or self.east))
        try:
            own = netns.run_in(fd, lambda: socket.create_connection(("127.0.0.1", port), SECONDS))
        finally:
            os.close(fd)
        connection = HTTPConnection("127.0.0.1", port)
        connection.sock = own
        connection.request(method, path, headers=fields)
        response = connection.getresponse()
        with own:
            return response.status, response.read()

    def samples(self, node: LabNode | None = None) -> list[tuple[str, dict[str, str], float]]:
        status, body = self.page("/metrics", node, port=15020)
        assert status == 200
        return [
            (sample.name, sample.labels, sample.value)
            for family in text_string_to_metric_families(body.decode())
            for sample in family.samples
        ]

    def wait_for_sample(self, node: LabNode, name: str, **labels: str) -> float:
        """Return the value of a series, once it is there: workers tell once a second."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            for found, its, value in self.samples(node):
                if found == name and labels.items() <= its.items():
                    return value
        raise AssertionError(f"{name} {labels} is not exposed")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    description = tmp_path_factory.mktemp("lab") / "cluster.yaml"
    description.write_text(yaml.safe_dump_all(CLUSTER))
    lab = Lab(f"t{os.getpid()}")
    with ExitStack() as stack:
        stack.callback(lab.down)
        for node in lab.up(description, print).nodes:
            wanted = sum(each.node == node for each in lab.cluster().pods)
            for state in lab.agent_states(node):
                if [each["state"] for each in state["pods"]] == ["enrolled"] * wanted:
                    break
        found = Watched(lab, stack)
        found.server.echo(9000)
        found.neighbor.echo(9000)
        wait_for_tunnel(found)
        yield found


def wait_for_tunnel(watched: Watched) -> None:
    """Wait until the client's node knows that the server's answers tunnels."""
    for state in watched.lab.agent_states(watched.east):
        assert state["ready"]
        rows = ask(watched.lab.admin_socket(watched.east), "workloads")
        if all(row["protocol"] == "hbone" for row in rows):
            return


def talk(client: PodEnd, address: str, port: int, text: bytes = b"alive") -> None:
    with client.connect(address, port) as connection:
        assert is_alive(connection, text)


def is_refused(client: PodEnd, host: str, port: int) -> bool:
    """Whether a connection is reset, be it before connect() returns or after."""
    try:
        with client.connect(host, port) as connection:
            return not is_alive(connection)
    except ConnectionResetError:
        return True


# -- connections --------------------------------------------------------------------------------


def test_open_connections_show_identities_bytes_path_and_worker(watched: Watched) -> None:
    identity = "spiffe://cluster.local/ns/shop/sa/{}".format
    with watched.client.connect("10.96.0.10", 80) as connection:
        assert is_alive(connection, b"x" * 1000)
        port = connection.getsockname()[1]
        rows = watched.rows("connections", "--pod", "client")
        (row,) = [row for row in rows if row["source"].endswith(f":{port}")]
        age = row.pop("age_seconds")
        assert 0 <= age < SECONDS
        (worker,) = next(watched.lab.agent_states(watched.east, "state"))["workers"]
        assert row == {
            "node": "east",
            "pod": "shop/client",
            "direction": "outbound",
            "path": "hbone",
            "state": "open",
            "source": f"{watched.client.address}:{port}",
            "source_pod": "shop/client",
            "source_identity": identity("client"),
            "destination": f"{watched.server.address}:9000",
            "destination_pod": "shop/server",
            "destination_identity": identity("server"),
            "original_destination": "10.96.0.10:80",
            "service": "web.shop.svc.cluster.local",
            "policy": None,
            "bytes_sent": 1000,
            "bytes_received": 1000,
            "worker": worker["pid"],
        }
        (inbound,) = watched.rows("connections", "--node", "west")
        assert (inbound["direction"], inbound["pod"]) == ("inbound", "shop/server")
        assert inbound["source_identity"] == identity("client")
        assert inbound["service"] == "web.shop.svc.cluster.local"
        table = watched.command("connections").stdout
        assert f"shop/client:{port}" in table
        assert f"shop/client:{watched.client.address}" not in table  # no port came by the tunnel
        assert max(map(len, table.splitlines())) <= 120


def test_services_are_listed_by_the_pods_that_they_lead_to(watched: Watched) -> None:
    (row,) = watched.rows("services")
    assert (row["service"], row["pods"], row["nodes"]) == ("shop/web", ["shop/server"], ["west"])
    for wanted in (("--pod", "shop/server"), ("-n", "shop"), ("--node", "west")):
        assert watched.rows("services", *wanted) == [row]
    for wanted in (("--pod", "client"), ("--node", "east")):
        assert watched.rows("services", *wanted) == []


def test_direct_connections_are_listed_with_the_bytes_of_their_end(watched: Watched) -> None:
    talk(watched.client, watched.neighbor.address, 9000)  # judged, by a tunnel
    with watched.client.connect(watched.neighbor.address, 9000) as connection:
        assert is_alive(connection, b"y" * 500)
        (row,) = watched.rows("connections", "--path", "direct")
        assert (row["bytes_sent"], row["bytes_received"], row["worker"]) == (500, 500, None)
        assert row["destination_pod"] == "shop/neighbor"
        assert watched.wait_for_sample(
            watched.east, "sidestep_connections_open", path="direct"
        ) == 1  # fmt: skip
    assert watched.rows("connections", "--path", "direct") == []


# -- logs ---------------------------------------------------------------------------------------


def test_denied_connection_is_logged_at_both_ends_and_counted(watched: Watched) -> None:
    assert is_refused(watched.client, watched.server.address, 9999)
    at = f"{watched.server.address}:9999"
    theirs = wait_for_entry(
        watched.lab, watched.west, COMPLETE, lambda entry: entry["dst.original"] == at
    )
    ours = wait_for_entry(
        watched.lab, watched.east, COMPLETE, lambda entry: entry["dst.original"] == at
    )
    assert (theirs["level"], theirs["scope"]) == ("error", "access")
    assert (theirs["verdict"], theirs["response_flags"]) == ("deny", "DENY")
    assert theirs["policy"] == "AuthorizationPolicy shop/not-9999 rules[0]"
    assert theirs["src.identity"] == "spiffe://cluster.local/ns/shop/sa/client"
    assert (theirs["src.workload"], theirs["dst.workload"]) == ("client", "server")
    assert ours["response_flags"] == "DENY"
    for node, reporter in ((watched.east, "source"), (watched.west, "destination")):
        assert watched.wait_for_sample(
            node,
            "istio_tcp_connections_failed_total",
            reporter=reporter,
            response_flags="DENY",
            source_workload="front",
            destination_workload="server",
        )


def test_whoever_dials_a_listener_itself_is_logged(watched: Watched) -> None:
    assert is_refused(watched.client, "127.0.0.1", OUTBOUND_PORT)
    entry = wait_for_entry(watched.lab, watched.east, "connection failed", lambda _entry: True)
    assert (entry["level"], entry["pod"]) == ("warning", "shop/client")
    assert entry["dst.addr"] == f"127.0.0.1:{OUTBOUND_PORT}"


def test_start_of_connections_is_logged_once_that_is_asked_for(watched: Watched) -> None:
    talk(watched.client, watched.server.address, 9000)
    assert watched.page("/logging?level=access=debug", method="POST") == (
        200,
        b"current log level is info,access=debug\n",
    )
    try:
        talk(watched.client, watched.server.address, 9000)
        entry = wait_for_entry(watched.lab, watched.east, OPENED, lambda _entry: True)
        assert entry["dst.identity"] == "spiffe://cluster.local/ns/shop/sa/server"
    finally:
        watched.page("/logging?access=info", method="POST")
    assert watched.page("/logging")[1] == b"current log level is info,access=info\n"
    status, text = watched.page("/logging?level=loud", method="POST")
    assert (status, text[:24]) == (400, b"log level 'loud' is none")
    status, text = watched.page("/logging?level=nope=debug", method="POST")
    assert (status, text[:57]) == (
        400,
        b"nothing logs as 'nope'; scopes are access, agent, agent.a",
    )
    assert watched.page("/logging")[1] == b"current log level is info,access=info\n"


# -- pages --------------------------------------------------------------------------------------


def test_health_dump_and_profile_are_served_on_loopback_and_the_socket_alone(
    watched: Watched,
) -> None:
    assert watched.page("/healthz/ready") == (200, b"ready\n")
    assert watched.page("/healthz/live") == (200, b"alive\n")
    with socket.socket(socket.AF_UNIX) as own:
        own.connect(str(watched.lab.admin_socket(watched.east)))
        own.sendall(b"GET /healthz/ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with own.makefile("rb") as answer:
            assert answer.read().endswith(b"\r\n\r\nready\n")
    # A stranger's page in a browser of the node names its own host.
    assert watched.page("/config_dump", Host="evil.example:15000")[0] == 421
    # The node's other addresses do not answer.
    fd = netns.open_netns(watched.lab.node_netns(watched.east))
    try:
        for port in (15000, 15020):
            with pytest.raises(ConnectionRefusedError):
                netns.run_in(
                    fd,
                    lambda port=port: socket.create_connection(  # type: ignore[misc]
                        (str(watched.east.link4(2)), port), SECONDS
                    ),
                )
    finally:
        os.close(fd)
    status, profile = watched.page("/debug/pprof/profile?seconds=1&frequency=500")
    assert (status, profile[:2]) == (200, b"\x1f\x8b")
    assert watched.page("/debug/pprof/profile?seconds=0")[0] == 400


def test_dump_has_ztunnels_shape(watched: Watched) -> None:
    with watched.client.connect("10.96.0.10", 80) as connection:
        assert is_alive(connection)
        dump = json.loads(watched.page("/config_dump")[1])
        states = {each["info"]["name"]: each for each in dump["workloadState"].values()}
        (outbound,) = states["client"]["connections"]["outbound"]
    assert outbound["originalDst"] == "10.96.0.10:80"
    assert outbound["actualDst"] == f"{watched.server.address}:9000"
    assert {each["name"]: each["protocol"] for each in dump["workloads"]}["server"] == "HBONE"
    (service,) = dump["services"]
    assert service["vips"] == ["/10.96.0.10"]
    (policy,) = dump["policies"]
    assert (policy["action"], policy["scope"]) == ("Deny", "WorkloadSelector")
    certificates = {each["identity"]: each for each in dump["certificates"]}
    assert certificates["spiffe://cluster.local/ns/shop/sa/client"]["state"] == "Available"
    assert "PRIVATE KEY" not in json.dumps(dump)


def test_second_agent_is_refused_and_the_first_goes_on(watched: Watched) -> None:
    path = watched.lab.admin_socket(watched.east)

    async def start() -> None:
        await Admin(path, dict).start()

    with pytest.raises(AgentRunning, match=f"listens at {path} already"):
        asyncio.run(start())
    assert ask(path, "state")["ready"]


# -- metrics ------------------------------------------------------------------------------------


def provoke_failures(watched: Watched) -> None:
    """Make what only failures count."""
    assert is_refused(watched.client, watched.server.address, 9999)
    talk(watched.client, watched.neighbor.address, 9000)
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    fd = netns.open_netns(watched.lab.node_netns(watched.west))
    try:
        own = netns.run_in(
            fd, lambda: socket.create_connection((watched.server.address, HBONE_PORT), SECONDS)
        )
    finally:
        os.close(fd)
    with own:
        peer = context.wrap_socket(own)
        # TLS 1.3: the client is done before the server has seen that there is no certificate.
        with peer, pytest.raises((OSError, ssl.SSLError)):
            peer.recv(1)
    (link,) = (watched.lab.pins / watched.west.name).glob("*/links/ss_bind6")
    link.unlink()  # which the agent repairs


def test_dashboard_and_alerts_name_what_an_agent_exposes(watched: Watched) -> None:
    provoke_failures(watched)
    watched.wait_for_sample(watched.west, "sidestep_peers_refused_total")
    watched.wait_for_sample(watched.west, "sidestep_repairs_total", kind="link")
    watched.wait_for_sample(watched.west, "istio_tcp_connections_failed_total")
    watched.wait_for_sample(watched.east, "istio_tcp_connections_opened_total", reporter="source")
    exposed: Sample = {}
    for node in (watched.east, watched.west):
        for name, its, _value in watched.samples(node):
            exposed.setdefault(name, set()).update(its)
    queries = [*dashboard_queries(), *rule_queries()]
    assert len(queries) > 30
    # Prometheus itself adds these.
    added = {"instance", "job"}
    for expression, shown in queries:
        named = metrics_of(expression)
        assert named, expression
        assert named.keys() <= exposed.keys(), expression
        for name, labels in named.items():
            assert labels <= exposed[name], expression
        known = set.union(*(exposed[name] for name in named)) | added
        assert grouping_of(expression) <= known, expression
        assert shown_labels(shown) <= (grouping_of(expression) or known), (expression, shown)


def test_real_prometheus_has_something_for_every_panel_and_every_rule(
    watched: Watched, tmp_path: Path
) -> None:
    provoke_failures(watched)
    watched.wait_for_sample(watched.west, "sidestep_peers_refused_total")
    watched.wait_for_sample(watched.east, "istio_tcp_connections_failed_total")
    pages = {
        node.name: partial(_metrics_page, watched, node) for node in (watched.east, watched.west)
    }
    with prometheus(tmp_path, pages, RULES) as found:
        missing = {expression for expression, _shown in dashboard_queries()}
        deadline = time.monotonic() + SECONDS
        while missing and time.monotonic() < deadline:
            missing -= {expression for expression in missing if found.query(expression)}
        # Only what is no trouble has no data.
        assert missing == {
            expression for expression, _shown in dashboard_queries() if expression.endswith(TROUBLE)
        }
        rules = [rule for group in found.ask("rules")["groups"] for rule in group["rules"]]
        assert len(rules) > 10
        assert [rule for rule in rules if rule["health"] != "ok"] == []


def _metrics_page(watched: Watched, node: LabNode) -> bytes:
    status, body = watched.page("/metrics", node, port=15020)
    assert status == 200
    return body


def test_metrics_carry_istios_labels_and_workloads_by_their_owner(watched: Watched) -> None:
    talk(watched.client, "10.96.0.10", 80, b"z" * 100)
    labels = {
        "reporter": "source",
        "source_workload": "front",
        "source_workload_namespace": "shop",
        "source_principal": "cluster.local/ns/shop/sa/client",
        "source_app": "client",
        "source_zone": "eu-1",
        "destination_zone": "unknown",
        "destination_workload": "server",
        "destination_principal": "cluster.local/ns/shop/sa/server",
        "destination_service": "web.shop.svc.cluster.local",
        "destination_service_name": "web",
        "connection_security_policy": "mutual_tls",
        "request_protocol": "tcp",
        "response_flags": "-",
    }
    opened = watched.wait_for_sample(watched.east, "istio_tcp_connections_opened_total", **labels)
    assert opened >= 1
    theirs = labels | {"reporter": "destination"}
    assert watched.wait_for_sample(watched.west, "istio_tcp_connections_closed_total", **theirs)
    assert watched.wait_for_sample(watched.west, "istio_tcp_received_bytes_total", **theirs) >= 100


def test_kernel_counts_what_it_decides(watched: Watched) -> None:
    talk(watched.client, watched.neighbor.address, 9000)
    talk(watched.client, watched.neighbor.address, 9000)
    for decision in ("captured", "direct"):
        assert watched.wait_for_sample(
            watched.east,
            "sidestep_pod_captures_total",
            pod="shop/client",
            direction="outbound",
            decision=decision,
        )


# -- archive ------------------------------------------------------------------------------------


def secrets_of(lab: Lab) -> list[bytes]:
    """Return every token and private key that the lab's files hold, as they could be copied."""
    found = []
    for path in lab.run.rglob("*"):
        if path.is_file() and ("token" in path.name or path.suffix in (".pem", ".key")):
            content = path.read_bytes()
            if b"PRIVATE KEY" in content:
                found += re.findall(rb"^[A-Za-z0-9+/=]{40,}$", content, re.MULTILINE)
            elif "token" in path.name:
                found += content.split()
    return [each for each in found if len(each) >= 16]


def test_bundle_has_everything_but_secrets(watched: Watched, tmp_path: Path) -> None:
    path = tmp_path / "bundle.tar.gz"
    done = watched.command("bundle", "-f", str(path))
    assert done.returncode == 0, done.stderr
    assert path.stat().st_mode & 0o777 == 0o600
    with tarfile.open(path) as archive:
        content = {
            member.name.partition("/")[2]: io.BytesIO(
                archive.extractfile(member).read()  # type: ignore[union-attr]  # they are files
            ).getvalue()
            for member in archive
        }
    for name in ("machine.json", "checks.json", "agents/east/state.json",
                 "agents/west/metrics.json", "agents/east/agent.log",
                 f"pins/{watched.lab.name}/east/ss_pods.json"):  # fmt: skip
        assert content[name], name
    assert content["problems.txt"] == b""
    everything = b"\n".join(content.values())
    assert b"PRIVATE KEY" not in everything
    secrets = secrets_of(watched.lab)
    assert secrets
    assert [each for each in secrets if each in everything] == []
    before = path.stat().st_ino
    assert watched.command("bundle", "-f", str(path)).returncode == 0
    assert path.stat().st_ino != before  # replaced as a whole
