"""Where a connection to a port of a service may go."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

from agent.model.service import Endpoint, Service, ServicePort

FIRST, SECOND = ip_address("10.0.0.1"), ip_address("fd00::2")
SERVICE = Service(
    namespace="shop",
    name="cart",
    addresses=(ip_address("10.96.0.1"),),
    ports=(ServicePort("web", 80), ServicePort("web-too", 80), ServicePort("admin", 81)),
    endpoints=(
        Endpoint(FIRST, (("web", 8080), ("admin", 9090))),
        Endpoint(SECOND, (("web", 8081), ("web-too", 8082))),
    ),
)


def test_port_leads_to_the_endpoints_own_ports_of_that_name() -> None:
    assert SERVICE.endpoints_for(80) == ((FIRST, 8080), (SECOND, 8081), (SECOND, 8082))


def test_endpoint_without_the_name_does_not_serve_the_port() -> None:
    assert SERVICE.endpoints_for(81) == ((FIRST, 9090),)


def test_port_that_the_service_has_not_leads_nowhere() -> None:
    assert SERVICE.endpoints_for(8080) == ()


def test_entry_of_the_same_name_is_another_service() -> None:
    assert SERVICE.key == ("shop", "cart", "Service")
    assert replace(SERVICE, kind="ServiceEntry").key != SERVICE.key


def test_endpoint_that_leaves_serves_a_port_that_nobody_else_does() -> None:
    first, second = SERVICE.endpoints
    service = replace(SERVICE, endpoints=(replace(first, is_leaving=True), second))
    assert service.endpoints_for(80) == ((SECOND, 8081), (SECOND, 8082))
    assert service.endpoints_for(81) == ((FIRST, 9090),)


def test_endpoints_of_one_node_are_those_that_are_there_and_there_the_leaving_count() -> None:
    first, second = SERVICE.endpoints
    here = replace(first, node="east", is_leaving=True)
    service = replace(SERVICE, endpoints=(here, replace(second, node="west")))
    assert service.endpoints_for(80, "east") == ((FIRST, 8080),)
    assert service.endpoints_for(80, "north") == ()
