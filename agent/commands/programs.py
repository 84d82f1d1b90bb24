"""`sidestep programs`: which programs are loaded, and where each is attached."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from agent.commands.examples import examples
from agent.commands.filters import Filter, filter_options
from agent.commands.pinned import find_names, find_places, pins_options, placed, read_all
from agent.datapath import listing
from agent.output import Output, emit, output_option

if TYPE_CHECKING:
    from pathlib import Path

COLUMNS = ("name", "type", "id", "tag", "instruction_bytes", "attached")


@click.command(epilog=examples("sidestep programs", "sidestep programs --node east -o yaml"))
@pins_options
@filter_options
@output_option
def programs(root: Path | None, lab: str | None, wanted: Filter, output: Output) -> None:
    """List the loaded programs and where they are attached, also while no agent runs.

    With --pod or --namespace those that are attached for that alone; the others are for all pods.
    """
    places = find_places(root, lab)
    rows = wanted.apply(read_all(places, listing.list_programs))
    wanted.check(rows, lambda: find_names(places))
    emit(rows, placed(COLUMNS, places), output, "no programs")
