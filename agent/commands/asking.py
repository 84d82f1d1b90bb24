"""Which agents a command asks, and how: the one of the node, those of a lab, or one by its socket.

Every command that needs a running agent goes through here, so that all of them find the same
agents, say the same when none answers, and end with the same exit code.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent import question
from agent.errors import AgentUnreachable, ConfigError, FeatureMissing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RUN = Path("/run/sidestep")


def find_sockets(run: Path, lab: str | None) -> list[Path]:
    """Return the sockets of the agents of this machine: of the node, or of one lab.

    Raises:
        AgentUnreachable: there is none.
        ConfigError: there are several labs, and none is chosen.
        FeatureMissing: the run directory cannot be read.
    """
    node = run / "agent.sock"
    try:
        if lab is None and node.exists():
            return [node]
        found = sorted((run / "lab").glob(f"{lab or '*'}/*/agent.sock"))
    except PermissionError as error:
        raise FeatureMissing(f"be root: {error.filename} cannot be read") from error
    if not found:
        named = f"lab {lab}" if lab else "lab"
        raise AgentUnreachable(f"no agent runs on this machine: there is no {node} and no {named}")
    labs = sorted({path.parent.parent.name for path in found})
    if len(labs) > 1:
        raise ConfigError(f"there are several labs, choose one with --lab: {', '.join(labs)}")
    return found


def agent_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that say which agents to ask; see `chosen_sockets`."""
    options = (
        click.option(
            "--socket", "socket_path", type=click.Path(path_type=Path),
            help="Ask the agent behind this socket only.",
        ),
        click.option("--lab", help="Ask the agents of this lab."),
        click.option(
            "--run-dir", type=click.Path(path_type=Path, file_okay=False), default=RUN,
            show_default=True, help="Run directory of the agent; the labs are below it.",
        ),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def chosen_sockets(socket_path: Path | None, lab: str | None, run_dir: Path = RUN) -> list[Path]:
    """Return the sockets that the options of `agent_options` mean."""
    return [socket_path] if socket_path is not None else find_sockets(run_dir, lab)


def ask_each(sockets: list[Path], command: str, **arguments: Any) -> Iterator[Any]:
    """Ask each agent and yield its answer (AdminError)."""
    for path in sockets:
        yield question.ask(path, command, **arguments)
