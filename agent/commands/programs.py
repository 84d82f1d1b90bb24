"""`sidestep programs`: which programs are loaded, and where each is attached."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from agent.commands.maps import find_pins, pins_option, with_pins
from agent.datapath import listing
from agent.output import Output, emit, output_option

if TYPE_CHECKING:
    from pathlib import Path

COLUMNS = ("name", "type", "id", "tag", "instruction_bytes", "attached")


@click.command()
@pins_option
@output_option
def programs(root: Path | None, output: Output) -> None:
    """List the loaded programs and where they are attached."""
    directories = find_pins(root)
    rows = [row for directory in directories for row in listing.list_programs(directory)]
    emit(rows, with_pins(COLUMNS, directories), output)
