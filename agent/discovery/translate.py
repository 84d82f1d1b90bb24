"""From Kubernetes objects to our model: the one translator, whatever the source. Pure.

    Pod            -> Workload, and LocalPod if it wants the mesh; without an address StartingPod
    Namespace      -> the default of its pods' wish for the mesh
    Node           -> the locality of its pods
    Service        -> Service
    EndpointSlice  -> the endpoints of a Service
    WorkloadEntry  -> Workload without a node, and endpoints of what selects it, see `entries`
    ServiceEntry   -> Service
    AuthorizationPolicy, PeerAuthentication -> policies, see `policies`

Other kinds are not read. An object that cannot be used is left out and becomes a problem
that names file, object, field and reason; it never disturbs another object. Whoever calls
decides what stays in force instead. One that can do without what is wrong with it is used,
and is a problem in part. Names are checked, because they become parts of identities and of
paths.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from agent.discovery.entries import REDIRECTION as REDIRECTION
from agent.discovery.entries import (
    EntryWorkload,
    ReadService,
    build_endpoint,
    read_labels,
    read_service_entry,
    read_service_selection,
    read_workload_entry,
)
from agent.discovery.fields import (
    LABEL_NAME,
    SUBDOMAIN_NAME,
    UID,
    Field,
    WrongField,
    read_created,
)
from agent.discovery.joining import Joiner, Slice
from agent.discovery.ownership import read_owner
from agent.discovery.policies import (
    DEFAULT_ROOT_NAMESPACE,
    read_authorization_policy,
    read_peer_authentication,
)
from agent.errors import ManifestError
from agent.model.enrollment import DEFAULT_RULES, EnrollmentRules, Refusal
from agent.model.pod import Exclusions, LocalPod
from agent.model.policy import NO_LABELS, PeerAuthentication, Policy
from agent.model.service import Service, ServicePort
from agent.model.starting import StartingPod
from agent.model.workload import NOWHERE, Locality, Workload
from agent.state.store import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from agent.model.pod import Address
    from agent.model.policy import AnyPolicy, Labels

REGION_LABEL, ZONE_LABEL = "topology.kubernetes.io/region", "topology.kubernetes.io/zone"
SERVICE_LABEL = "kubernetes.io/service-name"
SIDECAR_STATUS = "sidecar.istio.io/status"
BYPASS_INBOUND = "ambient.istio.io/bypass-inbound-capture"
DNS_CAPTURE = "ambient.istio.io/dns-capture"
# On what stands at the API server for a pod from a file of the kubelet's: that one's uid, a hash.
MIRROR = "kubernetes.io/config.mirror"
STATIC_UID = re.compile("[0-9a-f]{32}", re.ASCII)
EXCLUDE_OUTBOUND_PORTS = "traffic.sidecar.istio.io/excludeOutboundPorts"
EXCLUDE_OUTBOUND_NETWORKS = "traffic.sidecar.istio.io/excludeOutboundIPRanges"
EXCLUDE_INBOUND_PORTS = "traffic.sidecar.istio.io/excludeInboundPorts"
NO_PORTS: frozenset[int] = frozenset()
# On a pod, or on the root namespace for the whole cluster.
NETWORK = "topology.istio.io/network"
CLUSTER_KINDS = ("Namespace", "Node")  # which are in no namespace themselves
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
    """One object that cannot be used, or in part not, with the parts of its message."""

    def __init__(
        self, file: str, named: str, path: str, detail: str, *, is_partial: bool = False
    ) -> None:
        super().__init__(f"{file}: {named}: {path}: {detail}")
        self.file = file
        self.named = named
        self.path = path
        self.detail = detail
        self.is_partial = is_partial


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
    is_ready: bool

    @property
    def uid(self) -> str:
        return self.workload.uid

    def at(self, locality: Locality) -> _Pod:
        """Return the same pod, on a node that is there."""
        return replace(self, workload=replace(self.workload, locality=locality))


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
        self._localities: dict[str, Locality] = {}  # by the Node's name
        self._services = Joiner()
        self._policies: dict[str, AnyPolicy] = {}
        # What need not be worked out again, by the objects that it came from.
        self._local_pods: dict[str, tuple[_Namespace, LocalPod | Refusal]] = {}
        self.changes = 0  # of what is known: a Node that says again what it said makes none

    def put(self, source: SourcedObject, *, is_new: bool = False) -> ObjectProblem | None:
        """Take an object in place of what is known of it, unless it should be new.

        Return the problem of one that cannot be used: what it said before then stays in force,
        but not what another object of this name said that is gone by now. Of one that can be
        used in part, what can be used is in force, whatever it said before: nothing depends on
        what this agent has seen.
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
        is_said = isinstance(found, Locality) and self._localities.get(named) == found
        if not is_said:
            self.remove(named)
            self.changes += 1
            self._keep(named, found)
        self._origins[named] = (source.file, _uid_of(source.body))
        if not body.excused:
            return None
        first = body.excused[0]
        return ObjectProblem(source.file, named, first.path, first.detail, is_partial=True)

    def remove(self, named: str) -> None:
        """Forget an object, if it is known; `named` is what `describe` says of it."""
        if self._origins.pop(named, None) is None:
            return
        self.changes += 1
        self._namespaces.pop(named, None)
        self._policies.pop(named, None)
        self._local_pods.pop(named, None)
        pod = self._pods.pop(named, None)
        if pod is not None:
            del self._pod_by_uid[pod.uid]
        self._services.remove(named)
        if self._localities.pop(named, None) is not None:
            self._move_pods(named, NOWHERE)

    def names(self, kind: str) -> set[str]:
        """List what is known of a kind, as `describe` names it."""
        return {named for named in self._origins if named.startswith(f"{kind} ")}

    def _keep(self, named: str, found: _Read) -> None:
        match found:
            case None:
                pass
            case Locality():
                self._localities[named] = found
                self._move_pods(named, found)
            case _Pod():
                self._pods[named] = found.at(self._locality(found))
                self._pod_by_uid[found.uid] = named
                if found.is_ready and found.workload.addresses:
                    self._services.put_ready_pod(named, found.workload)
            case EntryWorkload():
                self._services.put_machine(named, found)
            case _Namespace():
                self._namespaces[named] = found
            case ReadService():
                self._services.put_service(named, found)
            case Slice():
                self._services.put_slice(named, found)
            case _:
                self._policies[named] = found

    def _move_pods(self, node: str, locality: Locality) -> None:
        for named, pod in self._pods.items():
            if f"Node {pod.workload.node}" == node and pod.workload.locality != locality:
                self._pods[named] = pod.at(locality)

    def snapshot(self) -> Snapshot:
        """Say what all objects mean together."""
        pods = sorted(self._pods.items(), key=_by_uid)
        local_pods: dict[str, list[LocalPod]] = {}
        starting = []
        refusals: dict[str, Refusal] = {}
        for named, pod in pods:
            judged = self._local_pod(named, pod)
            if isinstance(judged, Refusal):
                refusals[pod.uid] = judged
            if not pod.workload.addresses:
                starting.append(StartingPod(pod.workload, _wanted(judged)))
            elif not isinstance(judged, Refusal):
                local_pods.setdefault(pod.workload.node, []).append(judged)
        own = self._own_network()
        workloads = tuple(
            replace(pod.workload, network="") if pod.workload.network == own else pod.workload
            for _named, pod in pods
            if pod.workload.addresses
        )
        outside, services = self._services.settle(workloads)
        return Snapshot(
            workloads=workloads + outside,
            services=tuple(sorted(services, key=lambda each: each.key)),
            local_pods={node: tuple(group) for node, group in sorted(local_pods.items())},
            policies=tuple(sorted(self._policies.values(), key=lambda policy: policy.key)),
            starting=tuple(starting),
            refusals=refusals,
        )

    def _own_network(self) -> str | None:
        root = self._namespaces.get(f"Namespace {self._root_namespace}", NO_NAMESPACE)
        return dict(root.labels).get(NETWORK)

    def judge(self, body: dict[str, object]) -> StartingPod | None:
        """Say what one pod means beside all that is known, and keep nothing of it.

        None if that is not known: it has no node yet, is none of ours to care for, cannot be used,
        or its namespace is not known.
        """
        try:
            pod = _read_pod(Field(body, ""), self._root_namespace)
        except WrongField:
            return None
        namespace = self._namespaces.get(f"Namespace {pod.local.namespace}") if pod else None
        if pod is None or namespace is None:
            return None
        placed = pod.at(self._locality(pod))
        return StartingPod(placed.workload, _wanted(self._judge(pod, namespace)))

    def _locality(self, pod: _Pod) -> Locality:
        return self._localities.get(f"Node {pod.workload.node}", NOWHERE)

    def _local_pod(self, named: str, pod: _Pod) -> LocalPod | Refusal:
        namespace = self._namespaces.get(f"Namespace {pod.local.namespace}", NO_NAMESPACE)
        known = self._local_pods.get(named)
        if known is not None and known[0] is namespace:
            return known[1]
        local = self._judge(pod, namespace)
        self._local_pods[named] = (namespace, local)
        return local

    def _judge(self, pod: _Pod, namespace: _Namespace) -> LocalPod | Refusal:
        if pod.has_sidecar:
            return Refusal.SIDECAR
        refusal = self._rules.refusal(pod.local.namespace, pod.workload.labels, namespace.labels)
        if refusal is not None:
            return refusal
        word = pod.may_go_direct
        if word is None:
            word = namespace.may_go_direct
        return replace(pod.local, may_go_direct=word is not False)


def _wanted(judged: LocalPod | Refusal) -> LocalPod | None:
    return None if isinstance(judged, Refusal) else judged


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
    if kind not in CLUSTER_KINDS:
        name = f"{metadata.get('namespace') or 'default'}/{name}"
    return f"{kind or 'object'} {name}"


def _uid_of(body: dict[str, object]) -> object:
    metadata = body.get("metadata")
    return metadata.get("uid") if isinstance(metadata, dict) else None


def _by_uid(item: tuple[str, _Pod]) -> str:
    return item[1].uid


def _read_namespace(body: Field, _root_namespace: str) -> _Namespace:
    metadata = body.get("metadata")
    metadata.get("name").name(LABEL_NAME)
    direct_path = metadata.get("annotations").get(DIRECT_PATH)
    return _Namespace(
        read_labels(metadata.get("labels")), direct_path.excuse(_read_direct_path, None)
    )


def _read_node(body: Field, _root_namespace: str) -> Locality:
    metadata = body.get("metadata")
    metadata.get("name").name(SUBDOMAIN_NAME)
    labels = metadata.get("labels")
    return Locality(labels.get(REGION_LABEL).text(""), labels.get(ZONE_LABEL).text(""))


def _read_direct_path(entry: Field) -> bool | None:
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
    labels = read_labels(metadata.get("labels"))
    is_leaving = metadata.get("deletionTimestamp").value is not None
    workload = Workload(
        uid=uid,
        namespace=namespace,
        name=name,
        node=node,
        service_account=account,
        addresses=addresses,
        is_hbone=annotations.get(REDIRECTION).text("") == "enabled",
        labels=labels,
        network=dict(labels).get(NETWORK, ""),
        owner=read_owner(metadata),
        created=metadata.excuse(read_created, ""),
        is_leaving=is_leaving,
    )
    local = LocalPod(
        uid=uid,
        namespace=namespace,
        name=name,
        service_account=account,
        addresses=addresses,
        exclusions=Exclusions(
            outbound_ports=annotations.get(EXCLUDE_OUTBOUND_PORTS).excuse(Field.ports, NO_PORTS),
            outbound_networks=annotations.get(EXCLUDE_OUTBOUND_NETWORKS).excuse(Field.networks, ()),
            inbound_ports=annotations.get(EXCLUDE_INBOUND_PORTS).excuse(Field.ports, NO_PORTS),
        ),
        bypasses_inbound=_read_word(annotations.get(BYPASS_INBOUND)) is True,
        dns_capture=_read_word(annotations.get(DNS_CAPTURE)),
        node_uid=_read_node_uid(annotations.get(MIRROR)),
    )
    may_go_direct = annotations.get(DIRECT_PATH).excuse(_read_direct_path, None)
    has_sidecar = annotations.get(SIDECAR_STATUS).value is not None
    is_ready = not is_leaving and _read_is_ready(status)
    if not node:
        return None
    return _Pod(workload, local, may_go_direct, has_sidecar, is_ready)


def _read_is_ready(status: Field) -> bool:
    """Tell whether a pod is ready; without a word of the kubelet, as in a file, it counts as so."""
    found = [
        item.get("status").text()
        for item in status.get("conditions").items()
        if item.get("type").text("") == "Ready"
    ]
    return found in ([], ["True"])


def _read_word(entry: Field) -> bool | None:
    """Read a boolean as Go does; what is none counts as absent, as in Istio."""
    return GO_WORDS.get(entry.value) if isinstance(entry.value, str) else None


def _read_node_uid(entry: Field) -> str:
    """Read the hash of a static pod; never what could be another pod's uid at the API server."""
    is_hash = isinstance(entry.value, str) and STATIC_UID.fullmatch(entry.value)
    return entry.text() if is_hash else ""


def _read_pod_addresses(status: Field) -> tuple[Address, ...]:
    addresses = tuple(item.get("ip").address() for item in status.get("podIPs").items())
    if not addresses and status.get("podIP").text(""):
        addresses = (status.get("podIP").address(),)
    return addresses


def _read_service(body: Field, _root_namespace: str) -> ReadService:
    metadata, spec, status = body.get("metadata"), body.get("spec"), body.get("status")
    namespace = metadata.get("namespace").name(LABEL_NAME, "default")
    name = metadata.get("name").name(SUBDOMAIN_NAME)
    clusters = [*spec.get("clusterIPs").items()] or [spec.get("clusterIP")]
    ports = tuple(
        ServicePort(item.get("name").text(""), item.get("port").port())
        for item in spec.get("ports").items()
        if item.get("protocol").text("TCP") == "TCP"
    )
    addresses = tuple(item.address() for item in clusters if item.text("") not in {"", "None"})
    # What goes to one in mode Proxy goes there (KEP-1860); one may also have a name alone.
    balanced = tuple(
        item.get("ip").address()
        for item in status.get("loadBalancer").get("ingress").items()
        if item.get("ip").text("") and item.get("ipMode").text("VIP") != "Proxy"
    )
    is_local = spec.get("internalTrafficPolicy").text("Cluster") == "Local"
    service = Service(namespace, name, addresses, ports, (), balanced=balanced, is_local=is_local)
    return ReadService(service, read_service_selection(spec))


def _read_endpoint_slice(body: Field, _root_namespace: str) -> Slice | None:
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
    endpoints = tuple(
        build_endpoint(
            address.address(), ports, item.get("nodeName").text(""), is_leaving=not is_ready
        )
        for item in body.get("endpoints").items()
        for conditions in (item.get("conditions"),)
        for is_ready in (conditions.get("ready").flag(default=True),)
        if is_ready or _is_leaving(conditions)
        for address in item.get("addresses").items()
    )
    return Slice((namespace, service), endpoints)


def _is_leaving(conditions: Field) -> bool:
    """Tell whether what is not ready is so because it is to end, and still serves."""
    serving, terminating = conditions.get("serving"), conditions.get("terminating")
    return serving.flag(default=False) and terminating.flag(default=False)


_Read = (
    _Pod
    | _Namespace
    | Locality
    | ReadService
    | EntryWorkload
    | Slice
    | Policy
    | PeerAuthentication
    | None
)

READERS: dict[tuple[str, str], Callable[[Field, str], _Read]] = {
    ("v1", "Pod"): _read_pod,
    ("v1", "Namespace"): _read_namespace,
    ("v1", "Node"): _read_node,
    ("v1", "Service"): _read_service,
    ("discovery.k8s.io/v1", "EndpointSlice"): _read_endpoint_slice,
    **{
        (f"networking.istio.io/{version}", kind): read
        for version in ("v1", "v1beta1", "v1alpha3")
        for kind, read in (
            ("ServiceEntry", read_service_entry),
            ("WorkloadEntry", read_workload_entry),
        )
    },
    ("security.istio.io/v1", "AuthorizationPolicy"): read_authorization_policy,
    ("security.istio.io/v1beta1", "AuthorizationPolicy"): read_authorization_policy,
    ("security.istio.io/v1", "PeerAuthentication"): read_peer_authentication,
    ("security.istio.io/v1beta1", "PeerAuthentication"): read_peer_authentication,
}
