"""Pods' namespaces by their cgroups, while cgroups and processes come and go."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from agent import sandbox
from agent.errors import SandboxNotFound
from agent.model.pod import LocalPod

POD = LocalPod("0d7c-8a52", "shop", "cart", "cart", ())


def add_cgroup(path: Path, *pids: int) -> None:
    path.mkdir(parents=True)
    (path / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))


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
