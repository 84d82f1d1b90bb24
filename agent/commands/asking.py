"""Which agents a command asks, and how: the one of the node, those of a lab, or one by its socket.

Every command that needs a running agent goes through here, so that all of them find the same
agents, say the same when none answers, and end with the same exit code.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent import question
from agent.commands.exits import FINE, PROBLEM
from agent.commands.filters import Names
from agent.errors import AdminError, AgentUnreachable, ConfigError, FeatureMissing

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
        found = list(_sockets_of_labs(run / "lab", lab))
    except PermissionError as error:
        raise FeatureMissing(f"be root: what is below {run} cannot be read") from error
    if not found:
        named = f"lab {lab}" if lab else "lab"
        raise AgentUnreachable(f"no agent runs on this machine: there is no {node} and no {named}")
    labs = sorted({path.parent.parent.name for path in found})
    if len(labs) > 1:
        raise ConfigError(f"there are several labs, choose one with --lab: {', '.join(labs)}")
    return found


def _sockets_of_labs(directory: Path, lab: str | None) -> Iterator[Path]:
    """Yield the sockets below `directory` (PermissionError, which Path.glob would not tell)."""
    if not directory.is_dir():
        return
    for own in sorted(directory.iterdir()) if lab is None else [directory / lab]:
        for node in sorted(own.iterdir()) if own.is_dir() else ():
            if (node / "agent.sock").exists():
                yield node / "agent.sock"


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


def ask_each(sockets: list[Path], command: str, **arguments: Any) -> tuple[list[Any], int]:
    """Ask each agent; return the answers, and the exit code that the command has to end with.

    One that does not answer is a warning and PROBLEM: what the others know is told all the same.

    Raises:
        AdminError: none answers.
    """
    answers: list[Any] = []
    errors: list[AdminError] = []
    for path in sockets:
        try:
            answers.append(question.ask(path, command, **arguments))
        except AdminError as error:
            errors.append(error)
    if not answers:
        raise errors[0]
    for each in errors:
        click.echo(f"warning: {each}", err=True)
    return answers, PROBLEM if errors else FINE


def all_is_well(code: int) -> str:
    """Say that there is no difference, with the exit code of `ask_each`."""
    return "all is as it ought to be" + (" where an agent answers" if code == PROBLEM else "")


def ask_any(sockets: list[Path], command: str, **arguments: Any) -> Any:
    """Ask for what every agent knows: the first that is there (AdminError)."""
    for path in sockets[:-1]:
        with suppress(AgentUnreachable):
            return question.ask(path, command, **arguments)
    return question.ask(sockets[-1], command, **arguments)


def ask_names(sockets: list[Path]) -> Names:
    """Return all names that the agents know which answer."""
    found = Names()
    for path in sockets:
        with suppress(AdminError):
            found.add(**question.ask(path, "names"))
    return found
