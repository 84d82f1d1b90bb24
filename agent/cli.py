"""Click commands: parse and delegate.

A command is imported when it is asked for, so that each costs what it needs and no more: the agent
does not carry the libraries of the other commands, and the answer to a mistyped word is quick.

Here errors end: one of ours becomes `error: <message>` on stderr and an exit code, 2 if the
operator must correct a setting or the machine, else 1. Anything else is a defect and shows its
traceback.
"""

from __future__ import annotations

import importlib
from typing import Any

import click

from agent.errors import ConfigError, FeatureMissing, SidestepError

# The command NAME is the object NAME of agent.commands.NAME.
COMMANDS = (
    "agent", "ca", "lab", "demo", "bench", "pods", "policies", "explain", "certs", "maps",
    "programs", "check", "wait", "cni", "uninstall",
)  # fmt: skip


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

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SidestepError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(2 if isinstance(error, (ConfigError, FeatureMissing)) else 1)


@click.group(cls=_Edge)
def main() -> None:
    """Mutual TLS and identity for pods, without sidecars and without iptables."""


if __name__ == "__main__":
    main()
