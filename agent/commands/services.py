"""`sidestep services`: the services of the mesh and their endpoints, as the agent knows them."""

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

COLUMNS = ("service", "addresses", "ports", "endpoints")


@click.command(epilog=examples("sidestep services", "sidestep services -n shop -o yaml"))
@agent_options
@filter_options
@output_option
def services(
    socket_path: Path | None, lab: str | None, run_dir: Path, wanted: Filter, output: Output
) -> None:
    """List the services and the endpoints that are ready.

    With --pod those that lead to the pod, with --namespace those of the namespace and those that
    lead to a pod of it, with --node those that lead to a pod of the node.
    """
    sockets = chosen_sockets(socket_path, lab, run_dir)
    rows = wanted.apply(ask_any(sockets, "services"))
    wanted.check(rows, lambda: ask_names(sockets))
    rows.sort(key=itemgetter("service"))
    emit(rows, COLUMNS, output, "no services")
