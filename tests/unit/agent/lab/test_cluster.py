"""The description of a lab: what is accepted, and what every refusal names."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest

from agent.errors import ManifestError
from agent.lab.cluster import IDLE_COMMAND, MAX_NODES, MAX_PODS, parse_cluster


def node(name: str = "node-1") -> dict[str, Any]:
    return {"kind": "Node", "metadata": {"name": name}}


def pod(name: str = "cart", **spec: Any) -> dict[str, Any]:
    return {
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"nodeName": "node-1"} | spec,
    }


def test_addresses_come_from_the_places_in_the_file() -> None:
    cluster = parse_cluster([pod(), None, node(), pod("web", nodeName="b"), node("b")], "f", "lab")
    assert [(each.name, each.number) for each in cluster.nodes] == [("node-1", 1), ("b", 2)]
    cart, web = cluster.pods
    assert (cart.address4, cart.address6) == (
        ip_address("10.244.1.2"),
        ip_address("fd00:10:244:1::2"),
    )
    assert (web.address4, web.address6) == (
        ip_address("10.244.2.3"),
        ip_address("fd00:10:244:2::3"),
    )
    assert cart.node.gateway4 == ip_address("10.244.1.1")
    assert cart.node.link4(1) == ip_address("10.243.1.1")
    assert cart.node.link6(2) == ip_address("fd00:10:243:1::2")
    assert cart.node.gateway6 == ip_address("fd00:10:244:1::1")


def test_pod_without_a_command_waits_and_one_with_it_runs_it() -> None:
    bodies = [pod(), pod("b", containers=[{}]), pod("c", containers=[{"command": ["nginx", "-g"]}])]
    commands = [each.command for each in parse_cluster([node(), *bodies], "f", "lab").pods]
    assert commands == [IDLE_COMMAND, IDLE_COMMAND, ("nginx", "-g")]


def test_manifest_is_what_an_api_server_would_show() -> None:
    body = pod()
    (found,) = parse_cluster([node(), body], "f", "lab").pods
    manifest = found.manifest()
    assert manifest["metadata"] == {"name": "cart", "namespace": "shop", "uid": found.uid}
    assert manifest["status"] == {
        "phase": "Running",
        "podIP": "10.244.1.2",
        "podIPs": [{"ip": "10.244.1.2"}, {"ip": "fd00:10:244:1::2"}],
    }
    assert manifest["spec"] == body["spec"]
    assert "uid" not in body["metadata"]


def test_uid_is_of_the_pod_and_the_lab() -> None:
    def uids(lab: str) -> list[str]:
        return [each.uid for each in parse_cluster([node(), pod(), pod("b")], "f", lab).pods]

    assert uids("lab") == uids("lab")
    assert len({*uids("lab"), *uids("other")}) == 4


def test_pod_of_no_namespace_is_of_the_default_one() -> None:
    body = pod()
    del body["metadata"]["namespace"]
    (found,) = parse_cluster([node(), body], "f", "lab").pods
    assert found.key == "default/cart"


def test_other_objects_and_nodes_are_passed_on() -> None:
    service = {"kind": "Service", "metadata": {"name": "cart"}}
    assert parse_cluster([service, node()], "f", "lab").others == (service, node())


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ([["a", "list"]], "f: document 1: is not an object"),
        ([node(), {}], "f: document 2: kind: must be a text, not None"),
        ([{"kind": "Pod"}], "f: Pod in document 1: metadata: is missing"),
        ([{"kind": "Pod", "metadata": {}}], "f: Pod in document 1: metadata.name: must be"),
        ([], "f: a lab has 1 to 16 objects of kind Node"),
        ([node(f"n{i}") for i in range(MAX_NODES + 1)], "f: a lab has 1 to 16 objects"),
        ([node(), *[pod(f"p{i}") for i in range(MAX_PODS + 1)]], "f: a lab has at most 200 pods"),
        ([node(), pod(), pod()], "f: Pod shop/cart: metadata.name: is there twice"),
        (
            [node(), pod() | {"metadata": {"name": "cart", "namespace": 5}}],
            "metadata.namespace: must be a text, not 5",
        ),
        ([node(), pod() | {"spec": None}], "f: Pod shop/cart: spec: is missing"),
        ([node(), pod(nodeName="")], "f: Pod shop/cart: spec.nodeName: must be a text, not ''"),
        ([node(), pod(nodeName="b")], "f: Pod shop/cart: spec.nodeName: there is no Node b"),
        ([node(), pod(containers={"a": 1})], "spec.containers: must be a list of objects"),
        ([node(), pod(containers=["nginx"])], "spec.containers: must be a list of objects"),
        (
            [node(), pod(containers=[{"command": "nginx"}])],
            r"spec.containers\[0\].command: must be a list of texts",
        ),
        (
            [node(), pod(containers=[{"command": ["sleep", 5]}])],
            r"spec.containers\[0\].command: must be a list of texts",
        ),
    ],
)
def test_refusal_names_file_object_and_field(documents: list[Any], expected: str) -> None:
    with pytest.raises(ManifestError, match=expected):
        parse_cluster(documents, "f", "lab")
