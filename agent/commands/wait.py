"""`sidestep wait`: until a DaemonSet has done its work on every node, or has gone from all."""

from __future__ import annotations

import click

from agent.commands.examples import examples
from agent.model.place import parse_place


@click.command(epilog=examples("sidestep wait --daemonset sidestep-system/sidestep-agent"))
@click.option(
    "--daemonset", required=True, metavar="NAMESPACE/NAME", help="Whose pods are waited for."
)
@click.option("--delete", "is_to_go", is_flag=True, help="Delete it, and wait until it has gone.")
@click.option(
    "--timeout", type=click.IntRange(1), default=240, show_default=True, metavar="SECONDS",
    help="After which it is an error.",
)  # fmt: skip
def wait(daemonset: str, is_to_go: bool, timeout: int) -> None:
    """Wait until the pods of a DaemonSet are ready on all of its nodes; an error if late.

    Nodes that are not ready themselves are not waited for, but named.
    """
    namespace, name = parse_place(daemonset, "--daemonset")
    # Here, since only this needs the client's memory.
    from agent.discovery import rollout

    if is_to_go:
        away = rollout.delete(namespace, name, timeout)
        click.echo(f"{daemonset} has gone, and its pods have ended")
    else:
        count, away = rollout.wait_until_ready(namespace, name, timeout)
        click.echo(f"{daemonset} is ready on {count} nodes")
    if away:
        click.echo(f"but these nodes are not ready, and were not waited for: {', '.join(away)}")
