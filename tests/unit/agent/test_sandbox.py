"""Pods' namespaces by their cgroups, while cgroups and processes come and go."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agent import sandbox
from agent.datapath import links
from agent.errors import SandboxNotFound
from agent.model.pod import LocalPod
from tests.support.namespaces import POD4

if TYPE_CHECKING:
    from tests.support.namespaces import Network

# An address of every namespace, so that a test's own process can stand for the pod's.
POD = LocalPod("0d7c-8a52", "shop", "cart", "cart", (ip_address("127.0.0.1"),))


def add_cgroup(path: Path, *pids: int) -> None:
    path.mkdir(parents=True)
    (path / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))


class Place:
    """A process in a namespace, while inside; yields its pid."""

    def __init__(self, netns_fd: int, cgroup: Path) -> None:
        netns_path = f"/proc/{os.getpid()}/fd/{netns_fd}"
        command = [sys.executable, "-m", "agent.lab.launch", netns_path, str(cgroup), "cat"]
        self._command = command

    def __enter__(self) -> int:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        self._process.stdout.readline()  # it runs, and is in its place
        return self._process.pid

    def __exit__(self, *_error: object) -> None:
        self._process.communicate()


def v1_hierarchies() -> list[str]:
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [place for _, place, kind, *_ in map(str.split, lines) if kind == "cgroup"]


def ended_pid() -> int:
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


@pytest.mark.parametrize("name", ["pod0d7c-8a52", "kubepods-pod0d7c_8a52.slice"])
def test_namespace_is_that_of_a_process_that_still_runs(tmp_path: Path, name: str) -> None:
    add_cgroup(tmp_path / "other" / "pod1")
    add_cgroup(tmp_path / "burstable" / name / "container", ended_pid(), os.getpid())
    fd = sandbox.open_netns(POD, tmp_path)
    try:
        assert os.fstat(fd).st_ino == Path("/proc/self/ns/net").stat().st_ino
    finally:
        os.close(fd)


def test_static_pod_is_found_by_the_uid_that_the_node_has_for_it(tmp_path: Path) -> None:
    add_cgroup(tmp_path / "pod0d7c-8a52", ended_pid())
    static = "0123456789abcdef0123456789abcdef"
    add_cgroup(tmp_path / f"pod{static}", os.getpid())
    os.close(sandbox.open_netns(replace(POD, node_uid=static), tmp_path))


@pytest.mark.root
def test_namespace_is_the_one_that_has_the_pods_address(tmp_path: Path, network: Network) -> None:
    # As with a container engine in the pod, and a process that went to the node's namespace.
    elsewhere = Place(network.peer.fd, tmp_path), Place(network.pod.fd, tmp_path)
    with elsewhere[0] as nested, elsewhere[1] as own:
        add_cgroup(tmp_path / "pod0d7c-8a52", os.getpid(), nested, own)
        pod = replace(POD, addresses=(ip_address("203.0.113.9"), ip_address(POD4)))
        fd = sandbox.open_netns(pod, tmp_path)
        try:
            assert os.fstat(fd).st_ino == os.fstat(network.pod.fd).st_ino
        finally:
            os.close(fd)
        with pytest.raises(SandboxNotFound, match=r"none of its processes .* has 203\.0\.113\.9"):
            sandbox.open_netns(replace(POD, addresses=(ip_address("203.0.113.9"),)), tmp_path)


@pytest.mark.root
@pytest.mark.parametrize("hierarchy", ["v1", "v2"])
@pytest.mark.parametrize("name", ["pod0d7c-8a52", "kubepods-besteffort-pod0d7c_8a52.slice"])
def test_pod_is_found_in_real_cgroups(hierarchy: str, name: str, network: Network) -> None:
    root = links.cgroup_root()
    if hierarchy == "v1":
        controllers = [place for place in v1_hierarchies() if Path(place).name == "pids"]
        if not controllers:
            pytest.skip("this machine has no controllers of cgroup v1")
        root = Path(controllers[0])
    top = root / f"sidestep-test-{os.getpid()}"
    container = top / "kubepods" / name / "container"
    container.mkdir(parents=True)
    pod = replace(POD, addresses=(ip_address(POD4),))
    try:
        with Place(network.pod.fd, container):
            # The first is where an agent looks by default; it has every hierarchy below.
            for below in (Path("/sys/fs/cgroup"), top):
                fd = sandbox.open_netns(pod, below)
                try:
                    assert os.fstat(fd).st_ino == os.fstat(network.pod.fd).st_ino
                finally:
                    os.close(fd)
    finally:
        for made in (container, *list(container.parents)[:3]):
            made.rmdir()


@pytest.mark.parametrize("name", ["pod0d7c-8a520", "pod10d7c-8a52", "pod0d7c-8a52-x"])
def test_pod_whose_uid_contains_this_one_is_another(tmp_path: Path, name: str) -> None:
    add_cgroup(tmp_path / name, os.getpid())
    with pytest.raises(SandboxNotFound):
        sandbox.open_netns(POD, tmp_path)


def test_cgroup_whose_processes_cannot_be_listed_is_passed_over(tmp_path: Path) -> None:
    directory = tmp_path / "pod0d7c-8a52"
    (directory / "threads" / "cgroup.procs").mkdir(parents=True)
    with pytest.raises(SandboxNotFound, match="shop/cart has no process below"):
        sandbox.open_netns(POD, tmp_path)
    assert list(sandbox.all_netns(tmp_path)) == []


def test_each_namespace_is_listed_once(tmp_path: Path) -> None:
    add_cgroup(tmp_path / "pod1", os.getpid(), os.getpid(), ended_pid())
    add_cgroup(tmp_path / "pod2", os.getppid())
    found = [os.fstat(fd).st_ino for fd in sandbox.all_netns(tmp_path)]
    assert found == [Path("/proc/self/ns/net").stat().st_ino]
