"""A pod of this node, as enrollment needs it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class Exclusions:
    """What bypasses capture for one pod, from the settings and the pod's annotations."""

    outbound_ports: frozenset[int] = frozenset()
    outbound_networks: tuple[Network, ...] = ()
    inbound_ports: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class LocalPod:
    """One pod of this node."""

    uid: str
    namespace: str
    name: str
    service_account: str
    addresses: tuple[Address, ...]
    exclusions: Exclusions = Exclusions()
    may_go_direct: bool = True  # else traffic within the node is encrypted as well
    bypasses_inbound: bool = False  # plaintext goes past us to the pod, tunnels still end here
    dns_capture: bool | None = None  # the pod's own word; None leaves it to the settings
    node_uid: str = ""  # by which kubelet and runtime know it, if not by `uid`: a static pod's
