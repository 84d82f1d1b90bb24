"""Istio's labels of a connection."""

from __future__ import annotations

import pytest

from agent.model.flag import Flag
from agent.model.workload import Locality, Workload
from agent.tunnel.labels import NAMES, Party, ServiceName, build_labels, read_service_name

WEB = ServiceName("shop", "web", "web.shop.svc.cluster.local")


def workload(name: str, owner: str = "", **labels: str) -> Workload:
    pairs = frozenset((key.replace("__", "/").replace("_", "-"), labels[key]) for key in labels)
    locality = Locality("eu", "eu-1")
    return Workload(name, "shop", name, "east", name, (), True, pairs, owner, locality)


def labels(
    source: Party, destination: Party, flag: Flag = Flag.NONE, **more: bool
) -> dict[str, str]:
    found = build_labels("source", source, destination, WEB, flag, **more)
    assert tuple(name for name, _value in found) == NAMES == tuple(sorted(NAMES))
    return dict(found)


def test_both_ends_are_named_by_owner_and_labels() -> None:
    source = Party(workload("front-abc-1", "front", app="web", version="v2"), "spiffe://td/x")
    destination = Party(workload("stock"), "spiffe://td/y")
    found = labels(source, destination)
    assert found["source_workload"] == "front"
    assert found["source_app"] == "web"
    assert found["source_canonical_service"] == "web"
    assert found["source_version"] == "v2"
    assert found["source_canonical_revision"] == "v2"
    assert found["source_principal"] == "td/x"
    assert (found["source_region"], found["source_zone"]) == ("eu", "eu-1")
    assert found["destination_workload"] == "stock"
    assert found["destination_app"] == "stock"
    assert found["destination_version"] == "latest"
    assert found["destination_service"] == "web.shop.svc.cluster.local"
    assert found["destination_service_name"] == "web"
    assert found["connection_security_policy"] == "mutual_tls"
    assert found["response_flags"] == "-"


def test_what_is_not_known_is_unknown() -> None:
    found = dict(build_labels("destination", Party(), Party(), None, Flag.CONNECT))
    own = {"reporter": "destination", "request_protocol": "tcp", "response_flags": "CONNECT"}
    assert found == dict.fromkeys(NAMES, "unknown") | own


@pytest.mark.parametrize(
    ("source", "destination", "is_tls", "expected"),
    [
        ("spiffe://td/x", "spiffe://td/y", True, "mutual_tls"),
        ("spiffe://td/x", "spiffe://td/y", False, "unknown"),
        (None, "spiffe://td/y", True, "unknown"),
        ("spiffe://td/x", None, True, "unknown"),
    ],
)
def test_mutual_tls_is_claimed_only_where_it_was(
    source: str | None, destination: str | None, is_tls: bool, expected: str
) -> None:
    found = labels(Party(None, source), Party(None, destination), is_tls=is_tls)
    assert found["connection_security_policy"] == expected


@pytest.mark.parametrize(
    ("hostname", "expected"),
    [
        ("web.shop.svc.cluster.local", WEB),
        ("web.shop.svc.made.up.by.a.peer", WEB),
        ("web.shop.svc.", None),
        ("web.shop.svc", None),
        ("example.com", None),
        ("a..svc.cluster.local", None),
        ("", None),
        (None, None),
    ],
)
def test_service_is_read_from_its_name_in_dns(
    hostname: str | None, expected: ServiceName | None
) -> None:
    assert read_service_name(hostname) == expected
