"""Reading AuthorizationPolicy and PeerAuthentication: what they become, and what is refused."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from agent.discovery.translate import ObjectProblem, SourcedObject, Translator, translate
from agent.model.policy import PeerAuthentication, Policy

Body = dict[str, Any]


def body(kind: str, spec: Any, **metadata: Any) -> Body:
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": kind,
        "metadata": {"name": "p", "namespace": "shop", **metadata},
        "spec": spec,
    }


def read(kind: str, spec: Any, **metadata: Any) -> Any:
    translation = translate([SourcedObject("f", body(kind, spec, **metadata))])
    assert translation.problems == ()
    (policy,) = translation.snapshot.policies
    return policy


def problem(kind: str, spec: Any, **metadata: Any) -> ObjectProblem:
    translation = translate([SourcedObject("f", body(kind, spec, **metadata))])
    (found,) = translation.problems
    assert translation.snapshot.policies == ()
    assert found.named == f"{kind} shop/p"
    return found


def authorization(spec: Any, **metadata: Any) -> Policy:
    policy = read("AuthorizationPolicy", spec, **metadata)
    assert isinstance(policy, Policy)
    return policy


def terms(policy: Policy) -> list[str]:
    return [
        f"{rule.position} {clause.field} {negation}{term.attribute.name}: {term.values}"
        for rule in policy.rules
        for clause in rule.clauses
        for match in clause.matches
        for term in match
        for negation in ("not " * term.is_negated,)
    ]


def source(**fields: Any) -> Body:
    return {"rules": [{"from": [{"source": fields}]}]}


def test_l4_fields_are_read() -> None:
    rule = {
        "from": [
            {
                "source": {
                    "principals": ["*", "td/ns/a/*", "*/sa/b", "td/ns/a/sa/b"],
                    "notNamespaces": ["x"],
                    "serviceAccounts": ["own", "other/sa"],
                    "notIpBlocks": ["10.1.2.3", "10.0.0.1/8", "fd00::/64"],
                }
            }
        ],
        "to": [{"operation": {"ports": ["80"], "notPorts": ["81", "82"]}}],
        "when": [{"key": "destination.ip", "values": ["10.0.0.1"], "notValues": ["::1"]}],
    }
    assert terms(authorization({"action": "DENY", "rules": [{}, rule]})) == [
        "1 from PRINCIPAL: td/ns/a/sa/b, td/ns/a/*, */sa/b, *",
        "1 from SERVICE_ACCOUNT: other/sa, shop/own",
        "1 from not NAMESPACE: x",
        "1 from not SOURCE_ADDRESS: 10.1.2.3/32, 10.0.0.0/8, fd00::/64",
        "1 to DESTINATION_PORT: 80",
        "1 to not DESTINATION_PORT: 81, 82",
        "1 when[0] DESTINATION_ADDRESS: 10.0.0.1/32",
        "1 when[0] not DESTINATION_ADDRESS: ::1/128",
    ]


def test_block_of_mapped_addresses_is_one_of_ipv4() -> None:
    blocks = ["::ffff:10.0.0.0/104", "::ffff:10.1.2.3", "::ffff:0:0/95", "::ffff:0:0/96"]
    (found,) = terms(authorization(source(ipBlocks=blocks)))
    assert found == "0 from SOURCE_ADDRESS: 10.1.2.3/32, 10.0.0.0/8, 0.0.0.0/0, ::fffe:0:0/95"


@pytest.mark.parametrize("version", ["v1", "v1beta1"])
def test_both_versions_are_read_and_the_root_namespace_is_the_whole_mesh(version: str) -> None:
    written = body("AuthorizationPolicy", {}) | {"apiVersion": f"security.istio.io/{version}"}
    (policy,) = translate([SourcedObject("f", written)], "shop").snapshot.policies
    assert str(policy.scope) == "all pods of the mesh"
    (policy,) = translate([SourcedObject("f", written)]).snapshot.policies
    assert str(policy.scope) == "all pods of namespace shop"


L7_OPERATION = {"operation": {"methods": ["GET"], "ports": ["80"]}}


def test_http_attribute_in_an_allow_takes_the_rule_out() -> None:
    policy = authorization(
        {"rules": [{"to": [L7_OPERATION]}, {"to": [{"operation": {"ports": ["81"]}}]}]}
    )
    assert terms(policy) == ["1 to DESTINATION_PORT: 81"]
    (warning,) = policy.warnings
    assert warning.startswith("spec.rules[0].to[0].operation.methods: ")
    assert "never matches" in warning
    nothing_left = authorization({"rules": [{"to": [L7_OPERATION]}]})
    assert nothing_left.rules == ()
    assert "allows nothing" in nothing_left.warnings[-1]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"to": [L7_OPERATION]}, ["0 to DESTINATION_PORT: 80"]),
        ({"to": [{"operation": {"paths": ["/x"]}}]}, []),
        ({"to": [{"operation": {"paths": ["/x"]}}, {"operation": {"ports": ["1"]}}]}, []),
        (
            {
                "from": [{"source": {"namespaces": ["a"], "remoteIpBlocks": ["1.1.1.1"]}}],
                "to": [{"operation": {"hosts": ["h"]}}],
                "when": [{"key": "request.headers[x]", "values": ["y"]}],
            },
            ["0 from NAMESPACE: a"],
        ),
    ],
)
def test_http_attribute_in_a_deny_is_left_out_so_more_is_denied(
    rule: Body, expected: list[str]
) -> None:
    policy = authorization({"action": "DENY", "rules": [rule]})
    assert terms(policy) == expected
    assert len(policy.rules) == 1
    assert all("more is denied" in warning for warning in policy.warnings)
    assert policy.warnings


@pytest.mark.parametrize(
    ("spec", "path", "detail"),
    [
        ({"action": "CUSTOM"}, "spec.action", "external authorizer"),
        ({"action": "AUDIT"}, "spec.action", "dry-run"),
        ({"action": "allow"}, "spec.action", "ALLOW or DENY"),
        ({"rule": []}, "spec.rule", "not known"),
        ({"selector": {"matchLabels": {"a": "*"}}}, "spec.selector.matchLabels[a]", "whole"),
        ({"selector": {"matchExpressions": []}}, "spec.selector.matchExpressions", "not known"),
    ],
)  # fmt: skip
def test_wrong_policy_is_named_with_its_field(spec: Body, path: str, detail: str) -> None:
    found = problem("AuthorizationPolicy", spec)
    assert found.path == path
    assert detail in found.detail


def in_part(spec: Body) -> tuple[Policy, ObjectProblem]:
    translation = translate([SourcedObject("f", body("AuthorizationPolicy", spec))])
    ((policy,), (found,)) = translation.snapshot.policies, translation.problems
    assert isinstance(policy, Policy)
    assert found.is_partial
    return policy, found


@pytest.mark.parametrize("action", ["ALLOW", "DENY"])
@pytest.mark.parametrize(
    ("spec", "path", "detail"),
    [
        ({"rules": {}}, "spec.rules", "list"),
        ({"rules": [None]}, "spec.rules[0]", "mapping"),
        ({"rules": [{"form": []}]}, "spec.rules[0].form", "not known"),
        ({"rules": [{"from": []}]}, "spec.rules[0].from", "empty"),
        ({"rules": [{"from": [{}]}]}, "spec.rules[0].from[0].source", "something"),
        (source(principal=["a"]), "spec.rules[0].from[0].source.principal", "not known"),
        (source(principals=[""]), "spec.rules[0].from[0].source.principals[0]", "empty"),
        (source(principals="a"), "spec.rules[0].from[0].source.principals", "list"),
        (source(ipBlocks=["x"]), "spec.rules[0].from[0].source.ipBlocks[0]", "range"),
        (source(serviceAccounts=["*"]), "spec.rules[0].from[0].source.serviceAccounts[0]", "acc"),
        (
            {"rules": [{"to": [{"operation": {"ports": ["http"]}}]}]},
            "spec.rules[0].to[0].operation.ports[0]",
            "port",
        ),
        ({"rules": [{"when": [{"key": "ip", "values": ["1"]}]}]}, "spec.rules[0].when[0].key", ""),
        ({"rules": [{"when": [{"key": "source.ip"}]}]}, "spec.rules[0].when[0].values", "required"),
    ],
)  # fmt: skip
def test_policy_is_in_force_without_the_rule_that_is_wrong(
    spec: Body, path: str, detail: str, action: str
) -> None:
    policy, found = in_part(spec | {"action": action})
    assert found.path == path
    assert detail in found.detail
    assert policy.rules == ()
    assert path in policy.warnings[0]
    verb = {"ALLOW": "allows", "DENY": "denies"}[action]
    assert f"this policy {verb} nothing" in policy.warnings[-1] or not spec["rules"]
    good = {"to": [{"operation": {"ports": ["81"]}}]}
    if spec["rules"]:
        policy, _found = in_part({"action": action, "rules": [*spec["rules"], good]})
        assert terms(policy) == ["1 to DESTINATION_PORT: 81"]


def test_allow_with_a_wrong_value_lets_nobody_in_by_that_rule() -> None:
    blocks = ["10.0.0.0/8", "10.0.0.0/33"]
    assert in_part(source(ipBlocks=blocks))[0].rules == ()
    assert in_part(source(notIpBlocks=blocks))[0].rules == ()


@pytest.mark.parametrize(
    ("fields", "left"),
    [
        ({"ipBlocks": ["10.0.0.0/33", "11.0.0.0/8"]}, ["0 from SOURCE_ADDRESS: 11.0.0.0/8"]),
        ({"notIpBlocks": ["10.0.0.0/33", "11.0.0.0/8"]}, ["0 from not SOURCE_ADDRESS: 11.0.0.0/8"]),
        ({"notIpBlocks": ["10.0.0.0/33"]}, ["0 from not SOURCE_ADDRESS: "]),
        ({"principals": ["", 1, "a"]}, ["0 from PRINCIPAL: a"]),
    ],
)
def test_deny_denies_the_values_that_can_be_read_and_excepts_no_other(
    fields: Body, left: list[str]
) -> None:
    policy, found = in_part(source(**fields) | {"action": "DENY"})
    assert terms(policy) == left
    assert found.path in policy.warnings[0]


def test_edit_that_is_wrong_in_part_counts_whatever_was_there_before() -> None:
    good, wrong = source(principals=["a"]), source(principals=["a"], more=["b"])
    translator = Translator()
    translator.put(SourcedObject("f", body("AuthorizationPolicy", good)))
    edited = SourcedObject("f", body("AuthorizationPolicy", wrong))
    assert translator.put(edited) is not None
    assert translator.snapshot() == translate([edited]).snapshot


def test_wrong_policy_leaves_the_others_in_force() -> None:
    good, bad = body("AuthorizationPolicy", {}), body("AuthorizationPolicy", {"x": 1}, name="bad")
    translation = translate([SourcedObject("f", bad), SourcedObject("f", good)])
    assert [policy.key.name for policy in translation.snapshot.policies] == ["p"]
    assert [each.named for each in translation.problems] == ["AuthorizationPolicy shop/bad"]


@pytest.mark.parametrize(("text", "expected"), [("true", True), ("false", False)])
def test_dry_run_is_an_annotation(text: str, expected: bool) -> None:
    policy = authorization({}, annotations={"istio.io/dry-run": text})
    assert policy.is_dry_run is expected


def test_wrong_dry_run_is_refused() -> None:
    found = problem("AuthorizationPolicy", {}, annotations={"istio.io/dry-run": "maybe"})
    assert found.path == "metadata.annotations[istio.io/dry-run]"


def test_policy_of_a_waypoint_is_not_enforced_here() -> None:
    policy = authorization({"targetRefs": [{"kind": "Service", "name": "web"}]})
    assert not policy.is_enforced_here
    assert "waypoint of Service web" in policy.warnings[0]


def test_principal_with_its_scheme_is_warned_of() -> None:
    policy = authorization(source(principals=["spiffe://td/ns/a/sa/b"]))
    assert "without spiffe://" in policy.warnings[0]


def test_peer_authentication_is_read() -> None:
    spec = {
        "selector": {"matchLabels": {"app": "web"}},
        "mtls": {"mode": "STRICT"},
        "portLevelMtls": {8080: {"mode": "DISABLE"}, "81": {"mode": "UNSET"}},
    }
    policy = read("PeerAuthentication", spec, creationTimestamp="2026-01-01T00:00:00Z")
    assert isinstance(policy, PeerAuthentication)
    assert (policy.mode, policy.ports) == ("STRICT", ((8080, "DISABLE"),))
    assert policy.mode_at(8080) == "DISABLE"
    assert policy.mode_at(81) == "STRICT"
    assert "PERMISSIVE" in policy.warnings[0]


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ({"mtls": {"mode": "strict"}}, "spec.mtls.mode"),
        ({"portLevelMtls": {"http": {"mode": "STRICT"}}}, "spec.portLevelMtls[http]"),
        ({"mode": "STRICT"}, "spec.mode"),
    ],
)  # fmt: skip
def test_wrong_peer_authentication_is_named_with_its_field(spec: Body, path: str) -> None:
    assert problem("PeerAuthentication", spec).path == path


def test_mode_of_a_port_without_a_selector_is_left_out_and_the_rest_counts() -> None:
    spec = {"mtls": {"mode": "STRICT"}, "portLevelMtls": {8080: {"mode": "PERMISSIVE"}}}
    policy = read("PeerAuthentication", spec)
    assert (policy.mode, policy.ports) == ("STRICT", ())
    assert policy.warnings[0].startswith("spec.portLevelMtls: ")


def test_selecting_peer_authentication_of_the_root_namespace_has_no_effect() -> None:
    spec = {"selector": {"matchLabels": {"a": "b"}}, "mtls": {"mode": "STRICT"}}
    policy = read("PeerAuthentication", spec, namespace="istio-system")
    assert not policy.is_enforced_here
    assert policy.warnings


def test_age_may_be_written_without_quotes() -> None:
    created = datetime(2026, 1, 1, tzinfo=UTC)  # as YAML reads it
    policy = read("PeerAuthentication", {}, creationTimestamp=created)
    assert policy.created == "2026-01-01T00:00:00Z"


def test_selector_and_target_are_too_much() -> None:
    target = {"kind": "Service", "name": "web"}
    found = problem("AuthorizationPolicy", {"selector": {}, "targetRef": target})
    assert found.path == "spec.selector"


def test_deny_without_rules_is_warned_of() -> None:
    assert "denies nothing" in authorization({"action": "DENY"}).warnings[0]
