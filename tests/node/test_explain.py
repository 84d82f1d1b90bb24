"""Policies of a lab with real agents: in force within a second, listed, explained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from agent.lab.lab import Lab
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.root

SERVER = ["python3", "-m", "http.server", "8080", "--bind", "::"]
AMBIENT = {"name": "shop", "labels": {"istio.io/dataplane-mode": "ambient"}}


def pod(name: str, node: str, *command: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "shop", "labels": {"app": name}},
        "spec": {
            "nodeName": node,
            "serviceAccountName": name,
            "containers": [{"command": list(command)}],
        },
    }


CLUSTER = [
    {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "east"}},
    {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "west"}},
    {"apiVersion": "v1", "kind": "Namespace", "metadata": AMBIENT},
    pod("client", "east"),
    pod("neighbor", "east", *SERVER),
    pod("server", "west", *SERVER),
]


def policy(name: str, action: str, app: str, **rule: Any) -> dict[str, Any]:
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {
            "action": action,
            "selector": {"matchLabels": {"app": app}},
            "rules": [rule],
        },
    }


FROM_CLIENT = {"from": [{"source": {"principals": ["cluster.local/ns/shop/sa/client"]}}]}


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    description = tmp_path / "cluster.yaml"
    description.write_text(yaml.safe_dump_all(CLUSTER))
    built = Lab(f"t{os.getpid()}")
    try:
        for node in built.up(description, print).nodes:
            wanted = [each for each in built.cluster().pods if each.node == node]
            for state in built.agent_states(node):
                if [each["state"] for each in state["pods"]] == ["enrolled"] * len(wanted):
                    break
        yield built
    finally:
        built.down()


def sidestep(lab: Lab, *arguments: str) -> Any:
    command = [sys.executable, "-m", "agent.cli", *arguments, "--lab", lab.name, "-o", "json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def fetch(lab: Lab, server: str) -> int:
    url = f"http://{lab.find_pod(server).address4}:8080/"
    command = lab.command_in(
        lab.find_pod("client"), ["curl", "-sS", "-m", "5", "-o", "/dev/null", url]
    )
    return subprocess.run(command, check=False, capture_output=True).returncode


@pytest.mark.parametrize(
    ("server", "path"), [("server", "tunnel"), ("neighbor", "direct")], ids=["tunnel", "direct"]
)
def test_new_policy_closes_an_open_connection_within_a_second(
    lab: Lab, server: str, path: str
) -> None:
    assert fetch(lab, server) == 0  # on one node, the next one goes direct
    (row,) = sidestep(lab, "explain", "client", f"{server}:8080")
    assert (row["path"], row["verdict"]) == (path, "allow")
    script = f"exec 3<>/dev/tcp/{lab.find_pod(server).address4}/8080; echo open; cat <&3; echo end"
    command = lab.command_in(lab.find_pod("client"), ["bash", "-c", script])
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"open\n"
        began = time.monotonic()
        lab.write_object(policy("no-client", "DENY", server, **FROM_CLIENT))
        assert client.stdout.readline() == b"end\n"
        took = time.monotonic() - began
    print(f"closed after {took * 1000:.0f} ms")  # noqa: T201
    assert took < 1
    assert fetch(lab, server) != 0
    (row,) = sidestep(lab, "explain", "client", f"{server}:8080")
    assert (row["path"], row["verdict"]) == ("denied", "deny")
    assert row["decided_by"] == "AuthorizationPolicy shop/no-client rules[0]"


def test_commands_say_what_is_in_force_and_for_whom(lab: Lab) -> None:
    methods = {"to": [{"operation": {"methods": ["GET"]}}]}
    lab.write_object(policy("read", "ALLOW", "server", **methods))
    lab.write_object(policy("slip", "ALLOW", "server", form=[]))
    lab.write_object(policy("audit", "AUDIT", "server"))
    wait_until(lambda: len(sidestep(lab, "policies")) == 3)
    audit, read, slip = sidestep(lab, "policies")
    assert (audit["policy"], audit["state"]) == ("AuthorizationPolicy shop/audit", "refused")
    assert audit["warnings"][0].startswith("spec.action: ")
    assert (read["policy"], read["state"]) == ("AuthorizationPolicy shop/read", "in force")
    assert read["pods"] == ["shop/server"]
    assert "spec.rules[0].to[0].operation.methods" in read["warnings"][0]
    assert (slip["policy"], slip["state"]) == ("AuthorizationPolicy shop/slip", "in force")
    assert "spec.rules[0].form" in slip["warnings"][0]
    (row,) = sidestep(lab, "explain", "shop/client", "shop/server:8080")
    assert row["path"] == "denied"
    assert row["decided_by"] == "AuthorizationPolicy shop/read"
    assert any("methods" in warning for warning in row["warnings"])
    assert fetch(lab, "server") != 0


def test_unknown_name_is_an_error_of_one_line(lab: Lab) -> None:
    command = [sys.executable, "-m", "agent.cli", "explain", "client", "nobody:80"]
    done = subprocess.run(
        [*command, "--lab", lab.name], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: nobody is no pod, no service")


def test_strict_namespace_takes_no_plaintext_and_its_pods_still_speak(lab: Lab) -> None:
    node = lab.cluster().nodes[1]
    url = f"http://{lab.find_pod('server').address4}:8080/"
    enter = ["nsenter", f"--net={lab.node_netns(node)}"]
    ask = [*enter, "curl", "-sS", "-m", "5", "-o", "/dev/null", url]
    assert subprocess.run(ask, check=False, capture_output=True).returncode == 0
    body = {
        "apiVersion": "security.istio.io/v1",
        "kind": "PeerAuthentication",
        "metadata": {"name": "default", "namespace": "shop"},
        "spec": {"mtls": {"mode": "STRICT"}},
    }
    lab.write_object(body)
    wait_until(lambda: sidestep(lab, "policies"))
    assert subprocess.run(ask, check=False, capture_output=True).returncode != 0
    for server in ("server", "neighbor", "neighbor"):
        assert fetch(lab, server) == 0
    (row,) = sidestep(lab, "explain", "192.0.2.1", "server:8080")
    assert row["decided_by"] == "PeerAuthentication shop/default"
    command = [sys.executable, "-m", "agent.cli", "pods", "--pins", str(lab.pins), "-o", "json"]
    pods = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert [row["strict"] for row in pods] == [True, True, True]
