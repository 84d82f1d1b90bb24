"""`sidestep uninstall`: leave this node as it was before the first agent."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click

from agent import uninstall as steps
from agent.commands.cni import failed, places_options
from agent.commands.examples import examples
from agent.datapath import features, pins
from agent.discovery.entries import REDIRECTION
from cni import installer

_DIRECTORY = click.Path(path_type=Path, file_okay=False)


@click.command(epilog=examples("sidestep uninstall"))
@click.option(
    "--run-dir", type=_DIRECTORY, default="/run/sidestep", show_default=True,
    help="The agent's run directory.",
)  # fmt: skip
@click.option(
    "--pins", "pin_root", type=_DIRECTORY, default=pins.DEFAULT_ROOT, show_default=True,
    help="Where the agent's programs and maps are pinned.",
)  # fmt: skip
@click.option(
    "--pod-cgroups", type=_DIRECTORY, default="/sys/fs/cgroup", show_default=True,
    help="Where the cgroups of this node's pods are.",
)  # fmt: skip
@places_options
def uninstall(
    run_dir: Path, pin_root: Path, pod_cgroups: Path, networks: Path, plugins: Path, state: Path
) -> None:
    """Take everything of Sidestep off this node, also what an agent that crashed has left.

    An agent that runs is asked to take its pods out first: what is open goes on until it ends, at
    most for the agent's --drain-seconds. From then on pods speak in plaintext. Then the CNI plugin
    and its entry go, for which pods that start have waited, and all the rest. Delete the DaemonSet
    first, or it starts the next agent. Run it in the node's network namespace, as the agent. Labs
    are not touched: sidestep lab down.
    """
    features.require_root()
    pid = asyncio.run(steps.ask_agent(run_dir))
    if pid is not None:
        click.echo(f"agent {pid} has taken its pods out and ended")
    steps.refuse_if_held(pin_root)
    count = 0
    places = installer.Places(networks, plugins, state, Path())
    try:
        files = installer.uninstall(places)
    except OSError as error:
        raise failed(error, places) from error
    for path in files:
        click.echo(f"removed {path}, or what was ours in it")
        count += 1
    for line in steps.uninstall(pin_root, pod_cgroups, run_dir):
        click.echo(f"removed {line}")
        count += 1
    if not count and pid is None:
        click.echo("nothing of Sidestep is on this node")
    elif pid is None:
        click.echo(
            "no agent was there to take back what it had said on its pods; if none comes again: "
            f"kubectl annotate pods -A --field-selector spec.nodeName=NODE {REDIRECTION}-",
            err=True,
        )
