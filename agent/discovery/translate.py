"""From Kubernetes objects to our model: the one translator, whatever the source. Pure.

    Pod            -> Workload, and LocalPod if it wants the mesh
    Namespace      -> the default of its pods' wish for the mesh
    Service        -> Service
    EndpointSlice  -> the endpoints of a Service
    AuthorizationPolicy, PeerAuthentication -> policies, see `policies`

Other kinds are not read. An object that cannot be used is left out and becomes a problem
that names file, object, field and reason; it never disturbs another object. Whoever calls
decides what stays in force instead. Names are checked, because they become parts of
identities and of paths.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from agent.discovery.fields import LABEL_NAME, SUBDOMAIN_NAME, UID, Field, WrongField
from agent.discovery.policies import (
    DEFAULT_ROOT_NAMESPACE,
    read_authorization_policy,
    read_peer_authentication,
)
from agent.errors import ManifestError
from agent.model.pod import Exclusions, LocalPod
from agent.model.service import Endpoint, Service, ServicePort
from agent.model.workload import Workload
from agent.state.store import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from agent.model.pod import Address
    from agent.model.policy import AnyPolicy

MODE_LABEL = "istio.io/dataplane-mode"
SERVICE_LABEL = "kubernetes.io/service-name"
REDIRECTION = "ambient.istio.io/redirection"
EXCLUDE_OUTBOUND_PORTS = "traffic.sidecar.istio.io/excludeOutboundPorts"
EXCLUDE_OUTBOUND_NETWORKS = "traffic.sidecar.istio.io/excludeOutboundIPRanges"
EXCLUDE_INBOUND_PORTS = "traffic.sidecar.istio.io/excludeInboundPorts"
# On a pod or, for all its pods, on a namespace; the pod's own word counts.
DIRECT_PATH = "sidestep.io/direct-path"
DIRECT_PATH_WORDS = {"": None, "enabled": True, "disabled": False}


@dataclass(frozen=True, slots=True)
class SourcedObject:
    """A Kubernetes object, and the file or other place that it came from."""

    file: str
    body: dict[str, object]


@dataclass(frozen=True, slots=True)
class Translation:
    """What the objects mean, and which of them could not be used."""

    snapshot: Snapshot
    problems: tuple[ObjectProblem, ...]


class ObjectProblem(ManifestError):
    """One object that cannot be used, with the parts of its message."""

    def __init__(self, file: str, named: str, path: str, detail: str) -> None:
        super().__init__(f"{file}: {named}: {path}: {detail}")
        self.file = file
        self.named = named
        self.path = path
        self.detail = detail


@dataclass(frozen=True, slots=True)
class _Pod:
    workload: Workload
    mode: str
    exclusions: Exclusions
    may_go_direct: bool | None


@dataclass(slots=True)
class _Gathered:
    """What was read so far, by the key under which Kubernetes knows it."""

    pods: dict[str, _Pod] = field(default_factory=dict)
    modes: dict[str, str] = field(default_factory=dict)
    may_go_direct: dict[str, bool | None] = field(default_factory=dict)
    services: dict[tuple[str, str], Service] = field(default_factory=dict)
    endpoints: dict[tuple[str, str], dict[Address, dict[str, int]]] = field(default_factory=dict)
    root_namespace: str = DEFAULT_ROOT_NAMESPACE
    policies: list[AnyPolicy] = field(default_factory=list)


def translate(
    objects: Iterable[SourcedObject], root_namespace: str = DEFAULT_ROOT_NAMESPACE
) -> Translation:
    """Translate all objects of a source; of two objects with one name the first is used.

    Policies in `root_namespace` are about the whole mesh.
    """
    gathered = _Gathered(root_namespace=root_namespace)
    problems: list[ObjectProblem] = []
    seen: dict[str, str] = {}
    for source in objects:
        body = Field(source.body, "")
        named = describe(source.body)
        try:
            read = READERS.get((body.get("apiVersion").text(), body.get("kind").text()))
            if read is None:
                continue
            if named in seen:
                raise body.get("metadata").get("name").wrong(f"is defined in {seen[named]} already")
            read(body, gathered)
            seen[named] = source.file
        except WrongField as wrong:
            problems.append(ObjectProblem(source.file, named, wrong.path, wrong.detail))
    return Translation(_build_snapshot(gathered), tuple(problems))


def describe(body: dict[str, object]) -> str:
    """Name an object for a person, whatever is wrong with it: `Pod shop/cart-0`."""
    kind = body.get("kind")
    metadata = body.get("metadata")
    if not isinstance(metadata, dict):
        metadata = {}
    name = metadata.get("name") or "?"
    if kind != "Namespace":
        name = f"{metadata.get('namespace') or 'default'}/{name}"
    return f"{kind or 'object'} {name}"


def _build_snapshot(gathered: _Gathered) -> Snapshot:
    pods = sorted(gathered.pods.values(), key=lambda pod: pod.workload.uid)
    local_pods: dict[str, list[LocalPod]] = {}
    for pod in pods:
        workload = pod.workload
        if (pod.mode or gathered.modes.get(workload.namespace)) != "ambient":
            continue
        word = pod.may_go_direct
        if word is None:
            word = gathered.may_go_direct.get(workload.namespace)
        local_pods.setdefault(workload.node, []).append(
            LocalPod(
                uid=workload.uid,
                namespace=workload.namespace,
                name=workload.name,
                service_account=workload.service_account,
                addresses=workload.addresses,
                exclusions=pod.exclusions,
                may_go_direct=word is not False,
            )
        )
    services = []
    for key, service in sorted(gathered.services.items()):
        endpoints = tuple(
            Endpoint(address, tuple(sorted(ports.items())))
            for address, ports in sorted(
                gathered.endpoints.get(key, {}).items(),
                key=lambda item: (item[0].version, item[0].packed),
            )
        )
        services.append(replace(service, endpoints=endpoints))
    return Snapshot(
        workloads=tuple(pod.workload for pod in pods),
        services=tuple(services),
        local_pods={node: tuple(group) for node, group in sorted(local_pods.items())},
        policies=tuple(sorted(gathered.policies, key=lambda policy: policy.key)),
    )


def _read_namespace(body: Field, gathered: _Gathered) -> None:
    metadata = body.get("metadata")
    name = metadata.get("name").name(LABEL_NAME)
    may_go_direct = _read_direct_path(metadata.get("annotations"))
    gathered.modes[name] = metadata.get("labels").get(MODE_LABEL).text("")
    gathered.may_go_direct[name] = may_go_direct


def _read_direct_path(annotations: Field) -> bool | None:
    entry = annotations.get(DIRECT_PATH)
    if entry.text("") not in DIRECT_PATH_WORDS:
        raise entry.wrong(f"must be enabled or disabled, not {entry.value!r}")
    return DIRECT_PATH_WORDS[entry.text("")]


def _read_pod(body: Field, gathered: _Gathered) -> None:
    metadata, spec, status = body.get("metadata"), body.get("spec"), body.get("status")
    annotations = metadata.get("annotations")
    uid = metadata.get("uid").name(UID)
    mode = metadata.get("labels").get(MODE_LABEL).text("")
    workload = Workload(
        uid=uid,
        namespace=metadata.get("namespace").name(LABEL_NAME, "default"),
        name=metadata.get("name").name(SUBDOMAIN_NAME),
        node=spec.get("nodeName").text(""),
        service_account=spec.get("serviceAccountName").name(SUBDOMAIN_NAME, "default"),
        addresses=_read_pod_addresses(status),
        is_hbone=annotations.get(REDIRECTION).text("") == "enabled",
        labels=frozenset(
            (str(name), item.text()) for name, item in metadata.get("labels").members()
        ),
    )
    exclusions = Exclusions(
        outbound_ports=annotations.get(EXCLUDE_OUTBOUND_PORTS).ports(),
        outbound_networks=annotations.get(EXCLUDE_OUTBOUND_NETWORKS).networks(),
        inbound_ports=annotations.get(EXCLUDE_INBOUND_PORTS).ports(),
    )
    may_go_direct = _read_direct_path(annotations)
    if uid in gathered.pods:
        raise metadata.get("uid").wrong("belongs to another pod already")
    # A pod of the host's network shares the node's addresses, and one that ended may see
    # its own given to another pod: neither can be known by address.
    is_on_host = spec.get("hostNetwork").flag(default=False)
    has_ended = status.get("phase").text("") in {"Succeeded", "Failed"}
    if is_on_host or has_ended or not workload.addresses or not workload.node:
        return
    # As Istio has it: a value that is neither leaves the choice to the namespace.
    known_mode = mode if mode in {"ambient", "none"} else ""
    gathered.pods[uid] = _Pod(workload, known_mode, exclusions, may_go_direct)


def _read_pod_addresses(status: Field) -> tuple[Address, ...]:
    addresses = tuple(item.get("ip").address() for item in status.get("podIPs").items())
    if not addresses and status.get("podIP").text(""):
        addresses = (status.get("podIP").address(),)
    return addresses


def _read_service(body: Field, gathered: _Gathered) -> None:
    metadata, spec = body.get("metadata"), body.get("spec")
    namespace = metadata.get("namespace").name(LABEL_NAME, "default")
    name = metadata.get("name").name(SUBDOMAIN_NAME)
    clusters = [*spec.get("clusterIPs").items()] or [spec.get("clusterIP")]
    ports = tuple(
        ServicePort(item.get("name").text(""), item.get("port").port())
        for item in spec.get("ports").items()
        if item.get("protocol").text("TCP") == "TCP"
    )
    addresses = tuple(item.address() for item in clusters if item.text("") not in {"", "None"})
    gathered.services[namespace, name] = Service(namespace, name, addresses, ports, ())


def _read_endpoint_slice(body: Field, gathered: _Gathered) -> None:
    metadata = body.get("metadata")
    namespace = metadata.get("namespace").name(LABEL_NAME, "default")
    metadata.get("name").name(SUBDOMAIN_NAME)
    service = metadata.get("labels").get(SERVICE_LABEL).text("")
    if not service or body.get("addressType").text() == "FQDN":
        return
    # A slice's port without a number means every port, which a Service cannot lead to.
    ports = {
        item.get("name").text(""): item.get("port").port()
        for item in body.get("ports").items()
        if item.get("protocol").text("TCP") == "TCP" and item.get("port").value is not None
    }
    ready = [
        address.address()
        for item in body.get("endpoints").items()
        if item.get("conditions").get("ready").flag(default=True)
        for address in item.get("addresses").items()
    ]
    # One endpoint may be in several slices for a while (KEP-752), and is one endpoint.
    endpoints = gathered.endpoints.setdefault((namespace, service), {})
    for address in ready:
        endpoints.setdefault(address, {}).update(ports)


def _read_authorization_policy(body: Field, gathered: _Gathered) -> None:
    gathered.policies.append(read_authorization_policy(body, gathered.root_namespace))


def _read_peer_authentication(body: Field, gathered: _Gathered) -> None:
    gathered.policies.append(read_peer_authentication(body, gathered.root_namespace))


READERS: dict[tuple[str, str], Callable[[Field, _Gathered], None]] = {
    ("v1", "Pod"): _read_pod,
    ("v1", "Namespace"): _read_namespace,
    ("v1", "Service"): _read_service,
    ("discovery.k8s.io/v1", "EndpointSlice"): _read_endpoint_slice,
    ("security.istio.io/v1", "AuthorizationPolicy"): _read_authorization_policy,
    ("security.istio.io/v1beta1", "AuthorizationPolicy"): _read_authorization_policy,
    ("security.istio.io/v1", "PeerAuthentication"): _read_peer_authentication,
    ("security.istio.io/v1beta1", "PeerAuthentication"): _read_peer_authentication,
}
