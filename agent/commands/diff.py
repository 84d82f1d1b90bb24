"""`sidestep diff`: what ought to be in the kernel against what is there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from agent.commands.asking import agent_options, ask_each, chosen_sockets
from agent.commands.examples import examples
from agent.commands.exits import PROBLEM
from agent.commands.filters import Filter, filter_options
from agent.output import Output, Row, emit, output_option

if TYPE_CHECKING:
    from pathlib import Path

COLUMNS = ("pod", "kind", "name", "expected", "found")


@click.command(
    epilog=examples(
        "sidestep diff", "sidestep diff --pod shop/client", "sidestep check --repair   # mend it"
    )
)
@agent_options
@filter_options
@output_option
def diff(
    socket_path: Path | None, lab: str | None, run_dir: Path, wanted: Filter, output: Output
) -> None:
    """Compare desired state with the maps, pins, links, listeners, rules and routes of every pod.

    Each line is a difference: nothing expected is something that should not be there, nothing found
    is something that is missing. Exit code 0 if there is none, 1 if there are some.
    """
    rows: list[Row] = []
    for answer in ask_each(chosen_sockets(socket_path, lab, run_dir), "diff"):
        rows += [{name: row[name] for name in row if name != "problem"} for row in answer]
    rows = wanted.apply(rows)
    if rows or output != "table":
        several = len({row["node"] for row in rows}) > 1
        emit(rows, ("node", *COLUMNS) if several else COLUMNS, output)
    else:
        click.echo("all is as it ought to be")
    if rows:
        click.get_current_context().exit(PROBLEM)
