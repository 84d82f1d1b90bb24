"""Click commands: parse and delegate.

Here errors end: one of ours becomes `error: <message>` on stderr and an exit code, 2 if the
operator must correct a setting or the machine, else 1. Anything else is a defect and shows its
traceback.
"""

from __future__ import annotations

from typing import Any

import click

from agent.commands.agent import agent
from agent.commands.bench import bench
from agent.commands.check import check
from agent.commands.demo import demo
from agent.commands.lab import lab
from agent.commands.maps import maps
from agent.commands.programs import programs
from agent.errors import ConfigError, FeatureMissing, SidestepError


class _Edge(click.Group):
    """A group whose commands end with an exit code where they raise a SidestepError."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SidestepError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(2 if isinstance(error, (ConfigError, FeatureMissing)) else 1)


@click.group(cls=_Edge)
def main() -> None:
    """Mutual TLS and identity for pods, without sidecars and without iptables."""


main.add_command(agent)
main.add_command(bench)
main.add_command(lab)
main.add_command(demo)
main.add_command(maps)
main.add_command(programs)
main.add_command(check)


if __name__ == "__main__":
    main()
