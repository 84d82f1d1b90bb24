"""`sidestep policies`: what is in force, and for whom."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from agent.commands.asking import agent_options, ask_each, ask_names, chosen_sockets
from agent.commands.examples import examples
from agent.commands.filters import Filter, filter_options
from agent.output import Output, Row, emit, output_option

if TYPE_CHECKING:
    from pathlib import Path

COLUMNS = ("policy", "does", "state", "for", "rules", "pods", "warnings")


@click.command(epilog=examples("sidestep policies", "sidestep policies --pod shop/server -o yaml"))
@agent_options
@filter_options
@output_option
def policies(
    socket_path: Path | None, lab: str | None, run_dir: Path, wanted: Filter, output: Output
) -> None:
    """List the policies: what they do, for whom, and what to know about them.

    With --pod those that are about the pod, with --namespace those of the namespace and those about
    a pod of it, with --node those about a pod of the node.
    """
    sockets = chosen_sockets(socket_path, lab, run_dir)
    answers, code = ask_each(sockets, "policies")
    merged: dict[tuple[str, str], Row] = {}
    for rows in answers:
        for row in rows:
            if wanted.node is not None and (row["node"] != wanted.node or not row["pods"]):
                continue
            known = merged.setdefault((row["policy"], row["state"]), row)
            if known is not row:  # each agent tells of the pods of its own node
                known["pods"] = sorted({*known["pods"], *row["pods"]})  # type: ignore[misc]  # lists
    listed = [
        {name: value for name, value in merged[key].items() if name != "node"}
        for key in sorted(merged)
    ]
    listed = Filter(wanted.pod, wanted.namespace).apply(listed)
    wanted.check(listed, lambda: ask_names(sockets))
    emit(listed, COLUMNS, output, "no policies")
    click.get_current_context().exit(code)
