"""`sidestep uninstall`: leave this node as it was before the first agent."""

from __future__ import annotations

from pathlib import Path

import click

from agent import uninstall as steps
from agent.datapath import pins

_DIRECTORY = click.Path(path_type=Path, file_okay=False)


@click.command()
@click.option("--run-dir", type=_DIRECTORY, default="/run/sidestep", show_default=True)
@click.option("--pins", "pin_root", type=_DIRECTORY, default=pins.DEFAULT_ROOT, show_default=True)
@click.option(
    "--pod-cgroups", type=_DIRECTORY, default="/sys/fs/cgroup", show_default=True,
    help="Where the cgroups of this node's pods are.",
)  # fmt: skip
def uninstall(run_dir: Path, pin_root: Path, pod_cgroups: Path) -> None:
    """Take everything of Sidestep off this node, also what an agent that crashed has left.

    Delete the DaemonSet first: an agent that ends takes its pods out, and one that runs is refused.
    From then on pods speak in plaintext. Run it in the node's network namespace, as the agent.

    \b
    Example: sidestep uninstall
    """
    steps.refuse_if_held(pin_root)
    count = 0
    for line in steps.uninstall(pin_root, pod_cgroups, run_dir):
        click.echo(f"removed {line}")
        count += 1
    if not count:
        click.echo("nothing of Sidestep is on this node")
