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
    # Cgroups come and go while we look: os.walk() passes over what is gone, rglob() does not.
    for parent, names, _files in os.walk(pod_cgroups):
        for name in names:
            if not any(spelling in name for spelling in spellings):
                continue
            for pid in _processes_below(Path(parent, name)):
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
    for pid in _processes_below(pod_cgroups):
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


def _processes_below(cgroup: Path) -> Iterator[str]:
    for directory, _names, _files in os.walk(cgroup):
        try:
            yield from Path(directory, "cgroup.procs").read_text().split()
        except OSError:
            continue  # gone, or a cgroup of threads (EOPNOTSUPP)
