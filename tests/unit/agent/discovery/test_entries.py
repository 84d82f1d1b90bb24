"""ServiceEntry and WorkloadEntry: what each field means, what is refused, who has an address."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest

from agent.discovery.entries import (
    REDIRECTION,
    TUNNEL_LABEL,
    EntryWorkload,
    ReadService,
    merge,
    read_service_entry,
    read_service_selection,
    read_workload_entry,
    unclaimed,
)
from agent.discovery.fields import Field, WrongField
from agent.model.service import Endpoint, ServicePort
from agent.model.workload import Workload

Body = dict[str, Any]
ONE, TWO, VIP = (ip_address(f"192.0.2.{number}") for number in (1, 2, 100))
SIX = ip_address("2001:db8::1")
TCP = {"number": 5432, "name": "db", "protocol": "TCP"}


def read_entry(spec: Body | None = None, **metadata: Any) -> EntryWorkload:
    body = {
        "metadata": {"namespace": "shop", "name": "vm"} | metadata,
        "spec": {"address": str(ONE)} | (spec or {}),
    }
    return read_workload_entry(Field(body, ""), "istio-system")


def read(spec: Body, status: Body | None = None, **metadata: Any) -> ReadService | None:
    body = {
        "metadata": {"namespace": "shop", "name": "db"} | metadata,
        "spec": {"hosts": ["db.example.com"], "ports": [TCP], "resolution": "STATIC"} | spec,
        "status": status,
    }
    return read_service_entry(Field(body, ""), "istio-system")


def must_read(spec: Body, status: Body | None = None, **metadata: Any) -> ReadService:
    found = read(spec, status, **metadata)
    assert found is not None
    return found


# -- WorkloadEntry ------------------------------------------------------------------------------


def test_machine_is_a_workload_with_an_identity_and_no_node() -> None:
    spec = {"serviceAccount": "db", "labels": {"app": "db"}, "ports": {"db": 15432}}
    found = read_entry(spec)
    assert found.workload == Workload(
        "WorkloadEntry/shop/vm", "shop", "vm", "", "db", (ONE,), False, frozenset({("app", "db")})
    )
    assert found.ports == {"db": 15432}


def test_machine_without_an_account_has_the_default_one() -> None:
    assert read_entry().workload.service_account == "default"
    assert read_entry({"serviceAccount": ""}).workload.service_account == "default"


def test_labels_of_the_object_come_before_those_of_the_spec() -> None:
    spec = {"labels": {"app": "spec", "tier": "spec"}}
    found = read_entry(spec, labels={"app": "object"})
    assert found.workload.labels == {("app", "object"), ("tier", "spec")}


@pytest.mark.parametrize(
    ("metadata", "is_hbone"),
    [
        ({}, False),
        ({"labels": {TUNNEL_LABEL: "http"}}, True),
        ({"labels": {TUNNEL_LABEL: "mtls,http"}}, True),
        ({"labels": {TUNNEL_LABEL: "none"}}, False),
        ({"annotations": {REDIRECTION: "enabled"}}, True),
        ({"annotations": {REDIRECTION: "pending"}}, False),
    ],
)
def test_machine_takes_tunnels_if_it_says_so(metadata: Body, is_hbone: bool) -> None:
    assert read_entry({}, **metadata).workload.is_hbone is is_hbone


@pytest.mark.parametrize(
    ("spec", "path", "detail"),
    [
        ({"address": "vm.example.com"}, "spec.address", "is a name"),
        ({"address": "unix:///run/vm.sock"}, "spec.address", "sockets"),
        ({"address": "???"}, "spec.address", "neither an IP address nor a host name"),
        ({"address": None}, "spec.address", "is required"),
        ({"network": "other"}, "spec.network", "'other': gateways"),
        ({"serviceAccount": "a/b"}, "spec.serviceAccount", "not a valid name"),
        ({"ports": {"db": 0}}, "spec.ports[db]", "is not a port"),
    ],
)
def test_machine_that_cannot_be_used_is_refused_by_field(
    spec: Body, path: str, detail: str
) -> None:
    with pytest.raises(WrongField) as raised:
        read_entry(spec)
    assert raised.value.path == path
    assert detail in raised.value.detail


# -- ServiceEntry -------------------------------------------------------------------------------


def test_entry_with_endpoints_is_a_service() -> None:
    found = must_read(
        {
            "addresses": [str(VIP), f"{SIX}/128"],
            "endpoints": [
                {"address": str(TWO)},
                {"address": str(ONE), "ports": {"db": 15432}},
            ],
        },
        creationTimestamp="2026-01-01T00:00:00Z",
    )
    service = found.service
    assert service.key == ("shop", "db", "ServiceEntry")
    assert service.hosts == ("db.example.com",)
    assert service.addresses == (VIP, SIX)
    assert service.ports == (ServicePort("db", 5432),)
    assert service.endpoints_for(5432) == ((ONE, 15432), (TWO, 5432))
    assert found.selection is None
    assert found.workloads == ()
    assert found.created == "2026-01-01T00:00:00Z"


def test_target_port_is_that_of_endpoints_that_name_none_and_zero_is_none() -> None:
    ports = [
        TCP | {"targetPort": 6000},
        {"number": 80, "name": "web", "targetPort": 0, "protocol": "HTTP"},
        {"number": 53, "name": "dns", "protocol": "UDP"},
    ]
    found = must_read({"ports": ports, "endpoints": [{"address": str(ONE)}]})
    assert found.service.ports == (ServicePort("db", 5432), ServicePort("web", 80))
    assert found.service.endpoints == (Endpoint(ONE, (("db", 6000), ("web", 80))),)


def test_selector_is_kept_with_where_the_ports_lead() -> None:
    found = must_read({"workloadSelector": {"labels": {"app": "db"}}})
    assert found.selects_pods
    assert found.selection is not None
    assert found.selection.labels == {("app", "db")}
    assert found.selection.ports({}) == {"db": 5432}
    assert found.selection.ports({"db": 15432, "other": 1}) == {"db": 15432}


def test_endpoints_of_an_entry_with_a_tunnel_are_workloads() -> None:
    endpoint = {"address": str(ONE), "serviceAccount": "db", "labels": {"app": "db"}}
    found = must_read({"endpoints": [endpoint]}, labels={TUNNEL_LABEL: "http"})
    assert found.workloads == (
        Workload(
            f"ServiceEntry/shop/db/{ONE}", "shop", "db", "", "db", (ONE,), True,
            frozenset({("app", "db")}),
        ),
    )  # fmt: skip


def test_addresses_that_a_controller_chose_count_where_nobody_wrote_any() -> None:
    status = {"addresses": [{"host": "db.example.com", "value": "240.240.0.1"}]}
    endpoints = {"endpoints": [{"address": str(ONE)}]}
    assert must_read(endpoints, status).service.addresses == (ip_address("240.240.0.1"),)
    found = must_read(endpoints | {"addresses": [str(VIP), str(VIP)]}, status)
    assert found.service.addresses == (VIP,)


@pytest.mark.parametrize("resolution", [None, "NONE"])
def test_entry_whose_addresses_are_their_own_endpoints_changes_nothing(
    resolution: str | None,
) -> None:
    assert read({"resolution": resolution, "addresses": ["192.0.2.0/24"]}) is None


def test_entry_for_names_alone_changes_nothing() -> None:
    status = {"addresses": [{"host": "db.example.com", "value": "240.240.0.1"}]}
    spec = {"resolution": "DNS", "location": "MESH_EXTERNAL"}
    assert read(spec) is None
    assert read(spec, status) is None
    assert read(spec | {"endpoints": [{"address": "db.example.org"}]}) is None


def test_endpoints_that_are_addresses_need_no_resolution() -> None:
    endpoints = [{"address": "db.example.org"}, {"address": str(ONE)}]
    found = must_read({"resolution": "DNS", "addresses": [str(VIP)], "endpoints": endpoints})
    assert [each.address for each in found.service.endpoints] == [ONE]


@pytest.mark.parametrize(
    ("spec", "path", "detail"),
    [
        ({"hosts": []}, "spec.hosts", "is required"),
        ({"hosts": ["a b"]}, "spec.hosts[0]", "not a valid name"),
        ({"resolution": "MAGIC"}, "spec.resolution", "must be one of NONE, STATIC"),
        (
            {"resolution": "DNS", "addresses": [str(VIP)]},
            "spec.resolution",
            "DNS would need names to be resolved",
        ),
        ({"addresses": ["192.0.2.0/24"]}, "spec.addresses[0]", "is a range"),
        ({"addresses": ["db"]}, "spec.addresses[0]", "is not an IP address"),
        ({"endpoints": [{"address": "db.example.org"}]}, "spec.endpoints[0].address", "is a name"),
        (
            {"endpoints": [{"address": str(ONE), "network": "n2"}]},
            "spec.endpoints[0].network",
            "gateways to other networks",
        ),
        ({"ports": [TCP, TCP]}, "spec.ports[1].name", "the name of another port"),
        ({"ports": [{"number": 80}]}, "spec.ports[0].name", "is required"),
        ({"ports": [TCP | {"targetPort": "db"}]}, "spec.ports[0].targetPort", "is not a port"),
        ({"workloadSelector": {"labels": ["app"]}}, "spec.workloadSelector.labels", "mapping"),
    ],
)
def test_entry_that_cannot_be_used_is_refused_by_field(spec: Body, path: str, detail: str) -> None:
    with pytest.raises(WrongField) as raised:
        read(spec)
    assert raised.value.path == path
    assert detail in raised.value.detail


# -- Services, endpoints, addresses -------------------------------------------------------------


def test_service_selects_machines_by_number_or_by_the_name_of_a_port() -> None:
    ports = [
        {"name": "web", "port": 80, "targetPort": 8080},
        {"name": "plain", "port": 81},
        {"name": "named", "port": 82, "targetPort": "http"},
        {"name": "dns", "port": 53, "protocol": "UDP"},
    ]
    spec: Body = {"selector": {"app": "web"}, "ports": ports}
    found = read_service_selection(Field(spec, "spec"))
    assert found is not None
    assert found.ports({"web": 1}) == {"web": 8080, "plain": 81}
    assert found.ports({"http": 8000}) == {"web": 8080, "plain": 81, "named": 8000}


def test_service_without_a_selector_selects_nothing() -> None:
    assert read_service_selection(Field({"ports": []}, "spec")) is None


def test_endpoint_that_is_there_twice_is_one_with_all_its_ports() -> None:
    a, b = (("a", 1),), (("b", 2),)
    leaving = Endpoint(ONE, b, is_leaving=True)
    found = merge([Endpoint(SIX, a), Endpoint(TWO, a), leaving, Endpoint(ONE, a)])
    assert found == (Endpoint(ONE, (*a, *b)), Endpoint(TWO, a), Endpoint(SIX, a))
    assert merge([leaving, leaving]) == (leaving,)


def test_address_is_its_first_claimants() -> None:
    taken = {ONE}
    first, second = (
        Workload(uid, "shop", uid, "", "db", (ONE, TWO), is_hbone=False) for uid in ("a", "b")
    )
    found = unclaimed(first, taken)
    assert found is not None
    assert found.addresses == (TWO,)
    assert unclaimed(second, taken) is None
    free = Workload("c", "shop", "c", "", "db", (VIP,), is_hbone=False)
    assert unclaimed(free, taken) is free
