"""The description of a lab: Kubernetes objects in one YAML file, checked and given addresses.

    Node   metadata.name; at least one; passed to the agents as well
    Pod    spec.nodeName, spec.containers[0].command: a program of this machine; without one the pod
           only waits
    other  passed to the agents as it is

Addresses come from the position in the file, so the same file gives the same lab. Pure.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from agent.errors import ManifestError

MAX_NODES = 16
MAX_PODS = 200
IDLE_COMMAND = ("sleep", "infinity")
Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class LabNode:
    """A node; `number` counts from 1 and is in all its addresses."""

    name: str
    number: int

    @property
    def gateway4(self) -> IPv4Address:
        """What its pods send to."""
        return IPv4Address(f"10.244.{self.number}.1")

    @property
    def gateway6(self) -> IPv6Address:
        return IPv6Address(f"fd00:10:244:{self.number:x}::1")

    def link4(self, end: int) -> IPv4Address:
        """Return an address of the link to the fabric: end 1 is the fabric's, 2 the node's."""
        return IPv4Address(f"10.243.{self.number}.{end}")

    def link6(self, end: int) -> IPv6Address:
        return IPv6Address(f"fd00:10:243:{self.number:x}::{end}")


@dataclass(frozen=True, slots=True)
class LabPod:
    """A pod, where it runs and what."""

    uid: str
    namespace: str
    name: str
    node: LabNode
    number: int
    command: tuple[str, ...]
    body: Object

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def address4(self) -> IPv4Address:
        return IPv4Address(f"10.244.{self.node.number}.{self.number + 1}")

    @property
    def address6(self) -> IPv6Address:
        return IPv6Address(f"fd00:10:244:{self.node.number:x}::{self.number + 1:x}")

    def manifest(self) -> Object:
        """Return the object as an API server would show it: with uid and status."""
        addresses = [{"ip": str(self.address4)}, {"ip": str(self.address6)}]
        metadata = self.body["metadata"] | {"uid": self.uid, "namespace": self.namespace}
        status = {"phase": "Running", "podIP": addresses[0]["ip"], "podIPs": addresses}
        return self.body | {"metadata": metadata, "status": status}


@dataclass(frozen=True, slots=True)
class Cluster:
    """A whole lab."""

    nodes: tuple[LabNode, ...]
    pods: tuple[LabPod, ...]
    others: tuple[Object, ...]  # and the Nodes: what agents get as it is


def _text(value: object, file: str, named: str, path: str) -> str:
    if not isinstance(value, str) or not value:
        raise ManifestError(f"{file}: {named}: {path}: must be a text, not {value!r}")
    return value


def parse_cluster(documents: list[Any], file: str, lab: str) -> Cluster:
    """Check and number the objects of `file` (ManifestError names object and field)."""
    nodes: dict[str, LabNode] = {}
    pod_bodies: list[Object] = []
    others: list[Object] = []
    for position, body in enumerate(documents, start=1):
        if body is None:
            continue
        if not isinstance(body, dict):
            raise ManifestError(f"{file}: document {position}: is not an object")
        kind = _text(body.get("kind"), file, f"document {position}", "kind")
        metadata = body.get("metadata")
        if not isinstance(metadata, dict):
            raise ManifestError(f"{file}: {kind} in document {position}: metadata: is missing")
        name = _text(metadata.get("name"), file, f"{kind} in document {position}", "metadata.name")
        if kind == "Node":
            nodes[name] = LabNode(name, len(nodes) + 1)
            others.append(body)
        elif kind == "Pod":
            pod_bodies.append(body)
        else:
            others.append(body)
    if not 1 <= len(nodes) <= MAX_NODES:
        raise ManifestError(f"{file}: a lab has 1 to {MAX_NODES} objects of kind Node")
    if len(pod_bodies) > MAX_PODS:
        raise ManifestError(f"{file}: a lab has at most {MAX_PODS} pods")
    pods = tuple(
        _parse_pod(body, number, nodes, file, lab)
        for number, body in enumerate(pod_bodies, start=1)
    )
    keys = [pod.key for pod in pods]
    for key in keys:
        if keys.count(key) > 1:
            raise ManifestError(f"{file}: Pod {key}: metadata.name: is there twice")
    return Cluster(tuple(nodes.values()), pods, tuple(others))


def _parse_pod(body: Object, number: int, nodes: dict[str, LabNode], file: str, lab: str) -> LabPod:
    metadata = body["metadata"]
    namespace = metadata.get("namespace", "default")
    named = f"Pod {namespace}/{metadata['name']}"
    _text(namespace, file, named, "metadata.namespace")
    spec = body.get("spec")
    if not isinstance(spec, dict):
        raise ManifestError(f"{file}: {named}: spec: is missing")
    node = _text(spec.get("nodeName"), file, named, "spec.nodeName")
    if node not in nodes:
        raise ManifestError(f"{file}: {named}: spec.nodeName: there is no Node {node}")
    containers = spec.get("containers") or [{}]
    if not isinstance(containers, list) or not isinstance(containers[0], dict):
        raise ManifestError(f"{file}: {named}: spec.containers: must be a list of objects")
    command = containers[0].get("command") or list(IDLE_COMMAND)
    if not isinstance(command, list) or not all(isinstance(word, str) for word in command):
        raise ManifestError(f"{file}: {named}: spec.containers[0].command: must be a list of texts")
    uid = str(uuid.uuid5(uuid.NAMESPACE_URL, f"lab/{lab}/{namespace}/{metadata['name']}"))
    return LabPod(uid, namespace, metadata["name"], nodes[node], number, tuple(command), body)
