"""The lab, with a real agent on each node: enrollment by label, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agent.errors import ManifestError
from agent.lab.lab import DEFAULT_CLUSTER, Lab

if TYPE_CHECKING:
    from collections.abc import Iterator

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


def label(lab: Lab, mode: str | None) -> float:
    """Label the namespace and return the seconds until both agents have done it."""
    labels = {} if mode is None else {"istio.io/dataplane-mode": mode}
    body = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": "shop", "labels": labels},
    }
    cluster = lab.cluster()
    watches = [lab.agent_states(node) for node in cluster.nodes]
    for watch in watches:
        next(watch)
    began = time.monotonic()
    lab.write_object(body)
    for watch in watches:
        for state in watch:
            states = [pod["state"] for pod in state["pods"]]
            if states == (["enrolled"] if mode == "ambient" else []):
                break
    return time.monotonic() - began


def fetch(lab: Lab) -> int:
    command = lab.command_in(lab.find_pod("client"), ["curl", "-sS", "-m", "5", URL])
    return len(subprocess.run(command, check=True, capture_output=True).stdout)


def test_label_enrolls_and_unenrolls_within_a_second_without_a_restart(lab: Lab) -> None:
    before = lab.status()
    size = fetch(lab)
    assert label(lab, "ambient") < 1
    assert [row["mesh"] for row in lab.status()] == ["enrolled", "enrolled"]
    assert fetch(lab) == size
    assert label(lab, None) < 1
    assert fetch(lab) == size
    assert lab.status() == before


def test_agent_is_small_and_has_no_compiler(lab: Lab) -> None:
    label(lab, "ambient")
    for node in lab.cluster().nodes:
        state = next(lab.agent_states(node, "state"))
        for pid in [*(worker["pid"] for worker in state["workers"]), *lab._agent_pids(node)]:
            status = Path(f"/proc/{pid}/status").read_text()
            (resident,) = [line for line in status.splitlines() if line.startswith("VmRSS")]
            kib = int(resident.split()[1])
            print(f"pid {pid}: {kib / 1024:.1f} MiB")  # noqa: T201
            assert kib < 60 << 10
            maps = Path(f"/proc/{pid}/maps").read_text()
            assert "libLLVM" not in maps
            assert "libbcc" not in maps


def test_up_twice_changes_nothing(lab: Lab) -> None:
    before = lab.status()
    lab.up(DEFAULT_CLUSTER, print)
    assert lab.status() == before


def test_wrong_cluster_names_the_object_and_the_field(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "kind: Node\nmetadata: {name: a}\n---\nkind: Pod\nmetadata: {name: p}\nspec: {}\n"
    )
    with pytest.raises(ManifestError, match=r"Pod default/p: spec.nodeName"):
        Lab("wrong").load(path)
