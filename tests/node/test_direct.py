"""The direct path with a real agent: the first connection is judged, the kernel serves the rest."""

from __future__ import annotations

import json
import os
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from agent.datapath import listing
from agent.demo.evidence import AccessLog
from agent.lab import machine
from agent.lab.lab import Lab
from agent.question import ask
from tests.support.labs import entries, scrape

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.root

SERVER = ["python3", "-m", "http.server", "8080", "--bind", "::"]
DOCUMENTS = "/usr/share/common-licenses"


def pod(name: str, *command: str, **annotations: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "shop", "annotations": annotations},
        "spec": {
            "nodeName": "east",
            "serviceAccountName": name,
            "containers": [{"command": list(command)}],
        },
    }


AMBIENT = {"name": "shop", "labels": {"istio.io/dataplane-mode": "ambient"}}
CLUSTER = [
    {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "east"}},
    {"apiVersion": "v1", "kind": "Namespace", "metadata": AMBIENT},
    pod("client"),
    pod("server", *SERVER, "--directory", DOCUMENTS),
    pod("private", *SERVER, "--directory", DOCUMENTS, **{"sidestep.io/direct-path": "disabled"}),
]


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    description = tmp_path / "cluster.yaml"
    description.write_text(yaml.safe_dump_all(CLUSTER))
    built = Lab(f"t{os.getpid()}")
    try:
        (node,) = built.up(description, print).nodes
        for state in built.agent_states(node):
            if [pod["state"] for pod in state["pods"]] == ["enrolled"] * 3:
                break
        yield built
    finally:
        built.down()


def visit(lab: Lab, server: str) -> list[dict[str, Any]]:
    """Fetch a document twice; return what the agent logged of each at the client."""
    (node,) = lab.cluster().nodes
    entries = []
    for _ in range(2):
        log = AccessLog(lab.agent_log(node))
        url = f"http://{lab.find_pod(server).address4}:8080/BSD"
        command = lab.command_in(lab.find_pod("client"), ["curl", "-sSf", "-m", "5", url])
        body = subprocess.run(command, check=True, capture_output=True).stdout
        assert b"Redistribution" in body
        entries.append(log.wait_for(lambda entry: entry["direction"] == "outbound"))
    return entries


def test_second_connection_takes_the_direct_path(lab: Lab) -> None:
    first, second = visit(lab, "server")
    assert (first["path"], second["path"]) == ("hbone", "direct")
    same = ("src.workload", "dst.original", "dst.identity", "bytes_sent", "bytes_recv", "result")
    assert {key: second[key] for key in same} == {key: first[key] for key in same}
    assert second["dst.identity"] == "spiffe://cluster.local/ns/shop/sa/server"


def test_annotation_keeps_traffic_of_a_pod_encrypted(lab: Lab) -> None:
    assert [entry["path"] for entry in visit(lab, "private")] == ["hbone", "hbone"]


def replace_veth(lab: Lab, name: str) -> None:
    """Give a pod a macvlan in place of its veth, as the CNI plugin of that name does."""
    pod = lab.find_pod(name)
    node_netns, pod_netns = lab.node_netns(pod.node), lab.pod_netns(pod)
    link = f"pod{pod.number}"
    commands = (
        f"link del {link}",
        f"link add {link} type veth peer name under",
        "link set under up",
        "link add over link under type macvlan mode bridge",
        f"link set over netns {pod_netns} name eth0",
    )

    def replace() -> None:
        for command in commands:
            subprocess.run(["ip", *command.split()], check=True)

    machine.within(node_netns, replace)
    machine.connect_pod(node_netns, pod, pod_netns)


def test_pod_without_a_veth_is_told_and_speaks_with_its_neighbors_by_tunnel(lab: Lab) -> None:
    (node,) = lab.cluster().nodes
    lab.label_namespace("shop", None)
    replace_veth(lab, "server")
    lab.label_namespace("shop", "ambient")
    assert [entry["path"] for entry in visit(lab, "server")] == ["hbone", "hbone"]
    state = next(lab.agent_states(node))
    told = {pod["name"]: (pod["state"], pod["reason"]) for pod in state["pods"]}
    assert told == {
        "client": ("enrolled", ""),
        "private": ("enrolled", ""),
        "server": ("enrolled", "unguarded"),
    }
    (logged,) = entries(lab, node, "pod not guarded")
    assert logged["pod"] == "shop/server"
    (directory,) = listing.find_directories((lab.pins / node.name,))
    guarded = {row["pod"]: row["guarded"] for row in listing.list_pods(directory)}
    assert guarded == {"shop/client": True, "shop/private": True, "shop/server": False}
    asked = {"source": "client", "destination": "server", "port": 8080}
    (row,) = ask(lab.admin_socket(node), "explain", **asked)
    assert row["path"] == "tunnel"
    assert "shop/server has no veth" in row["reason"]


def test_direct_connections_survive_the_agent_and_are_logged_by_the_next(lab: Lab) -> None:
    visit(lab, "server")
    (node,) = lab.cluster().nodes
    script = (
        "exec 3<>/dev/tcp/{}/8080; echo open; read; "
        "printf 'GET /BSD HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3"
    ).format(lab.find_pod("server").address4)
    command = lab.command_in(lab.find_pod("client"), ["bash", "-c", script])
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "open\n"
        lab.restart_agent(node)
        log = AccessLog(lab.agent_log(node))
        assert "Redistribution" in client.communicate("\n", timeout=10)[0]
    entry = log.wait_for(lambda entry: entry["path"] == "direct")
    assert json.loads(json.dumps(entry))["result"] == "ok"


def test_connections_of_both_paths_are_counted(lab: Lab) -> None:
    entries = visit(lab, "server")
    wanted = {
        ("sidestep_connections_total", path, outcome): 1
        for path, outcome in (("hbone", "ok"), ("direct", "ok"))
    }
    deadline = time.monotonic() + 5
    while True:  # workers tell once a second
        found = scrape(lab, *lab.cluster().nodes)
        counted = {
            (name, path, outcome): found.get(
                (
                    name,
                    frozenset({"direction": "outbound", "path": path, "outcome": outcome}.items()),
                ),
                0,
            )
            for name, path, outcome in wanted
        }
        if counted == wanted:
            break
        assert time.monotonic() < deadline, counted
    direct = frozenset({("direction", "outbound"), ("path", "direct")})
    assert found["sidestep_received_bytes_total", direct] == entries[1]["bytes_recv"]
    assert found["sidestep_pods", frozenset({("state", "enrolled")})] == 3
    client = frozenset({("pod", "shop/client"), ("direction", "outbound")})
    assert found["sidestep_pod_packets_total", client] > 0
    expiry = frozenset({("identity", "spiffe://cluster.local/ns/shop/sa/client")})
    left = found["sidestep_certificate_expiry_timestamp_seconds", expiry] - time.time()
    assert 3600 < left < 2 * 86400
