"""A limit for the memory that an agent takes, as a container has one."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

from agent.datapath import links

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agent.lab.cluster import LabNode
    from agent.lab.lab import Lab

V1 = Path("/sys/fs/cgroup/memory")
DISSOLVE_SECONDS = 5.0


@contextlib.contextmanager
def limited(lab: Lab, node: LabNode, more_bytes: int) -> Iterator[None]:
    """Let all processes of a node's agent take so much more than they have, and no more."""
    limit = _limited_v1 if (V1 / "memory.limit_in_bytes").exists() else _limited_v2
    with limit(lab, node, more_bytes):
        yield


@contextlib.contextmanager
def _limited_v1(lab: Lab, node: LabNode, more_bytes: int) -> Iterator[None]:
    # What they have is charged where they were: only the rest counts here.
    cgroup = V1 / f"sidestep-{lab.name}"
    cgroup.mkdir()
    try:
        (cgroup / "memory.limit_in_bytes").write_text(str(more_bytes))
        for pid in lab.agent_processes(node):
            (cgroup / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        _dissolve(cgroup)


def _dissolve(cgroup: Path) -> None:
    deadline = time.monotonic() + DISSOLVE_SECONDS
    while cgroup.is_dir():
        assert time.monotonic() < deadline, (cgroup / "cgroup.procs").read_text()
        for left in (cgroup / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                (V1 / "cgroup.procs").write_text(left)
        # One that has just been forked, or ends, is in the way.
        with contextlib.suppress(OSError):
            cgroup.rmdir()


@contextlib.contextmanager
def _limited_v2(lab: Lab, node: LabNode, more_bytes: int) -> Iterator[None]:
    cgroup, root = lab.cgroup / node.name / "agent", links.cgroup_root()
    above = [path for path in reversed(cgroup.parents) if path.is_relative_to(root)]
    added: list[Path] = []
    try:
        for parent in above:
            if "memory" not in (parent / "cgroup.subtree_control").read_text().split():
                (parent / "cgroup.subtree_control").write_text("+memory")
                added.append(parent)
        has = int((cgroup / "memory.current").read_text())
        (cgroup / "memory.max").write_text(str(has + more_bytes))
        yield
    finally:
        for parent in reversed(added):
            (parent / "cgroup.subtree_control").write_text("-memory")
