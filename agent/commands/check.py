"""`sidestep check`: whether this machine has what Sidestep needs, and what to do if not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from agent.commands.asking import agent_options, all_is_well, ask_each, chosen_sockets
from agent.commands.examples import examples
from agent.commands.exits import CANNOT_RUN, FINE, PROBLEM
from agent.datapath import features
from agent.output import Output, Row, emit, output_option

if TYPE_CHECKING:
    from pathlib import Path

COLUMNS = ("check", "ok", "required", "detail", "to_do")
REPAIR_COLUMNS = ("node", "pod", "kind", "name", "expected", "found", "mended", "problem")


@click.command(
    epilog=examples("sidestep check", "sidestep check -o json", "sidestep check --repair")
)
@click.option(
    "--repair", "is_repairing", is_flag=True,
    help="Have the running agents put right what `sidestep diff` finds, and list that instead.",
)  # fmt: skip
@agent_options
@output_option
def check(
    is_repairing: bool, socket_path: Path | None, lab: str | None, run_dir: Path, output: Output
) -> None:
    """Check the privileges and kernel features of this machine.

    With --repair, mend the differences between desired state and kernel. Exit code 1 if something
    that is required is missing, or could not be mended; 2 without root.
    """
    if is_repairing:
        code = _repair(chosen_sockets(socket_path, lab, run_dir), output)
    else:
        code = _check(output)
    click.get_current_context().exit(code)


def _repair(sockets: list[Path], output: Output) -> int:
    answers, code = ask_each(sockets, "diff", repair=True)
    rows: list[Row] = []
    for answer in answers:
        rows += [row | {"mended": row["problem"] is None} for row in answer]
    if rows or output != "table":
        emit(rows, REPAIR_COLUMNS, output)
    else:
        click.echo(f"{all_is_well(code)}: nothing was done")
    return code if all(row["mended"] for row in rows) else PROBLEM


def _check(output: Output) -> int:
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
    if not missing:
        return FINE
    click.echo(
        f"error: this machine cannot run Sidestep: {', '.join(missing)} is missing", err=True
    )
    # Without root hardly anything can be found out.
    return CANNOT_RUN if "root" in missing else PROBLEM
