"""Selector pairs of enrollment, as Istio's Helm value `enablementSelectors` writes them. Pure.

    - podSelector: {matchLabels: {istio.io/dataplane-mode: ambient}}
    - podSelector:
        matchExpressions: [{key: istio.io/dataplane-mode, operator: NotIn, values: [none]}]
      namespaceSelector: {matchLabels: {istio.io/dataplane-mode: ambient}}

A field that is not known is an error: with a slip of the pen a selector would select everything.
"""

from __future__ import annotations

import yaml

from agent.discovery.fields import Field, WrongField
from agent.errors import ConfigError
from agent.model.enrollment import Operator, Requirement, SelectorPair

OPERATORS = {operator.value: operator for operator in Operator}
WITH_VALUES = (Operator.IN, Operator.NOT_IN)


def parse_pairs(text: str) -> tuple[SelectorPair, ...]:
    """Parse a list of pairs in YAML or JSON (ConfigError)."""
    try:
        return tuple(_read_pair(item) for item in Field(yaml.safe_load(text), "").items())
    # A ValueError is also what PyYAML says to the date 2001-13-01.
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"selectors of enrollment: {' '.join(str(error).split())}") from error
    except WrongField as wrong:
        raise ConfigError(f"selectors of enrollment: {wrong.path}: {wrong.detail}") from wrong


def _read_pair(pair: Field) -> SelectorPair:
    pair.only("podSelector", "namespaceSelector")
    return SelectorPair(
        _read_selector(pair.get("podSelector")), _read_selector(pair.get("namespaceSelector"))
    )


def _read_selector(selector: Field) -> tuple[Requirement, ...]:
    selector.only("matchLabels", "matchExpressions")
    labels = tuple(
        Requirement(str(key), Operator.IN, frozenset({value.text()}))
        for key, value in selector.get("matchLabels").members()
    )
    return labels + tuple(map(_read_expression, selector.get("matchExpressions").items()))


def _read_expression(expression: Field) -> Requirement:
    expression.only("key", "operator", "values")
    word = expression.get("operator")
    operator = OPERATORS.get(word.text())
    if operator is None:
        raise word.wrong(f"must be one of {', '.join(OPERATORS)}")
    values = frozenset(item.text() for item in expression.get("values").items())
    if bool(values) != (operator in WITH_VALUES):
        needed = "are required" if operator in WITH_VALUES else "must be empty"
        raise expression.get("values").wrong(f"{needed} with {operator}")
    return Requirement(expression.get("key").text(), operator, values)
