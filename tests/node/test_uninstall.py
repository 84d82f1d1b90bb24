"""`sidestep uninstall` leaves a node as it was, with traffic running, also after a crash."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from agent import uninstall as steps
from agent.lab import machine
from agent.lab.lab import DEFAULT_CLUSTER, Lab
from cni import installer
from tests.support import footprint
from tests.support.labs import PodEnd, is_alive
from tests.support.load import Load

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from agent.lab.cluster import LabNode

pytestmark = pytest.mark.root
# As somebody wrote it by hand: every blank stays.
CONFLIST = """{"cniVersion": "1.0.0", "name": "pods",
   "plugins": [ {"type": "ptp",  "mtu": 1400} ]}
"""


@pytest.fixture
def lab() -> Iterator[Lab]:
    built = Lab(f"t{os.getpid()}")
    built.agent_options = ("--drain-seconds", "3")
    try:
        built.up(DEFAULT_CLUSTER, print)
        yield built
    finally:
        built.down()


def of_runtime(lab: Lab, node: LabNode) -> Path:
    """Return the directory that stands for what a container runtime has on a node."""
    return lab.run / f"runtime-{node.name}"


def install_plugin(lab: Lab, node: LabNode) -> None:
    """Have the plugin on a node, as `sidestep cni install` does."""
    top = of_runtime(lab, node)
    socket = lab.run / node.name / "cni.sock"
    installer.install(installer.Places(top / "net.d", top / "bin", top / "state", socket))
    assert (top / "bin/sidestep").exists()


def uninstall(lab: Lab, node: LabNode) -> str:
    """Run the command as a chart's hook does, in the node's namespace; return what it says."""
    command = [
        sys.executable, "-m", "agent.lab.launch",
        str(lab.node_netns(node)), str(lab.cgroup / node.name / "agent"),
        sys.executable, "-m", "agent.cli", "uninstall",
        "--run-dir", str(lab.run / node.name),
        "--pins", str(lab.pins / node.name),
        "--pod-cgroups", str(lab.pod_cgroups(node)),
        "--networks", str(of_runtime(lab, node) / "net.d"),
        "--plugins", str(of_runtime(lab, node) / "bin"),
        "--state", str(of_runtime(lab, node) / "state"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=40, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def of_node(lab: Lab, node: LabNode) -> dict[str, object]:
    """List all that an agent of a node could have made."""
    cluster = lab.cluster()
    paths = [lab.pod_netns(pod) for pod in cluster.pods if pod.node == node]
    status = lab.objects / "status"
    own = {pod.key.replace("/", ".") for pod in cluster.pods if pod.node == node}
    return {
        "namespaces": footprint.namespaces([lab.node_netns(node), *paths]),
        "files": footprint.files(lab.pins / node.name, lab.run / node.name),
        "runtime": footprint.contents(of_runtime(lab, node)),
        "published": {name for name in own if (status / f"{name}.yaml").exists()},
    }


@pytest.mark.parametrize("has_crashed", [False, True])
def test_everything_is_as_before_the_first_agent(lab: Lab, has_crashed: bool) -> None:
    east, west = lab.cluster().nodes
    for node in (east, west):
        uninstall(lab, node)
    for node in (east, west):
        (lab.run / node.name / "notify.sock").unlink(missing_ok=True)
        (of_runtime(lab, node) / "net.d").mkdir(parents=True)
        (of_runtime(lab, node) / "bin").mkdir()
        (of_runtime(lab, node) / "net.d/10-pods.conflist").write_text(CONFLIST)
    before = {node.name: of_node(lab, node) for node in (east, west)}
    objects = footprint.bpf_objects()
    lab.up(DEFAULT_CLUSTER, print)
    lab.label_namespace("shop", "ambient")
    for node in (east, west):
        install_plugin(lab, node)
    with ExitStack() as stack:
        client = PodEnd(lab, "client", stack)
        loads = [Load(client, PodEnd(lab, name, stack), stack) for name in ("server", "cache")]
        for load in loads:
            load.start(streams=2)
            while not load.connects.good:
                assert not load.connects.failed
        assert footprint.bpf_objects() > objects
        if has_crashed:
            for node in (east, west):
                pids = lab.agent_processes(node)
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
                assert all(machine.wait_for_exit(pid, 5) for pid in pids)
        said = {node.name: uninstall(lab, node) for node in (east, west)}
        for node in (east, west):
            assert ("has taken its pods out" in said[node.name]) != has_crashed
            assert ("kubectl annotate pods" in said[node.name]) == has_crashed
            assert "of namespace" not in said[node.name]
            (lab.run / node.name / "notify.sock").unlink(missing_ok=True)
            after = of_node(lab, node)
            if has_crashed:  # nobody was there to take the words back
                after["published"] = before[node.name]["published"]
            assert after == before[node.name]
        assert footprint.bpf_objects() == objects
        assert ("rules, routes and sysctls of pod shop/client" in said[east.name]) == has_crashed
        # In plain text now, as before the mesh.
        with client.open(str(lab.find_pod("server").address4), 9000) as connection:
            assert is_alive(connection)
    assert "nothing of Sidestep" in uninstall(lab, east)


def test_agent_that_was_not_asked_is_not_undone(lab: Lab) -> None:
    east, _west = lab.cluster().nodes
    (lab.run / east.name / "handover.sock").unlink()
    with pytest.raises(AssertionError, match="was not asked"):
        uninstall(lab, east)


def test_lab_that_runs_is_not_the_nodes(lab: Lab, tmp_path: Path) -> None:
    lab.label_namespace("shop", "ambient")
    nodes = lab.cluster().nodes
    before = [of_node(lab, node) for node in nodes]
    # As below a controller of cgroup v1, which holds the processes of the whole machine.
    pids = [pid for pod in lab.cluster().pods for pid in machine.processes_of(lab.pod_cgroup(pod))]
    (tmp_path / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))
    assert list(steps.uninstall(tmp_path / "pins", tmp_path, tmp_path / "run")) == []
    assert [of_node(lab, node) for node in nodes] == before
