"""ServiceEntry and WorkloadEntry: what is in the mesh and no pod, read as ambient mesh does. Pure.

    WorkloadEntry   a machine: a Workload with an identity, an address and labels, but no node
    ServiceEntry    a service by host names: its own endpoints, or a selector

A selector is about WorkloadEntries, and for a ServiceEntry also about pods, of its own namespace; a
Service selects WorkloadEntries as well. A selected WorkloadEntry may name other ports than those of
the service.

    resolution STATIC      the endpoints that are addresses
    resolution DNS         the same, if the entry names some; a host name is not resolved here
    resolution NONE        nothing: each address is its own endpoint, as all that nobody claims is

What would need names to be resolved or a gateway to another network is refused, so that it shows.
`location` and `exportTo` make no difference, as in ambient mesh. Called by `translate`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_interface
from typing import TYPE_CHECKING

from agent.discovery.fields import LABEL_NAME, SUBDOMAIN_NAME, Field, read_created
from agent.model.service import Endpoint, Service, ServicePort
from agent.model.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from agent.model.pod import Address
    from agent.model.policy import Labels

REDIRECTION = "ambient.istio.io/redirection"
# On what is no pod: who is there speaks HBONE.
TUNNEL_LABEL, HTTP_TUNNEL = "networking.istio.io/tunnel", "http"
RESOLUTIONS = ("NONE", "STATIC", "DNS", "DNS_ROUND_ROBIN", "DYNAMIC_DNS")
HOST = re.compile(r"(\*\.)?[A-Za-z0-9]([-A-Za-z0-9.]{0,251}[A-Za-z0-9])?", re.ASCII)
NAME_IN_PLACE_OF_AN_ADDRESS = "is a name; only an IP address can be used, names are not resolved"


@dataclass(frozen=True, slots=True)
class Target:
    """Where a port of a service leads on what its selector finds."""

    name: str  # of the service's port
    entry_name: str  # of a WorkloadEntry's port, which comes first
    port: int | None  # otherwise


@dataclass(frozen=True, slots=True)
class Selection:
    """What a service selects by labels that must all be there, and where its ports lead then."""

    labels: Labels
    targets: tuple[Target, ...]

    def ports(self, named: Mapping[str, int]) -> dict[str, int]:
        """Return the ports of a selected workload which names `named`."""
        found = ((each.name, named.get(each.entry_name, each.port)) for each in self.targets)
        return {name: port for name, port in found if port is not None}


@dataclass(frozen=True, slots=True)
class EntryWorkload:
    """A WorkloadEntry."""

    workload: Workload
    ports: dict[str, int]


@dataclass(frozen=True, slots=True)
class ReadService:
    """A Service or ServiceEntry: its own endpoints, and what it selects besides."""

    service: Service
    selection: Selection | None = None
    selects_pods: bool = False
    workloads: tuple[Workload, ...] = ()  # endpoints that are in the mesh
    created: str = field(default="", compare=False)


def read_labels(labels: Field) -> Labels:
    """Read a mapping of labels."""
    return frozenset((str(name), item.text()) for name, item in labels.members())


def read_workload_entry(body: Field, _root_namespace: str) -> EntryWorkload:
    """Read a WorkloadEntry (WrongField)."""
    metadata, spec = body.get("metadata"), body.get("spec")
    namespace = metadata.get("namespace").name(LABEL_NAME, "default")
    name = metadata.get("name").name(SUBDOMAIN_NAME)
    # The labels are in two places, and those of the object come first.
    own = read_labels(metadata.get("labels"))
    taken = {key for key, _value in own}
    labels = own | {each for each in read_labels(spec.get("labels")) if each[0] not in taken}
    address = _read_address(spec)
    if address is None:
        raise spec.get("address").wrong(NAME_IN_PLACE_OF_AN_ADDRESS)
    workload = Workload(
        uid=f"WorkloadEntry/{namespace}/{name}",
        namespace=namespace,
        name=name,
        node="",
        service_account=_read_account(spec),
        addresses=(address,),
        is_hbone=_is_hbone(labels, metadata),
        labels=labels,
    )
    return EntryWorkload(workload, _read_ports(spec))


def read_service_entry(body: Field, _root_namespace: str) -> ReadService | None:
    """Read a ServiceEntry (WrongField); None if it changes nothing about where connections go."""
    metadata, spec = body.get("metadata"), body.get("spec")
    namespace = metadata.get("namespace").name(LABEL_NAME, "default")
    name = metadata.get("name").name(SUBDOMAIN_NAME)
    hosts = tuple(item.name(HOST) for item in spec.get("hosts").items())
    if not hosts:
        raise spec.get("hosts").wrong("is required")
    resolution = spec.get("resolution").text("NONE")
    if resolution not in RESOLUTIONS:
        raise spec.get("resolution").wrong(f"must be one of {', '.join(RESOLUTIONS)}")
    if resolution == "NONE":
        return None
    targets = _read_targets(spec.get("ports"))
    ports = tuple(ServicePort(target.name, number) for target, number in targets)
    selector = read_labels(spec.get("workloadSelector").get("labels"))
    selection = Selection(selector, tuple(target for target, _number in targets))
    endpoints, workloads = _read_endpoints(body, namespace, name, selection)
    addresses = _read_addresses(body)
    needs_names = resolution != "STATIC" and not endpoints and not selector
    if needs_names and spec.get("addresses").value:
        raise spec.get("resolution").wrong(
            f"{resolution} would need names to be resolved, which is not done here; "
            "name endpoints by address, or leave out the addresses"
        )
    if needs_names:
        return None
    return ReadService(
        Service(namespace, name, addresses, ports, endpoints, "ServiceEntry", hosts),
        selection if selector else None,
        selects_pods=True,
        workloads=workloads,
        created=read_created(metadata),
    )


def read_service_selection(spec: Field) -> Selection | None:
    """Read what a Service selects, and where its ports lead on a WorkloadEntry."""
    selector = read_labels(spec.get("selector"))
    if not selector:
        return None
    targets = []
    for item in spec.get("ports").items():
        if item.get("protocol").text("TCP") != "TCP":
            continue
        name, target = item.get("name").text(""), item.get("targetPort")
        if isinstance(target.value, str):
            targets.append(Target(name, target.value, None))
        else:
            number = item.get("port") if target.value is None else target
            targets.append(Target(name, "", number.port()))
    return Selection(selector, tuple(targets))


def build_endpoint(
    address: Address, ports: Mapping[str, int], node: str = "", *, is_leaving: bool = False
) -> Endpoint:
    """Make an endpoint with its ports in order."""
    return Endpoint(address, tuple(sorted(ports.items())), node, is_leaving)


def merge(found: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
    """Join endpoints; an address that is there several times is one endpoint."""
    merged: dict[Address, Endpoint] = {}
    for endpoint in found:
        other = merged.get(endpoint.address)
        merged[endpoint.address] = endpoint if other is None else _join(other, endpoint)
    return tuple(
        sorted(merged.values(), key=lambda each: (each.address.version, each.address.packed))
    )


def _join(one: Endpoint, other: Endpoint) -> Endpoint:
    ports = dict(one.ports) | dict(other.ports)
    is_leaving = one.is_leaving and other.is_leaving
    return build_endpoint(one.address, ports, one.node or other.node, is_leaving=is_leaving)


def unclaimed(workload: Workload, taken: set[Address]) -> Workload | None:
    """Leave a workload the addresses that nobody has, and take them; None if it has none then."""
    addresses = tuple(address for address in workload.addresses if address not in taken)
    taken.update(addresses)
    if not addresses:
        return None
    return workload if addresses == workload.addresses else replace(workload, addresses=addresses)


def _read_address(spec: Field) -> Address | None:
    """Read where an endpoint is; None if that is a name."""
    network, address = spec.get("network"), spec.get("address")
    if network.text(""):
        raise network.wrong(f"{network.value!r}: gateways to other networks are not used here")
    text = address.text()
    try:
        return ip_address(text)
    except ValueError:
        if text.startswith("unix://"):
            raise address.wrong("sockets of a machine's own cannot be reached") from None
        if not HOST.fullmatch(text):
            raise address.wrong(f"{text!r} is neither an IP address nor a host name") from None
        return None


def _read_account(spec: Field) -> str:
    # An empty one is the namespace's default account, as ztunnel has it.
    account = spec.get("serviceAccount")
    return account.name(SUBDOMAIN_NAME) if account.text("") else "default"


def _read_ports(spec: Field) -> dict[str, int]:
    return {str(name): item.port() for name, item in spec.get("ports").members()}


def _is_hbone(labels: Labels, metadata: Field) -> bool:
    words = next((value for key, value in labels if key == TUNNEL_LABEL), "")
    says = metadata.get("annotations").get(REDIRECTION).text("")
    return says == "enabled" or HTTP_TUNNEL in words.split(",")


def _read_targets(ports: Field) -> list[tuple[Target, int]]:
    targets, names = [], set()
    for item in ports.items():
        protocol = item.get("protocol").text("TCP").upper()
        if protocol == "UDP":
            continue
        number, target, name = item.get("number").port(), item.get("targetPort"), item.get("name")
        if name.text() in names:
            raise name.wrong(f"{name.value!r} is the name of another port already")
        names.add(name.text())
        # Zero is what an absent number becomes on its way through the API.
        has_target = target.value not in (None, 0)
        port = target.port() if has_target else number
        targets.append((Target(name.text(), name.text(), port), number))
    return targets


def _read_endpoints(
    body: Field, namespace: str, name: str, selection: Selection
) -> tuple[tuple[Endpoint, ...], tuple[Workload, ...]]:
    metadata, endpoints = body.get("metadata"), body.get("spec").get("endpoints")
    labels = read_labels(metadata.get("labels"))
    resolution = body.get("spec").get("resolution").text("")
    found: list[Endpoint] = []
    workloads = []
    for item in endpoints.items():
        address = _read_address(item)
        if address is None:
            if resolution == "STATIC":
                raise item.get("address").wrong(NAME_IN_PLACE_OF_AN_ADDRESS)
            continue
        found.append(build_endpoint(address, selection.ports(_read_ports(item))))
        account, own = _read_account(item), read_labels(item.get("labels"))
        if _is_hbone(labels, metadata):
            uid = f"ServiceEntry/{namespace}/{name}/{address}"
            workloads.append(Workload(uid, namespace, name, "", account, (address,), True, own))
    return merge(found), tuple(workloads)


def _read_addresses(body: Field) -> tuple[Address, ...]:
    """Read a service's own addresses, or those that a controller chose for it."""
    chosen = body.get("spec").get("addresses")
    items = [*chosen.items()]
    if not items:
        allocated = body.get("status").get("addresses").items()
        items = [item.get("value") for item in allocated]
    addresses = []
    for item in items:
        try:
            interface = ip_interface(item.text())
        except ValueError:
            raise item.wrong(f"{item.value!r} is not an IP address") from None
        if interface.network.num_addresses != 1:
            raise item.wrong(f"{item.value!r} is a range; only single addresses can be used")
        addresses.append(interface.ip)
    return tuple(dict.fromkeys(addresses))
