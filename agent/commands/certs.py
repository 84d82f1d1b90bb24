"""`sidestep certs`: the certificates of this machine's agents."""

from __future__ import annotations

from collections import defaultdict
from operator import itemgetter
from typing import TYPE_CHECKING

import click

from agent.commands.asking import agent_options, ask_any, ask_each, ask_names, chosen_sockets
from agent.commands.examples import examples
from agent.commands.exits import PROBLEM
from agent.commands.filters import Filter, filter_options
from agent.output import Output, Row, emit, output_option

if TYPE_CHECKING:
    from pathlib import Path

COLUMNS = ("node", "identity", "state", "not_after", "next_request", "last_failure")


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
    has no certificate that is valid. With --pod that of the pod's identity, which other pods may
    have as well.
    """
    rows: list[Row] = []
    sockets = chosen_sockets(socket_path, lab, run_dir)
    states, code = ask_each(sockets, "state")
    pods: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for each in ask_any(sockets, "workloads"):
        pods[each["node"], each["identity"]].append(each["workload"])
    for state in states:
        node, identity = state["node"], state["identity"]
        rows += [
            {"node": node} | row | {"pods": pods[node, row["identity"]], "roots": identity["roots"]}
            for row in identity["certificates"]
        ]
    rows = wanted.apply(rows)
    wanted.check(rows, lambda: ask_names(sockets))
    rows.sort(key=itemgetter("node", "identity"))
    emit(rows, COLUMNS, output, "no certificates")
    if any(str(row["state"]).startswith("Unavailable") for row in rows):
        code = PROBLEM
    click.get_current_context().exit(code)
