"""`sidestep workloads`: the pods of the whole mesh, as this node's agent knows them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from agent.commands.asking import agent_options, ask_each, chosen_sockets
from agent.commands.examples import examples
from agent.commands.filters import Filter, filter_options
from agent.output import Output, emit, output_option

if TYPE_CHECKING:
    from pathlib import Path

COLUMNS = ("workload", "node", "addresses", "protocol", "identity")


@click.command(
    epilog=examples("sidestep workloads -n shop", "sidestep workloads --node east -o json")
)
@agent_options
@filter_options
@output_option
def workloads(
    socket_path: Path | None, lab: str | None, run_dir: Path, wanted: Filter, output: Output
) -> None:
    """List the pods that connections may go to, and whether a tunnel leads there (hbone)."""
    sockets = chosen_sockets(socket_path, lab, run_dir)[:1]  # every agent knows all of them
    (rows,) = ask_each(sockets, "workloads")
    emit(wanted.apply(rows), COLUMNS, output)
