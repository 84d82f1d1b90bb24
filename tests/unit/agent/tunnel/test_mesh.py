"""Where a worker's view sends a connection, and how the view changes."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address
from itertools import permutations
from typing import TYPE_CHECKING

import pytest

from agent.model.service import Endpoint, Service, ServicePort
from agent.model.workload import Workload
from agent.tunnel.mesh import Mesh, Route, Standpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agent.model.pod import Address
    from agent.model.service import ServiceKind

POD4, POD6 = ip_address("10.0.0.1"), ip_address("fd00::1")
OTHER4 = ip_address("10.0.0.2")
VIP4, VIP6 = ip_address("10.96.0.1"), ip_address("fd00:96::1")
WORKLOAD = Workload("u-1", "shop", "cart-0", "node-1", "cart", (POD4, POD6), is_hbone=True)
WEST = Standpoint("west")
SERVICE = Service(
    "shop",
    "cart",
    (VIP4, VIP6),
    (ServicePort("web", 80),),
    (Endpoint(POD4, (("web", 8080),)), Endpoint(POD6, (("web", 8080),))),
)


def first(endpoints: Sequence[tuple[Address, int]]) -> tuple[Address, int]:
    return endpoints[0]


@pytest.fixture
def mesh() -> Mesh:
    made = Mesh()
    made.put_workload(WORKLOAD)
    made.put_service(SERVICE)
    return made


def test_address_that_nobody_claims_passes_through() -> None:
    assert Mesh().resolve(POD4, 80, first) == Route(POD4, 80, None)


def test_pod_of_the_mesh_is_reached_through_its_tunnel(mesh: Mesh) -> None:
    assert mesh.resolve(POD6, 9, first) == Route(POD6, 9, WORKLOAD)


def test_pod_that_is_not_captured_is_reached_as_plain_tcp(mesh: Mesh) -> None:
    mesh.put_workload(replace(WORKLOAD, is_hbone=False))
    assert mesh.resolve(POD4, 9, first) == Route(POD4, 9, None)


def test_service_leads_to_an_endpoint_of_the_same_family(mesh: Mesh) -> None:
    assert mesh.resolve(VIP4, 80, first) == Route(POD4, 8080, WORKLOAD, SERVICE)
    assert mesh.resolve(VIP6, 80, first) == Route(POD6, 8080, WORKLOAD, SERVICE)


def test_other_family_serves_where_there_is_none_of_the_same(mesh: Mesh) -> None:
    service = replace(SERVICE, endpoints=SERVICE.endpoints[:1])
    mesh.put_service(service)
    assert mesh.resolve(VIP6, 80, first) == Route(POD4, 8080, WORKLOAD, service)


def test_service_without_an_endpoint_for_the_port_leads_nowhere(mesh: Mesh) -> None:
    assert mesh.resolve(VIP4, 81, first) is None
    mesh.put_service(replace(SERVICE, endpoints=()))
    assert mesh.resolve(VIP4, 80, first) is None


def test_workload_comes_before_service(mesh: Mesh) -> None:
    mesh.put_service(replace(SERVICE, addresses=(POD4,)))
    assert mesh.resolve(POD4, 80, first) == Route(POD4, 80, WORKLOAD)


def test_new_content_takes_the_place_of_the_old(mesh: Mesh) -> None:
    mesh.put_workload(replace(WORKLOAD, addresses=(OTHER4,)))
    assert mesh.resolve(POD4, 80, first) == Route(POD4, 80, None)
    found = mesh.resolve(OTHER4, 80, first)
    assert found is not None
    assert found.workload is not None
    mesh.put_service(replace(SERVICE, addresses=(VIP6,)))
    assert mesh.resolve(VIP4, 80, first) == Route(VIP4, 80, None)


def test_what_is_removed_is_forgotten_and_may_be_removed_again(mesh: Mesh) -> None:
    for _ in range(2):
        mesh.remove_workload(WORKLOAD.uid)
        mesh.remove_service(SERVICE.namespace, SERVICE.name)
    assert mesh.resolve(POD4, 80, first) == Route(POD4, 80, None)
    assert mesh.resolve(VIP4, 80, first) == Route(VIP4, 80, None)


@pytest.mark.parametrize("kind", ["Service", "ServiceEntry"])
def test_service_is_known_by_name(kind: ServiceKind) -> None:
    mesh = Mesh()
    mesh.put_service(replace(SERVICE, kind=kind))
    assert mesh.has_service(SERVICE.namespace, SERVICE.name)
    assert not mesh.has_service("elsewhere", SERVICE.name)
    mesh.remove_service(SERVICE.namespace, SERVICE.name, kind)
    assert not mesh.has_service(SERVICE.namespace, SERVICE.name)


def test_address_that_was_taken_over_stays_with_its_new_owner(mesh: Mesh) -> None:
    # A pod's address may be given to another pod before the first one's end is known.
    heir = replace(WORKLOAD, uid="u-2", addresses=(POD4,))
    mesh.put_workload(heir)
    mesh.remove_workload(WORKLOAD.uid)
    assert mesh.resolve(POD4, 80, first) == Route(POD4, 80, heir)
    service = replace(SERVICE, name="cart-2", addresses=(VIP4,))
    mesh.put_service(service)
    mesh.remove_service(SERVICE.namespace, SERVICE.name)
    assert mesh.resolve(VIP4, 80, first) == Route(POD4, 8080, heir, service)


def test_address_is_the_same_pods_whatever_came_first_and_then_whose_it_still_is() -> None:
    leaving = replace(WORKLOAD, uid="u-0", is_leaving=True)
    heir = replace(WORKLOAD, uid="u-2", name="cart-1", addresses=(POD4,))
    for order in permutations((leaving, heir, leaving)):  # which is told again while it leaves
        mesh = Mesh()
        for workload in order:
            mesh.put_workload(workload)
        assert mesh.resolve(POD4, 80, first) == Route(POD4, 80, heir)
        assert mesh.at(POD6) == leaving
        mesh.remove_workload("u-0")
        assert mesh.resolve(POD4, 80, first) == Route(POD4, 80, heir)
        mesh.put_workload(leaving)
        mesh.remove_workload("u-2")
        assert mesh.resolve(POD4, 80, first) == Route(POD4, 80, leaving)
        mesh.remove_workload("u-0")
        assert mesh.at(POD4) is None


def test_workload_is_found_by_its_uid(mesh: Mesh) -> None:
    assert mesh.workload("u-1") == WORKLOAD
    assert mesh.at(POD4) == WORKLOAD
    assert mesh.at(OTHER4) is None
    assert mesh.workload("u-2") is None


def test_service_and_entry_of_one_name_are_two(mesh: Mesh) -> None:
    entry = replace(SERVICE, addresses=(OTHER4,), kind="ServiceEntry")
    mesh.put_service(entry)
    mesh.remove_service(*SERVICE.key)
    assert mesh.resolve(VIP4, 80, first) == Route(VIP4, 80, None)
    assert mesh.resolve(OTHER4, 80, first) == Route(POD4, 8080, WORKLOAD, entry)


def test_pod_in_another_network_is_unreachable_with_a_reason(mesh: Mesh) -> None:
    elsewhere = replace(WORKLOAD, network="west")
    mesh.put_workload(elsewhere)
    assert mesh.standpoint("u-1") == Standpoint("west", "node-1")
    assert mesh.standpoint("u-2") == Standpoint()
    why = "shop/cart-0 is in network 'west', and there is no gateway to it"
    assert mesh.resolve(POD4, 80, first) == Route(POD4, 80, None, None, why)
    assert mesh.resolve(POD4, 80, first, WEST) == Route(POD4, 80, elsewhere)
    assert mesh.resolve(VIP4, 80, first) == Route(POD4, 8080, None, SERVICE, why)
    mesh.put_workload(WORKLOAD)
    why = "shop/cart-0 is in the cluster's network, and there is no gateway to it"
    assert mesh.resolve(POD4, 80, first, WEST) == Route(POD4, 80, None, None, why)
    mesh.remove_workload("u-1")
    assert mesh.standpoint("u-1") == Standpoint()


def test_service_leads_to_the_endpoints_of_the_clients_network(mesh: Mesh) -> None:
    west = replace(WORKLOAD, uid="u-2", addresses=(OTHER4,), network="west")
    mesh.put_workload(west)
    both = (SERVICE.endpoints[0], Endpoint(OTHER4, (("web", 8080),)))
    mesh.put_service(service := replace(SERVICE, endpoints=both))
    seen: list[Sequence[tuple[Address, int]]] = []

    def only(endpoints: Sequence[tuple[Address, int]]) -> tuple[Address, int]:
        seen.append(endpoints)
        return endpoints[0]

    assert mesh.resolve(VIP4, 80, only) == Route(POD4, 8080, WORKLOAD, service)
    assert mesh.resolve(VIP4, 80, only, WEST) == Route(OTHER4, 8080, west, service)
    assert [len(each) for each in seen] == [1, 1]


def test_endpoint_that_is_no_workload_is_in_every_network(mesh: Mesh) -> None:
    mesh.put_workload(replace(WORKLOAD, uid="u-2", addresses=(OTHER4,), network="west"))
    mesh.remove_workload("u-1")
    assert mesh.resolve(VIP4, 80, first, WEST) == Route(POD4, 8080, None, SERVICE)


def test_load_balancer_is_a_services_at_its_ports_and_may_be_shared(mesh: Mesh) -> None:
    web = replace(SERVICE, balanced=(OTHER4,))
    admin = replace(web, name="admin", addresses=(), ports=(ServicePort("web", 81),))
    for service in (web, admin):
        mesh.put_service(service)
    assert mesh.resolve(OTHER4, 80, first) == Route(POD4, 8080, WORKLOAD, web)
    assert mesh.resolve(OTHER4, 81, first) == Route(POD4, 8080, WORKLOAD, admin)
    assert mesh.resolve(OTHER4, 22, first) == Route(OTHER4, 22, None)
    mesh.put_service(replace(web, endpoints=()))
    assert mesh.resolve(OTHER4, 80, first) is None
    mesh.remove_service(*web.key)
    assert mesh.resolve(OTHER4, 80, first) == Route(OTHER4, 80, None)
    assert mesh.resolve(OTHER4, 81, first) == Route(POD4, 8080, WORKLOAD, admin)
    heir = replace(admin, name="heir")
    mesh.put_service(heir)
    mesh.remove_service(*admin.key)
    assert mesh.resolve(OTHER4, 81, first) == Route(POD4, 8080, WORKLOAD, heir)


def test_local_service_leads_to_the_clients_node_but_by_a_load_balancer(mesh: Mesh) -> None:
    there = Endpoint(POD4, (("web", 8080),), "node-1")
    service = replace(SERVICE, endpoints=(there,), balanced=(OTHER4,), is_local=True)
    mesh.put_service(service)
    found = Route(POD4, 8080, WORKLOAD, service)
    assert mesh.resolve(VIP4, 80, first, Standpoint(node="node-1")) == found
    assert mesh.resolve(VIP4, 80, first, Standpoint(node="node-2")) is None
    assert mesh.resolve(OTHER4, 80, first, Standpoint(node="node-2")) == found
