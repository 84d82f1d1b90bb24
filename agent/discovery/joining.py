"""Services joined with what is behind them, and who holds an address that several claim. Pure.

    Service        the endpoints of its slices, and the WorkloadEntries that it selects
    ServiceEntry   its own endpoints, and the WorkloadEntries and ready pods that it selects

A selector is about its own namespace. What was joined is kept until something behind it changes.

Of several claims to an address that of a pod or a Service holds, since anybody who may write an
entry in some namespace could otherwise take over the connections of all; among ServiceEntries the
oldest. Called by `translate`, which names objects as `describe` does.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from agent.discovery.entries import build_endpoint, merge, unclaimed
from agent.model.age import age

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from agent.discovery.entries import EntryWorkload, ReadService
    from agent.model.service import Endpoint, Service
    from agent.model.workload import Workload

    ServiceKey = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of the endpoints of a Service."""

    service: ServiceKey
    endpoints: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True)
class _Space:
    """What of a namespace selects, and what can be selected."""

    ready_pods: dict[str, Workload] = field(default_factory=dict)
    machines: dict[str, EntryWorkload] = field(default_factory=dict)
    selecting: dict[str, ReadService] = field(default_factory=dict)
    # Those of `selecting` that are about pods, too: a pod that changes need not ask the others.
    selecting_pods: dict[str, ReadService] = field(default_factory=dict)


class Joiner:
    """All services, and what may be behind them."""

    def __init__(self) -> None:
        self._services: dict[str, ReadService] = {}
        self._slices: dict[str, Slice] = {}
        self._slices_of: dict[ServiceKey, dict[str, Slice]] = {}
        self._spaces: dict[str, _Space] = {}
        self._place: dict[str, str] = {}  # the namespace of what is in a space
        self._joined: dict[str, Service] = {}

    def put_service(self, named: str, read: ReadService) -> None:
        """Take a new Service or ServiceEntry."""
        self._services[named] = read
        if read.selection is None:
            return
        space = self._space(named, read.service.namespace)
        space.selecting[named] = read
        if read.selects_pods:
            space.selecting_pods[named] = read

    def put_slice(self, named: str, part: Slice) -> None:
        """Take a new slice."""
        self._slices[named] = part
        self._slices_of.setdefault(part.service, {})[named] = part
        self._joined.pop(_named_service(part.service), None)

    def put_ready_pod(self, named: str, pod: Workload) -> None:
        """Take a new pod that is ready; one that is not need not be known here."""
        space = self._space(named, pod.namespace)
        space.ready_pods[named] = pod
        self._part(space.selecting_pods, pod)

    def put_machine(self, named: str, machine: EntryWorkload) -> None:
        """Take a new WorkloadEntry."""
        space = self._space(named, machine.workload.namespace)
        space.machines[named] = machine
        self._part(space.selecting, machine.workload)

    def remove(self, named: str) -> None:
        """Forget what is known under a name, if anything is."""
        self._services.pop(named, None)
        self._joined.pop(named, None)
        part = self._slices.pop(named, None)
        if part is not None:
            self._joined.pop(_named_service(part.service), None)
            others = self._slices_of[part.service]
            del others[named]
            if not others:
                del self._slices_of[part.service]
        namespace = self._place.pop(named, None)
        if namespace is not None:
            self._leave(named, namespace)

    def settle(self, pods: tuple[Workload, ...]) -> tuple[tuple[Workload, ...], list[Service]]:
        """Return the workloads that are no pods, and all services; `pods` hold their addresses."""
        services = {named: self._join(named, read) for named, read in self._services.items()}
        entries = sorted(
            (age(self._services[named].created), named)
            for named, service in services.items()
            if service.kind == "ServiceEntry"
        )
        claims = [
            machine.workload
            for _namespace, space in sorted(self._spaces.items())
            for _named, machine in sorted(space.machines.items())
        ]
        claims += [each for _, named in entries for each in self._services[named].workloads]
        if not entries and not claims:
            return (), list(services.values())
        taken = {address for pod in pods for address in pod.addresses}
        taken.update(
            address
            for service in services.values()
            if service.kind == "Service"
            for address in (*service.addresses, *service.balanced)
        )
        outside = [workload for each in claims if (workload := unclaimed(each, taken)) is not None]
        for _age, named in entries:
            service = services[named]
            addresses = tuple(each for each in service.addresses if each not in taken)
            taken.update(addresses)
            if addresses != service.addresses:
                services[named] = replace(service, addresses=addresses)
        return tuple(outside), list(services.values())

    def _space(self, named: str, namespace: str) -> _Space:
        self._place[named] = namespace
        return self._spaces.setdefault(namespace, _Space())

    def _leave(self, named: str, namespace: str) -> None:
        space = self._spaces[namespace]
        space.selecting.pop(named, None)
        space.selecting_pods.pop(named, None)
        pod = space.ready_pods.pop(named, None)
        if pod is not None:
            self._part(space.selecting_pods, pod)
        machine = space.machines.pop(named, None)
        if machine is not None:
            self._part(space.selecting, machine.workload)
        if not (space.ready_pods or space.machines or space.selecting):
            del self._spaces[namespace]

    def _part(self, selecting: dict[str, ReadService], workload: Workload) -> None:
        """Join anew, when asked, what selects a workload."""
        for named, read in selecting.items():
            if read.selection is not None and read.selection.labels <= workload.labels:
                self._joined.pop(named, None)

    def _join(self, named: str, read: ReadService) -> Service:
        joined = self._joined.get(named)
        if joined is None:
            # One endpoint may be in several slices for a while (KEP-752), and is one endpoint.
            endpoints = merge(self._endpoints_of(read))
            joined = self._joined[named] = replace(read.service, endpoints=endpoints)
        return joined

    def _endpoints_of(self, read: ReadService) -> Iterator[Endpoint]:
        service = read.service
        yield from service.endpoints
        if service.kind == "Service":
            for part in self._slices_of.get((service.namespace, service.name), {}).values():
                yield from part.endpoints
        if read.selection is None:
            return
        space = self._spaces[service.namespace]
        pods = space.ready_pods.values() if read.selects_pods else ()
        found: Iterable[tuple[Workload, dict[str, int]]] = (
            *((pod, {}) for pod in pods),
            *((machine.workload, machine.ports) for machine in space.machines.values()),
        )
        for workload, ports in found:
            if read.selection.labels <= workload.labels:
                for address in workload.addresses:
                    yield build_endpoint(address, read.selection.ports(ports))


def _named_service(key: ServiceKey) -> str:
    return f"Service {key[0]}/{key[1]}"
