"""`sidestep certs`: the certificates of this machine's agents."""

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

COLUMNS = ("identity", "state", "not_after", "next_request", "last_failure")


@click.command(
    epilog=examples("sidestep certs", "sidestep certs -n shop", "sidestep certs -o json")
)
@agent_options
@filter_options
@output_option
def certs(
    socket_path: Path | None, lab: str | None, run_dir: Path, wanted: Filter, output: Output
) -> None:
    """Show each identity's certificate: state, validity, next renewal, last failure.

    JSON and YAML have serial numbers, chains and trusted roots as well. Exit code 1 if an identity
    has no certificate that is valid. An identity belongs to a namespace, not to one pod.
    """
    rows: list[Row] = []
    for state in ask_each(chosen_sockets(socket_path, lab, run_dir), "state"):
        identity = state["identity"]
        roots = {"roots": identity["roots"]}
        rows += [{"node": state["node"]} | row | roots for row in identity["certificates"]]
    rows = wanted.apply(rows)
    several = len({row["node"] for row in rows}) > 1
    emit(rows, ("node", *COLUMNS) if several else COLUMNS, output)
    if any(str(row["state"]).startswith("Unavailable") for row in rows):
        click.get_current_context().exit(PROBLEM)
