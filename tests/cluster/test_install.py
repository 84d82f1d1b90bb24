"""An operator's path on a real node: nothing, the chart, a meshed namespace, back to nothing."""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from agent.identity.local import LocalAuthority
from tests.support.kube_node import KubeNode
from tests.support.modules import ROOT
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.root, pytest.mark.timeout(400)]

CHART = ROOT / "deploy/chart"
SYSTEM = "sidestep-system"
IN_SYSTEM = ("-n", SYSTEM)
AGENTS = "daemonset/sidestep-agent"
EMERGENCY_EXIT = ("sidestep", "cni", "uninstall")
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
IMAGE, NEXT = "localhost/sidestep:test", "next"
TRAFFIC = (ROOT / "tests/support/traffic.py").read_text()
HELLO: tuple[list[str], dict[str, Any]] = (
    ["python3", "-c", SERVER],
    {"httpGet": {"port": 8080, "path": "/"}},
)
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
                    "image": IMAGE,
                    "command": command,
                    "readinessProbe": {**probe, "periodSeconds": 1},
                }
            ],
        },
    }


def shop(server: list[str], probe: dict[str, Any]) -> str:
    """Return a server behind a service, and a client, each with an account."""
    bodies: list[dict[str, Any]] = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}
    ]
    for name, command, ready in (
        ("server", server, probe),
        ("client", ["sleep", "infinity"], {"exec": {"command": ["true"]}}),
    ):
        account = {"namespace": "shop", "name": name}
        bodies += [
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": account},
            pod(name, command, ready),
        ]
    spec = {"selector": {"app": "server"}, "ports": [{"port": 80, "targetPort": 8080}]}
    metadata = {"namespace": "shop", "name": "server"}
    bodies += [{"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}]
    return "---\n".join(yaml.safe_dump(body) for body in bodies)


@contextmanager
def open_shop(node: KubeNode, server: list[str], probe: dict[str, Any]) -> Iterator[None]:
    """Have the shop's pods run, outside the mesh, until the block ends."""
    place = node.directory / "shop.yaml"
    place.write_text(shop(server, probe))
    node.kubectl("apply", "-f", str(place))
    node.kubectl("wait", "--for=condition=Ready", "pod", "--all", "-n", "shop", "--timeout=60s")
    try:
        yield
    finally:
        node.kubectl("delete", "namespace", "shop")


def install(node: KubeNode, *options: str) -> None:
    node.helm(
        "install", "sidestep", str(CHART), "--namespace", SYSTEM, "--create-namespace",
        "--set", "image.repository=localhost/sidestep,image.tag=test",
        "--set", f"ca.clusterIP={CA_ADDRESS}",
        "--set", f"agent.kubeletCgroup={node.kubelet_cgroup}",
        *options, "--wait", "--timeout", "90s",
    )  # fmt: skip


def uninstall(node: KubeNode) -> str:
    return node.helm("uninstall", "sidestep", "--namespace", SYSTEM, "--wait", "--timeout", "120s")


@contextmanager
def installed(node: KubeNode, *options: str) -> Iterator[None]:
    """Have the chart installed until the block ends."""
    install(node, *options)
    try:
        yield
    finally:
        uninstall(node)
        node.kubectl("delete", "namespace", SYSTEM)


def start_late(node: KubeNode) -> None:
    """Start one more client, and wait until it is ready."""
    late = pod("late", ["sleep", "infinity"], {"exec": {"command": ["true"]}})
    late["spec"]["serviceAccountName"] = "client"
    (node.directory / "late.json").write_text(json.dumps(late))
    node.kubectl("apply", "-f", str(node.directory / "late.json"))
    node.kubectl("wait", "--for=condition=Ready", "pod/late", "-n", "shop", "--timeout=60s")


def address_of_service(node: KubeNode) -> str:
    return node.kubectl(
        "get", "service", "server", "-n", "shop", "-o", "jsonpath={.spec.clusterIP}"
    )


def request(node: KubeNode, client: str = "client") -> str:
    """Ask the server through its service, from inside a client."""
    address = address_of_service(node)
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


def has_entry(node: KubeNode) -> bool:
    return "sidestep" in node.run(["sh", "-c", "cat /etc/cni/net.d/*"]).stdout


def redirections(node: KubeNode) -> list[str]:
    path = r"jsonpath={.items[*].metadata.annotations.ambient\.istio\.io/redirection}"
    return node.kubectl("get", "pods", "-n", "shop", "-o", path).split()


def agents(node: KubeNode, *options: str) -> list[str]:
    """List the agents' pods, also those that end."""
    label = "app.kubernetes.io/name=sidestep-agent"
    return node.kubectl("get", "pods", *IN_SYSTEM, "-l", label, "-o", "name", *options).split()


def restarts(node: KubeNode, namespace: str, pod: str) -> str:
    """Return how often each container of a pod was started anew."""
    path = "jsonpath={.status.containerStatuses[*].restartCount}"
    return node.kubectl("get", "pod", pod, "-n", namespace, "-o", path)


def is_ending(node: KubeNode, agent: str) -> bool:
    path = "jsonpath={.metadata.deletionTimestamp}"
    return node.kubectl("get", agent, *IN_SYSTEM, "-o", path) != ""


def carries(node: KubeNode, agent: str = AGENTS) -> bool:
    """Whether an agent's log has a connection that went through a tunnel, and ended."""
    text = node.kubectl("logs", agent, *IN_SYSTEM, "-c", "agent")
    return any(json.loads(line).get("path") == "hbone" for line in text.splitlines())


def listing(node: KubeNode, sandboxes: list[str]) -> dict[str, str]:
    """Return what an installation could change on the node, in sandboxes, and in the cluster."""
    commands = {
        "files": "find /etc/cni /opt /run/sidestep* /var/lib/sidestep* -printf '%p %m %u\\n'"
        " | sort",
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


@dataclass(frozen=True)
class Before:
    """The shop outside the mesh, and its node: what is to be the same again."""

    node: KubeNode
    answer: str
    sandboxes: list[str]
    listed: dict[str, str]

    def wait_again(self) -> None:
        """Wait until all is as it was."""
        # The last pods of the hooks go in the background.
        cluster = self.listed["cluster"]
        wait_until(lambda: listing(self.node, self.sandboxes)["cluster"] == cluster)
        assert listing(self.node, self.sandboxes) == self.listed


@contextmanager
def plain_shop(node: KubeNode) -> Iterator[Before]:
    """Have the shop answer without the mesh, and look at the node."""
    with open_shop(node, *HELLO):
        wait_until(lambda: request(node))
        answer = request(node)
        sandboxes = node.run(["ls", "/run/netns"]).stdout.split()
        yield Before(node, answer, sandboxes, listing(node, sandboxes))


def test_operator_installs_meshes_a_namespace_and_takes_it_all_away(
    node: KubeNode, measured: Callable[[str], None]
) -> None:
    with plain_shop(node) as before:
        assert before.answer.startswith("hello 10.247.0.")
        assert len(before.sandboxes) == 2

        began = time.monotonic()
        with installed(node):
            measured(f"helm install --wait takes {time.monotonic() - began:.0f} s")
            assert redirections(node) == []
            wait_until(lambda: has_entry(node))

            # Running pods, without a restart.
            node.kubectl("label", "namespace", "shop", "istio.io/dataplane-mode=ambient")
            wait_until(lambda: redirections(node) == ["enabled"] * 2)
            assert request(node) == before.answer
            wait_until(lambda: carries(node))

            # A pod that starts is in the mesh before its first process.
            start_late(node)
            assert request(node, "late").startswith("hello 10.247.0.")
            assert redirections(node) == ["enabled"] * 3
            node.kubectl("delete", "pod", "late", "-n", "shop")

            # The kubelet's probes reached the server all along.
            assert [restarts(node, "shop", pod) for pod in ("server", "client")] == ["0", "0"]

            # The emergency exit leaves a file, which has to go as well.
            node.kubectl("exec", AGENTS, *IN_SYSTEM, "-c", "cni", "--", *EMERGENCY_EXIT)
            assert not has_entry(node)

        assert redirections(node) == []
        assert request(node) == before.answer
        before.wait_again()


AWAY: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Node",
    "metadata": {
        "name": "away",
        "labels": {"kubernetes.io/os": "linux", "kubernetes.io/hostname": "away"},
    },
    "status": {
        "conditions": [{"type": "Ready", "status": "Unknown"}],
        "allocatable": {"cpu": "4", "memory": "4Gi", "pods": "9"},
    },
}


def test_node_that_agents_left_is_cleaned_and_one_that_is_away_is_not_waited_for(
    node: KubeNode,
) -> None:
    (node.directory / "away.json").write_text(json.dumps(AWAY))
    with plain_shop(node) as before:
        install(node)
        wait_until(lambda: has_entry(node))
        node.kubectl("create", "-f", str(node.directory / "away.json"))
        wait_until(lambda: len(agents(node)) == 2)
        selector = r"agent.nodeSelector.kubernetes\.io/hostname=away"
        node.helm(
            "upgrade", "sidestep", str(CHART), "--namespace", SYSTEM,
            "--reuse-values", "--set", selector,
        )  # fmt: skip
        wait_until(lambda: not agents(node, "--field-selector=spec.nodeName=node-1"), 40)
        assert has_entry(node)
        told = uninstall(node)
        assert told.count("these nodes are not ready, and were not waited for: away") == 2
        node.kubectl("delete", "node", "away")
        node.kubectl("delete", "pods", "--all", *IN_SYSTEM, "--force", "--grace-period=0")
        node.kubectl("delete", "namespace", SYSTEM)
        before.wait_again()


def change_under_traffic(node: KubeNode, *command: str) -> float:
    """Let Helm replace the agent while a pod talks; return the seconds until the new one serves."""
    (before,) = agents(node)
    with node.talking(
        "exec", "-i", "-n", "shop", "client", "--",
        "python3", "-c", TRAFFIC, "drive", address_of_service(node), "80",
    ) as talk:  # fmt: skip
        wait_until(lambda: carries(node, before))
        began = time.monotonic()
        node.helm(*command, "--namespace", SYSTEM)
        wait_until(lambda: len(agents(node)) == 2)
        (after,) = {*agents(node)} - {before}
        node.kubectl("wait", "--for=condition=Ready", after, *IN_SYSTEM, "--timeout=60s")
        seconds = time.monotonic() - began
        wait_until(lambda: carries(node, after))
        # Told to end, and still there, for the connection that lasts.
        wait_until(lambda: is_ending(node, before))
        told, problem = talk.communicate(timeout=30)
    assert problem == ""
    result = json.loads(told)
    assert result["failures"] == []
    assert result["done"] > 100
    # With nothing left to serve the one before ends, long before the time to drain is over.
    node.kubectl("rollout", "status", AGENTS, *IN_SYSTEM, "--timeout=20s")
    wait_until(lambda: agents(node) == [after])
    assert restarts(node, SYSTEM, after.removeprefix("pod/")) == "0 0"
    return seconds


def test_update_and_rollback_under_traffic_lose_no_connection(
    node: KubeNode, measured: Callable[[str], None]
) -> None:
    node.run(["ctr", "-n", "k8s.io", "images", "tag", IMAGE, f"localhost/sidestep:{NEXT}"])
    server = ["python3", "-c", TRAFFIC, "serve", "8080"]
    # All through the agents: the kernel's own path does not need them.
    options = ("--set", "agent.directPath=false")
    with open_shop(node, server, {"tcpSocket": {"port": 8080}}), installed(node, *options):
        node.kubectl("label", "namespace", "shop", "istio.io/dataplane-mode=ambient")
        wait_until(lambda: redirections(node) == ["enabled"] * 2)
        new = ("--reuse-values", "--set", f"image.tag={NEXT}")
        seconds = change_under_traffic(node, "upgrade", "sidestep", str(CHART), *new)
        measured(f"a new agent is in office {seconds:.1f} s after helm upgrade")
        seconds = change_under_traffic(node, "rollback", "sidestep")
        measured(f"the one before again {seconds:.1f} s after helm rollback")


def test_static_pod_takes_part_and_is_told_that_its_names_are_not_captured(node: KubeNode) -> None:
    # The kubelet has it from a file, and the API server knows it by another uid.
    body = pod("static", ["sleep", "infinity"], {"exec": {"command": ["true"]}})
    del body["spec"]["serviceAccountName"]
    body["metadata"]["annotations"] = {"ambient.istio.io/dns-capture": "true"}
    file = node.static_pods / "static.yaml"
    with open_shop(node, *HELLO), installed(node):
        node.kubectl("label", "namespace", "shop", "istio.io/dataplane-mode=ambient")
        wait_until(lambda: redirections(node) == ["enabled"] * 2)
        file.write_text(json.dumps(body))
        wait_until(lambda: redirections(node) == ["enabled"] * 3)
        ready = ["--for=condition=Ready", "pod/static-node-1", "--timeout=60s"]
        node.kubectl("wait", "-n", "shop", *ready)
        assert request(node, "static-node-1").startswith("hello 10.247.0.")
        wait_until(lambda: "has no DNS proxy" in node.kubectl("get", "events", "-n", "shop"))
        file.unlink()
        wait_until(lambda: redirections(node) == ["enabled"] * 2)


def documented(sentence: str) -> list[list[str]]:
    """Return the arguments of kubectl in the block of docs/install.md that follows a sentence."""
    _before, found, after = (ROOT / "docs/install.md").read_text().partition(sentence)
    assert found
    block = after.partition("\n\n")[2].partition("\n\n")[0]
    commands = [shlex.split(line) for line in block.splitlines()]
    assert {command[0] for command in commands} == {"kubectl"}
    return [command[1:] for command in commands]


def run_documented(node: KubeNode, sentence: str) -> None:
    for command in documented(sentence):
        here = (word.replace("deploy/manifests", str(node.directory)) for word in command)
        node.kubectl(*(word.replace("=my-ca", f"={node.directory / 'my-ca'}") for word in here))


def test_ca_of_an_operators_own_signs(node: KubeNode) -> None:
    LocalAuthority.create(node.directory / "my-ca", "cluster.local")
    run_documented(node, "To bring a CA of your own")
    with installed(node, "--take-ownership"):
        path = r"jsonpath={.data.root-cert\.pem}"
        published = node.kubectl("get", "configmap", "sidestep-ca-root", *IN_SYSTEM, "-o", path)
    assert published == (node.directory / "my-ca/root-cert.pem").read_text()


def write_manifests(node: KubeNode) -> None:
    """Write the manifests with the image in them, and what this node has in place of DNS."""
    for name in ("sidestep.yaml", "uninstall.yaml"):
        text = (ROOT / "deploy/manifests" / name).read_text()
        bodies = [body for body in yaml.safe_load_all(text) if body]
        for body in bodies:
            if body["kind"] == "Service":
                body["spec"]["clusterIP"] = CA_ADDRESS
            if body["metadata"]["name"] == "sidestep-agent" and body["kind"] == "DaemonSet":
                # Half of it is how long a namespace that goes waits for its pods, at least.
                body["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] = 30
            template = body["spec"].get("template") if "spec" in body else None
            for container in _containers(template) if template else ():
                container["image"] = IMAGE
                if container["name"] == "agent":
                    container["args"] += [
                        f"--ca={CA_ADDRESS}:15012",
                        f"--kubelet-cgroup={node.kubelet_cgroup}",
                    ]
        (node.directory / name).write_text(yaml.safe_dump_all(bodies))


def _containers(template: dict[str, Any]) -> list[dict[str, Any]]:
    spec: dict[str, list[dict[str, Any]]] = template["spec"]
    return spec["containers"] + spec.get("initContainers", [])


def mesh_without_helm(node: KubeNode) -> None:
    run_documented(node, "Without Helm, put the image's name")
    run_documented(node, "## Mesh a namespace")
    wait_until(lambda: redirections(node) == ["enabled"] * 2)


def test_operator_without_helm_installs_and_takes_it_all_away(node: KubeNode) -> None:
    write_manifests(node)
    with plain_shop(node) as before:
        mesh_without_helm(node)
        assert request(node) == before.answer
        wait_until(lambda: carries(node))
        run_documented(node, "Without Helm, delete the agents first")
        assert redirections(node) == []
        assert request(node) == before.answer
        before.wait_again()


def test_node_goes_on_without_the_mesh_where_everything_is_deleted_at_once(node: KubeNode) -> None:
    write_manifests(node)
    with plain_shop(node) as before:
        mesh_without_helm(node)
        # Not in the documented order: rights and account of the agent go with it.
        node.kubectl("delete", "-f", str(node.directory / "sidestep.yaml"))
        wait_until(lambda: request(node) == before.answer)
        start_late(node)
        assert request(node, "late").startswith("hello 10.247.0.")
        node.kubectl("delete", "pod", "late", "-n", "shop")
        # What is left on the node can be taken away afterwards.
        run_documented(node, "If everything was deleted at once")
        before.wait_again()
