"""The dump in ztunnel's shape: what istioctl's own types expect, field by field."""

from __future__ import annotations

import base64
import json
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, Any

import pytest

from agent.config_dump import build_dump
from agent.identity.issuer import Certificate
from agent.model.condition import Attribute, Term, network_set, port_set, text_set
from agent.model.identity import SpiffeId
from agent.model.open_connection import OpenConnection
from agent.model.pod import LocalPod
from agent.model.policy import (
    Action,
    Clause,
    Mode,
    PeerAuthentication,
    Policy,
    PolicyKey,
    Rule,
    Scope,
)
from agent.model.service import Endpoint, Service, ServicePort
from agent.model.workload import Workload
from agent.state.store import Snapshot
from tests.support.certificates import Maker

if TYPE_CHECKING:
    from agent.model.policy import AnyPolicy

CART4, CART6, STOCK4 = ip_address("10.0.0.1"), ip_address("fd00::1"), ip_address("10.0.0.2")
CART = Workload(
    "u-1", "shop", "cart-abc-1", "east", "cart", (CART4, CART6), True,
    frozenset({("app", "cart"), ("version", "v2")}), "cart",
)  # fmt: skip
STOCK = Workload("u-2", "shop", "stock", "west", "stock", (STOCK4,), is_hbone=False)
WEB = Service(
    "shop",
    "web",
    (ip_address("10.96.0.1"),),
    (ServicePort("http", 80), ServicePort("admin", 81)),
    (
        Endpoint(CART4, (("http", 8080),)),
        Endpoint(ip_address("192.0.2.1"), (("http", 8080), ("admin", 9000))),
    ),
)
EMPTY = Service("shop", "none", (), (ServicePort("", 80),), ())
POD = LocalPod("u-1", "shop", "cart-abc-1", "cart", (CART4,))


def connection(direction: str, pod: str = "cart-abc-1") -> OpenConnection:
    return OpenConnection(
        "shop", pod, direction, "hbone", "open", "10.0.0.1:4", "10.96.0.1:80", "10.0.0.2:8080",
        None, None, None, None, None, None, 0, 0, 0.0,
    )  # fmt: skip


def dump(*policies: AnyPolicy, certificates: Any = (), connections: Any = ()) -> dict[str, Any]:
    snapshot = Snapshot((CART, STOCK), (WEB, EMPTY), policies=policies)
    found = build_dump(
        snapshot,
        "cluster.local",
        "cluster.local",
        certificates,
        [(POD, True), (LocalPod("u-9", "shop", "late", "late", ()), False)],
        connections,
        "1.2.3",
        {"localNode": "east"},
    )
    return dict(json.loads(json.dumps(found)))


def test_workloads_have_the_fields_that_istioctl_prints() -> None:
    cart, stock = dump()["workloads"]
    assert cart["uid"] == "Kubernetes//Pod/shop/cart-abc-1"
    assert cart["workloadIps"] == ["10.0.0.1", "fd00::1"]
    assert (cart["protocol"], stock["protocol"]) == ("HBONE", "TCP")
    assert (cart["workloadName"], cart["workloadType"]) == ("cart", "deployment")
    assert (cart["canonicalName"], cart["canonicalRevision"]) == ("cart", "v2")
    assert (stock["workloadName"], stock["canonicalRevision"]) == ("stock", "latest")
    assert cart["network"] == ""
    assert (cart["status"], cart["node"], cart["capacity"]) == ("Healthy", "east", 1)
    assert cart["locality"] == {"region": "", "zone": ""}


def test_services_have_endpoints_by_workload_and_ports() -> None:
    web, empty = dump()["services"]
    assert (web["hostname"], web["vips"]) == ("web.shop.svc.cluster.local", ["/10.96.0.1"])
    assert web["ports"] == {"80": 8080, "81": 0}
    assert web["endpoints"]["Kubernetes//Pod/shop/cart-abc-1:/10.0.0.1"] == {
        "workloadUid": "Kubernetes//Pod/shop/cart-abc-1",
        "service": "shop/web.shop.svc.cluster.local",
        "address": "/10.0.0.1",
        "port": {"80": 8080},
    }
    assert web["endpoints"][":/192.0.2.1"]["port"] == {"80": 8080, "81": 9000}
    assert (empty["ports"], empty["endpoints"], empty["vips"]) == ({"80": 0}, {}, [])


def test_every_kind_of_condition_has_its_field() -> None:
    terms = (
        Term(Attribute.PRINCIPAL, text_set(["td/a", "td/b*", "*c", "*"])),
        Term(Attribute.NAMESPACE, text_set(["shop"]), is_negated=True),
        Term(Attribute.SERVICE_ACCOUNT, text_set(["shop/cart"])),
        Term(Attribute.SOURCE_ADDRESS, network_set([ip_network("10.0.0.0/8")])),
        Term(Attribute.DESTINATION_ADDRESS, network_set([ip_network("fd00::1/128")])),
        Term(Attribute.DESTINATION_PORT, port_set([80, 81])),
    )
    key = PolicyKey("shop", "p", "AuthorizationPolicy")
    rules = (Rule(0, (Clause("from", (terms,)),)),)
    scope = Scope("shop", frozenset({("app", "cart")}))
    (policy,) = dump(Policy(key, Action.ALLOW, scope, rules))["policies"]
    assert (policy["action"], policy["scope"]) == ("Allow", "WorkloadSelector")
    assert policy["rules"] == [
        [
            [
                {
                    "principals": [
                        {"Exact": "td/a"}, {"Prefix": "td/b"}, {"Suffix": "c"}, {"Presence": {}}
                    ],
                    "notNamespaces": [{"Exact": "shop"}],
                    "serviceAccounts": [{"namespace": "shop", "serviceAccount": "cart"}],
                    "sourceIps": ["10.0.0.0/8"],
                    "destinationIps": ["fd00::1/128"],
                    "destinationPorts": [80, 81],
                }
            ]
        ]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "scope", "count", "named"),
    [
        (Mode.STRICT, Scope("shop"), 1, "Namespace"),
        (Mode.PERMISSIVE, Scope(), 0, "Global"),
        (None, Scope(), 0, "Global"),
    ],
)
def test_strict_is_a_denial_of_whoever_has_no_principal(
    mode: Mode | None, scope: Scope, count: int, named: str
) -> None:
    key = PolicyKey("shop", "p", "PeerAuthentication")
    (policy,) = dump(PeerAuthentication(key, scope, mode))["policies"]
    assert (policy["action"], policy["scope"]) == ("Deny", named)
    assert policy["rules"] == [[[{"notPrincipals": [{"Presence": {}}]}]]] * count


def test_certificates_say_state_chain_and_roots_but_no_key() -> None:
    authority = Maker().root
    identity = SpiffeId("cluster.local", "shop", "cart")
    issued = Certificate(identity, authority.pem, b"KEY", authority.pem, 0.0, 1.0)
    found = dump(
        certificates=[
            ("a", issued, authority.pem, ""),
            ("b", None, b"", "the CA is away"),
            ("c", None, b"", ""),
        ]
    )
    first, second, third = found["certificates"]
    assert first["state"] == "Available"
    assert (second["state"], third["state"]) == ("Unavailable: the CA is away", "Initializing")
    assert (second["certChain"], second["rootCerts"]) == ([], [])
    (leaf,) = first["certChain"]
    assert base64.b64decode(leaf["pem"]).startswith(b"-----BEGIN CERTIFICATE-----\nM")
    assert leaf["serialNumber"].isdecimal()
    assert leaf["validFrom"].endswith("Z")
    assert "KEY" not in json.dumps(found)


def test_pods_have_their_state_and_connections() -> None:
    found = dump(connections=[connection("outbound"), connection("inbound"),
                              connection("outbound", "other")])  # fmt: skip
    states = found["workloadState"]
    assert states["u-9"]["state"] == "Pending"
    cart = states["u-1"]
    assert cart["state"] == "Up"
    assert cart["info"] == {
        "name": "cart-abc-1",
        "namespace": "shop",
        "trustDomain": "cluster.local",
        "serviceAccount": "cart",
    }
    common = {"src": "10.0.0.1:4", "actualDst": "10.0.0.2:8080", "protocol": "HBONE"}
    assert cart["connections"]["outbound"] == [common | {"originalDst": "10.96.0.1:80"}]
    assert cart["connections"]["inbound"] == [common | {"originalDst": None}]
    assert found["version"] == {"version": "1.2.3"}
