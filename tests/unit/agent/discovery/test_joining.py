"""What is behind a service as objects come and go, and who holds an address."""

from __future__ import annotations

from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Any

from agent.discovery.translate import SERVICE_LABEL, SourcedObject, Translator
from tests.unit.agent.discovery.test_translate import POD4, POD6, Body, pod

NETWORKING = "networking.istio.io/v1"


def machine(name: str = "vm", address: str = "192.0.2.1", **labels: str) -> Body:
    return {
        "apiVersion": NETWORKING,
        "kind": "WorkloadEntry",
        "metadata": {"namespace": "shop", "name": name},
        "spec": {"address": address, "labels": labels},
    }


def service_entry(name: str = "db", created: Any = "", **spec: Any) -> Body:
    port = {"number": 5432, "name": "db"}
    metadata = {"namespace": "shop", "name": name, "creationTimestamp": created}
    common = {"hosts": [f"{name}.example.com"], "ports": [port], "resolution": "STATIC"}
    return {
        "apiVersion": NETWORKING,
        "kind": "ServiceEntry",
        "metadata": metadata,
        "spec": common | spec,
    }


def follow(*bodies: Body) -> Translator:
    translator = Translator()
    for body in bodies:
        assert translator.put(SourcedObject("f", body)) is None
    return translator


def endpoints_of(translator: Translator, name: str) -> list[tuple[str, int]]:
    (found,) = (each for each in translator.snapshot().services if each.name == name)
    return [(str(each.address), port) for each in found.endpoints for _name, port in each.ports]


def test_selected_machines_and_pods_are_endpoints_as_they_come_and_go() -> None:
    selecting = service_entry(workloadSelector={"labels": {"app": "db"}})
    translator = follow(selecting)
    assert endpoints_of(translator, "db") == []
    translator.put(SourcedObject("f", machine(app="db")))
    assert endpoints_of(translator, "db") == [("192.0.2.1", 5432)]
    translator.put(SourcedObject("f", pod(labels={"app": "db", "more": "yes"})))
    assert endpoints_of(translator, "db") == [
        (str(POD4), 5432),
        ("192.0.2.1", 5432),
        (str(POD6), 5432),
    ]
    translator.put(SourcedObject("f", pod(labels={"app": "other"})))
    translator.put(SourcedObject("f", machine("second", "192.0.2.2", app="other")))
    assert endpoints_of(translator, "db") == [("192.0.2.1", 5432)]
    translator.remove("WorkloadEntry shop/vm")
    assert endpoints_of(translator, "db") == []
    for named in ("Pod shop/cart-0", "WorkloadEntry shop/second", "ServiceEntry shop/db"):
        translator.remove(named)
    assert translator.snapshot().services == ()


def test_service_selects_machines_and_has_its_pods_from_slices_alone() -> None:
    spec = {"selector": {"app": "db"}, "ports": [{"name": "db", "port": 5432}]}
    body = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"namespace": "shop", "name": "db"},
        "spec": spec,
    }
    translator = follow(body, machine(app="db"), pod(labels={"app": "db"}))
    assert endpoints_of(translator, "db") == [("192.0.2.1", 5432)]
    translator.put(SourcedObject("f", machine(app="other")))
    assert endpoints_of(translator, "db") == []


def test_address_of_a_pod_or_service_is_nobody_elses() -> None:
    vip = "10.96.0.1"
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"namespace": "other", "name": "web"},
        "spec": {"clusterIP": vip, "ports": []},
        "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.8"}]}},
    }
    claims = [
        machine("takes-a-pods", str(POD4)),
        machine("takes-a-services", vip),
        service_entry("takes-it-too", addresses=[vip, str(POD6)]),
        machine("takes-a-load-balancers", "192.0.2.8"),
        machine("fair", "192.0.2.9"),
    ]
    snapshot = follow(*claims, service, pod()).snapshot()
    assert [each.name for each in snapshot.workloads] == ["cart-0", "fair"]
    addresses = {each.name: each.addresses for each in snapshot.services}
    assert addresses == {"web": (ip_address(vip),), "takes-it-too": ()}


def test_oldest_entry_holds_an_address() -> None:
    static = {"addresses": ["192.0.2.100"], "endpoints": [{"address": "192.0.2.1"}]}
    young = service_entry("a-young", "2026-02-01T00:00:00Z", **static)
    old = service_entry("b-old", "2026-01-01T00:00:00Z", **static)
    snapshot = follow(young, old).snapshot()
    held = {each.name: bool(each.addresses) for each in snapshot.services}
    assert held == {"a-young": False, "b-old": True}


def test_entry_that_does_not_tell_its_age_is_the_youngest() -> None:
    static: Body = {"addresses": ["192.0.2.100"], "endpoints": [{"address": "192.0.2.1"}]}
    created = datetime(2026, 1, 1, tzinfo=UTC)  # as YAML reads it without quotes
    ageless, old = service_entry("a", **static), service_entry("b", created, **static)
    held = {each.name: bool(each.addresses) for each in follow(ageless, old).snapshot().services}
    assert held == {"a": False, "b": True}


def test_endpoints_in_the_mesh_are_workloads() -> None:
    body = service_entry(endpoints=[{"address": "192.0.2.1", "serviceAccount": "db"}])
    body["metadata"]["labels"] = {"networking.istio.io/tunnel": "http"}
    (found,) = follow(body).snapshot().workloads
    assert (found.name, found.service_account, found.is_hbone) == ("db", "db", True)


def test_same_name_of_a_service_and_an_entry_are_two() -> None:
    body = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"namespace": "shop", "name": "db"},
        "spec": {"clusterIP": "10.96.0.1", "ports": []},
    }
    translator = follow(body, service_entry(addresses=["192.0.2.100"]))
    assert [each.kind for each in translator.snapshot().services] == ["Service", "ServiceEntry"]
    translator.remove("Service shop/db")
    assert [each.kind for each in translator.snapshot().services] == ["ServiceEntry"]


def test_slices_of_a_service_are_joined_and_forgotten() -> None:
    body = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"namespace": "shop", "name": "db"},
        "spec": {"ports": [{"name": "db", "port": 5432}]},
    }
    slices = [
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"namespace": "shop", "name": name, "labels": {SERVICE_LABEL: "db"}},
            "addressType": "IPv4",
            "ports": [{"name": "db", "port": 5432}],
            "endpoints": [{"addresses": addresses}],
        }
        for name, addresses in (("a", ["10.0.0.1", "10.0.0.2"]), ("b", ["10.0.0.2"]))
    ]
    translator = follow(body, *slices)
    assert [address for address, _port in endpoints_of(translator, "db")] == [
        "10.0.0.1",
        "10.0.0.2",
    ]
    translator.remove("EndpointSlice shop/a")
    assert [address for address, _port in endpoints_of(translator, "db")] == ["10.0.0.2"]
    translator.remove("EndpointSlice shop/b")
    assert endpoints_of(translator, "db") == []
