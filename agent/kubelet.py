"""Know the kubelet by its cgroup, so that its probes reach the pods (ss_probers).

A service that restarts gets a new cgroup under the old name, so the directory above it is watched.
Nobody else on the node is let in by this: not by address, not by user, not by the host's network.

Called by the composition root.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import watchfiles

if TYPE_CHECKING:
    import asyncio
    from pathlib import Path

    from agent.datapath.btf import Value
    from agent.datapath.maps import Map

log = logging.getLogger(__name__)
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
        # An agent before us may have written another; it goes when ours is there.
        self._known: Value | None = next((key["value"] for key, _ in probers.items()), None)

    async def follow(self, stop: asyncio.Event) -> None:
        """Follow the cgroup through restarts of the kubelet, until `stop`."""
        self.refresh()
        changes = watchfiles.awatch(
            self._cgroup.parent,
            watch_filter=lambda _change, path: path == str(self._cgroup),
            recursive=False,
            stop_event=stop,
            step=10,
            debounce=50,
        )
        async for _change in changes:
            self.refresh()

    def refresh(self) -> None:
        """Look now."""
        try:
            cgroup_id: int | None = self._cgroup.stat().st_ino  # kernfs: the inode is the id
        except FileNotFoundError:
            cgroup_id = None
        if cgroup_id == self._known:
            return
        if cgroup_id is not None:
            self._map.put({"value": cgroup_id}, {"value": 1})
        if self._known is not None:
            self._map.delete({"value": self._known})
        self._known = cgroup_id
        log.info("kubelet's cgroup", extra={"cgroup": str(self._cgroup), "id": cgroup_id})
