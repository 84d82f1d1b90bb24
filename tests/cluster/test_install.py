"""An operator's path on a real node: nothing, the chart, a meshed namespace, back to nothing."""

from __future__ import annotations

import json
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.support.api_server import wait_until
from tests.support.kube_node import KubeNode
from tests.support.modules import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.root, pytest.mark.timeout(400)]

CHART = ROOT / "deploy/chart"
SYSTEM = "sidestep-system"
CA_ADDRESS = "10.96.0.12"  # the node has no DNS of the cluster
SERVER = """
import http.server

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"hello {self.client_address[0]}".encode())

http.server.HTTPServer(("", 8080), Handler).serve_forever()
"""
CLIENT = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=5).read().decode())"


@pytest.fixture(scope="module")
def images() -> Path:
    """Return where the images are, built from deploy/Dockerfile the first time."""
    built = subprocess.run(
        [ROOT / "tests/cluster/image.sh"], check=True, stdout=subprocess.PIPE, text=True
    )
    return ROOT / built.stdout.strip()


@pytest.fixture(scope="module")
def node(
    tmp_path_factory: pytest.TempPathFactory, programs: Path, images: Path
) -> Iterator[KubeNode]:
    made = KubeNode(tmp_path_factory.mktemp("node"), programs, images)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def pod(name: str, command: list[str], probe: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": "shop", "name": name, "labels": {"app": name}},
        "spec": {
            "serviceAccountName": name,
            "terminationGracePeriodSeconds": 1,
            "containers": [
                {
                    "name": name,
                    "image": "localhost/sidestep:test",
                    "command": command,
                    "readinessProbe": {**probe, "periodSeconds": 1},
                }
            ],
        },
    }


def shop() -> str:
    """Return a server behind a service, and a client, each with an account."""
    bodies: list[dict[str, Any]] = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}
    ]
    for name, command, probe in (
        ("server", ["python3", "-c", SERVER], {"httpGet": {"port": 8080, "path": "/"}}),
        ("client", ["sleep", "infinity"], {"exec": {"command": ["true"]}}),
    ):
        account = {"namespace": "shop", "name": name}
        bodies += [
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": account},
            pod(name, command, probe),
        ]
    spec = {"selector": {"app": "server"}, "ports": [{"port": 80, "targetPort": 8080}]}
    metadata = {"namespace": "shop", "name": "server"}
    bodies += [{"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}]
    return "---\n".join(yaml.safe_dump(body) for body in bodies)


def request(node: KubeNode, client: str = "client") -> str:
    """Ask the server through its service, from inside a client."""
    address = node.kubectl(
        "get", "service", "server", "-n", "shop", "-o", "jsonpath={.spec.clusterIP}"
    )
    return node.kubectl(
        "exec",
        "-n",
        "shop",
        client,
        "--",
        "python3",
        "-c",
        CLIENT,
        f"http://{address}/",
        check=False,
    ).strip()


def redirections(node: KubeNode) -> list[str]:
    path = r"jsonpath={.items[*].metadata.annotations.ambient\.istio\.io/redirection}"
    return node.kubectl("get", "pods", "-n", "shop", "-o", path).split()


def connections(node: KubeNode) -> list[dict[str, Any]]:
    """Return what the agent's log says of connections that ended."""
    text = node.kubectl("logs", "-n", SYSTEM, "daemonset/sidestep-agent", "-c", "agent")
    lines = [json.loads(line) for line in text.splitlines()]
    return [line for line in lines if "path" in line]


def listing(node: KubeNode, sandboxes: list[str]) -> dict[str, str]:
    """Return what an installation could change on the node, in sandboxes, and in the cluster."""
    commands = {
        "files": "find /etc/cni /opt /run/sidestep* /var/lib/sidestep* -printf '%p %m\\n' | sort",
        "networks": "cat /etc/cni/net.d/*",
        "bpf": "find /sys/fs/bpf",
        "links": "ip -o link | sed 's/^[0-9]*: //'; tc qdisc show",
        # Link-local addresses get their routes a moment after their links.
        "rules": "ip rule; ip -6 rule;"
        " ip route show table all | grep -Ev '10.247|^(local|any).* fe80'",
        # Chains for each service come and go, and are kube-proxy's.
        "packet filter": "nft list tables; iptables-save",
    }
    found = {
        name: node.run(["sh", "-c", command], check=False).stdout
        for name, command in commands.items()
    }
    for sandbox in sandboxes:
        routes = f"ip -n {sandbox} route show table all | grep -Ev '^(local|any).* fe80'"
        inside = f"ip -n {sandbox} rule; {routes}"
        state = "cat /proc/sys/net/ipv4/tcp_fwmark_accept /proc/sys/net/ipv4/fwmark_reflect"
        command = f"{inside}; ip netns exec {sandbox} {state}"
        found[sandbox] = node.run(["sh", "-c", command]).stdout
    kinds = "clusterroles,clusterrolebindings,all,secrets,configmaps,roles,serviceaccounts"
    names = node.kubectl("get", kinds, "-A", "-o", "name")
    found["cluster"] = "\n".join(sorted(line for line in names.splitlines() if "sidestep" in line))
    return found


def test_operator_installs_meshes_a_namespace_and_takes_it_all_away(
    node: KubeNode, measured: Callable[[str], None]
) -> None:
    (node.directory / "shop.yaml").write_text(shop())
    node.kubectl("apply", "-f", str(node.directory / "shop.yaml"))
    node.kubectl("wait", "--for=condition=Ready", "pod", "--all", "-n", "shop", "--timeout=60s")
    wait_until(lambda: request(node))
    plain = request(node)
    assert plain.startswith("hello 10.247.0.")
    sandboxes = node.run(["ls", "/run/netns"]).stdout.split()
    assert len(sandboxes) == 2
    before = listing(node, sandboxes)

    began = time.monotonic()
    node.helm(
        "install", "sidestep", str(CHART), "--namespace", SYSTEM, "--create-namespace",
        "--set", "image.repository=localhost/sidestep,image.tag=test",
        "--set", f"ca.clusterIP={CA_ADDRESS}",
        "--set", f"agent.kubeletCgroup={node.kubelet_cgroup}",
        "--wait", "--timeout", "90s",
    )  # fmt: skip
    measured(f"helm install --wait takes {time.monotonic() - began:.0f} s")
    assert redirections(node) == []
    wait_until(lambda: "sidestep" in node.run(["sh", "-c", "cat /etc/cni/net.d/*"]).stdout)

    # Running pods, without a restart.
    node.kubectl("label", "namespace", "shop", "istio.io/dataplane-mode=ambient")
    wait_until(lambda: redirections(node) == ["enabled"] * 2)
    assert request(node) == plain
    wait_until(lambda: any(each["path"] == "hbone" for each in connections(node)))

    # A pod that starts is in the mesh before its first process.
    late = pod("late", ["sleep", "infinity"], {"exec": {"command": ["true"]}})
    late["spec"]["serviceAccountName"] = "client"
    (node.directory / "late.json").write_text(json.dumps(late))
    node.kubectl("apply", "-f", str(node.directory / "late.json"))
    node.kubectl("wait", "--for=condition=Ready", "pod/late", "-n", "shop", "--timeout=60s")
    assert request(node, "late").startswith("hello 10.247.0.")
    assert redirections(node) == ["enabled"] * 3
    node.kubectl("delete", "pod", "late", "-n", "shop")

    # The kubelet's probes reached the server all along.
    restarts = "jsonpath={.items[*].status.containerStatuses[*].restartCount}"
    assert node.kubectl("get", "pods", "-n", "shop", "-o", restarts) == "0 0"

    node.helm("uninstall", "sidestep", "--namespace", SYSTEM, "--wait", "--timeout", "120s")
    assert redirections(node) == []
    assert request(node) == plain
    # The last pods of the hooks go in the background.
    wait_until(lambda: listing(node, sandboxes)["cluster"] == before["cluster"])
    assert listing(node, sandboxes) == before
