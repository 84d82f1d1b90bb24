"""What PromQL expressions name: metrics, and the labels that each part asks for."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import yaml

from tests.support.modules import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

DASHBOARD = ROOT / "deploy/grafana/sidestep.json"
RULES = ROOT / "deploy/prometheus/alerts.yaml"
METRIC = re.compile(r"\b((?:istio|sidestep|process|workload_manager)_\w+)(?:\{([^}]*)\})?")
MATCHED = re.compile(r"(\w+)\s*[=!]~?")
GROUPED = re.compile(r"\bby \(([^)]*)\)")
SHOWN = re.compile(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}")
# What Grafana fills in.
VARIABLES = {"$__rate_interval": "5m", "$namespace": "shop", "$__all": ".*"}


def plain(expression: str) -> str:
    """Return an expression without the variables of a dashboard."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


def dashboard_queries() -> Iterator[tuple[str, str]]:
    """Yield each expression of the dashboard, and the legend that names its series."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            yield plain(target["expr"]), target["legendFormat"]


def rule_queries() -> Iterator[tuple[str, str]]:
    """Yield each expression of the alert rules, and the texts that name its series."""
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["expr"], " ".join(rule["annotations"].values())


def metrics_of(expression: str) -> dict[str, set[str]]:
    """Return the metrics of an expression, each with the labels that select its series."""
    found: dict[str, set[str]] = {}
    for name, selector in METRIC.findall(GROUPED.sub("", expression)):
        found.setdefault(name, set()).update(MATCHED.findall(selector))
    return found


def grouping_of(expression: str) -> set[str]:
    """Return the labels that an expression groups by."""
    return {label.strip() for group in GROUPED.findall(expression) for label in group.split(",")}


def shown_labels(text: str) -> set[str]:
    """Return the labels that a legend or an annotation shows."""
    return set(SHOWN.findall(text)) - {"value"}
