"""`sidestep wait`: until a DaemonSet has done its work on every node."""

from __future__ import annotations

import click

from agent.errors import ConfigError


@click.command()
@click.option(
    "--daemonset", required=True, metavar="NAMESPACE/NAME", help="Whose pods are waited for."
)
@click.option(
    "--timeout", type=click.IntRange(1), default=240, show_default=True, metavar="SECONDS",
    help="After which it is an error.",
)  # fmt: skip
def wait(daemonset: str, timeout: int) -> None:
    """Wait until the pods of a DaemonSet are ready on all of its nodes; exit code 1 if late."""
    namespace, _, name = daemonset.partition("/")
    if not namespace or not name or "/" in name:
        raise ConfigError(f"--daemonset {daemonset}: must be NAMESPACE/NAME")
    # Here, since only this needs the client's memory.
    from agent.discovery.rollout import wait_until_ready

    count = wait_until_ready(namespace, name, timeout)
    click.echo(f"{daemonset} is ready on {count} nodes")
