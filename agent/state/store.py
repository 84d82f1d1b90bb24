"""What is known of the mesh at one moment. Pure.

A Snapshot is what a source of discovery yields. It never changes: a newer state is a new value.
The control process compares two of them and tells the workers the difference; who looks an address
up does so in the worker's own view (`agent.tunnel.mesh`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agent.model.enrollment import Refusal
    from agent.model.pod import LocalPod
    from agent.model.policy import AnyPolicy
    from agent.model.service import Service
    from agent.model.starting import StartingPod
    from agent.model.workload import Workload


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that one source knows; `local_pods` are those that want the mesh, by node.

    Pods that have a node and no address yet are `starting`, and in none of the lists of others.
    `refusals` says of pods, by uid, why they do not want the mesh.
    """

    workloads: tuple[Workload, ...] = ()
    services: tuple[Service, ...] = ()
    local_pods: Mapping[str, tuple[LocalPod, ...]] = field(default_factory=dict)
    policies: tuple[AnyPolicy, ...] = ()
    starting: tuple[StartingPod, ...] = ()
    refusals: Mapping[str, Refusal] = field(default_factory=dict)
