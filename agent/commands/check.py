"""`sidestep check`: whether this machine has what Sidestep needs, and what to do if not."""

from __future__ import annotations

import click

from agent.datapath import features
from agent.errors import FeatureMissing
from agent.output import Output, Row, emit, output_option

COLUMNS = ("check", "ok", "required", "detail", "to_do")


@click.command()
@output_option
def check(output: Output) -> None:
    """Check the privileges and kernel features of this machine; exit code 2 if one is missing."""
    checks = features.run_checks()
    rows: list[Row] = [
        {
            "check": found.name,
            "ok": found.is_ok,
            "required": found.is_required,
            "detail": found.detail,
            "to_do": found.remedy,
        }
        for found in checks
    ]
    emit(rows, COLUMNS, output)
    missing = [found.name for found in checks if found.is_required and not found.is_ok]
    if missing:
        raise FeatureMissing(f"this machine cannot run Sidestep: {', '.join(missing)} is missing")
