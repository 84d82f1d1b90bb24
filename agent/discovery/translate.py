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

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from agent.discovery.fields import LABEL_NAME, SUBDOMAIN_NAME, UID, Field, WrongField
from agent.discovery.ownership import read_owner
from agent.discovery.policies import (
    DEFAULT_ROOT_NAMESPACE,
    read_authorization_policy,
    read_peer_authentication,
)
from agent.errors import ManifestError
from agent.model.enrollment import DEFAULT_RULES, EnrollmentRules
from agent.model.pod import Exclusions, LocalPod
from agent.model.policy import NO_LABELS, PeerAuthentication, Policy
from agent.model.service import Endpoint, Service, ServicePort
from agent.model.workload import Workload
from agent.state.store import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from agent.model.pod import Address
    from agent.model.policy import AnyPolicy, Labels

    ServiceKey = tuple[str, str]

SERVICE_LABEL = "kubernetes.io/service-name"
REDIRECTION = "ambient.istio.io/redirection"
SIDECAR_STATUS = "sidecar.istio.io/status"
BYPASS_INBOUND = "ambient.istio.io/bypass-inbound-capture"
DNS_CAPTURE = "ambient.istio.io/dns-capture"
EXCLUDE_OUTBOUND_PORTS = "traffic.sidecar.istio.io/excludeOutboundPorts"
EXCLUDE_OUTBOUND_NETWORKS = "traffic.sidecar.istio.io/excludeOutboundIPRanges"
EXCLUDE_INBOUND_PORTS = "traffic.sidecar.istio.io/excludeInboundPorts"
# On a pod or, for all its pods, on a namespace; the pod's own word counts.
DIRECT_PATH = "sidestep.io/direct-path"
DIRECT_PATH_WORDS = {"": None, "enabled": True, "disabled": False}
# What Go's strconv.ParseBool takes.
GO_WORDS = dict.fromkeys(("1", "t", "T", "TRUE", "true", "True"), True) | dict.fromkeys(
    ("0", "f", "F", "FALSE", "false", "False"), False
)


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
class _Namespace:
    labels: Labels
    may_go_direct: bool | None


NO_NAMESPACE = _Namespace(NO_LABELS, None)


@dataclass(frozen=True, slots=True)
class _Pod:
    workload: Workload
    local: LocalPod
    may_go_direct: bool | None
    has_sidecar: bool

    @property
    def uid(self) -> str:
        return self.workload.uid


@dataclass(frozen=True, slots=True)
class _Slice:
    service: ServiceKey
    endpoints: dict[Address, dict[str, int]]


class Translator:
    """Keeps what each object means, and never the object itself: a cluster has many."""

    def __init__(
        self,
        root_namespace: str = DEFAULT_ROOT_NAMESPACE,
        rules: EnrollmentRules = DEFAULT_RULES,
    ) -> None:
        self._root_namespace = root_namespace
        self._rules = rules
        self._origins: dict[str, tuple[str, object]] = {}  # file and uid
        self._pod_by_uid: dict[str, str] = {}
        self._pods: dict[str, _Pod] = {}
        self._namespaces: dict[str, _Namespace] = {}
        self._services: dict[str, Service] = {}
        self._slices: dict[str, _Slice] = {}
        self._slices_of: dict[ServiceKey, dict[str, _Slice]] = {}
        self._policies: dict[str, AnyPolicy] = {}
        # What need not be worked out again, by the objects that it came from.
        self._local_pods: dict[str, tuple[_Namespace, LocalPod | None]] = {}
        self._whole_services: dict[ServiceKey, Service] = {}

    def put(self, source: SourcedObject, *, is_new: bool = False) -> ObjectProblem | None:
        """Take an object in place of what is known of it, unless it should be new.

        Return the problem of one that cannot be used: what it said before then stays in force,
        but not what another object of this name said that is gone by now.
        """
        body = Field(source.body, "")
        named = describe(source.body)
        try:
            read = READERS.get((body.get("apiVersion").text(), body.get("kind").text()))
            if read is None:
                return None
            metadata = body.get("metadata")
            if is_new and named in self._origins:
                file, _uid = self._origins[named]
                raise metadata.get("name").wrong(f"is defined in {file} already")
            found = read(body, self._root_namespace)
            if isinstance(found, _Pod) and self._pod_by_uid.get(found.uid, named) != named:
                raise metadata.get("uid").wrong("belongs to another pod already")
        except WrongField as wrong:
            if not is_new and self._origins.get(named, ("", None))[1] != _uid_of(source.body):
                self.remove(named)
            return ObjectProblem(source.file, named, wrong.path, wrong.detail)
        self.remove(named)
        self._origins[named] = (source.file, _uid_of(source.body))
        self._keep(named, found)
        return None

    def remove(self, named: str) -> None:
        """Forget an object, if it is known; `named` is what `describe` says of it."""
        self._origins.pop(named, None)
        self._namespaces.pop(named, None)
        self._policies.pop(named, None)
        self._local_pods.pop(named, None)
        pod = self._pods.pop(named, None)
        if pod is not None:
            del self._pod_by_uid[pod.uid]
        service = self._services.pop(named, None)
        if service is not None:
            self._whole_services.pop((service.namespace, service.name), None)
        part = self._slices.pop(named, None)
        if part is not None:
            self._whole_services.pop(part.service, None)
            others = self._slices_of[part.service]
            del others[named]
            if not others:
                del self._slices_of[part.service]

    def names(self, kind: str) -> set[str]:
        """List what is known of a kind, as `describe` names it."""
        return {named for named in self._origins if named.startswith(f"{kind} ")}

    def _keep(self, named: str, found: _Read) -> None:
        match found:
            case None:
                pass
            case _Pod():
                self._pods[named] = found
                self._pod_by_uid[found.uid] = named
            case _Namespace():
                self._namespaces[named] = found
            case Service():
                self._services[named] = found
            case _Slice():
                self._slices[named] = found
                self._slices_of.setdefault(found.service, {})[named] = found
                self._whole_services.pop(found.service, None)
            case _:
                self._policies[named] = found

    def snapshot(self) -> Snapshot:
        """Say what all objects mean together."""
        pods = sorted(self._pods.items(), key=_by_uid)
        local_pods: dict[str, list[LocalPod]] = {}
        for named, pod in pods:
            local = self._local_pod(named, pod)
            if local is not None:
                local_pods.setdefault(pod.workload.node, []).append(local)
        services = [self._whole_service(service) for service in self._services.values()]
        return Snapshot(
            workloads=tuple(pod.workload for _named, pod in pods),
            services=tuple(sorted(services, key=lambda each: (each.namespace, each.name))),
            local_pods={node: tuple(group) for node, group in sorted(local_pods.items())},
            policies=tuple(sorted(self._policies.values(), key=lambda policy: policy.key)),
        )

    def _local_pod(self, named: str, pod: _Pod) -> LocalPod | None:
        namespace = self._namespaces.get(f"Namespace {pod.local.namespace}", NO_NAMESPACE)
        known = self._local_pods.get(named)
        if known is not None and known[0] is namespace:
            return known[1]
        local = None
        if not pod.has_sidecar and self._rules.wants(
            pod.local.namespace, pod.workload.labels, namespace.labels
        ):
            word = pod.may_go_direct
            if word is None:
                word = namespace.may_go_direct
            local = replace(pod.local, may_go_direct=word is not False)
        self._local_pods[named] = (namespace, local)
        return local

    def _whole_service(self, service: Service) -> Service:
        key = (service.namespace, service.name)
        whole = self._whole_services.get(key)
        if whole is None:
            # One endpoint may be in several slices for a while (KEP-752), and is one endpoint.
            merged: dict[Address, dict[str, int]] = {}
            for part in self._slices_of.get(key, {}).values():
                for address, ports in part.endpoints.items():
                    merged.setdefault(address, {}).update(ports)
            endpoints = tuple(
                Endpoint(address, tuple(sorted(ports.items())))
                for address, ports in sorted(
                    merged.items(), key=lambda item: (item[0].version, item[0].packed)
                )
            )
            whole = self._whole_services[key] = replace(service, endpoints=endpoints)
        return whole


def translate(
    objects: Iterable[SourcedObject],
    root_namespace: str = DEFAULT_ROOT_NAMESPACE,
    rules: EnrollmentRules = DEFAULT_RULES,
) -> Translation:
    """Translate all objects of a source; of two objects with one name the first is used.

    Policies in `root_namespace` are about the whole mesh.
    """
    translator = Translator(root_namespace, rules)
    problems = [translator.put(source, is_new=True) for source in objects]
    found = tuple(problem for problem in problems if problem is not None)
    return Translation(translator.snapshot(), found)


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


def _uid_of(body: dict[str, object]) -> object:
    metadata = body.get("metadata")
    return metadata.get("uid") if isinstance(metadata, dict) else None


def _by_uid(item: tuple[str, _Pod]) -> str:
    return item[1].uid


def _read_labels(metadata: Field) -> Labels:
    return frozenset((str(name), item.text()) for name, item in metadata.get("labels").members())


def _read_namespace(body: Field, _root_namespace: str) -> _Namespace:
    metadata = body.get("metadata")
    metadata.get("name").name(LABEL_NAME)
    return _Namespace(_read_labels(metadata), _read_direct_path(metadata.get("annotations")))


def _read_direct_path(annotations: Field) -> bool | None:
    entry = annotations.get(DIRECT_PATH)
    if entry.text("") not in DIRECT_PATH_WORDS:
        raise entry.wrong(f"must be enabled or disabled, not {entry.value!r}")
    return DIRECT_PATH_WORDS[entry.text("")]


def _read_pod(body: Field, _root_namespace: str) -> _Pod | None:
    metadata, spec, status = body.get("metadata"), body.get("spec"), body.get("status")
    annotations = metadata.get("annotations")
    uid = metadata.get("uid").name(UID)
    namespace = metadata.get("namespace").name(LABEL_NAME, "default")
    name = metadata.get("name").name(SUBDOMAIN_NAME)
    node = spec.get("nodeName").text("")
    account = spec.get("serviceAccountName").name(SUBDOMAIN_NAME, "default")
    # A pod of the host's network shares the node's addresses, and one that ended may see
    # its own given to another pod: neither can be known by address. What else one says that
    # ended does not matter, it leaves in any case.
    is_on_host = spec.get("hostNetwork").flag(default=False)
    has_ended = status.get("phase").text("") in {"Succeeded", "Failed"}
    if is_on_host or has_ended:
        return None
    addresses = _read_pod_addresses(status)
    workload = Workload(
        uid=uid,
        namespace=namespace,
        name=name,
        node=node,
        service_account=account,
        addresses=addresses,
        is_hbone=annotations.get(REDIRECTION).text("") == "enabled",
        labels=_read_labels(metadata),
        owner=read_owner(metadata),
    )
    local = LocalPod(
        uid=uid,
        namespace=namespace,
        name=name,
        service_account=account,
        addresses=addresses,
        exclusions=Exclusions(
            outbound_ports=annotations.get(EXCLUDE_OUTBOUND_PORTS).ports(),
            outbound_networks=annotations.get(EXCLUDE_OUTBOUND_NETWORKS).networks(),
            inbound_ports=annotations.get(EXCLUDE_INBOUND_PORTS).ports(),
        ),
        bypasses_inbound=_read_word(annotations.get(BYPASS_INBOUND)) is True,
        dns_capture=_read_word(annotations.get(DNS_CAPTURE)),
    )
    may_go_direct = _read_direct_path(annotations)
    has_sidecar = annotations.get(SIDECAR_STATUS).value is not None
    if not addresses or not node:
        return None
    return _Pod(workload, local, may_go_direct, has_sidecar)


def _read_word(entry: Field) -> bool | None:
    """Read a boolean as Go does; what is none counts as absent, as in Istio."""
    return GO_WORDS.get(entry.value) if isinstance(entry.value, str) else None


def _read_pod_addresses(status: Field) -> tuple[Address, ...]:
    addresses = tuple(item.get("ip").address() for item in status.get("podIPs").items())
    if not addresses and status.get("podIP").text(""):
        addresses = (status.get("podIP").address(),)
    return addresses


def _read_service(body: Field, _root_namespace: str) -> Service:
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
    return Service(namespace, name, addresses, ports, ())


def _read_endpoint_slice(body: Field, _root_namespace: str) -> _Slice | None:
    metadata = body.get("metadata")
    namespace = metadata.get("namespace").name(LABEL_NAME, "default")
    metadata.get("name").name(SUBDOMAIN_NAME)
    service = metadata.get("labels").get(SERVICE_LABEL).text("")
    if not service or body.get("addressType").text() == "FQDN":
        return None
    # A slice's port without a number means every port, which a Service cannot lead to.
    ports = {
        item.get("name").text(""): item.get("port").port()
        for item in body.get("ports").items()
        if item.get("protocol").text("TCP") == "TCP" and item.get("port").value is not None
    }
    endpoints = {
        address.address(): ports
        for item in body.get("endpoints").items()
        if item.get("conditions").get("ready").flag(default=True)
        for address in item.get("addresses").items()
    }
    return _Slice((namespace, service), endpoints)


_Read = _Pod | _Namespace | Service | _Slice | Policy | PeerAuthentication | None

READERS: dict[tuple[str, str], Callable[[Field, str], _Read]] = {
    ("v1", "Pod"): _read_pod,
    ("v1", "Namespace"): _read_namespace,
    ("v1", "Service"): _read_service,
    ("discovery.k8s.io/v1", "EndpointSlice"): _read_endpoint_slice,
    ("security.istio.io/v1", "AuthorizationPolicy"): read_authorization_policy,
    ("security.istio.io/v1beta1", "AuthorizationPolicy"): read_authorization_policy,
    ("security.istio.io/v1", "PeerAuthentication"): read_peer_authentication,
    ("security.istio.io/v1beta1", "PeerAuthentication"): read_peer_authentication,
}
