"""Finding the first rule that holds, whatever it is filed under; tests/property has the rest."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest

from agent.model.condition import Connection
from agent.model.identity import SpiffeId
from agent.model.policy import Policy
from agent.state.rule_table import RuleTable
from tests.support.policies import authorization

CONNECTION = Connection(ip_address("10.0.0.1"), SpiffeId("td", "a", "b"), ip_address("fd00::1"), 80)
PLAIN = Connection(CONNECTION.source, None, CONNECTION.destination, 81)


def policy(name: str, *rules: Any) -> Policy:
    found = authorization(name, "ALLOW", *rules)
    assert isinstance(found, Policy)
    return found


def source(**fields: list[str]) -> dict[str, Any]:
    return {"from": [{"source": fields}]}


def ports(*numbers: str) -> dict[str, Any]:
    return {"to": [{"operation": {"ports": list(numbers)}}]}


MATCHING = [
    {},
    source(principals=["td/ns/a/sa/b"]),
    source(principals=["td/ns/a/*"]),
    source(principals=["*/sa/b"]),
    source(principals=["*"]),
    source(namespaces=["a"], notNamespaces=["b"]),
    source(notNamespaces=["b"]),
    source(notNamespaces=["b"]) | ports("80"),
    source(serviceAccounts=["a/b"], ipBlocks=["10.0.0.0/8"]),
    source(ipBlocks=["10.0.0.1"]),
    {"when": [{"key": "destination.ip", "values": ["fd00::/64"]}]},
    ports("80", "82"),
    {"to": [{"operation": {"ports": ["9"]}}, {"operation": {"ports": ["80"]}}]},
]
OTHER = [
    source(principals=["td/ns/a/sa/c"]),
    source(principals=["td/ns/a/sa/b/much-longer-than-any*", "*much-longer-than-any-principal-is"]),
    source(notNamespaces=["a"]),
    source(notNamespaces=["a"]) | ports("80"),
    source(ipBlocks=["fd00::/8"]),
    source(principals=["*"]) | ports("81"),
]


@pytest.mark.parametrize("rule", MATCHING, ids=str)
def test_matching_rule_is_found_among_others(rule: dict[str, Any]) -> None:
    table = RuleTable()
    table.put(policy("m", *OTHER, rule))
    assert table.first(CONNECTION.facts()) == ("default", "m", len(OTHER))
    table.remove(table.policies[0])
    assert table.first(CONNECTION.facts()) is None
    assert table.policies == []
    assert table._drawers == {}


@pytest.mark.parametrize("rule", OTHER, ids=str)
def test_rule_that_does_not_match_is_not_found(rule: dict[str, Any]) -> None:
    table = RuleTable()
    table.put(policy("o", rule))
    assert table.first(CONNECTION.facts()) is None


def test_first_in_order_is_found_whatever_comes_first_in_time() -> None:
    table = RuleTable()
    for name, rule in (("c", {}), ("a", ports("80")), ("b", source(principals=["*"]))):
        table.put(policy(name, ports("9"), rule))
    assert table.first(CONNECTION.facts()) == ("default", "a", 1)
    assert table.first(PLAIN.facts()) == ("default", "c", 1)


def test_rules_of_one_principal_are_told_apart_by_their_ports() -> None:
    table = RuleTable()
    for number in range(50):
        table.put(policy(f"p{number}", source(principals=["gate"]) | ports(str(1000 + number))))
    sizes = [len(drawer) for drawers in table._drawers.values() for drawer in drawers.values()]
    assert max(sizes) == 1


def test_fuller_clause_is_not_taken() -> None:
    table = RuleTable()
    same = source(principals=["gate"]) | ports("80")
    for number in range(4):
        table.put(policy(f"p{number}", same))
    sizes = [len(drawer) for drawers in table._drawers.values() for drawer in drawers.values()]
    assert sorted(sizes) == [2, 2]


def test_drawer_is_left_where_the_best_so_far_comes_first() -> None:
    table = RuleTable()
    table.put(policy("b", ports("80")))
    unseen = source(ipBlocks=["192.0.2.0/24"]) | source(
        principals=["td/ns/a/sa/b"], namespaces=["x"]
    )
    table.put(policy("a", unseen))
    table.put(policy("c", source(principals=["td/ns/a/sa/b"], namespaces=["x"])))
    table.put(policy("d", source(principals=["td/ns/a/sa/b"])))
    assert table.first(CONNECTION.facts()) == ("default", "b", 0)
