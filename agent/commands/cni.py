"""`sidestep cni`: install the plugin on a node, keep it installed, uninstall it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent import logs
from agent.commands.examples import examples
from agent.errors import InstallFailed
from cni import installer

if TYPE_CHECKING:
    from collections.abc import Callable

_DIRECTORY = click.Path(path_type=Path, file_okay=False)


def places_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say where things are."""
    options: list[Callable[[Any], Any]] = [
        click.option(
            "--networks", type=_DIRECTORY, default="/etc/cni/net.d", show_default=True,
            help="Where the runtime looks for network configurations.",
        ),
        click.option(
            "--plugins", type=_DIRECTORY, default="/opt/cni/bin", show_default=True,
            help="Where the runtime looks for plugins.",
        ),
        click.option(
            "--state", type=_DIRECTORY, default="/var/lib/sidestep", show_default=True,
            help="Where the record of the installation is; by the same name on the host.",
        ),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _entry(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that go into the entry."""
    options: list[Callable[[Any], Any]] = [
        click.option(
            "--socket", type=click.Path(path_type=Path, dir_okay=False),
            default="/run/sidestep/cni.sock", show_default=True,
            help="Where the agent listens: cni.sock below its --run-dir, by its name on the host.",
        ),
        click.option(
            "--exclude-namespace", multiple=True,
            default=("kube-system", "sidestep-system"), show_default=True,
            help="Its pods start whether or not the agent is there. The agent's own must be one.",
        ),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@click.group(epilog=examples("sidestep cni watch", "sidestep cni uninstall"))
def cni() -> None:
    """Chain Sidestep's plugin after the cluster's CNI on this node."""


@cni.command(epilog=examples("sidestep cni install --networks /etc/cni/net.d"))
@places_options
@_entry
def install(
    networks: Path, plugins: Path, state: Path, socket: Path, exclude_namespace: tuple[str, ...]
) -> None:
    """Install now, once; a node without a network configuration is an error."""
    places = installer.Places(networks, plugins, state, socket, exclude_namespace)
    try:
        primary = installer.install(places)
    except installer.InstallError as error:
        raise InstallFailed(str(error)) from error
    except OSError as error:
        raise failed(error, places) from error
    click.echo(f"{networks / primary} has the plugin")


@cni.command(epilog=examples("sidestep cni uninstall --plugins /opt/cni/bin"))
@places_options
def uninstall(networks: Path, plugins: Path, state: Path) -> None:
    """Take entry, plugin and record away; each file is as its owner wrote it.

    A `sidestep cni watch` of this node, also one that starts later, waits for the next `sidestep
    cni install`; `sidestep uninstall` takes away what tells it so.
    """
    places = installer.Places(networks, plugins, state, Path())
    try:
        installer.keep_out(places)
    except OSError as error:
        raise failed(error, places) from error
    click.echo("the plugin is uninstalled, and kept out until sidestep cni install")


def failed(error: OSError, places: installer.Places) -> InstallFailed:
    """Say what could not be done, and which option names the place."""
    options = {"networks": places.networks, "plugins": places.plugins, "state": places.state}
    for option, directory in options.items():
        if error.filename and Path(error.filename).is_relative_to(directory):
            return InstallFailed(
                f"--{option} {directory}: {error.filename}: {error.strerror}; is this the host's "
                "directory, and may it be written here?"
            )
    return InstallFailed(str(error))


@cni.command(
    epilog=examples("sidestep cni watch", "sidestep cni watch --exclude-namespace kube-system")
)
@places_options
@_entry
def watch(
    networks: Path, plugins: Path, state: Path, socket: Path, exclude_namespace: tuple[str, ...]
) -> None:
    """Install, and put back what others take away, until SIGTERM or an uninstallation.

    Waits for the cluster's network configuration, and, where the node has no entry yet, for the
    agent. Ending leaves everything in place.
    """
    logs.set_up()
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    # Python writes there when a signal comes; the handlers only keep it from ending the process.
    signal.set_wakeup_fd(writing)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: None)
    installer.watch(installer.Places(networks, plugins, state, socket, exclude_namespace), reading)
