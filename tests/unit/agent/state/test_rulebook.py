"""The order of judging, precedence of modes, and dry runs; tests/property has the rest."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address
from typing import TYPE_CHECKING

import pytest

from agent.model.condition import Connection
from agent.model.identity import SpiffeId
from agent.model.policy import NO_LABELS, PeerAuthentication, Policy
from agent.model.verdict import Basis
from agent.state.rulebook import Rulebook
from tests.support.policies import authentication, authorization, from_account

if TYPE_CHECKING:
    from agent.model.policy import AnyPolicy

CLIENT = Connection(
    ip_address("10.0.0.1"), SpiffeId("td", "default", "client"), ip_address("10.0.0.2"), 80
)
PLAIN = replace(CLIENT, identity=None)
WEB = frozenset({("app", "web")})
SELECT_WEB = {"matchLabels": {"app": "web"}}
ALLOW = authorization("allow", "ALLOW", from_account("client"))
DENY = authorization("deny", "DENY", from_account("client"))
NOTHING = authorization("a-nothing", "ALLOW")


def rulebook(*policies: AnyPolicy) -> Rulebook:
    made = Rulebook()
    made.change(policies)
    return made


@pytest.mark.parametrize(
    ("policies", "basis", "decided_by"),
    [
        ((), Basis.NO_POLICY, None),
        ((DENY,), Basis.RULE, "AuthorizationPolicy default/deny rules[0]"),
        ((ALLOW, DENY), Basis.RULE, "AuthorizationPolicy default/deny rules[0]"),
        ((NOTHING, ALLOW), Basis.RULE, "AuthorizationPolicy default/allow rules[0]"),
        ((NOTHING,), Basis.NOT_ALLOWED, "AuthorizationPolicy default/a-nothing"),
        ((authorization("o", "DENY", from_account("other")),), Basis.NO_POLICY, None),
    ],
)
def test_deny_comes_before_allow(
    policies: tuple[AnyPolicy, ...], basis: Basis, decided_by: str | None
) -> None:
    verdict = rulebook(*policies).judge("default", NO_LABELS, CLIENT)
    assert (verdict.basis, verdict.decided_by) == (basis, decided_by)
    assert verdict.is_allowed is (basis is Basis.NO_POLICY or verdict.policy == ALLOW.key)


def made(name: str, mode: str, created: str = "", **spec: object) -> PeerAuthentication:
    found = authentication(name, mode, **spec)  # type: ignore[arg-type]  # namespace is a text
    assert isinstance(found, PeerAuthentication)
    return replace(found, created=created)


@pytest.mark.parametrize(
    ("policies", "named"),
    [
        ((made("m", "STRICT", namespace="istio-system"),), "istio-system/m"),
        ((made("m", "STRICT", namespace="istio-system"), made("n", "PERMISSIVE")), None),
        ((made("m", "STRICT", namespace="istio-system"), made("n", "UNSET")), "istio-system/m"),
        ((made("n", "PERMISSIVE"), made("w", "STRICT", selector=SELECT_WEB)), "default/w"),
        ((made("n", "STRICT"), made("w", "DISABLE", selector=SELECT_WEB)), None),
        ((made("b", "STRICT", "2025"), made("a", "PERMISSIVE", "2026")), "default/b"),
        ((made("b", "PERMISSIVE", "2025"), made("a", "STRICT", "2026")), None),
        ((made("r", "STRICT", namespace="istio-system", selector=SELECT_WEB),), None),
        ((made("n", "STRICT", namespace="other"),), None),
        (
            (
                made("v", "STRICT", "2026", selector={"matchLabels": {"tier": "1"}}),
                made("w", "PERMISSIVE", "2025", selector=SELECT_WEB),
            ),
            None,
        ),
        (
            (
                made("v", "STRICT", "2025", selector={"matchLabels": {"tier": "1"}}),
                made("w", "PERMISSIVE", "2026", selector=SELECT_WEB),
            ),
            "default/v",
        ),
    ],
)
def test_workload_comes_before_namespace_before_mesh(
    policies: tuple[AnyPolicy, ...], named: str | None
) -> None:
    book = rulebook(*policies)
    labels = WEB | {("tier", "1")}
    verdict = book.judge("default", labels, PLAIN)
    assert verdict.decided_by == (named and f"PeerAuthentication {named}")
    assert book.judge("default", labels, CLIENT).is_allowed


def test_dry_run_only_tells() -> None:
    assert isinstance(DENY, Policy)
    book = rulebook(ALLOW, replace(DENY, is_dry_run=True))
    verdict = book.judge("default", NO_LABELS, CLIENT)
    assert verdict.is_allowed
    assert verdict.would_be is not None
    assert verdict.would_be.policy == DENY.key
    other = replace(CLIENT, identity=SpiffeId("td", "default", "other"))
    assert book.judge("default", NO_LABELS, other).would_be is None


def test_removed_policies_are_gone() -> None:
    strict = made("s", "STRICT")
    waypoint = authorization("w", "DENY", {}, targetRefs=[{"kind": "Service", "name": "x"}])
    book = rulebook(ALLOW, NOTHING, strict, made("t", "STRICT"), waypoint)
    assert book.get(ALLOW.key) == ALLOW
    assert book.judge("default", NO_LABELS, CLIENT).is_allowed
    book.change([policy.key for policy in list(book)])
    book.remove(ALLOW.key)  # once more does nothing
    assert list(book) == []
    assert book.judge("default", NO_LABELS, PLAIN).basis is Basis.NO_POLICY


def test_applying_policies_are_listed_in_order() -> None:
    book = rulebook(ALLOW, NOTHING, authorization("w", "DENY", selector=SELECT_WEB))
    assert [policy.key.name for policy in book.applying("default", NO_LABELS)] == [
        "a-nothing",
        "allow",
    ]


@pytest.mark.parametrize(
    ("policies", "expected"),
    [
        ((), None),
        ((made("n", "PERMISSIVE"),), None),
        ((made("n", "STRICT"),), frozenset()),
        (
            (
                made(
                    "w",
                    "STRICT",
                    selector=SELECT_WEB,
                    portLevelMtls={"80": {"mode": "PERMISSIVE"}, "81": {"mode": "STRICT"}},
                ),
            ),
            frozenset({80}),
        ),
        (
            (
                made("n", "PERMISSIVE"),
                made("w", "UNSET", selector=SELECT_WEB, portLevelMtls={"80": {"mode": "STRICT"}}),
            ),
            None,
        ),
    ],
)
def test_ports_that_take_plaintext(
    policies: tuple[AnyPolicy, ...], expected: frozenset[int] | None
) -> None:
    assert rulebook(*policies).plaintext_ports("default", WEB) == expected
