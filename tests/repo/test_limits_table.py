"""The table of limits in docs/architecture.md has every limit, with the default that it has."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import click

from agent.commands.agent import agent
from agent.model.bounds import Bounds

TABLE = Path(__file__).parents[2] / "docs" / "architecture.md"


def test_table_has_every_limit_with_its_default() -> None:
    rows = re.findall(r"^\| `(--[a-z-]+)` \| (\d+) \|", TABLE.read_text(), re.MULTILINE)
    options = {
        each.opts[0]: each.default for each in agent.params if isinstance(each, click.Option)
    }
    found = {name: float(default) for name, default in rows}
    assert found == {name: options[name] for name in found}
    bounds = [float(getattr(Bounds(), each.name)) for each in fields(Bounds)]
    assert sorted(found.values()) == sorted(bounds)
