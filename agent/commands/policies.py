"""`sidestep policies`: what is in force, and for whom; and which agents commands ask."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent import admin
from agent.errors import AgentUnreachable, ConfigError
from agent.output import Output, Row, emit, output_option

if TYPE_CHECKING:
    from collections.abc import Callable

RUN = Path("/run/sidestep")
COLUMNS = ("policy", "does", "state", "for", "rules", "pods", "warnings")


def find_sockets(run: Path, lab: str | None) -> list[Path]:
    """Return the sockets of the agents of this machine: of the node, or of one lab.

    Raises:
        AgentUnreachable: there is none.
        ConfigError: there are several labs, and none is chosen.
    """
    node = run / "agent.sock"
    if lab is None and node.exists():
        return [node]
    found = sorted((run / "lab").glob(f"{lab or '*'}/*/agent.sock"))
    if not found:
        raise AgentUnreachable(f"no agent runs on this machine: there is no {node} and no lab")
    labs = sorted({path.parent.parent.name for path in found})
    if len(labs) > 1:
        raise ConfigError(f"there are several labs, choose one with --lab: {', '.join(labs)}")
    return found


def agent_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that say which agents to ask."""
    socket = click.option(
        "--socket", "socket_path", type=click.Path(path_type=Path), help="An agent's agent.sock."
    )
    lab = click.option("--lab", help="Ask the agents of this lab.")
    return socket(lab(command))


def chosen_sockets(socket_path: Path | None, lab: str | None) -> list[Path]:
    """Return the sockets that the options of `agent_options` mean."""
    return [socket_path] if socket_path is not None else find_sockets(RUN, lab)


@click.command()
@agent_options
@output_option
def policies(socket_path: Path | None, lab: str | None, output: Output) -> None:
    """List the policies: what they do, for whom, and what to know about them."""
    merged: dict[tuple[str, str], Row] = {}
    for path in chosen_sockets(socket_path, lab):
        for row in admin.ask(path, "policies"):
            known = merged.setdefault((row["policy"], row["state"]), row)
            if known is not row:  # each agent tells of the pods of its own node
                known["pods"] = sorted({*known["pods"], *row["pods"]})  # type: ignore[misc]  # lists
    emit([merged[key] for key in sorted(merged)], COLUMNS, output)
