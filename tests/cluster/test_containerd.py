"""Pods started by a real containerd, as a kubelet does: chained after the bridge plugin."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from agent import netns
from cni import installer
from tests.cluster.test_agent import SIDESTEP, Processes
from tests.cluster.test_rights import AUDIENCE, annotation, installed, token_of
from tests.support.api_server import path_of
from tests.support.cluster_objects import Body, namespace, pod
from tests.support.cri import Containerd, Sandbox
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.api_server import ApiServer

__all__ = ["installed"]
pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

SPACE, OUTSIDE, EXCLUDED = "chained", "unmeshed", "spared"
PORT = 8080


class ChainedNode:
    """A node: CA, agent, containerd, and the plugin installed."""

    def __init__(self, directory: Path, server: ApiServer, runtime: Containerd) -> None:
        self.server = server
        self.runtime = runtime
        self.node = Processes(directory, server)
        self.node.pod_cgroups = runtime.hierarchy
        self.places = installer.Places(
            runtime.networks,
            runtime.plugins,
            directory / "cni-state",
            directory / "run/cni.sock",
            (EXCLUDED,),
        )
        self.bodies: list[Body] = []
        name = "agent-node-1"
        own = pod(f"sidestep-system/{name}", "10.8.0.1", serviceAccountName="sidestep-agent")
        uid = server.apply(own)["metadata"]["uid"]
        self.bodies.append(own)
        reference = {"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid}
        self._token = token_of(
            server, "sidestep-agent", audiences=[AUDIENCE], boundObjectRef=reference
        )

    def start_agent(self) -> None:
        self.node.start_agent(self._token)
        wait_until(lambda: self.node.state()["ready"])

    def create(self, space: str, name: str, labels: Body | None = None) -> Body:
        """Create a pod as a scheduler leaves it: it has a node and no address."""
        body = pod(f"{space}/{name}", "", labels)
        del body["status"]
        body["metadata"]["uid"] = self.server.apply(body)["metadata"]["uid"]
        self.bodies.append(body)
        return body

    def run(self, body: Body, attempt: int = 0) -> Sandbox:
        metadata = body["metadata"]
        return self.runtime.run(metadata["namespace"], metadata["name"], metadata["uid"], attempt)

    def tell_address(self, body: Body, sandbox: Sandbox) -> None:
        """Write what a kubelet writes once the sandbox runs."""
        addresses = [{"ip": each} for each in sandbox.addresses]
        status = {"phase": "Running", "podIP": sandbox.addresses[0], "podIPs": addresses}
        kind = "application/merge-patch+json"
        self.server.must("PATCH", f"{path_of(body)}/status", {"status": status}, kind)

    def delete(self, body: Body) -> None:
        self.server.delete(body)
        self.bodies.remove(body)

    def states(self) -> dict[str, str]:
        return {row["name"]: row["state"] for row in self.node.state()["pods"]}

    def log(self) -> list[Body]:
        lines = (self.node.directory / "agent.log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def map(self, name: str) -> list[dict[str, Any]]:
        command = [*SIDESTEP, "maps", "dump", name, "--pins", str(self.node.pins), "-o", "json"]
        rows: list[dict[str, Any]] = json.loads(subprocess.check_output(command))
        return rows

    def end(self) -> None:
        with ExitStack() as stack:
            stack.callback(self.node.end)
            stack.callback(self.runtime.end)
            for body in self.bodies:
                stack.callback(self.server.ask, "DELETE", path_of(body), {"gracePeriodSeconds": 0})
            if "agent" in self.node.running:
                for sandbox in list(self.runtime.running):
                    self.runtime.remove(sandbox)
                self.node.stop("agent")


@pytest.fixture
def node(installed: ApiServer, tmp_path: Path) -> Iterator[ChainedNode]:
    for space, mode in ((SPACE, "ambient"), (OUTSIDE, None), (EXCLUDED, "ambient")):
        installed.apply(namespace(space, mode))
    runtime = Containerd(tmp_path)
    with ExitStack() as stack:
        made = ChainedNode(tmp_path, installed, runtime)
        stack.callback(made.end)
        runtime.write_network()
        made.node.start_ca()
        made.start_agent()
        installer.install(made.places)
        runtime.start()
        runtime.wait_ready()
        yield made


@contextmanager
def inside(sandbox: Sandbox) -> Iterator[Callable[..., socket.socket]]:
    """Make sockets in a sandbox."""
    fd = netns.open_netns(sandbox.netns)
    with ExitStack() as stack:
        stack.callback(os.close, fd)

        def make() -> socket.socket:
            made = netns.run_in(fd, lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            made.settimeout(10)
            return stack.enter_context(made)

        yield make


@contextmanager
def serving(sandbox: Sandbox) -> Iterator[None]:
    """Echo in a sandbox."""
    program = (
        "import socketserver\n"
        "class Echo(socketserver.StreamRequestHandler):\n"
        "    def handle(self): self.wfile.write(self.rfile.readline())\n"
        "socketserver.ThreadingTCPServer.allow_reuse_address = True\n"
        f"server = socketserver.ThreadingTCPServer(('', {PORT}), Echo)\n"
        "print('up', flush=True)\n"
        "server.serve_forever()\n"
    )
    command = ["nsenter", f"--net={sandbox.netns}", sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        yield
        process.kill()


def echo(client: Sandbox, server: Sandbox) -> bytes:
    """Ask a server, and return its answer; OSError if there is none."""
    with inside(client) as make:
        connection = make()
        connection.connect((server.addresses[0], PORT))
        connection.sendall(b"hello\n")
        answer = connection.recv(100)
        if not answer:
            raise ConnectionResetError
        return answer


def test_pod_of_the_mesh_is_enrolled_before_it_starts(node: ChainedNode) -> None:
    body = node.create(SPACE, "server")
    sandbox = node.run(body)
    # Nobody has told the API server an address yet.
    assert node.states() == {"server": "enrolled"}
    wait_until(lambda: len(node.map("ss_guards")) == 1)
    assert [row["address"] for row in node.map("ss_local")] == list(sandbox.addresses)
    node.tell_address(body, sandbox)
    wait_until(lambda: annotation(node.server, body) == "enabled")

    client = node.create(SPACE, "client")
    at = node.run(client)
    node.tell_address(client, at)
    wait_until(lambda: annotation(node.server, client) == "enabled")
    outsider = node.create(OUTSIDE, "outsider")
    outside = node.run(outsider)
    with serving(sandbox):
        wait_until(lambda: echo(at, sandbox) == b"hello\n")
        assert echo(outside, sandbox) == b"hello\n"
    assert node.states() == {"server": "enrolled", "client": "enrolled"}
    # What the API server told later was no reason to enroll anew.
    enrolled = [line["pod"] for line in node.log() if line["message"] == "pod enrolled"]
    assert sorted(enrolled) == [f"{SPACE}/client", f"{SPACE}/server"]

    node.runtime.remove(sandbox.id)
    wait_until(lambda: node.states() == {"client": "enrolled"})
    assert [row["address"] for row in node.map("ss_local")] == list(at.addresses)
    assert annotation(node.server, outsider) is None


def test_without_an_agent_pods_of_the_mesh_wait_and_others_start(node: ChainedNode) -> None:
    waiting = node.create(SPACE, "waiting")
    spared = node.create(EXCLUDED, "spared")
    known = node.create(SPACE, "known")
    before = node.run(known)
    assert node.node.stop("agent") == 0
    with pytest.raises(grpc.RpcError) as raised:
        node.run(waiting)
    message = str(raised.value)
    assert "no agent answers at" in message
    assert "DaemonSet sidestep-agent" in message
    assert node.run(spared).addresses
    node.runtime.remove(before.id)  # deleting needs nobody
    node.start_agent()
    node.run(waiting, attempt=1)
    assert node.states()["waiting"] == "enrolled"


def test_uninstalled_plugin_lets_all_pods_start(node: ChainedNode) -> None:
    conflist = node.runtime.networks / "10-pods.conflist"
    assert b"sidestep" in conflist.read_bytes()
    node.node.stop("agent")
    # The entry alone is left behind, as by somebody who restores a file.
    node.places.record.unlink()
    assert node.run(node.create(SPACE, "first")).addresses
    installer.uninstall(node.places)
    node.runtime.wait_ready()
    assert conflist.read_text() == json.dumps(node.runtime.network(), indent=2) + "\n"
    assert not node.places.plugin.exists()
    assert not node.places.state.exists()
    wait_until(lambda: _runs(node, node.create(SPACE, f"n{time.monotonic_ns()}")))


def _runs(node: ChainedNode, body: Body) -> bool:
    """Run a pod, unless the runtime has not read the changed network yet."""
    try:
        node.run(body)
    except grpc.RpcError as error:
        assert 'failed to find plugin "sidestep"' in str(error)  # noqa: PT017  # may happen
        return False
    return True


def test_new_sandbox_of_a_pod_takes_the_place_of_the_old_one(node: ChainedNode) -> None:
    body = node.create(SPACE, "restarted")
    old = node.run(body)
    node.tell_address(body, old)
    wait_until(lambda: annotation(node.server, body) == "enabled")
    (before,) = node.map("ss_pods")
    # As after a crash: the pause process is gone, and the runtime has not noticed.
    os.kill(old.pid, 9)
    new = node.run(body, attempt=1)
    (after,) = node.map("ss_pods")
    assert after != before
    assert [row["address"] for row in node.map("ss_local")] == list(new.addresses)
    node.runtime.remove(old.id)  # late, as the kubelet's cleaning up is
    assert node.map("ss_pods") == [after]
    node.tell_address(body, new)
    other = node.create(OUTSIDE, "other")
    outside = node.run(other)
    with serving(new):
        assert echo(outside, new) == b"hello\n"
    # Stopped, while the API server still has the pod: nobody waits for a sandbox.
    node.runtime.stop(new.id)
    assert node.states() == {}
    node.server.must("PATCH", path_of(body), {"metadata": {"labels": {"touched": "1"}}},
                     "application/merge-patch+json")  # fmt: skip
    wait_until(lambda: annotation(node.server, body) is None)
    assert node.states() == {}


def test_address_that_another_pod_gets_is_its_own(node: ChainedNode) -> None:
    node.runtime.write_network(rangeStart="10.98.0.7", rangeEnd="10.98.0.7")
    installer.install(node.places)
    node.runtime.wait_ready()
    first = node.create(SPACE, "first")
    old = wait_for_address(node, first, "10.98.0.7")
    node.tell_address(first, old)
    wait_until(lambda: annotation(node.server, first) == "enabled")
    node.runtime.stop(old.id)
    # The API server still says that the address is of the first.
    second = node.create(SPACE, "second")
    new = node.run(second)
    assert new.addresses == old.addresses == ("10.98.0.7",)
    node.tell_address(second, new)
    wait_until(lambda: annotation(node.server, second) == "enabled")
    node.delete(first)
    wait_until(lambda: node.states() == {"second": "enrolled"})
    assert [row["address"] for row in node.map("ss_local")] == ["10.98.0.7"]
    assert len(node.map("ss_pods")) == 1


def wait_for_address(node: ChainedNode, body: Body, address: str) -> Sandbox:
    """Run a pod once the runtime has read the changed network."""
    attempt = 0
    while True:
        found = node.run(body, attempt)
        if found.addresses == (address,):
            return found
        node.runtime.remove(found.id)
        attempt += 1
        assert attempt < 50


def test_agent_that_comes_back_finds_the_pods_that_run(node: ChainedNode) -> None:
    body = node.create(SPACE, "staying")
    sandbox = node.run(body)
    node.tell_address(body, sandbox)
    wait_until(lambda: annotation(node.server, body) == "enabled")
    node.node.kill("agent")
    node.start_agent()
    # From its cgroup: nobody has told this agent of a sandbox.
    wait_until(lambda: node.states() == {"staying": "enrolled"})
    node.runtime.remove(sandbox.id)
    wait_until(lambda: node.states() == {})
    assert annotation(node.server, body) is None


def test_pod_start_costs_little_more(node: ChainedNode, measured: Callable[[str], None]) -> None:
    def seconds(space: str, name: str) -> float:
        body = node.create(space, name)
        began = time.monotonic()
        sandbox = node.run(body)
        took = time.monotonic() - began
        node.runtime.remove(sandbox.id)
        node.delete(body)
        return took

    pairs = [
        (seconds(SPACE, f"in-{number}"), seconds(EXCLUDED, f"out-{number}")) for number in range(12)
    ]
    meshed, spared = (median(column) for column in zip(*pairs, strict=True))
    measured(
        f"a pod of the mesh starts in {meshed * 1000:.0f} ms at the median, another in "
        f"{spared * 1000:.0f} ms (containerd, 12 of each)"
    )
    # Far above what ADD itself may cost (test_plugin.py): a sandbox takes a tenth of a second.
    assert meshed - spared < 0.1
