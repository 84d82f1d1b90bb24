"""Where a connection goes: a worker's view of workloads and services. Pure.

Kept up to date by messages. Workload before service, as ambient mesh resolves it; an address that
nobody claims passes through as plain TCP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from agent.model.pod import Address
    from agent.model.service import Service, ServiceKind
    from agent.model.workload import Workload

    Choose = Callable[[Sequence[tuple[Address, int]]], tuple[Address, int]]


@dataclass(frozen=True, slots=True)
class Route:
    """Dial `address`:`port`; through a tunnel if `workload` is set.

    `service` is what the address belonged to that was asked for.
    """

    address: Address
    port: int
    workload: Workload | None
    service: Service | None = None


class Mesh:
    """Workloads and services by address."""

    def __init__(self) -> None:
        self._workloads: dict[str, Workload] = {}
        self._by_address: dict[Address, Workload] = {}
        self._services: dict[tuple[str, str, ServiceKind], Service] = {}
        self._service_by_address: dict[Address, Service] = {}

    def put_workload(self, workload: Workload) -> None:
        """Add or replace a workload."""
        self.remove_workload(workload.uid)
        self._workloads[workload.uid] = workload
        for address in workload.addresses:
            self._by_address[address] = workload

    def remove_workload(self, uid: str) -> None:
        """Forget a workload, if it is known."""
        known = self._workloads.pop(uid, None)
        for address in known.addresses if known else ():
            if self._by_address.get(address) is known:
                del self._by_address[address]

    def workload(self, uid: str) -> Workload | None:
        """Return a workload, if it is known."""
        return self._workloads.get(uid)

    def at(self, address: Address) -> Workload | None:
        """Return the workload that has an address, if one is known."""
        return self._by_address.get(address)

    def put_service(self, service: Service) -> None:
        """Add or replace a service."""
        self.remove_service(*service.key)
        self._services[service.key] = service
        for address in service.addresses:
            self._service_by_address[address] = service

    def remove_service(self, namespace: str, name: str, kind: ServiceKind = "Service") -> None:
        """Forget a service, if it is known."""
        known = self._services.pop((namespace, name, kind), None)
        for address in known.addresses if known else ():
            if self._service_by_address.get(address) is known:
                del self._service_by_address[address]

    def resolve(self, address: Address, port: int, choose: Choose) -> Route | None:
        """Return the route of a connection; None if it is to a service without an endpoint."""
        service = None if address in self._by_address else self._service_by_address.get(address)
        if service is not None:
            endpoints = service.endpoints_for(port)
            same_family = [found for found in endpoints if found[0].version == address.version]
            if not endpoints:
                return None
            address, port = choose(same_family or endpoints)
        workload = self._by_address.get(address)
        is_tunneled = workload is not None and workload.is_hbone
        return Route(address, port, workload if is_tunneled else None, service)
