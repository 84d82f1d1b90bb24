"""`sidestep maps`: what the data path's maps hold, from their pins alone."""

from __future__ import annotations

from pathlib import Path

import click

from agent.datapath import listing
from agent.datapath.source import MAPS, RING_BUFFERS
from agent.output import Output, emit, output_option

LIST_COLUMNS = ("name", "type", "id", "key", "value", "entries", "max_entries")

pins_option = click.option(
    "--pins",
    "root",
    type=click.Path(path_type=Path),
    help="Look for pins at and below this directory only.",
)


def find_pins(root: Path | None) -> list[Path]:
    """Return the pin directories, and say on stderr if there is none."""
    roots = listing.ROOTS if root is None else (root,)
    directories = listing.find_directories(roots)
    if not directories:
        places = " or ".join(str(place) for place in roots)
        click.echo(f"no pins below {places}: no agent has started on this machine", err=True)
    return directories


def with_pins(columns: tuple[str, ...], directories: list[Path]) -> tuple[str, ...]:
    """Return the table's columns: where there are several directories, they are named."""
    return (*columns, "pins") if len(directories) > 1 else columns


@click.group()
def maps() -> None:
    """Show the maps of the data path, also while no agent runs."""


@maps.command("list")
@pins_option
@output_option
def list_maps(root: Path | None, output: Output) -> None:
    """List the maps and how full they are."""
    directories = find_pins(root)
    rows = [row for directory in directories for row in listing.list_maps(directory)]
    emit(rows, with_pins(LIST_COLUMNS, directories), output)


@maps.command()
@click.argument("name")
@pins_option
@output_option
def dump(name: str, root: Path | None, output: Output) -> None:
    """Print the entries of the map NAME, decoded."""
    if name not in (*MAPS, *RING_BUFFERS):
        raise click.BadParameter(
            f"there is no map {name!r}; the maps are {', '.join(MAPS)}", param_hint="NAME"
        )
    columns = listing.columns(name)
    directories = find_pins(root)
    rows = [row for directory in directories for row in listing.dump_map(directory, name)]
    emit(rows, with_pins(columns, directories), output)
