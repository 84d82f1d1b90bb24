"""Find the network namespace of a pod of this node, from its cgroup.

The runtime names a pod's cgroup after the pod's uid (`pod<uid>`, with `_` for `-` under systemd).
Any process in it is in the pod's namespace. Nothing of the container runtime is asked.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from agent import netns
from agent.errors import SandboxNotFound

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agent.model.pod import LocalPod


def open_netns(pod: LocalPod, pod_cgroups: Path) -> int:
    """Return a descriptor of the pod's namespace, the caller's (SandboxNotFound)."""
    spellings = (f"pod{pod.uid}", f"pod{pod.uid.replace('-', '_')}")
    for directory in pod_cgroups.rglob("*pod*"):
        if not any(spelling in directory.name for spelling in spellings):
            continue
        for processes in directory.rglob("cgroup.procs"):
            for pid in processes.read_text().split():
                try:
                    return netns.open_netns(Path(f"/proc/{pid}/ns/net"))
                except OSError:
                    continue  # ended meanwhile: the next one will do
    raise SandboxNotFound(
        f"{pod.namespace}/{pod.name} has no process below {pod_cgroups}; is it running here?"
    )


def all_netns(pod_cgroups: Path) -> Iterator[int]:
    """Yield a descriptor of each network namespace of a pod here, open until the next one."""
    seen = set()
    for processes in pod_cgroups.rglob("*pod*/**/cgroup.procs"):
        for pid in processes.read_text().split():
            try:
                fd = netns.open_netns(Path(f"/proc/{pid}/ns/net"))
            except OSError:
                continue
            try:
                found = os.fstat(fd)
                if (found.st_dev, found.st_ino) not in seen:
                    seen.add((found.st_dev, found.st_ino))
                    yield fd
            finally:
                os.close(fd)
