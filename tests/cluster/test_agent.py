"""A real agent and a real CA that know their cluster from a real API server alone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from agent.datapath import links, pins
from agent.lab.machine import kill_cgroup
from tests.cluster.test_rights import AUDIENCE, annotation, installed, token_of
from tests.support.api_server import path_of
from tests.support.cluster_objects import Body, namespace, pod
from tests.support.namespaces import POD4
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.api_server import ApiServer
    from tests.support.namespaces import Namespace, Network

__all__ = ["installed"]
pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

SIDESTEP = [sys.executable, "-m", "agent.cli"]
CA_HOST = "ca.test"
SPACE = "meshed"


class Processes:
    """The CA and one agent, on this machine, and the processes that stand for pods."""

    def __init__(self, directory: Path, server: ApiServer) -> None:
        self.directory = directory
        self.server = server
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.pins = pins.DEFAULT_ROOT.parent / f"sidestep-test-{os.getpid()}"
        self.cgroups = links.cgroup_root() / f"sidestep-test-{os.getpid()}"
        self.cgroups.mkdir()
        self.pod_cgroups = self.cgroups  # where the agent looks

    def start_pod(self, space: Namespace, body: Body) -> None:
        """Start a process in a namespace, which stands for a pod's."""
        cgroup = self.cgroups / f"pod{self.server.must('GET', path_of(body))['metadata']['uid']}"
        cgroup.mkdir()
        place = f"/proc/{os.getpid()}/fd/{space.fd}"
        launcher = [sys.executable, "-m", "agent.lab.launch", place, str(cgroup)]
        name = f"pod {body['metadata']['name']}"
        self.running[name] = subprocess.Popen([*launcher, "sleep", "infinity"])

    def start(self, name: str, account: str | None, *options: str) -> subprocess.Popen[bytes]:
        """Start a command as an account of ours, or as the administrator."""
        config = self.directory / f"{name}.json"
        token = "admin" if account is None else token_of(self.server, account)
        config.write_text(json.dumps(self.server.kubeconfig(token)))
        with (self.directory / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [*SIDESTEP, name, "--source", "kubernetes", *options],
                stderr=log, env=os.environ | {"KUBECONFIG": str(config)},
            )  # fmt: skip
        return self.running[name]

    def start_ca(self) -> None:
        keep = self.directory / "ca"
        self.start(
            "ca", "sidestep-ca", "--directory", str(keep), "--host", CA_HOST,
            "--listen", f"unix:{self.directory}/ca.sock", "--audience", AUDIENCE,
        )  # fmt: skip
        wait_until((self.directory / "ca.sock").exists)

    def start_agent(
        self, token: str, account: str | None = "sidestep-agent"
    ) -> subprocess.Popen[bytes]:
        path = self.directory / "token"
        path.touch(0o600)
        path.write_text(token)
        return self.start(
            "agent", account, "--node", "node-1", "--run-dir", str(self.directory / "run"),
            "--metrics-port", "0", "--pins", str(self.pins), "--pod-cgroups", str(self.pod_cgroups),
            "--ca", f"unix:{self.directory}/ca.sock", "--ca-name", CA_HOST,
            "--ca-token", str(path), "--ca-root", str(self.directory / "ca/root-cert.pem"),
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Return what the agent says of itself; nothing while it does not answer."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            try:
                connection.connect(str(self.directory / "run/agent.sock"))
                connection.sendall(b'{"command": "state"}\n')
                with connection.makefile("r") as lines:
                    found: dict[str, Any] = json.loads(lines.readline())
            except (OSError, ValueError):
                return {"ready": False}
        return found

    def stop(self, name: str) -> int:
        process = self.running.pop(name)
        process.send_signal(signal.SIGTERM)
        return process.wait(20)

    def kill(self, name: str) -> None:
        process = self.running.pop(name)
        process.kill()
        process.wait()

    def end(self) -> None:
        for name in list(self.running):
            self.kill(name)
        kill_cgroup(self.cgroups)
        for made in self.pins.glob("*"):
            pins.remove(made)
        if self.pins.exists():
            self.pins.rmdir()
        for log in self.directory.glob("*.log"):
            print(f"--- {log.name}\n{log.read_text()[-6000:]}")  # noqa: T201  # shown on failure


def agent_token(server: ApiServer, stack: ExitStack) -> str:
    """Return a token of an agent's pod on node-1; the pod goes with `stack`."""
    own = pod("sidestep-system/agent-node-1", "10.8.0.1", serviceAccountName="sidestep-agent")
    reference = {"apiVersion": "v1", "kind": "Pod", "name": "agent-node-1"}
    reference["uid"] = server.apply(own)["metadata"]["uid"]
    stack.callback(server.delete, own)
    return token_of(server, "sidestep-agent", audiences=[AUDIENCE], boundObjectRef=reference)


@pytest.fixture
def pod_body(installed: ApiServer) -> Iterator[Body]:
    """Return the pod of `network` as the API server knows it; its namespace has no label yet."""
    installed.apply(namespace(SPACE, None))
    body = pod(f"{SPACE}/server", POD4)
    installed.apply(body)
    yield body
    installed.delete(body)


def test_agent_and_ca_live_on_the_api_server_alone(
    installed: ApiServer,
    pod_body: Body,
    network: Network,
    tmp_path: Path,
    measured: Callable[[str], None],
) -> None:
    unstarted = pod(f"{SPACE}/unstarted", "10.8.0.2")

    def says(word: str | None, body: Body = pod_body) -> float:
        began = time.monotonic()
        wait_until(lambda: annotation(installed, body) == word)
        return time.monotonic() - began

    def certificates() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = processes.state()["identity"]["certificates"]
        return found

    with ExitStack() as stack:
        token = agent_token(installed, stack)
        processes = Processes(tmp_path, installed)
        stack.callback(processes.end)
        processes.start_pod(network.pod, pod_body)
        processes.start_ca()
        processes.start_agent(token)
        wait_until(lambda: processes.state()["ready"])
        assert processes.state()["pods"] == []
        assert annotation(installed, pod_body) is None

        installed.apply(namespace(SPACE))
        took = says("enabled")
        wait_until(lambda: [row["state"] for row in certificates()] == ["Available"])
        installed.apply(namespace(SPACE, None))
        took = max(took, says(None))
        assert took < 1.0
        measured(f"a label is in force, and said on the pod, after {took * 1000:.0f} ms at most")

        # A pod that has no sandbox yet waits, and holds up nobody.
        installed.apply(namespace(SPACE))
        installed.apply(unstarted)
        stack.callback(installed.delete, unstarted)
        says("pending", unstarted)

        # The API server goes: nothing that holds is touched.
        says("enabled")
        installed.kill()
        states = {row["name"]: row["state"] for row in processes.state()["pods"]}
        assert states == {"server": "enrolled", "unstarted": "pending"}
        installed.start()
        assert annotation(installed, pod_body) == "enabled"
        installed.apply(namespace(SPACE, None))
        says(None)
        installed.apply(namespace(SPACE))
        says("enabled")

        # An agent that is killed leaves its word; the next one makes it true again.
        processes.kill("agent")
        installed.apply(namespace(SPACE, None))
        processes.start_agent(token)
        says(None)
        installed.apply(namespace(SPACE))
        says("enabled")
        assert processes.stop("agent") == 0
        assert annotation(installed, pod_body) == "enabled"  # captured, for the next agent
        assert processes.stop("ca") == 0
