"""The operator's selectors: what Istio's chart writes, and what each slip of the pen names."""

from __future__ import annotations

import pytest

from agent.discovery.selector_pairs import parse_pairs
from agent.errors import ConfigError
from agent.model.enrollment import DEFAULT_PAIRS, Operator, Requirement, SelectorPair

OF_ISTIO = """
- podSelector: {matchLabels: {istio.io/dataplane-mode: ambient}}
- podSelector:
    matchExpressions: [{key: istio.io/dataplane-mode, operator: NotIn, values: [none]}]
  namespaceSelector:
    matchLabels: {istio.io/dataplane-mode: ambient}
"""


def test_default_of_istio_is_ours() -> None:
    assert parse_pairs(OF_ISTIO) == DEFAULT_PAIRS


def test_labels_and_expressions_are_joined() -> None:
    text = """[{"podSelector": {"matchLabels": {"a": "1"}, "matchExpressions": [
        {"key": "b", "operator": "Exists"}, {"key": "c", "operator": "DoesNotExist"}]}}, {}]"""
    joined = (
        Requirement("a", Operator.IN, frozenset({"1"})),
        Requirement("b", Operator.EXISTS),
        Requirement("c", Operator.DOES_NOT_EXIST),
    )
    assert parse_pairs(text) == (SelectorPair(joined), SelectorPair())


def test_nothing_selects_nobody() -> None:
    assert parse_pairs("") == ()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[", "while parsing"),
        ("{}", "object: must be a list"),
        ("[{selector: {}}]", "[0].selector: is not known here"),
        ("[{podSelector: {labels: {}}}]", "[0].podSelector.labels: is not known here"),
        ("[{podSelector: {matchLabels: {a: true}}}]", "[0].podSelector.matchLabels[a]: must be a"),
        ("[{podSelector: {matchExpressions: [{operator: Gt}]}}]", "operator: must be one of In,"),
        ("[{podSelector: {matchExpressions: [{key: a, operator: In}]}}]",
         "values: are required with In"),
        ("[{podSelector: {matchExpressions: [{key: a, operator: Exists, values: [x]}]}}]",
         "values: must be empty with Exists"),
        ("[{podSelector: {matchExpressions: [{operator: Exists}]}}]", "key: is required"),
        ("[{podSelector: {matchExpressions: [{key: a, value: [x]}]}}]", "value: is not known here"),
    ],
)  # fmt: skip
def test_slip_of_the_pen_is_named(text: str, named: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_pairs(text)
    assert str(raised.value).startswith("selectors of enrollment: ")
    assert named in str(raised.value)
