"""A Kubernetes Service or a ServiceEntry, and the endpoints behind it, TCP only. Pure.

A service's port leads to a target port by name, because each endpoint may listen
elsewhere; an endpoint that lacks the name does not serve that port. What leaves and still
serves counts where nothing else does, as for kube-proxy: otherwise a rollout of a single pod
would be a gap. Choosing one endpoint among several is not done here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from agent.model.pod import Address

ServiceKind = Literal["Service", "ServiceEntry"]
KINDS: tuple[ServiceKind, ...] = get_args(ServiceKind)


@dataclass(frozen=True, slots=True)
class ServicePort:
    """A port of the service; the name is empty if it is the only one."""

    name: str
    port: int


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address behind a service that serves, with its target port by port name, in order."""

    address: Address
    ports: tuple[tuple[str, int], ...]
    node: str = ""  # where it is, if it is known
    is_leaving: bool = False  # serves, and takes what is new only where nobody else does


@dataclass(frozen=True, slots=True)
class Service:
    """One service; a headless one has no addresses. `hosts` are a ServiceEntry's names.

    `balanced` are the addresses of its load balancers, which are its own at its ports only: there
    are some that give several services one address, or that of a node. If it `is_local`, its own
    addresses lead from each node to endpoints on that node, and nowhere if there are none.
    """

    namespace: str
    name: str
    addresses: tuple[Address, ...]
    ports: tuple[ServicePort, ...]
    endpoints: tuple[Endpoint, ...]
    kind: ServiceKind = "Service"
    hosts: tuple[str, ...] = ()
    balanced: tuple[Address, ...] = ()
    is_local: bool = False

    @property
    def key(self) -> tuple[str, str, ServiceKind]:
        """Return what no other service shares."""
        return self.namespace, self.name, self.kind

    def endpoints_for(self, port: int, node: str | None = None) -> tuple[tuple[Address, int], ...]:
        """List where a connection to `port` of the service may go; empty if nowhere.

        With a node, only where it may go that stays there.
        """
        names = {entry.name for entry in self.ports if entry.port == port}
        found = [
            (endpoint, target)
            for endpoint in self.endpoints
            if node is None or endpoint.node == node
            for name, target in endpoint.ports
            if name in names
        ]
        staying = [each for each in found if not each[0].is_leaving]
        return tuple((endpoint.address, target) for endpoint, target in staying or found)
