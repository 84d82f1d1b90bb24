"""The plugin itself, run as a runtime runs it, against a real agent and a real API server."""

from __future__ import annotations

import json
import os
import subprocess
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import pytest

from agent import netlink, netns
from agent.model.enrollment import MODE_LABEL
from cni.installer import SHIM, Places
from tests.cluster.test_agent import Processes
from tests.cluster.test_rights import AUDIENCE, annotation, installed, token_of
from tests.support.api_server import path_of
from tests.support.cluster_objects import Body, namespace, pod
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.api_server import ApiServer

__all__ = ["installed"]
pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

SPACE, SPARED = "plugged", "plugged-not"
ADD_SECONDS = 0.030


class Plugin:
    """Runs the plugin for pods of a node, whose sandboxes the test makes."""

    def __init__(self, directory: Path, server: ApiServer, stack: ExitStack) -> None:
        self.server = server
        self.stack = stack
        self.node = Processes(directory, server)
        stack.callback(self.node.end)
        self.places = Places(directory, directory, directory, directory / "run/cni.sock", (SPARED,))
        self.places.record.touch()

    def create(self, name: str, space: str = SPACE) -> Body:
        body = pod(f"{space}/{name}", "")
        del body["status"]
        body["metadata"]["uid"] = self.server.apply(body)["metadata"]["uid"]
        self.stack.callback(self.server.ask, "DELETE", path_of(body), {"gracePeriodSeconds": 0})
        return body

    def run(
        self,
        command: str,
        body: Body,
        netns_path: str,
        address: str = "10.97.0.9",
        more: Body | None = None,
    ) -> tuple[int, Any]:
        """Run it; return the code, 0 for success, and what it printed."""
        metadata = body["metadata"]
        result = {
            "cniVersion": "1.1.0",
            "interfaces": [{"name": "eth0", "sandbox": netns_path}],
            "ips": [{"address": f"{address}/24", "interface": 0}],
        }
        configuration = self.places.entry() | {
            "cniVersion": "1.1.0", "name": "pods", "prevResult": result,
        } | (more or {})  # fmt: skip
        environment = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": f"sandbox-of-{metadata['name']}",
            "CNI_NETNS": netns_path,
            "CNI_IFNAME": "eth0",
            "CNI_ARGS": f"K8S_POD_NAMESPACE={metadata['namespace']};"
            f"K8S_POD_NAME={metadata['name']};K8S_POD_UID={metadata['uid']}",
        }
        done = subprocess.run(
            [SHIM], input=json.dumps(configuration), env=environment,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        printed: Any = json.loads(done.stdout) if done.stdout else None
        if done.returncode == 0:
            return 0, printed
        return printed["code"], printed

    def states(self) -> dict[str, str]:
        return {row["name"]: row["state"] for row in self.node.state()["pods"]}


@contextmanager
def sandbox(number: int = 0) -> Iterator[str]:
    """Make a network namespace with a link to the node, as the plugin before ours does."""
    fd = netns.create()
    host_fd = netns.open_netns(Path("/proc/self/ns/net"))
    link = f"ss-cni{number}"
    try:

        def make() -> None:
            netlink.set_up("lo")
            netlink.add_veth("eth0", link, host_fd)
            netlink.set_up("eth0")

        netns.run_in(fd, make)
        yield f"/proc/{os.getpid()}/fd/{fd}"
    finally:
        netns.run_aside(lambda: netlink.delete_link(link))
        os.close(host_fd)
        os.close(fd)


@pytest.fixture
def plugin(installed: ApiServer, tmp_path: Path) -> Iterator[Plugin]:
    installed.apply(namespace(SPACE))
    installed.apply(namespace(SPARED))
    with ExitStack() as stack:
        made = Plugin(tmp_path, installed, stack)
        own = pod("sidestep-system/agent-node-1", "10.8.0.1", serviceAccountName="sidestep-agent")
        reference = {"apiVersion": "v1", "kind": "Pod", "name": "agent-node-1"}
        reference["uid"] = installed.apply(own)["metadata"]["uid"]
        stack.callback(installed.delete, own)
        token = token_of(
            installed, "sidestep-agent", audiences=[AUDIENCE], boundObjectRef=reference
        )
        made.node.start_ca()
        made.node.start_agent(token)
        wait_until(lambda: made.node.state()["ready"])
        yield made


def test_pod_is_added_once_checked_and_deleted(plugin: Plugin) -> None:
    body = plugin.create("one")
    with sandbox() as place:
        assert plugin.run("STATUS", body, place) == (0, None)
        for _ in range(2):
            code, result = plugin.run("ADD", body, place)
            assert code == 0
            assert result["ips"] == [{"address": "10.97.0.9/24", "interface": 0}]
        assert plugin.states() == {"one": "enrolled"}
        assert plugin.run("CHECK", body, place) == (0, None)
        with sandbox(1) as elsewhere:
            code, error = plugin.run("CHECK", body, elsewhere)
            assert code == 100
            assert "another network namespace" in error["msg"]
        # Somebody takes the capture away behind the agent's back.
        (link,) = plugin.node.pins.glob("*/links/lookup_*")
        link.unlink()
        code, error = plugin.run("CHECK", body, place)
        assert code == 100
        assert "inbound is not captured" in error["msg"]
        assert plugin.run("DEL", body, place) == (0, None)
        assert plugin.states() == {}
        assert plugin.run("DEL", body, place) == (0, None)


def test_sandbox_that_vanishes_fails_alone(plugin: Plugin, tmp_path: Path) -> None:
    body = plugin.create("vanished")
    # Gone by the time the agent looks, and, as after an unmount, only the file is left.
    (tmp_path / "unmounted").touch()
    for place in ("/run/netns/is-gone", str(tmp_path / "unmounted")):
        code, error = plugin.run("ADD", body, place)
        assert code == 11
        assert f"{SPACE}/vanished was not enrolled: {place}" in error["msg"]
        assert "mountPropagation" in error["msg"]
        assert plugin.states() == {}
    assert plugin.run("DEL", body, "/run/netns/is-gone") == (0, None)
    other = plugin.create("other")
    with sandbox() as place:
        assert plugin.run("ADD", other, place)[0] == 0
        assert plugin.states() == {"other": "enrolled"}
        with sandbox(1) as second:
            assert plugin.run("ADD", body, second, "10.97.0.8")[0] == 0
            assert plugin.states() == {"other": "enrolled", "vanished": "enrolled"}
            assert plugin.run("DEL", body, second)[0] == 0


def test_runtime_says_which_sandboxes_are_left(plugin: Plugin) -> None:
    bodies = [plugin.create("kept"), plugin.create("lost")]
    with sandbox(0) as first, sandbox(1) as second:
        for body, place in zip(bodies, (first, second), strict=True):
            assert plugin.run("ADD", body, place, f"10.97.0.{ord(place[-1])}")[0] == 0
        valid = [{"containerID": "sandbox-of-kept", "ifname": "eth0"}]
        more = {"cni.dev/valid-attachments": valid}
        assert plugin.run("GC", bodies[0], "", more=more) == (0, None)
        assert plugin.states() == {"kept": "enrolled"}


def test_pod_that_nobody_knows_waits_and_one_outside_the_mesh_does_not(plugin: Plugin) -> None:
    unknown = pod(f"{SPACE}/unknown", "")
    unknown["metadata"]["uid"] = "00000000-0000-4000-8000-000000000000"
    with sandbox() as place:
        began = time.monotonic()
        code, error = plugin.run("ADD", unknown, place)
        assert code == 11
        assert "is not known after 10 s" in error["msg"]
        assert time.monotonic() - began < 20
        outside = plugin.create("outside", "default")
        assert plugin.run("ADD", outside, place)[0] == 0
        assert plugin.states() == {}
        assert annotation(plugin.server, outside) is None
        bare = plugin.create("bare")
        code, error = plugin.run("ADD", bare, place, more={"prevResult": {"ips": []}})
        assert code == 7
        assert "no address" in error["msg"]


def test_add_costs_little(plugin: Plugin, measured: Callable[[str], None]) -> None:
    took: dict[str, list[float]] = {SPACE: [], SPARED: []}
    for number in range(25):
        for space, seconds in took.items():
            body = plugin.create(f"cost-{number}", space)
            with sandbox() as place:
                began = time.monotonic()
                code, _result = plugin.run("ADD", body, place)
                seconds.append(time.monotonic() - began)
                assert code == 0
                assert plugin.run("DEL", body, place)[0] == 0
    meshed, spared = median(took[SPACE]), median(took[SPARED])
    measured(
        f"ADD takes {meshed * 1000:.1f} ms at the median, {max(took[SPACE]) * 1000:.1f} ms at "
        f"most; for a pod of an excluded namespace {spared * 1000:.1f} ms"
    )
    assert meshed < ADD_SECONDS


def test_pod_that_left_the_mesh_between_two_sandboxes_joins_again(plugin: Plugin) -> None:
    kind = "application/merge-patch+json"

    def label(body: Body, mode: str) -> None:
        change = {"metadata": {"labels": {MODE_LABEL: mode}}}
        plugin.server.must("PATCH", path_of(body), change, kind)

    def passes() -> bool:
        """Add it, and tell whether it took no part; the label takes a moment to be known."""
        assert plugin.run("ADD", body, place)[0] == 0
        if plugin.states() == {}:
            return True
        assert plugin.run("DEL", body, place)[0] == 0
        return False

    body = plugin.create("back")
    with sandbox() as place:
        assert plugin.run("ADD", body, place)[0] == 0
        assert plugin.run("DEL", body, place)[0] == 0
        label(body, "none")
        wait_until(passes)
        status = {"phase": "Running", "podIP": "10.97.0.9", "podIPs": [{"ip": "10.97.0.9"}]}
        plugin.server.must("PATCH", f"{path_of(body)}/status", {"status": status}, kind)
        label(body, "ambient")
        # Looked for by its cgroup, which it has not got here.
        wait_until(lambda: plugin.states() == {"back": "pending"})
