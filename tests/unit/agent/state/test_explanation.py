"""Explanations as a table: who, to whom, which path, which verdict, and what would change it."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import pytest

from agent.errors import NameUnknown
from agent.model.enrollment import Refusal
from agent.model.pod import Exclusions, LocalPod
from agent.model.policy import Policy
from agent.model.service import Endpoint, Service, ServicePort
from agent.model.workload import Workload
from agent.state.explanation import Explainer, Explanation, describe_policy
from agent.state.rulebook import Rulebook
from agent.state.store import Snapshot
from tests.support.policies import authentication, authorization, from_account

if TYPE_CHECKING:
    from collections.abc import Mapping, Set

    from agent.model.policy import AnyPolicy

ADDRESSES = {"client": 1, "near": 2, "far": 3, "bare": 4, "open": 5, "bypass": 6}
NODES = {"client": "east", "near": "east"}


def workload(name: str) -> Workload:
    number = ADDRESSES[name]
    addresses = (ip_address(f"10.0.0.{number}"), ip_address(f"fd00::{number}"))
    labels = frozenset({("app", name)})
    node = NODES.get(name, "west")
    return Workload(name, "default", name, node, name, addresses, name != "bare", labels)


def local(name: str) -> LocalPod:
    exclusions = Exclusions(inbound_ports=frozenset({9})) if name == "open" else Exclusions()
    if name == "client":
        exclusions = Exclusions(outbound_ports=frozenset({7}))
    found = workload(name)
    return LocalPod(
        name, "default", name, name, found.addresses, exclusions,
        bypasses_inbound=name == "bypass",
    )  # fmt: skip


SERVICES = (
    Service(
        "default", "web", (ip_address("10.1.0.1"),), (ServicePort("http", 80),),
        (Endpoint(ip_address("10.0.0.3"), (("http", 8080),)),),
    ),
    Service(
        "default", "crossed", (ip_address("10.1.0.2"), ip_address("fd01::2")),
        (ServicePort("out", 7), ServicePort("in", 80)),
        (Endpoint(ip_address("10.0.0.3"), (("out", 8080), ("in", 7))),),
    ),
    Service("default", "far", (), (ServicePort("http", 80),), ()),
    Service(
        "default", "entry", (), (ServicePort("http", 80),),
        (Endpoint(ip_address("10.0.0.3"), (("http", 8080),)),),
        "ServiceEntry", ("db.example.com",),
    ),
)  # fmt: skip
SNAPSHOT = Snapshot(
    tuple(map(workload, ADDRESSES)),
    SERVICES,
    {
        "east": (local("client"), local("near")),
        "west": (local("far"), local("open"), local("bypass")),
    },
    refusals={"bare": Refusal.NOT_LABELED},
)
NONE: Mapping[str, str] = {}
STRICT = authentication("strict", "STRICT")
NOT_CLIENT = authorization("not-client", "DENY", from_account("client"))
ONLY_NEAR = authorization("only-near", "ALLOW", from_account("near", "80"))


def explain(
    source: str,
    destination: str,
    *policies: AnyPolicy,
    port: int = 80,
    has_direct: bool = True,
    snapshot: Snapshot = SNAPSHOT,
    unenrolled: Mapping[str, str] = NONE,
    unguarded: Set[str] = frozenset(),
) -> list[Explanation]:
    rulebook = Rulebook()
    for policy in policies:
        rulebook.put(policy)
    explainer = Explainer(
        snapshot, rulebook, "cluster.local", Exclusions(), has_direct, unenrolled, unguarded
    )
    return explainer.explain(source, destination, port)


@pytest.mark.parametrize(
    ("source", "destination", "port", "policies", "path", "decided_by"),
    [
        ("client", "far", 80, (), "tunnel", None),
        ("client", "near", 80, (), "direct", None),
        ("client", "near", 80, (STRICT,), "direct", None),
        ("client", "fd00::3", 80, (), "tunnel", None),
        ("bare", "far", 80, (), "plaintext", None),
        ("bare", "far", 80, (STRICT,), "denied", "PeerAuthentication default/strict"),
        ("192.0.2.1", "far", 80, (STRICT,), "denied", "PeerAuthentication default/strict"),
        ("client", "far", 80, (STRICT,), "tunnel", None),
        ("client", "bare", 80, (NOT_CLIENT,), "passthrough", None),
        ("client", "192.0.2.1", 80, (NOT_CLIENT,), "passthrough", None),
        ("client", "client", 80, (NOT_CLIENT,), "passthrough", None),
        ("client", "127.0.0.1", 80, (), "passthrough", None),
        ("client", "::", 80, (), "passthrough", None),
        ("client", "::ffff:10.0.0.3", 80, (), "tunnel", None),
        ("::ffff:10.0.0.1", "::ffff:10.1.0.1", 80, (), "tunnel", None),
        ("client", "far", 80, (NOT_CLIENT,), "denied",
         "AuthorizationPolicy default/not-client rules[0]"),
        ("near", "far", 80, (ONLY_NEAR,), "tunnel",
         "AuthorizationPolicy default/only-near rules[0]"),
        ("near", "far", 81, (ONLY_NEAR,), "denied", "AuthorizationPolicy default/only-near"),
        ("client", "far", 15008, (), "denied", None),
        ("client", "far", 7, (STRICT,), "denied", "PeerAuthentication default/strict"),
        ("bare", "open", 9, (STRICT,), "passthrough", None),
        ("bare", "bypass", 80, (STRICT,), "passthrough", None),
        ("client", "bypass", 80, (NOT_CLIENT,), "denied",
         "AuthorizationPolicy default/not-client rules[0]"),
        ("client", "open", 9, (NOT_CLIENT,), "denied",
         "AuthorizationPolicy default/not-client rules[0]"),
        ("client", "web", 80, (), "tunnel", None),
        ("client", "10.1.0.1", 80, (), "tunnel", None),
        ("client", "web", 81, (), "denied", None),
        # Port 7 is excluded where it is asked for, not where the service leads.
        ("client", "crossed", 7, (), "plaintext", None),
        ("client", "crossed", 80, (), "tunnel", None),
        ("far", "web", 80, (), "tunnel", None),  # itself, by a service
        ("far", "web", 80, (ONLY_NEAR,), "denied", "AuthorizationPolicy default/only-near"),
        ("far", "db.example.com", 80, (), "passthrough", None),
        ("client", "service:far", 80, (), "denied", None),
        ("client", "web.default.svc.cluster.local", 80, (NOT_CLIENT,), "denied",
         "AuthorizationPolicy default/not-client rules[0]"),
    ],
)  # fmt: skip
def test_path_and_verdict(
    source: str,
    destination: str,
    port: int,
    policies: tuple[AnyPolicy, ...],
    path: str,
    decided_by: str | None,
) -> None:
    (found,) = explain(source, destination, *policies, port=port)
    assert found.path == path
    assert (found.verdict.decided_by if found.verdict else None) == decided_by


def test_direct_path_may_be_off() -> None:
    (found,) = explain("client", "near", has_direct=False)
    assert found.path == "tunnel"


def test_nothing_leads_into_another_network() -> None:
    west = replace(workload("far"), network="west")
    others = tuple(each for each in SNAPSHOT.workloads if each.name != "far")
    snapshot = replace(SNAPSHOT, workloads=(*others, west))
    for source, path in (("client", "denied"), ("far", "passthrough"), ("bare", "plaintext")):
        (found,) = explain(source, "far", snapshot=snapshot)
        assert found.path == path
    (found,) = explain("client", "far", snapshot=snapshot)
    assert found.reason == "default/far is in another network, and there is no gateway to it"


def test_identities_are_those_of_the_tunnel() -> None:
    (found,) = explain("client", "far")
    assert str(found.source_identity) == "spiffe://cluster.local/ns/default/sa/client"
    assert str(found.destination_identity) == "spiffe://cluster.local/ns/default/sa/far"
    assert found.is_proved
    (found,) = explain("bare", "far")
    assert found.source_identity is None
    assert not found.is_proved


def test_identity_that_nobody_learns_is_an_identity_all_the_same() -> None:
    for source, destination, port in (("client", "192.0.2.1", 80), ("client", "far", 7)):
        (found,) = explain(source, destination, port=port)
        assert str(found.source_identity) == "spiffe://cluster.local/ns/default/sa/client"
        assert not found.is_proved


def test_verdict_agrees_with_a_path_that_is_denied() -> None:
    (found,) = explain("client", "far", port=15008)
    assert found.row()["verdict"] == "deny"
    assert found.row()["explained"] == "denied: port 15008 is the agent's own"
    (found,) = explain("client", "far", NOT_CLIENT)
    assert found.reason == "tunnel if it were allowed: both pods are in the mesh"
    (found,) = explain("client", "192.0.2.1")
    assert (found.row()["verdict"], found.row()["explained"]) == (None, None)


def test_connection_of_no_pod_is_an_error() -> None:
    with pytest.raises(NameUnknown, match="is the address of a pod"):
        explain("192.0.2.1", "192.0.2.2")


def outside(name: str, **changes: Any) -> Snapshot:
    """Return a state where a pod is not enrolled, though nothing is against it."""
    others = tuple(each for each in SNAPSHOT.workloads if each.name != name)
    changed = replace(workload(name), is_hbone=False, **changes)
    return replace(SNAPSHOT, workloads=(*others, changed))


@pytest.mark.parametrize(
    ("snapshot", "unenrolled", "reason", "advice"),
    [
        (outside("far"), {"far": "pending: no process"}, "far is not in the mesh (pending: no", ()),
        (outside("far"), {}, "the agent of node west has not enrolled it",
         ("see why on node west: sidestep diff --pod default/far",)),
        (outside("far", node=""), {}, "default/far is not in the mesh, so nobody", ()),
        (replace(outside("far"), refusals={"far": Refusal.OPTED_OUT}), {}, "says none",
         ("enroll default/far: label it istio.io/dataplane-mode: ambient",)),
        (replace(outside("far"), refusals={"far": Refusal.NAMESPACE}), {}, "is excluded", ()),
    ],
)  # fmt: skip
def test_pod_outside_has_its_reason_and_a_label_only_if_that_helps(
    snapshot: Snapshot, unenrolled: dict[str, str], reason: str, advice: tuple[str, ...]
) -> None:
    (found,) = explain("client", "far", snapshot=snapshot, unenrolled=unenrolled)
    assert reason in found.reason
    assert found.to_change == advice


def test_who_is_no_pod_cannot_be_enrolled() -> None:
    permissive = "let PeerAuthentication default/strict say PERMISSIVE for port 80"
    (found,) = explain("192.0.2.1", "far", STRICT)
    assert found.to_change == (permissive,)
    (found,) = explain("bare", "far", STRICT)
    enroll = "enroll default/bare: label it istio.io/dataplane-mode: ambient"
    assert found.to_change == (enroll, permissive)
    (found,) = explain("client", "far", STRICT, port=7)
    assert found.to_change[0] == "let default/client exclude it from capture no more"


@pytest.mark.parametrize(
    ("source", "destination", "policy", "expected"),
    [
        ("bare", "far", STRICT, "enroll default/bare"),
        ("client", "bare", STRICT, "enroll default/bare"),
        ("client", "far", NOT_CLIENT, "without AuthorizationPolicy default/not-client rules[0]"),
        ("client", "far", ONLY_NEAR, "only-near rules[0] would allow it, but for: from"),
        ("client", "far", ONLY_NEAR, "principal cluster.local/ns/default/sa/client and port 80"),
    ],
)
def test_advice_names_what_would_change_it(
    source: str, destination: str, policy: AnyPolicy, expected: str
) -> None:
    (found,) = explain(source, destination, policy)
    assert any(expected in line for line in found.to_change)


@pytest.mark.parametrize("name", ["nobody", "service:nobody", "pod:web"])
def test_unknown_name_is_an_error(name: str) -> None:
    with pytest.raises(NameUnknown, match=name.rpartition(":")[2]):
        explain("client", name)


@pytest.mark.parametrize("name", ["client", "near"])
def test_pod_that_is_not_guarded_takes_no_direct_path(name: str) -> None:
    (found,) = explain("client", "near", unguarded={workload(name).uid})
    assert found.path == "tunnel"
    assert found.reason.startswith(f"default/{name} has no veth")


def test_several_pods_or_services_of_one_name_are_an_error() -> None:
    twins = replace(SERVICES[0], namespace="other"), replace(workload("far"), namespace="other")
    services, workloads = (*SERVICES, twins[0]), (*SNAPSHOT.workloads, twins[1])
    snapshot = replace(SNAPSHOT, services=services, workloads=workloads)
    explainer = Explainer(snapshot, Rulebook(), "cluster.local", Exclusions(), False, NONE)
    with pytest.raises(NameUnknown, match="several services: default/web, other/web"):
        explainer.explain("client", "web", 80)
    with pytest.raises(NameUnknown, match="several pods: default/far, other/far"):
        explainer.explain("client", "far", 80)


def test_row_has_plain_values() -> None:
    (found,) = explain("client", "far", NOT_CLIENT)
    row = found.row()
    assert row["verdict"] == "deny"
    assert row["destination"] == "default/far 10.0.0.3:80"
    assert row["source_identity"] == "spiffe://cluster.local/ns/default/sa/client"
    assert explain("client", "bare")[0].row()["verdict"] is None
    assert explain("client", "far")[0].row()["verdict"] == "allow"


def test_dry_run_and_warnings_of_policies_are_told() -> None:
    assert isinstance(NOT_CLIENT, Policy)
    dry_run = replace(NOT_CLIENT, is_dry_run=True, warnings=("careful",))
    (found,) = explain("client", "fd00::3", dry_run)
    assert "default/not-client" in str(found.row()["dry_run"])
    assert found.warnings == ("AuthorizationPolicy default/not-client: careful",)
    assert found.row()["destination"] == "default/far [fd00::3]:80"


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (NOT_CLIENT, ("DENY", "in force")),
        (STRICT, ("STRICT", "in force")),
        (authentication("u", "UNSET"), ("UNSET", "in force")),
        (authentication("w", "STRICT", selector={"matchLabels": {"a": "b"}},
                        portLevelMtls={"80": {"mode": "DISABLE"}}),
         ("STRICT, 80=DISABLE", "in force")),
        (authentication("r", "STRICT", "istio-system", selector={"matchLabels": {"a": "b"}}),
         ("STRICT", "not enforced here")),
    ],
)  # fmt: skip
def test_policies_are_described(policy: AnyPolicy, expected: tuple[str, str]) -> None:
    assert describe_policy(policy) == expected


def test_dry_run_is_described() -> None:
    assert isinstance(NOT_CLIENT, Policy)
    assert describe_policy(replace(NOT_CLIENT, is_dry_run=True)) == ("DENY", "dry run")


@pytest.mark.parametrize("name", ["db.example.com", "service:default/entry"])
def test_entry_is_found_by_its_hosts_and_by_its_name(name: str) -> None:
    (found,) = explain("client", name)
    assert found.destination.endswith("10.0.0.3:8080")


def test_entry_has_no_name_of_the_cluster() -> None:
    with pytest.raises(NameUnknown):
        explain("client", "service:entry.default.svc")


LOCAL = Service(
    "default", "agents", (ip_address("10.1.0.3"),), (ServicePort("http", 80),),
    (
        Endpoint(ip_address("10.0.0.2"), (("http", 8080),), node="east"),
        Endpoint(ip_address("10.0.0.3"), (("http", 8080),), node="west"),
    ),
    balanced=(ip_address("192.0.2.9"),), is_local=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("source", "destination", "ends"),
    [
        ("client", "agents", ["10.0.0.2"]),
        ("client", "10.1.0.3", ["10.0.0.2"]),
        ("far", "agents", ["10.0.0.3"]),
        ("client", "192.0.2.9", ["10.0.0.2", "10.0.0.3"]),  # a load balancer may go anywhere
    ],
)
def test_local_service_leads_to_the_endpoints_of_the_clients_node(
    source: str, destination: str, ends: list[str]
) -> None:
    found = explain(source, destination, snapshot=replace(SNAPSHOT, services=(LOCAL,)))
    assert [each.destination.split()[-1] for each in found] == [f"{end}:8080" for end in ends]


def test_local_service_without_endpoint_on_the_clients_node_says_so() -> None:
    far = replace(LOCAL, endpoints=LOCAL.endpoints[1:])
    (row,) = explain("client", "agents", snapshot=replace(SNAPSHOT, services=(far,)))
    assert (row.path, row.reason.split(" on node ")[1]) == (
        "denied", "east (internalTrafficPolicy: Local)",
    )  # fmt: skip
