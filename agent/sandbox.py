"""Find the network namespace of a pod of this node, from its cgroup.

The kubelet names a pod's cgroup after the pod's uid (`pod<uid>`, with `_` for `-` under systemd),
in cgroup v2 or below each controller of v1; that of a static pod after the uid that the node has
for it. Of the namespaces that its processes are in, the pod's has the pod's address: a container
engine inside the pod makes others, and a privileged process may have gone to the node's. Nothing of
the container runtime is asked.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from agent import netns
from agent.errors import SandboxNotFound

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from agent.model.pod import Address, LocalPod

LABS = "sidestep-lab"  # below it are the cgroups of all labs of this machine


def open_netns(pod: LocalPod, pod_cgroups: Path) -> int:
    """Return a descriptor of the pod's namespace, the caller's (SandboxNotFound)."""
    strange: set[tuple[int, int]] = set()
    for pid in _processes_of(pod.node_uid or pod.uid, pod_cgroups):
        try:
            fd = netns.open_netns(Path(f"/proc/{pid}/ns/net"))
        except OSError:
            continue  # ended meanwhile: the next one will do
        found = os.fstat(fd)
        if (found.st_dev, found.st_ino) not in strange:
            if netns.run_in(fd, lambda: _has_any(pod.addresses)):
                return fd
            strange.add((found.st_dev, found.st_ino))
        os.close(fd)
    named = f"{pod.namespace}/{pod.name}"
    if strange:
        shown = ", ".join(map(str, pod.addresses))
        raise SandboxNotFound(
            f"{named}: none of its processes is in a network namespace that has {shown}"
        )
    raise SandboxNotFound(f"{named} has no process below {pod_cgroups}; is it running here?")


def _has_any(addresses: Iterable[Address]) -> bool:
    """Tell whether the current namespace has one of the addresses."""
    for address in addresses:
        family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
            return True
    return False


def _processes_of(uid: str, pod_cgroups: Path) -> Iterator[str]:
    # Not a part of another pod's uid, which ends or begins with this one.
    name = re.compile(rf"(.*-)?pod({re.escape(uid)}|{re.escape(uid.replace('-', '_'))})(\.slice)?")
    # Cgroups come and go while we look: os.walk() passes over what is gone, rglob() does not.
    for parent, names, _files in os.walk(pod_cgroups):
        for each in names:
            if name.fullmatch(each):
                yield from _processes_below(Path(parent, each))


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
