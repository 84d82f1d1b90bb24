"""`sidestep pods`: which pods are enrolled, and what passed their links."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from agent.commands.maps import find_pins, pins_option, with_pins
from agent.datapath import listing
from agent.output import Output, emit, output_option

if TYPE_CHECKING:
    from pathlib import Path

COLUMNS = ("pod", "address4", "address6", "strict", *listing.POD_COUNTERS)


@click.command()
@pins_option
@output_option
def pods(root: Path | None, output: Output) -> None:
    """List the enrolled pods, and packets, bytes and drops on their links, from the pins alone.

    Dropped is TCP that did not pass the agent (plaintext, from STRICT pods only), that came from an
    address which is not the pod's (spoofed), or that hid in fragments or headers (of STRICT pods).
    """
    directories = find_pins(root)
    rows = [row for directory in directories for row in listing.list_pods(directory)]
    emit(rows, with_pins(COLUMNS, directories), output)
