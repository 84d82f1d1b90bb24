"""Who takes part: label selectors, their pairs, and what no label can change."""

from __future__ import annotations

import pytest

from agent.model.enrollment import (
    DEFAULT_RULES,
    MODE_LABEL,
    OWN_LABEL,
    EnrollmentRules,
    Operator,
    Refusal,
    Requirement,
    SelectorPair,
)

NOTHING: frozenset[tuple[str, str]] = frozenset()
AMBIENT = frozenset({(MODE_LABEL, "ambient")})
NONE = frozenset({(MODE_LABEL, "none")})
OTHER = frozenset({(MODE_LABEL, "sidecar")})
OWN = frozenset({OWN_LABEL})


@pytest.mark.parametrize(
    ("operator", "values", "absent", "listed", "unlisted"),
    [
        (Operator.IN, {"a", "b"}, False, True, False),
        (Operator.NOT_IN, {"a", "b"}, True, False, True),
        (Operator.EXISTS, set(), False, True, True),
        (Operator.DOES_NOT_EXIST, set(), True, False, False),
    ],
)
def test_requirement_compares_as_kubernetes_does(
    operator: Operator, values: set[str], absent: bool, listed: bool, unlisted: bool
) -> None:
    requirement = Requirement("key", operator, frozenset(values))
    assert requirement.holds(frozenset({("other", "a")})) == absent
    assert requirement.holds(frozenset({("other", "x"), ("key", "a")})) == listed
    assert requirement.holds(frozenset({("key", "z")})) == unlisted


def test_pair_without_requirements_is_everybody() -> None:
    assert SelectorPair().holds(NOTHING, NOTHING)


def test_pair_holds_if_both_sides_do() -> None:
    is_red = Requirement("color", Operator.IN, frozenset({"red"}))
    red = frozenset({("color", "red")})
    pair = SelectorPair((is_red,), (is_red,))
    assert pair.holds(red, red)
    assert not pair.holds(red, NOTHING)
    assert not pair.holds(NOTHING, red)


@pytest.mark.parametrize(
    ("of_namespace", "of_pod", "wants"),
    [
        (NOTHING, NOTHING, False),
        (AMBIENT, NOTHING, True),
        (NOTHING, AMBIENT, True),
        (NONE, AMBIENT, True),
        (AMBIENT, NONE, False),
        (AMBIENT, OTHER, True),
        (OTHER, NOTHING, False),
        (NOTHING, OTHER, False),
    ],
)
def test_pods_word_comes_before_its_namespaces(
    of_namespace: frozenset[tuple[str, str]], of_pod: frozenset[tuple[str, str]], wants: bool
) -> None:
    assert (DEFAULT_RULES.refusal("shop", of_pod, of_namespace) is None) == wants


def test_excluded_namespace_is_never_in() -> None:
    assert DEFAULT_RULES.refusal("kube-system", AMBIENT, AMBIENT) is Refusal.NAMESPACE
    rules = EnrollmentRules(excluded_namespaces=frozenset({"shop"}))
    assert rules.refusal("shop", AMBIENT, AMBIENT) is Refusal.NAMESPACE
    assert rules.refusal("kube-system", AMBIENT, AMBIENT) is None


def test_our_own_pods_are_known_by_namespace_and_label_together() -> None:
    assert DEFAULT_RULES.refusal("sidestep-system", OWN | AMBIENT, AMBIENT) is Refusal.OWN
    assert DEFAULT_RULES.refusal("sidestep-system", AMBIENT, NOTHING) is None
    assert DEFAULT_RULES.refusal("shop", OWN, AMBIENT) is None
    own = EnrollmentRules(own_namespace="mesh")
    assert own.refusal("mesh", OWN, AMBIENT) is Refusal.OWN


def test_refusal_says_what_would_have_to_change() -> None:
    assert DEFAULT_RULES.refusal("shop", NOTHING, OTHER) is Refusal.NOT_LABELED
    assert DEFAULT_RULES.refusal("shop", NONE, AMBIENT) is Refusal.OPTED_OUT
    own_selectors = EnrollmentRules(
        (SelectorPair(of_pod=(Requirement("never", Operator.EXISTS),)),)
    )
    assert own_selectors.refusal("shop", AMBIENT, AMBIENT) is Refusal.NOT_SELECTED
