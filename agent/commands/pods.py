"""`sidestep pods`: which pods are enrolled, and what passed their links."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from agent.commands.examples import examples
from agent.commands.filters import Filter, filter_options
from agent.commands.pinned import find_names, find_places, pins_options, placed, read_all
from agent.datapath import listing
from agent.output import Output, Row, emit, output_option

if TYPE_CHECKING:
    from pathlib import Path

COLUMNS = (
    "pod",
    "addresses",
    "strict",
    "guarded",
    "outbound_bytes",
    "inbound_bytes",
    "dropped_plaintext",
    "dropped_spoofed",
    "dropped_fragment",
)


@click.command(
    epilog=examples(
        "sidestep pods", "sidestep pods -n shop", "sidestep pods --pod shop/client -o json"
    )
)
@pins_options
@filter_options
@output_option
def pods(root: Path | None, lab: str | None, wanted: Filter, output: Output) -> None:
    """List the enrolled pods, and bytes and drops on their links, from the pins alone.

    Dropped is TCP that did not pass the agent (plaintext: what opens a connection, and of STRICT
    pods whatever carries data), that came from an address which is not the pod's (spoofed), or that
    hid in fragments or headers (of STRICT pods). A pod that is not guarded has no veth to the node:
    nothing is counted or dropped of it.
    """
    places = find_places(root, lab)
    rows = [_with_addresses(row) for row in read_all(places, listing.list_pods)]
    rows = wanted.apply(rows)
    wanted.check(rows, lambda: find_names(places))
    rows.sort(key=lambda row: [str(row[name]) for name in ("lab", "node", "pod")])
    emit(rows, placed(COLUMNS, places), output, "no enrolled pods")


def _with_addresses(row: Row) -> Row:
    return row | {"addresses": [row[name] for name in ("address4", "address6") if row[name]]}
