"""An agent is killed: its pods stay closed, and the next one takes over or takes away."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from agent import netlink, netns, sysctl
from agent.datapath import listing
from agent.discovery.translate import EXCLUDE_OUTBOUND_PORTS
from agent.enroll import REPLY_SYSCTLS
from agent.lab import machine
from tests.support.labs import wait_for_entry
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from agent.lab.cluster import LabNode, LabPod
    from agent.lab.lab import Lab

pytestmark = pytest.mark.root


def kill_agent(lab: Lab, node: LabNode) -> None:
    """Kill control process and workers at once, as the kernel does when memory is out."""
    pids = machine.processes_of(lab.cgroup / node.name / "agent")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        assert machine.wait_for_exit(pid, 5)


def fetch(lab: Lab, server: str) -> int:
    """Return curl's exit code."""
    url = f"http://{lab.find_pod(server).address4}:8080/BSD"
    curl = ["curl", "-s", "-m", "5", "-o", "/dev/null", url]
    return subprocess.run(lab.command_in(lab.find_pod("client"), curl), check=False).returncode


def traces(lab: Lab, pod: LabPod) -> tuple[bool, set[str]]:
    """Return whether the pod's namespace has the reply route, and the values of its sysctls."""

    def look() -> tuple[bool, set[str]]:
        paths = (*REPLY_SYSCTLS, sysctl.NET / "ipv4/conf/eth0/accept_local")
        values = {path.read_text().strip() for path in paths}
        return netlink.has_reply_route(), values

    fd = netns.open_netns(lab.pod_netns(pod))
    try:
        return netns.run_in(fd, look)
    finally:
        os.close(fd)


def wait_enrolled(lab: Lab, node: LabNode, count: int) -> None:
    for state in lab.agent_states(node):
        if [pod["state"] for pod in state["pods"]] == ["enrolled"] * count:
            return


def repair(lab: Lab) -> list[dict[str, Any]]:
    """Have every agent look at all of its node, mend what differs, and return what did."""
    line = [sys.executable, "-m", "agent.cli", "check", "--repair", "--lab", lab.name, "-o", "json"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout))


def test_pods_of_a_killed_agent_are_closed_and_the_next_one_serves_them(lab: Lab) -> None:
    east, _west = lab.cluster().nodes
    programs = {pod.key: machine.processes_of(lab.pod_cgroup(pod)) for pod in lab.cluster().pods}
    assert fetch(lab, "server") == 0
    kill_agent(lab, east)
    assert fetch(lab, "server") == 7  # refused: nothing goes out in plain text
    lab.restart_agent(east)
    wait_enrolled(lab, east, 2)
    assert fetch(lab, "server") == 0
    assert fetch(lab, "cache") == 0
    now = {pod.key: machine.processes_of(lab.pod_cgroup(pod)) for pod in lab.cluster().pods}
    assert now == programs
    client = lab.find_pod("client")
    lab.label_namespace("shop", None)
    wait_for_entry(
        lab, east, "pod has nothing of ours any more", lambda entry: entry["pod"] == client.key
    )
    assert traces(lab, client) == (False, {"0"})  # as before the first agent


def test_pod_that_left_while_no_agent_ran_is_let_go(lab: Lab) -> None:
    east, _west = lab.cluster().nodes
    client = lab.find_pod("client")
    kill_agent(lab, east)
    manifest = client.manifest()
    labels = {"istio.io/dataplane-mode": "none"}
    lab.write_object(manifest | {"metadata": manifest["metadata"] | {"labels": labels}})
    lab.restart_agent(east)
    wait_enrolled(lab, east, 1)
    assert traces(lab, client) == (False, {"0"})
    (directory,) = listing.find_directories((lab.pins / "east",))
    for name in ("ss_pods", "ss_pod_names", "ss_listeners", "ss_bypass", "ss_local", "ss_guards"):
        pods = {row.get("pod") or row.get("name") for row in listing.dump_map(directory, name)}
        assert pods <= {"shop/cache", "cache"}, name
    links = [path.name for path in (directory / "links").iterdir()]
    assert sum(name.startswith("lookup_") for name in links) == 1
    assert sum(name.startswith("guard_") for name in links) == 2
    assert fetch(lab, "server") == 0  # as any client outside the mesh
    published = {path.name for path in (lab.objects / "status").glob("*.yaml")}
    assert published == {"shop.cache.yaml", "shop.server.yaml"}  # nobody dials it by a tunnel


def restart_before_its_address_is_told(lab: Lab) -> tuple[LabNode, LabPod]:
    """Kill the first node's agent, and start the next one while its client has no address."""
    east, _west = lab.cluster().nodes
    client = lab.find_pod("client")
    kill_agent(lab, east)
    lab.write_object(client.manifest() | {"status": {"phase": "Pending"}})
    lab.restart_agent(east)
    wait_enrolled(lab, east, 1)
    return east, client


def test_pod_whose_address_is_not_told_yet_stays_closed(lab: Lab) -> None:
    """It was brought by the runtime, and the agent killed before the API heard of it."""
    east, client = restart_before_its_address_is_told(lab)
    assert repair(lab) == []  # nor does upkeep, which compares the same, take anything away
    assert traces(lab, client) == (True, {"1"})
    assert fetch(lab, "server") == 7
    lab.write_object(client.manifest())
    wait_enrolled(lab, east, 2)
    assert fetch(lab, "server") == 0


def test_pod_that_ends_before_its_address_is_told_leaves_nothing(lab: Lab) -> None:
    _east, client = restart_before_its_address_is_told(lab)
    (directory,) = listing.find_directories((lab.pins / "east",))

    def captured() -> set[object]:
        return {row["pod"] for row in listing.dump_map(directory, "ss_pods")}

    assert captured() == {"shop/cache", "shop/client"}
    lab.remove_object(client.manifest())
    wait_until(lambda: repair(lab) == [] and captured() == {"shop/cache"}, 10)
    assert sum(path.name.startswith("lookup_") for path in (directory / "links").iterdir()) == 1


def test_exception_that_was_taken_back_while_no_agent_ran_holds_no_more(lab: Lab) -> None:
    east, _west = lab.cluster().nodes
    client = lab.find_pod("client")
    manifest = client.manifest()
    excluded = {EXCLUDE_OUTBOUND_PORTS: "8080"}
    lab.write_object(manifest | {"metadata": manifest["metadata"] | {"annotations": excluded}})
    lab.restart_agent(east)
    (directory,) = listing.find_directories((lab.pins / "east",))
    assert listing.dump_map(directory, "ss_ports")
    kill_agent(lab, east)
    lab.write_object(manifest)
    lab.restart_agent(east)
    assert not listing.dump_map(directory, "ss_ports")
    wait_enrolled(lab, east, 2)
    assert fetch(lab, "server") == 0


def test_step_of_unenrolling_that_fails_ends_no_agent(lab: Lab) -> None:
    east, _west = lab.cluster().nodes
    client = lab.find_pod("client")
    (directory,) = listing.find_directories((lab.pins / "east",))
    link = next((directory / "links").glob("lookup_*"))
    link.unlink()
    link.mkdir()  # so that its removal fails
    try:
        lab.label_namespace("shop", None)
        assert {row["mesh"] for row in lab.status()} == {"none"}
        gone = "pod has nothing of ours any more"
        wait_for_entry(lab, east, gone, lambda entry: entry["pod"] == client.key)
        assert traces(lab, client) == (False, {"0"})
    finally:
        link.rmdir()
