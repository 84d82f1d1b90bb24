"""What is known of the mesh at one moment, and the lookups on it. Pure.

A Snapshot is what a source of discovery yields; a Mesh is the same with its indexes built
once. Neither ever changes: a newer state is a new value. Called by the reconciler and the
writers of the maps. Where two claim one address, the first in the snapshot's order has it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agent.model.pod import Address, LocalPod
    from agent.model.service import Service
    from agent.model.workload import Workload


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that one source knows; `local_pods` are those that want the mesh, by node."""

    workloads: tuple[Workload, ...] = ()
    services: tuple[Service, ...] = ()
    local_pods: Mapping[str, tuple[LocalPod, ...]] = field(default_factory=dict)


class Mesh:
    """A snapshot with its indexes."""

    __slots__ = ("_local_pods", "_service_by_address", "_workload_by_address", "snapshot")

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self._local_pods = snapshot.local_pods
        self._workload_by_address: dict[Address, Workload] = {}
        for workload in snapshot.workloads:
            for address in workload.addresses:
                self._workload_by_address.setdefault(address, workload)
        self._service_by_address: dict[Address, Service] = {}
        for service in snapshot.services:
            for address in service.addresses:
                self._service_by_address.setdefault(address, service)

    def workload_at(self, address: Address) -> Workload | None:
        """Find the pod that owns the address."""
        return self._workload_by_address.get(address)

    def service_at(self, address: Address) -> Service | None:
        """Find the service that owns the address."""
        return self._service_by_address.get(address)

    def local_pods(self, node: str) -> dict[str, LocalPod]:
        """List the node's pods that want the mesh, by uid."""
        return {pod.uid: pod for pod in self._local_pods.get(node, ())}
