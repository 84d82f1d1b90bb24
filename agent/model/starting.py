"""A pod that has a node and no address yet: its sandbox is made now. Pure.

The API server tells a pod's addresses when the kubelet has heard of them, which is after the
runtime has run the CNI plugin. So the plugin brings the addresses, and this is the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent.model.pod import Address, LocalPod
    from agent.model.workload import Workload


@dataclass(frozen=True, slots=True)
class StartingPod:
    """What is known of a pod beside its addresses; `local` is None if it wants no mesh."""

    workload: Workload
    local: LocalPod | None

    @property
    def uid(self) -> str:
        return self.workload.uid

    @property
    def node(self) -> str:
        return self.workload.node

    def at(self, addresses: tuple[Address, ...]) -> StartingPod:
        """Return the same pod at other addresses."""
        return StartingPod(
            replace(self.workload, addresses=addresses),
            None if self.local is None else replace(self.local, addresses=addresses),
        )
