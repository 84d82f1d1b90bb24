"""The lab, with a real agent on each node: enrollment by label, and nothing left behind."""

from __future__ import annotations

import os
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agent import netns
from agent.errors import LabError, ManifestError
from agent.lab.lab import DEFAULT_CLUSTER, Lab
from agent.lab.machine import command_of, wait_for_exit
from agent.model.capture import HBONE_PORT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.root

URL = "http://10.244.2.3:8080/"


@pytest.fixture
def lab() -> Iterator[Lab]:
    built = Lab(f"t{os.getpid()}")
    try:
        built.up(DEFAULT_CLUSTER, print)
        yield built
    finally:
        built.down()


def fetch(lab: Lab) -> int:
    command = lab.command_in(lab.find_pod("client"), ["curl", "-sS", "-m", "5", URL])
    return len(subprocess.run(command, check=True, capture_output=True).stdout)


def test_label_enrolls_and_unenrolls_within_a_second_without_a_restart(lab: Lab) -> None:
    before = lab.status()
    size = fetch(lab)
    assert lab.label_namespace("shop", "ambient") < 1
    assert [row["mesh"] for row in lab.status()] == ["enrolled"] * 3
    assert fetch(lab) == size
    assert lab.label_namespace("shop", None) < 1
    assert fetch(lab) == size
    assert lab.status() == before


def memory_mib(pid: int) -> dict[str, float]:
    """Return the sums of /proc/PID/smaps_rollup, proc(5)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    fields = [line.split() for line in lines]
    return {name.removesuffix(":"): int(kib) / 1024 for name, kib, _unit in fields}


def test_agent_is_small_and_has_no_compiler(lab: Lab, measured: Callable[[str], None]) -> None:
    lab.label_namespace("shop", "ambient")
    for node in lab.cluster().nodes:
        for pid in lab.agent_processes(node):
            if "agent.identity.caller" in command_of(pid):
                assert wait_for_exit(pid, 10)  # it ends when it has nothing to ask
        workers = [found["pid"] for found in next(lab.agent_states(node, "state"))["workers"]]
        proportional = 0.0
        for pid in lab.agent_processes(node):
            memory = memory_mib(pid)
            # What two processes share counts half for each.
            proportional += memory["Pss"]
            part = "worker" if pid in workers else "control"
            measured(
                f"agent of {node.name} at idle, {part}: resident {memory['Rss']:.1f} MiB,"
                f" proportional {memory['Pss']:.1f} MiB"
            )
            assert memory["Rss"] < (60 if part == "control" else 32)
            maps = Path(f"/proc/{pid}/maps").read_text()
            assert ("cryptography" in maps) == (part == "control")
            assert "cygrpc" not in maps
            assert "libLLVM" not in maps
            assert "libbcc" not in maps
        measured(f"agent of {node.name} at idle: proportional {proportional:.1f} MiB, all of it")
        # One worker for each processor: each more than the first has its own share.
        assert proportional < 60 + 20 * (len(workers) - 1)


def test_same_label_again_is_done_at_once(lab: Lab) -> None:
    assert lab.label_namespace("shop", None) < 1
    for _ in range(2):
        assert lab.label_namespace("shop", "ambient") < 1


def test_pod_that_does_not_follow_its_label_is_named_with_the_reason(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = lab.find_pod("client")
    with ExitStack() as stack:
        fd = netns.open_netns(lab.pod_netns(client))
        stack.callback(os.close, fd)
        taken = stack.enter_context(netns.run_in(fd, socket.socket))
        taken.bind(("0.0.0.0", HBONE_PORT))
        taken.listen()
        monkeypatch.setattr("agent.lab.lab.READY_SECONDS", 1)
        with pytest.raises(LabError, match=r"shop/client is failed: .*Address already in use"):
            lab.label_namespace("shop", "ambient")


def test_up_twice_changes_nothing(lab: Lab) -> None:
    lab.label_namespace("shop", "ambient")
    before = lab.status()
    said: list[str] = []
    lab.up(DEFAULT_CLUSTER, said.append)
    assert lab.status() == before
    assert said == [
        "2 nodes, routed through one fabric", "pods already running", "agents already running"
    ]  # fmt: skip


def test_pod_whose_program_is_not_there_is_named_with_its_log(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "kind: Node\nmetadata: {name: a}\n---\nkind: Pod\nmetadata: {name: p}\n"
        "spec: {nodeName: a, containers: [{command: [no-such-program]}]}\n"
    )
    built, said = Lab(f"t{os.getpid()}"), list[str]()
    try:
        built.up(path, said.append)
        (log,) = [Path(line.rpartition(" ")[2]) for line in said if line.startswith("warning: ")]
        assert "no-such-program cannot be started" in log.read_text()
        again: list[str] = []
        built.up(path, again.append)
    finally:
        built.down()
    assert again[-1].startswith("warning: pod default/p ")
    assert again[-1].endswith(f", see {log}")
    assert said == [
        "1 node, routed through one fabric",
        "1 pod started",
        "the certificate authority signs",
        "1 agent started",
        f"warning: pod default/p has ended with exit code 127, see {log}",
    ]


def test_wrong_cluster_names_the_object_and_the_field(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "kind: Node\nmetadata: {name: a}\n---\nkind: Pod\nmetadata: {name: p}\nspec: {}\n"
    )
    with pytest.raises(ManifestError, match=r"Pod default/p: spec.nodeName"):
        Lab("wrong").load(path)
