"""Know the kubelet by its cgroup, so that its probes reach the pods (ss_probers).

A service that restarts gets a new cgroup under the old name, so the directory above it is watched,
or what is there of those above that: a slice may be made when its first service starts. Nobody else
on the node is let in by this: not by address, not by user, not by the host's network.

Called by the composition root.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING

from agent.changes import Changes
from agent.errors import MapError
from cni.inotify import NAMES

if TYPE_CHECKING:
    import asyncio
    from pathlib import Path

    from agent.datapath.btf import Value
    from agent.datapath.maps import Map

log = logging.getLogger(__name__)
LOOK_SECONDS = 10.0  # between two looks, if no change is told
# Below the root of cgroup v2, as systemd, k3s, RKE2 and MicroK8s name it.
USUAL_CGROUPS = (
    "system.slice/kubelet.service",
    "system.slice/k3s.service",
    "system.slice/k3s-agent.service",
    "system.slice/rke2-server.service",
    "system.slice/rke2-agent.service",
    "system.slice/snap.microk8s.daemon-kubelite.service",
    "kubelet.slice/kubelet.service",
)


def find_cgroup(root: Path) -> Path | None:
    """Return the kubelet's cgroup where one of the usual ones is there."""
    return next((root / name for name in USUAL_CGROUPS if (root / name).is_dir()), None)


class Probers:
    """Keeps ss_probers at the cgroup that has the kubelet's name now."""

    def __init__(self, probers: Map, cgroup: Path) -> None:
        self._map = probers
        self._cgroup = cgroup
        self._written: set[Value] | None = None  # what the map holds, once it has been read

    async def follow(self, stop: asyncio.Event) -> None:
        """Follow the cgroup through restarts of the kubelet, until `stop`."""
        while not stop.is_set():
            with suppress(FileNotFoundError):  # what is above went while it was looked at
                above = self._find_above()
                # Names only: the kernel writes into the files of a cgroup all the time.
                with Changes(above[0], events=NAMES) as changes:
                    self.refresh()
                    while self._find_above() == above and not stop.is_set():
                        await changes.wait(stop, LOOK_SECONDS)
                        self.refresh()

    def _find_above(self) -> tuple[Path, int]:
        """Return the lowest directory above the cgroup that is there, and which one it is."""
        directory = next(each for each in self._cgroup.parents if each.is_dir())
        return directory, directory.stat().st_ino

    def refresh(self) -> None:
        """Look now; the next time makes up for what fails."""
        try:
            self._look()
        except (MapError, OSError) as error:
            log.warning("the kubelet's probes may not pass", extra={"error": str(error)})

    def _look(self) -> None:
        try:
            wanted: set[Value] = {self._cgroup.stat().st_ino}  # kernfs: the inode is the id
        except FileNotFoundError:
            wanted = set()
        if self._written is None:
            # An agent before us may have written another; it goes when ours is there.
            self._written = {key["value"] for key, _ in self._map.items()}
        if wanted == self._written:
            return
        for cgroup_id in wanted - self._written:
            self._map.put({"value": cgroup_id}, {"value": 1})
            self._written.add(cgroup_id)
        for cgroup_id in self._written - wanted:
            self._map.delete({"value": cgroup_id})
            self._written.discard(cgroup_id)
        fields = {"cgroup": str(self._cgroup), "id": next(iter(wanted), None)}
        log.info("kubelet's cgroup", extra=fields)
