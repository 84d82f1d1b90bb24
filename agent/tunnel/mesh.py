"""Where a connection goes: a worker's view of workloads and services. Pure.

Kept up to date by messages. Workload before service, as ambient mesh resolves it; an address that
nobody claims passes through as plain TCP. One that several workloads claim is that one's which
`Workload.claim` prefers, whatever order they came in, and the next one's when that is gone. Nothing
leads into another network: that would take a gateway, which Sidestep has not.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

from agent.model.service import KINDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from agent.model.pod import Address
    from agent.model.service import Service, ServiceKind
    from agent.model.workload import Workload

    Choose = Callable[[Sequence[tuple[Address, int]]], tuple[Address, int]]

CLAIM = attrgetter("claim")


@dataclass(frozen=True, slots=True)
class Route:
    """Dial `address`:`port`; through a tunnel if `workload` is set.

    `service` is what the address belonged to that was asked for. If `unreachable` says why, there
    is nothing to dial.
    """

    address: Address
    port: int
    workload: Workload | None
    service: Service | None = None
    unreachable: str = ""


class Standpoint(NamedTuple):
    """Where a connection comes from, as far as it decides where it goes."""

    network: str = ""
    node: str = ""


UNKNOWN = Standpoint()


class Mesh:
    """Workloads and services by address."""

    def __init__(self) -> None:
        self._workloads: dict[str, Workload] = {}
        self._by_address: dict[Address, tuple[Workload, ...]] = {}  # who has it comes first
        self._elsewhere: set[str] = set()  # uids of workloads in other networks than the cluster's
        self._services: dict[tuple[str, str, ServiceKind], Service] = {}
        self._service_by_address: dict[Address, Service] = {}
        self._service_by_balanced: dict[tuple[Address, int], Service] = {}

    def put_workload(self, workload: Workload) -> None:
        """Add or replace a workload."""
        self.remove_workload(workload.uid)
        self._workloads[workload.uid] = workload
        if workload.network:
            self._elsewhere.add(workload.uid)
        for address in workload.addresses:
            claims = (workload, *self._by_address.get(address, ()))
            self._by_address[address] = tuple(sorted(claims, key=CLAIM, reverse=True))

    def remove_workload(self, uid: str) -> None:
        """Forget a workload, if it is known."""
        known = self._workloads.pop(uid, None)
        self._elsewhere.discard(uid)
        for address in known.addresses if known else ():
            claims = self._by_address.pop(address, ())
            if left := tuple(each for each in claims if each is not known):
                self._by_address[address] = left

    def workload(self, uid: str) -> Workload | None:
        """Return a workload, if it is known."""
        return self._workloads.get(uid)

    def at(self, address: Address) -> Workload | None:
        """Return the workload that has an address, if one is known."""
        claims = self._by_address.get(address)
        return claims[0] if claims else None

    def put_service(self, service: Service) -> None:
        """Add or replace a service."""
        self.remove_service(*service.key)
        self._services[service.key] = service
        for address in service.addresses:
            self._service_by_address[address] = service
        for balanced in _balanced(service):
            self._service_by_balanced[balanced] = service

    def remove_service(self, namespace: str, name: str, kind: ServiceKind = "Service") -> None:
        """Forget a service, if it is known."""
        known = self._services.pop((namespace, name, kind), None)
        for address in known.addresses if known else ():
            if self._service_by_address.get(address) is known:
                del self._service_by_address[address]
        for balanced in _balanced(known) if known else ():
            if self._service_by_balanced.get(balanced) is known:
                del self._service_by_balanced[balanced]

    def has_service(self, namespace: str, name: str) -> bool:
        """Say whether there is a service of that name, of either kind."""
        return any((namespace, name, kind) in self._services for kind in KINDS)

    def standpoint(self, uid: str) -> Standpoint:
        """Return the network and the node of a workload; the cluster's own if it is not known."""
        known = self._workloads.get(uid)
        return Standpoint(known.network, known.node) if known else UNKNOWN

    def resolve(
        self, address: Address, port: int, choose: Choose, source: Standpoint = UNKNOWN
    ) -> Route | None:
        """Return the route of a connection from somewhere.

        None if it is to a service without an endpoint. One in the same network comes first.
        """
        service = None if address in self._by_address else self._service_at(address, port)
        if service is not None:
            # As kube-proxy does: what comes by a load balancer may go to other nodes.
            stays = service.is_local and address in service.addresses
            endpoints = service.endpoints_for(port, source.node if stays else None)
            if self._elsewhere:
                near = tuple(each for each in endpoints if self._is_near(each[0], source.network))
                endpoints = near or endpoints
            same_family = [found for found in endpoints if found[0].version == address.version]
            if not endpoints:
                return None
            address, port = choose(same_family or endpoints)
        workload = self.at(address)
        if workload is not None and workload.network != source.network:
            named = f"{workload.namespace}/{workload.name}"
            where = f"network {workload.network!r}" if workload.network else "the cluster's network"
            why = f"{named} is in {where}, and there is no gateway to it"
            return Route(address, port, None, service, why)
        is_tunneled = workload is not None and workload.is_hbone
        return Route(address, port, workload if is_tunneled else None, service)

    def _service_at(self, address: Address, port: int) -> Service | None:
        found = self._service_by_address.get(address)
        return found or self._service_by_balanced.get((address, port))

    def _is_near(self, address: Address, network: str) -> bool:
        workload = self.at(address)
        return workload is None or workload.network == network


def _balanced(service: Service) -> Iterator[tuple[Address, int]]:
    return ((address, entry.port) for address in service.balanced for entry in service.ports)
