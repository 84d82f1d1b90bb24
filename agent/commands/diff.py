"""`sidestep diff`: what ought to be in the kernel against what is there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from agent.commands.asking import agent_options, all_is_well, ask_each, ask_names, chosen_sockets
from agent.commands.examples import examples
from agent.commands.exits import PROBLEM
from agent.commands.filters import Filter, filter_options
from agent.output import Output, Row, emit, output_option

if TYPE_CHECKING:
    from pathlib import Path

COLUMNS = ("node", "pod", "kind", "name", "expected", "found")


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
    is something that is missing. With --pod it also says why a pod does not want the mesh. Exit
    code 0 if there is no difference, 1 if there are some.
    """
    sockets = chosen_sockets(socket_path, lab, run_dir)
    answers, code = ask_each(sockets, "diff")
    rows: list[Row] = []
    for answer in answers:
        rows += [{name: row[name] for name in row if name != "problem"} for row in answer]
    rows = wanted.apply(rows)
    wanted.check(rows, lambda: ask_names(sockets))
    if rows or output != "table":
        emit(rows, COLUMNS, output)
    else:
        click.echo(all_is_well(code))
        for pod in wanted.apply(ask_names(sockets).pods.values()) if wanted.pod else ():
            if pod["refusal"]:
                click.echo(f"{pod['pod']} is not in the mesh: {pod['refusal']}")
    click.get_current_context().exit(PROBLEM if rows else code)
