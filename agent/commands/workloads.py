"""`sidestep workloads`: the pods of the whole mesh, as this node's agent knows them."""

from __future__ import annotations

from operator import itemgetter
from typing import TYPE_CHECKING

import click

from agent.commands.asking import agent_options, ask_any, ask_names, chosen_sockets
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
    sockets = chosen_sockets(socket_path, lab, run_dir)
    rows = wanted.apply(ask_any(sockets, "workloads"))
    wanted.check(rows, lambda: ask_names(sockets))
    rows.sort(key=itemgetter("workload"))
    emit(rows, COLUMNS, output, "no workloads")
