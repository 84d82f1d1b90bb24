"""`sidestep lab`: a small cluster on this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

from agent.commands.examples import examples
from agent.commands.filters import Filter, filter_options
from agent.lab.lab import DEFAULT_CLUSTER, Lab
from agent.output import Output, emit, output_option

_name = click.option("--name", default="lab", show_default=True, help="Which lab.")


@click.group(
    epilog=examples(
        "sidestep lab up",
        "sidestep lab label shop ambient",
        "sidestep lab exec client -- curl -s http://10.244.2.3:8080/",
        "sidestep lab down",
    )
)
def lab() -> None:
    """Build and use a small cluster out of network namespaces, with a real agent on each node."""


@lab.command(epilog=examples("sidestep lab up", "sidestep lab up -f cluster.yaml --name mine"))
@click.option(
    "-f", "--file", type=click.Path(path_type=Path, dir_okay=False, exists=True),
    default=DEFAULT_CLUSTER, help="Kubernetes objects: Node, Namespace, Pod, Service ...",
)  # fmt: skip
@_name
def up(file: Path, name: str) -> None:
    """Bring the lab up, or complete it."""
    Lab(name).up(file, lambda line: click.echo(f"  {line}"))
    suffix = "" if name == "lab" else f" --name {name}"
    click.echo(f"lab {name} is up: sidestep lab status{suffix}")


@lab.command(epilog=examples("sidestep lab down", "sidestep lab down --name mine"))
@_name
def down(name: str) -> None:
    """Remove the lab: processes, namespaces, programs, files."""
    click.echo(f"lab {name} is down" if Lab(name).down() else f"there was no lab {name}")


@lab.command(epilog=examples("sidestep lab status", "sidestep lab status -o json"))
@_name
@filter_options
@output_option
def status(name: str, wanted: Filter, output: Output) -> None:
    """List the pods of the lab and their place in the mesh."""
    rows = wanted.apply(Lab(name).status())
    emit(rows, ("pod", "node", "address", "address6", "processes", "mesh"), output)


@lab.command(epilog=examples("sidestep lab label shop ambient", "sidestep lab label shop none"))
@click.argument("namespace")
@click.argument("mode", type=click.Choice(["ambient", "none"]))
@_name
def label(namespace: str, mode: str, name: str) -> None:
    """Take the pods of NAMESPACE into the mesh (ambient) or out of it (none)."""
    seconds = Lab(name).label_namespace(namespace, None if mode == "none" else mode)
    click.echo(f"the pods of {namespace} have followed after {seconds * 1000:.0f} ms")


@lab.command(
    name="exec",
    context_settings={"ignore_unknown_options": True},
    epilog=examples("sidestep lab exec client -- curl -s http://10.244.2.3:8080/"),
)
@click.argument("pod")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@_name
def exec_(pod: str, command: tuple[str, ...], name: str) -> None:
    """Run a command inside a pod: sidestep lab exec POD -- COMMAND..."""
    built = Lab(name)
    line = built.command_in(built.find_pod(pod), list(command))
    sys.exit(subprocess.run(line, check=False).returncode)
