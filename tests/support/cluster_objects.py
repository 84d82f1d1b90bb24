"""Kubernetes objects as a cluster has them, and a source that a test follows."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from agent.discovery.translate import SERVICE_LABEL
from agent.model.enrollment import MODE_LABEL

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from agent.discovery.kubernetes import KubernetesSource
    from agent.state.store import Snapshot

Body = dict[str, Any]
PATIENCE_SECONDS = 30.0


def namespace(name: str, mode: str | None = "ambient") -> Body:
    labels = {} if mode is None else {MODE_LABEL: mode}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def pod(place: str, address: str, labels: Body | None = None, **spec: Any) -> Body:
    """Describe a running pod; `place` is its namespace and name."""
    space, _, name = place.partition("/")
    container = {"name": "main", "image": "example.org/main"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": space, "name": name, "labels": labels or {}},
        "spec": {"nodeName": "node-1", "containers": [container]} | spec,
        "status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]},
    }


def service(space: str, name: str) -> Body:
    ports = [{"name": "web", "port": 80, "protocol": "TCP"}]
    metadata = {"namespace": space, "name": name}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"ports": ports}}


def endpoint_slice(space: str, name: str, *addresses: str) -> Body:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"namespace": space, "name": f"{name}-1", "labels": {SERVICE_LABEL: name}},
        "addressType": "IPv4",
        "ports": [{"name": "web", "port": 8080, "protocol": "TCP"}],
        "endpoints": [{"addresses": [each], "conditions": {"ready": True}} for each in addresses],
    }


def definition(kind: str, plural: str, group: str = "security.istio.io") -> Body:
    """Describe a kind that takes any content."""
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{group}"},
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural, "singular": kind.lower()},
            "versions": [version],
        },
    }


def policy(space: str, name: str) -> Body:
    """Describe a policy that lets nobody in."""
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"namespace": space, "name": name},
        "spec": {},
    }


def machine(space: str, name: str, address: str, **labels: str) -> Body:
    """Describe what is in the mesh and no pod."""
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": "WorkloadEntry",
        "metadata": {"namespace": space, "name": name},
        "spec": {"address": address, "labels": labels, "serviceAccount": name},
    }


def service_entry(space: str, name: str, **spec: Any) -> Body:
    """Describe a service by its host name."""
    common = {
        "hosts": [f"{name}.example.com"],
        "ports": [{"number": 5432, "name": "db", "protocol": "TCP"}],
        "resolution": "STATIC",
    }
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": "ServiceEntry",
        "metadata": {"namespace": space, "name": name},
        "spec": common | spec,
    }


class Following:
    """What a source has said so far."""

    def __init__(self) -> None:
        self.snapshots: list[Snapshot] = []
        self.came = asyncio.Condition()

    @property
    def latest(self) -> Snapshot:
        return self.snapshots[-1]

    async def until(self, condition: Callable[[Snapshot], object]) -> Snapshot:
        """Wait for a snapshot of which a condition holds (TimeoutError)."""
        async with asyncio.timeout(PATIENCE_SECONDS), self.came:
            await self.came.wait_for(lambda: self.snapshots and condition(self.latest))
        return self.latest


@asynccontextmanager
async def following(source: KubernetesSource) -> AsyncIterator[Following]:
    """Follow a source until the end of the block."""
    found, stop = Following(), asyncio.Event()

    async def read() -> None:
        async for snapshot in source.watch(stop):
            async with found.came:
                found.snapshots.append(snapshot)
                found.came.notify_all()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(read())
        try:
            yield found
        finally:
            stop.set()
            await source.close()


def names(snapshot: Snapshot, space: str) -> set[str]:
    """List the pods of a namespace that are known."""
    return {each.name for each in snapshot.workloads if each.namespace == space}


def enrolled(snapshot: Snapshot, space: str) -> set[str]:
    """List the pods of a namespace that take part."""
    groups = snapshot.local_pods.values()
    return {each.name for group in groups for each in group if each.namespace == space}
