"""Policies as values: scopes, rules, and which of them are enforced here."""

from __future__ import annotations

import pickle

import pytest

from agent.model.condition import Attribute, Facts, Term, port_set, text_set
from agent.model.policy import Clause, Mode, PeerAuthentication, PolicyKey, Rule, Scope
from tests.support.policies import authorization, from_account

PORT_80 = Term(Attribute.DESTINATION_PORT, port_set([80]))
NAMESPACE_A = Term(Attribute.NAMESPACE, text_set(["a"]))
WEB = frozenset({("app", "web")})


def facts(namespace: str | None, port: int) -> Facts:
    return (None, namespace, None, (4, 0), (4, 0), port)


def test_clause_is_an_or_of_matches_and_a_match_an_and_of_terms() -> None:
    clause = Clause("from", ((PORT_80, NAMESPACE_A), (Term(Attribute.NAMESPACE, text_set(["b"])),)))
    assert clause.holds(facts("a", 80))
    assert clause.holds(facts("b", 81))
    assert not clause.holds(facts("a", 81))


def test_rule_is_an_and_of_clauses_and_holds_without_any() -> None:
    rule = Rule(0, (Clause("from", ((NAMESPACE_A,),)), Clause("to", ((PORT_80,),))))
    assert rule.holds(facts("a", 80))
    assert not rule.holds(facts("a", 81))
    assert not rule.holds(facts(None, 80))
    assert Rule(0).holds(facts(None, 80))


@pytest.mark.parametrize(
    ("scope", "covers", "shown"),
    [
        (Scope(), True, "all pods of the mesh"),
        (Scope("shop"), True, "all pods of namespace shop"),
        (Scope("other"), False, "all pods of namespace other"),
        (Scope("shop", WEB), True, "pods of namespace shop with app=web"),
        (Scope("", frozenset({("app", "db")})), False, "pods of the mesh with app=db"),
    ],
)
def test_scope_covers_by_namespace_and_labels(scope: Scope, covers: bool, shown: str) -> None:
    assert scope.covers("shop", WEB | {("tier", "1")}) is covers
    assert str(scope) == shown


def test_policy_survives_the_way_to_a_worker() -> None:
    policy = authorization(
        "p", "DENY", from_account("a", "80"), selector={"matchLabels": {"a": "b"}}
    )
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert policy.is_enforced_here
    assert str(policy.key) == "AuthorizationPolicy default/p"


def authentication(created: str, *, scope: Scope, name: str = "p") -> PeerAuthentication:
    key = PolicyKey("shop", name, "PeerAuthentication")
    return PeerAuthentication(key, scope, Mode.STRICT, ((81, Mode.PERMISSIVE),), created)


def test_port_has_its_own_mode() -> None:
    policy = authentication("", scope=Scope("shop", WEB))
    assert (policy.mode_at(80), policy.mode_at(81)) == (Mode.STRICT, Mode.PERMISSIVE)


def test_older_comes_first_and_without_an_age_last() -> None:
    scope = Scope("shop")
    ages = [authentication(created, scope=scope).age for created in ("2025", "2026", "")]
    assert sorted(ages) == ages


def test_selecting_peer_authentication_of_the_mesh_does_not_count() -> None:
    assert authentication("", scope=Scope()).is_enforced_here
    assert authentication("", scope=Scope("shop", WEB)).is_enforced_here
    assert not authentication("", scope=Scope("", WEB)).is_enforced_here
