"""Values of the model as members of map keys and values, and back. Pure."""

from __future__ import annotations

from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from agent.datapath.btf import Value
    from agent.model.pod import Address, LocalPod, Network
    from agent.model.service import Service

V4_MAPPED = b"\0" * 10 + b"\xff\xff"
V4_MAPPED_BITS = 96
NETWORK_HEAD_BITS = 32 + 64  # pad and netns cookie stand before the address in `struct network`
OUTBOUND, INBOUND, PLAINTEXT = 0, 1, 2  # enum direction


def pack_address(address: Address) -> bytes:
    """Return 16 bytes, IPv4 as v4-mapped (RFC 4291 §2.5.5.2)."""
    return V4_MAPPED + address.packed if isinstance(address, IPv4Address) else address.packed


@lru_cache(maxsize=1024)  # few pods speak much
def unpack_address(packed: Value) -> Address:
    """Return the address of 16 bytes, v4-mapped as IPv4."""
    assert isinstance(packed, bytes)
    is_v4 = packed.startswith(V4_MAPPED)
    return IPv4Address(packed[len(V4_MAPPED) :]) if is_v4 else IPv6Address(packed)


def pod_record(pod: LocalPod, *, is_strict: bool = False) -> dict[str, Value]:
    """Return the value of ss_pods; of several addresses of a family the first counts."""
    return {"is_strict": int(is_strict)} | _first_addresses(pod)


def resident_record(
    netns_cookie: int, links: Mapping[int, int], *, has_exclusions: bool
) -> dict[str, Value]:
    """Return the value of ss_local; `links` are the pod's guarded ones, each with its row.

    Which of several a pod sends by is left for guard to find out.
    """
    only = next(iter(links.items())) if len(links) == 1 else (0, 0)
    return {
        "netns_cookie": netns_cookie,
        "link": only[0],
        "row": only[1],
        "has_exclusions": int(has_exclusions),
    }


def guarded_record(pod: LocalPod, netns_cookie: int, row: int) -> dict[str, Value]:
    """Return the value of ss_guards; `row` is the link's of ss_counters."""
    return {"netns_cookie": netns_cookie, "row": row} | _first_addresses(pod)


def _first_addresses(pod: LocalPod) -> dict[str, Value]:
    return {
        f"address{address.version}": pack_address(address) for address in reversed(pod.addresses)
    }


def pod_name_record(pod: LocalPod) -> dict[str, Value]:
    """Return the value of ss_pod_names."""
    return {
        "uid": pod.uid.encode(),
        "namespace": pod.namespace.encode(),
        "name": pod.name.encode(),
    }


def network_key(netns_cookie: int, network: Network) -> dict[str, Value]:
    """Return a key of ss_bypass."""
    mapped = V4_MAPPED_BITS if isinstance(network, IPv4Network) else 0
    return {
        "prefix_bits": NETWORK_HEAD_BITS + mapped + network.prefixlen,
        "netns_cookie": netns_cookie,
        "address": pack_address(network.network_address),
    }


def port_key(netns_cookie: int, port: int, direction: int) -> dict[str, Value]:
    """Return a key of ss_ports."""
    return {"netns_cookie": netns_cookie, "port_be": port, "direction": direction}


def source_key(netns_cookie: int, address: Address, port: int) -> dict[str, Value]:
    """Return a key of ss_origin_flow."""
    return {"netns_cookie": netns_cookie, "address": pack_address(address), "port_be": port}


def connection_key(one: tuple[bytes, int], other: tuple[bytes, int]) -> dict[str, Value]:
    """Return a key of ss_direct_flows from both ends, packed address and port, in any order."""
    first, second = sorted((one, other), key=lambda end: (end[1], end[0]))
    return {
        "first": first[0],
        "second": second[0],
        "first_port_be": first[1],
        "second_port_be": second[1],
    }


def verdict_key(
    source_cookie: int, destination_cookie: int, port: int, *, is_v6: bool
) -> dict[str, Value]:
    """Return a key of ss_verdicts."""
    return {
        "source_netns_cookie": source_cookie,
        "destination_netns_cookie": destination_cookie,
        "port_be": port,
        "is_v6": int(is_v6),
    }


def service_port_key(address: Address, port: int, index: int = 0) -> dict[str, Value]:
    """Return a key of ss_services (index 0) or ss_endpoints."""
    return {"address": pack_address(address), "port_be": port, "index": index}


ServicePorts = dict[tuple["Address", int], tuple[tuple["Address", int], ...]]


def service_ports(services: Iterable[Service], node: str) -> ServicePorts:
    """Return what the kernel of a node may connect each port of each service to.

    Of the endpoints those of the address's own family, as far as there are some: a socket cannot
    change its family. A port without an endpoint is left out, and so goes to the agent.
    """
    ports: ServicePorts = {}
    for service in services:
        for address in (*service.addresses, *service.balanced):
            stays = service.is_local and address in service.addresses
            for port in service.ports:
                endpoints = service.endpoints_for(port.port, node if stays else None)
                same = tuple(found for found in endpoints if found[0].version == address.version)
                if endpoints:
                    ports[address, port.port] = same or endpoints
    return ports
