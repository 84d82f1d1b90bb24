"""Click commands: parse and delegate.

A command is imported when it is asked for, so that each costs what it needs and no more: the agent
does not carry the libraries of the other commands, and the answer to a mistyped word is quick.

Exit codes are the same everywhere: 0 fine, 1 a problem was found, 2 the command could not do its
work. Here errors end: one of ours, and output that nobody takes, becomes `error: <message>` on
stderr and exit code 2. Anything else is a defect, shows its traceback, and ends with 2 as well,
since nothing was found out.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Any

import click

from agent.commands.examples import examples
from agent.commands.exits import CANNOT_RUN
from agent.errors import SidestepError

# The command NAME is the object NAME of agent.commands.NAME.
COMMANDS = (
    "agent", "ca", "cni", "lab", "demo", "bench", "check", "pods", "workloads", "services",
    "policies", "certs", "connections", "explain", "diff", "maps", "programs", "bundle", "wait",
    "uninstall",
)  # fmt: skip
LONG = 200  # characters: more than any first sentence
PRINTERS = ("click.utils", "rich.console")


class _Edge(click.Group):
    """A group whose commands end with an exit code where they raise a SidestepError."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(f"agent.commands.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List each command with its whole first sentence, which click would cut."""
        commands = ((name, self.get_command(ctx, name)) for name in COMMANDS)
        rows = [(name, found.get_short_help_str(LONG)) for name, found in commands if found]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SidestepError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(CANNOT_RUN)
        except (click.exceptions.Exit, click.Abort, click.ClickException):
            raise
        except Exception as error:
            if not _is_of_output(error):
                click.echo(traceback.format_exc(), err=True, nl=False)
            elif isinstance(error, BrokenPipeError):
                raise  # `| head` has enough: click ends without a word
            else:
                click.echo(f"error: the output cannot be written: {error}", err=True)
                # What is left of it would be tried again at the end of the interpreter.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(CANNOT_RUN)


def _is_of_output(error: Exception) -> bool:
    """Say whether it came of printing."""
    *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
    return isinstance(error, OSError) and frame.f_globals["__name__"] in PRINTERS


@click.group(
    cls=_Edge,
    epilog=examples(
        "sidestep check                  # can this machine run it?",
        "sidestep lab up                 # a cluster on this machine, to try it",
        "sidestep connections -n shop    # what is open, and who it is",
        "sidestep explain shop/client shop/server:8080",
        "sidestep diff                   # is the kernel as it ought to be?",
    ),
)
@click.version_option(package_name="sidestep", message="sidestep %(version)s")
def main() -> None:
    """Mutual TLS and identity for pods, without sidecars and without iptables.

    Exit codes: 0 fine, 1 a problem was found, 2 the command could not do its work.
    """


if __name__ == "__main__":
    main()
