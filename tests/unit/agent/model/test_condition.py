"""Sets of values, terms, and the facts of a connection."""

from __future__ import annotations

import pickle
from ipaddress import ip_address, ip_network

import pytest

from agent.model.condition import (
    Attribute,
    Connection,
    Fact,
    Term,
    ValueSet,
    network_set,
    port_set,
    text_set,
)
from agent.model.identity import SpiffeId

ABSENT = [(None, False, False), (None, True, True)]
NETWORKS = network_set([ip_network("10.0.0.0/8"), ip_network("10.1.2.3"), ip_network("fd00::/64")])


def fact(address: str) -> tuple[int, int]:
    parsed = ip_address(address)
    return parsed.version, int(parsed)


@pytest.mark.parametrize(
    ("patterns", "text", "expected"),
    [
        (["a", "b"], "b", True),
        (["a", "b"], "c", False),
        (["a*"], "abc", True),
        (["a*"], "ba", False),
        (["*c"], "abc", True),
        (["*c"], "ca", False),
        (["*"], "x", True),
        (["*a*"], "xa", False),  # a star at both ends is a suffix with a star in it
        (["*a*"], "xa*", True),
        (["a*b"], "a*b", True),
    ],
)
def test_text_patterns(patterns: list[str], text: str, expected: bool) -> None:
    assert text_set(patterns).has(text) is expected


def test_networks_hold_addresses_of_their_version() -> None:
    assert NETWORKS.has(fact("10.9.9.9"))
    assert NETWORKS.has(fact("fd00::9"))
    assert not NETWORKS.has(fact("11.0.0.1"))
    assert not NETWORKS.has(fact("::a00:1"))  # the number of 10.0.0.1


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (text_set(["b", "a", "c*", "*d"]), "a, b, c*, *d"),
        (text_set(["*"]), "*"),
        (NETWORKS, "10.1.2.3/32, 10.0.0.0/8, fd00::/64"),
        (port_set([81, 80, 80]), "80, 81"),
    ],
)
def test_sets_are_shown_as_written_and_survive_the_way_to_a_worker(
    values: ValueSet, shown: str
) -> None:
    assert str(values) == shown
    assert pickle.loads(pickle.dumps(values)) == values


def test_connection_without_an_identity_has_no_principal() -> None:
    plain = Connection(ip_address("10.0.0.1"), None, ip_address("10.0.0.2"), 80)
    assert plain.facts() == (None, None, None, fact("10.0.0.1"), fact("10.0.0.2"), 80)
    known = Connection(plain.source, SpiffeId("td", "a", "b"), plain.destination, 80)
    assert known.facts()[:3] == ("td/ns/a/sa/b", "a", "a/b")


@pytest.mark.parametrize(
    ("value", "is_negated", "expected"),
    [("a", False, True), ("b", False, False), ("a", True, False), ("b", True, True), *ABSENT],
)
def test_term_holds(value: Fact, is_negated: bool, expected: bool) -> None:
    term = Term(Attribute.NAMESPACE, text_set(["a"]), is_negated)
    assert term.holds((None, value, None, (4, 0), (4, 0), 80)) is expected
    assert pickle.loads(pickle.dumps(term)) == term


def test_ports() -> None:
    assert port_set([443, 80]).has(80)
    assert not port_set([443, 80]).has(81)
