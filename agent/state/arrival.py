"""What this node knows of its pods before the API server does, put into the state. Pure.

    arrived    a pod's sandbox has just been made: it is at the addresses that the plugin has seen,
               whatever the state still says
    gone       its sandbox is no more, though the state still has the pod

The node's own runtime is nearer to its pods than the API server, so its word counts on this node.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from agent.model.starting import StartingPod

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from agent.state.store import Snapshot


def find_pod(
    snapshot: Snapshot, node: str, is_meant: Callable[[str, str, str], bool]
) -> StartingPod | None:
    """Return a pod of a node; `is_meant` gets uid, namespace and name."""
    for starting in snapshot.starting:
        found = starting.workload
        if found.node == node and is_meant(found.uid, found.namespace, found.name):
            return starting
    for found in snapshot.workloads:
        if found.node == node and is_meant(found.uid, found.namespace, found.name):
            own = snapshot.local_pods.get(node, ())
            return StartingPod(found, next((pod for pod in own if pod.uid == found.uid), None))
    return None


def pods_of(snapshot: Snapshot, node: str) -> dict[str, StartingPod]:
    """Return all pods of a node, with or without addresses, by uid."""
    local = {pod.uid: pod for pod in snapshot.local_pods.get(node, ())}
    found = {
        each.uid: StartingPod(each, local.get(each.uid))
        for each in snapshot.workloads
        if each.node == node
    }
    return found | {each.uid: each for each in snapshot.starting if each.node == node}


def complete(
    snapshot: Snapshot, node: str, arrived: Iterable[StartingPod], gone: Collection[str] = ()
) -> Snapshot:
    """Return the state with pods of a node that have arrived, and without those that are gone."""
    by_uid = {pod.uid: pod for pod in arrived}
    if not by_uid and not gone:
        return snapshot
    replaced = by_uid.keys() | set(gone)
    workloads = [each for each in snapshot.workloads if each.uid not in replaced]
    workloads += [pod.workload for pod in by_uid.values()]
    own = [pod for pod in snapshot.local_pods.get(node, ()) if pod.uid not in replaced]
    own += [pod.local for pod in by_uid.values() if pod.local is not None]
    return replace(
        snapshot,
        workloads=tuple(sorted(workloads, key=lambda each: each.uid)),
        local_pods={**snapshot.local_pods, node: tuple(sorted(own, key=lambda each: each.uid))},
        starting=tuple(each for each in snapshot.starting if each.uid not in replaced),
    )
