"""Istio's L4 policies, small, slow and obvious: straight from the objects, one after the other.

What the indexed rulebook is compared with. Knows nothing of Sidestep's model.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any

ROOT = "istio-system"
L7 = {"hosts", "notHosts", "methods", "notMethods", "paths", "notPaths"} | {
    "requestPrincipals", "notRequestPrincipals", "remoteIpBlocks", "notRemoteIpBlocks"
}  # fmt: skip
Body = dict[str, Any]


@dataclass(frozen=True)
class Visit:
    """A connection to a pod; the identity is (trust domain, namespace, account) or None."""

    source: str
    identity: tuple[str, str, str] | None
    destination: str
    port: int
    namespace: str
    labels: dict[str, str]


def text_matches(pattern: str, text: str) -> bool:
    if pattern == "*":
        return True
    if pattern.startswith("*"):
        return text.endswith(pattern[1:])
    if pattern.endswith("*"):
        return text.startswith(pattern[:-1])
    return pattern == text


def value_matches(field: str, value: str, visit: Visit, namespace: str) -> bool:
    """Compare one value of one field or condition; `namespace` is that of the policy."""
    if field in {"ipBlocks", "source.ip"}:
        return ip_address(visit.source) in ip_network(value)
    if field == "destination.ip":
        return ip_address(visit.destination) in ip_network(value)
    if field in {"ports", "destination.port"}:
        return int(value) == visit.port
    if visit.identity is None:
        return False
    trust_domain, source_namespace, account = visit.identity
    if field in {"principals", "source.principal"}:
        return text_matches(value, f"{trust_domain}/ns/{source_namespace}/sa/{account}")
    if field in {"namespaces", "source.namespace"}:
        return text_matches(value, source_namespace)
    assert field in {"serviceAccounts", "source.serviceAccount"}
    wanted = value if "/" in value else f"{namespace}/{value}"
    return wanted == f"{source_namespace}/{account}"


def field_matches(field: str, values: list[str], visit: Visit, namespace: str) -> bool:
    if field.startswith("not"):
        positive = field[3].lower() + field[4:]
        return not any(value_matches(positive, value, visit, namespace) for value in values)
    return any(value_matches(field, value, visit, namespace) for value in values)


def condition_matches(condition: Body, visit: Visit, namespace: str) -> bool:
    key = condition["key"]
    values, refused = condition.get("values"), condition.get("notValues")
    if values and not any(value_matches(key, value, visit, namespace) for value in values):
        return False
    return not any(value_matches(key, value, visit, namespace) for value in refused or [])


def rule_matches(rule: Body, action: str, visit: Visit, namespace: str) -> bool:
    alternatives = [
        [item["source"] for item in rule.get("from", [{"source": {}}])],
        [item["operation"] for item in rule.get("to", [{"operation": {}}])],
    ]
    conditions = rule.get("when", [])
    has_l7 = any(L7 & fields.keys() for group in alternatives for fields in group) or any(
        condition["key"].startswith("request.") for condition in conditions
    )
    if has_l7 and action == "ALLOW":
        return False
    return all(
        any(
            all(
                field_matches(field, values, visit, namespace)
                for field, values in fields.items()
                if field not in L7
            )
            for fields in group
        )
        for group in alternatives
    ) and all(
        condition_matches(condition, visit, namespace)
        for condition in conditions
        if not condition["key"].startswith("request.")
    )


def covers(body: Body, visit: Visit) -> bool:
    if body["metadata"]["namespace"] not in {ROOT, visit.namespace}:
        return False
    wanted = body["spec"].get("selector", {}).get("matchLabels", {})
    return all(visit.labels.get(name) == value for name, value in wanted.items())


def is_strict(bodies: list[Body], visit: Visit) -> str | None:
    """Name the PeerAuthentication that refuses plaintext at the port."""
    levels: list[list[Body]] = [[], [], []]
    for body in bodies:
        if covers(body, visit):
            selects = bool(body["spec"].get("selector", {}).get("matchLabels"))
            is_root = body["metadata"]["namespace"] == ROOT
            if not (selects and is_root):
                levels[0 if selects else 2 if is_root else 1].append(body)
    for level in levels:
        by_age = sorted(
            level, key=lambda body: (body["metadata"]["creationTimestamp"], name_of(body))
        )
        for body in by_age[:1]:
            spec = body["spec"]
            mode = spec.get("mtls", {}).get("mode", "UNSET")
            at_port = spec.get("portLevelMtls", {}).get(str(visit.port), {}).get("mode", "UNSET")
            mode = mode if at_port == "UNSET" else at_port
            if mode != "UNSET":
                return name_of(body) if mode == "STRICT" else None
    return None


def name_of(body: Body) -> str:
    metadata = body["metadata"]
    return f"{body['kind']} {metadata['namespace']}/{metadata['name']}"


def judge(bodies: list[Body], visit: Visit, *, with_dry_run: bool) -> tuple[bool, str | None]:
    """Return whether the connection passes, and the policy and rule that decide."""
    strict = is_strict([body for body in bodies if body["kind"] == "PeerAuthentication"], visit)
    if visit.identity is None and strict:
        return False, strict
    policies = [
        body
        for body in bodies
        if body["kind"] == "AuthorizationPolicy"
        and covers(body, visit)
        and "targetRefs" not in body["spec"]
        and (with_dry_run or body["metadata"]["annotations"]["istio.io/dry-run"] != "true")
    ]
    policies.sort(key=lambda body: (body["metadata"]["namespace"], body["metadata"]["name"]))
    by_action: dict[str, list[Body]] = {"DENY": [], "ALLOW": []}
    for body in policies:
        by_action[body["spec"]["action"]].append(body)
    for action in ("DENY", "ALLOW"):
        for body in by_action[action]:
            for number, rule in enumerate(body["spec"].get("rules", [])):
                if rule_matches(rule, action, visit, body["metadata"]["namespace"]):
                    return action == "ALLOW", f"{name_of(body)} rules[{number}]"
    if by_action["ALLOW"]:
        return False, name_of(by_action["ALLOW"][0])
    return True, None
