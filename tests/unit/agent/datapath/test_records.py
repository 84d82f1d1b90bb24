"""Values of the model as members of maps."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from agent.datapath import records
from agent.model.pod import Address, LocalPod
from agent.model.service import Endpoint, Service, ServicePort

V4, V6 = ip_address("10.0.0.1"), ip_address("fd00::1")
MAPPED = bytes.fromhex("00000000000000000000ffff0a000001")


@pytest.mark.parametrize(("address", "packed"), [(V4, MAPPED), (V6, V6.packed)])
def test_address_has_sixteen_bytes_and_comes_back(address: Address, packed: bytes) -> None:
    assert records.pack_address(address) == packed
    assert records.unpack_address(packed) == address


def test_first_address_of_a_family_counts() -> None:
    others = (ip_address("10.0.0.2"), ip_address("fd00::2"))
    pod = LocalPod("u-1", "shop", "cart-0", "cart", (V4, V6, *others))
    addresses = {"address4": MAPPED, "address6": V6.packed}
    assert records.pod_record(pod) == {"is_strict": 0} | addresses
    assert records.pod_record(pod, is_strict=True) == {"is_strict": 1} | addresses
    assert records.guarded_record(pod, 7, 2) == {"netns_cookie": 7, "row": 2} | addresses
    pod = LocalPod("u-1", "shop", "cart-0", "cart", (V6,))
    assert records.pod_record(pod) == {"is_strict": 0, "address6": V6.packed}


def test_names_are_bytes() -> None:
    pod = LocalPod("u-1", "shop", "cart-0", "cart", (V4,))
    assert records.pod_name_record(pod) == {
        "uid": b"u-1",
        "namespace": b"shop",
        "name": b"cart-0",
    }


@pytest.mark.parametrize(
    ("network", "bits", "packed"),
    [
        ("10.0.0.1/32", 32 + 64 + 128, MAPPED),
        ("10.0.0.0/8", 32 + 64 + 96 + 8, bytes.fromhex("00000000000000000000ffff0a000000")),
        ("0.0.0.0/0", 32 + 64 + 96, bytes.fromhex("00000000000000000000ffff00000000")),
        ("fd00::/16", 32 + 64 + 16, ip_address("fd00::").packed),
        ("::/0", 32 + 64, bytes(16)),
    ],
)
def test_prefix_counts_pad_and_cookie_too(network: str, bits: int, packed: bytes) -> None:
    assert records.network_key(7, ip_network(network)) == {
        "prefix_bits": bits,
        "netns_cookie": 7,
        "address": packed,
    }


def test_keys_carry_the_cookie_of_the_namespace() -> None:
    assert records.port_key(7, 80, records.INBOUND) == {
        "netns_cookie": 7,
        "port_be": 80,
        "direction": 1,
    }
    assert records.source_key(7, V4, 1234) == {
        "netns_cookie": 7,
        "address": MAPPED,
        "port_be": 1234,
    }
    assert records.verdict_key(7, 8, 80, is_v6=False) == {
        "source_netns_cookie": 7,
        "destination_netns_cookie": 8,
        "port_be": 80,
        "is_v6": 0,
    }


def test_verdict_is_about_two_namespaces_a_port_and_a_family() -> None:
    assert records.verdict_key(1, 2, 80, is_v6=True) == {
        "source_netns_cookie": 1,
        "destination_netns_cookie": 2,
        "port_be": 80,
        "is_v6": 1,
    }


@pytest.mark.parametrize(
    ("lower", "higher"),
    [
        ((V6.packed, 80), (MAPPED, 8080)),  # by port, whatever the addresses
        ((MAPPED, 256), (MAPPED, 511)),  # as numbers: 511 begins with a lower byte in some orders
        ((MAPPED, 80), (V6.packed, 80)),  # by address, where the ports are equal
    ],
)
def test_connection_has_one_key_from_both_ends(
    lower: tuple[bytes, int], higher: tuple[bytes, int]
) -> None:
    key = records.connection_key(lower, higher)
    assert key == records.connection_key(higher, lower)
    assert (key["first"], key["first_port_be"]) == lower
    assert (key["second"], key["second_port_be"]) == higher


VIP4, VIP6 = ip_address("10.96.0.1"), ip_address("fd96::1")
WEB = (ServicePort("web", 80), ServicePort("dns", 53))


def service(*endpoints: Endpoint) -> Service:
    return Service("shop", "cart", (VIP4, VIP6), WEB, endpoints)


def test_service_port_leads_to_endpoints_of_its_family() -> None:
    found = records.service_ports(
        [service(*(Endpoint(ip, (("web", 8080),)) for ip in (V4, V6)))], "node-1"
    )
    assert found == {(VIP4, 80): ((V4, 8080),), (VIP6, 80): ((V6, 8080),)}


def test_service_port_leads_to_the_other_family_where_it_has_no_own() -> None:
    found = records.service_ports([service(Endpoint(V4, (("web", 8080),)))], "node-1")
    assert found == {(VIP4, 80): ((V4, 8080),), (VIP6, 80): ((V4, 8080),)}


def test_load_balancer_leads_to_the_same_endpoints() -> None:
    balanced = replace(service(Endpoint(V4, (("web", 8080),))), addresses=(), balanced=(VIP4,))
    assert records.service_ports([balanced], "node-1") == {(VIP4, 80): ((V4, 8080),)}


@pytest.mark.parametrize("node", ["node-1", "node-2"])
def test_local_service_leads_to_the_nodes_own_endpoints_but_for_its_load_balancers(
    node: str,
) -> None:
    found = service(Endpoint(V4, (("web", 8080),), node="node-1"))
    local = replace(found, addresses=(VIP6,), balanced=(VIP4,), is_local=True)
    own = {(VIP6, 80): ((V4, 8080),)} if node == "node-1" else {}  # else the agent refuses
    assert records.service_ports([local], node) == {(VIP4, 80): ((V4, 8080),)} | own


def test_service_without_endpoints_is_left_to_the_agent() -> None:
    assert records.service_ports([service()], "node-1") == {}


def test_key_of_an_endpoint_counts_from_zero() -> None:
    assert records.service_port_key(V4, 80) == {"address": MAPPED, "port_be": 80, "index": 0}
    assert records.service_port_key(V4, 80, 2)["index"] == 2


@pytest.mark.parametrize(
    ("links", "link", "row"), [({}, 0, 0), ({5: 2}, 5, 2), ({5: 2, 6: 3}, 0, 0)]
)
def test_resident_has_a_link_if_it_has_no_more(links: dict[int, int], link: int, row: int) -> None:
    record = records.resident_record(7, links, has_exclusions=True)
    assert record == {"netns_cookie": 7, "link": link, "row": row, "has_exclusions": 1}
