"""`sidestep maps`: what the data path's maps hold, from their pins alone."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click
import yaml

from agent.commands.examples import examples
from agent.commands.filters import Filter, filter_options
from agent.commands.pinned import find_names, find_places, pins_options, placed, read_all
from agent.datapath import listing
from agent.datapath.source import MAPS, RING_BUFFERS
from agent.output import Output, Row, cell, emit, output_option

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LIST_COLUMNS = ("name", "type", "id", "key", "value", "entries", "max_entries")
WATCH_SECONDS = 0.5  # the kernel tells nobody that a map has changed


@click.group(
    epilog=examples(
        "sidestep maps list",
        "sidestep maps dump ss_pods",
        "sidestep maps dump ss_origin_flow --watch",
    )
)
def maps() -> None:
    """Show the maps of the data path, also while no agent runs."""


@maps.command("list", epilog=examples("sidestep maps list", "sidestep maps list --pod shop/client"))
@pins_options
@filter_options
@output_option
def list_maps(root: Path | None, lab: str | None, wanted: Filter, output: Output) -> None:
    """List the maps and how full they are.

    With --pod or --namespace those that have entries about it, and how many.
    """
    places = find_places(root, lab)
    rows = Filter(node=wanted.node).apply(
        read_all(places, lambda directory: _list_about(directory, wanted))
    )
    wanted.check(rows, lambda: find_names(places))
    emit(rows, placed(LIST_COLUMNS, places), output, "no maps")


def _list_about(directory: Path, wanted: Filter) -> list[Row]:
    rows = listing.list_maps(directory)
    about = Filter(wanted.pod, wanted.namespace)
    if about == Filter():
        return rows
    for row in rows:
        name = str(row["name"])
        is_listed = name in listing.COLUMNS
        row["entries"] = len(about.apply(listing.dump_map(directory, name))) if is_listed else 0
    return [row for row in rows if row["entries"]]


@maps.command(
    epilog=examples(
        "sidestep maps dump ss_pods",
        "sidestep maps dump ss_direct_flows --pod shop/client",
        "sidestep maps dump ss_origin_flow --watch -o json",
    )
)
@click.argument(
    "name",
    shell_complete=lambda _ctx, _parameter, begun: [
        name for name in MAPS if name.startswith(begun) and name in listing.COLUMNS
    ],
)
@pins_options
@filter_options
@click.option("--watch", is_flag=True, help="Go on and print what changes, until interrupted.")
@output_option
def dump(
    name: str, root: Path | None, lab: str | None, wanted: Filter, watch: bool, output: Output
) -> None:
    """Print the entries of the map NAME, decoded.

    With --watch every change follows on a line of its own: + has come, - has gone, and an entry
    with another value does both. As JSON and YAML each is an object with `time`, `change`, `entry`,
    beginning with the entries that are there.
    """
    if name not in (*MAPS, *RING_BUFFERS):
        raise click.BadParameter(
            f"there is no map {name!r}; the maps are {', '.join(MAPS)}", param_hint="NAME"
        )
    columns = listing.columns(name)
    places = find_places(root, lab)

    def read() -> list[Row]:
        return wanted.apply(read_all(places, lambda directory: listing.dump_map(directory, name)))

    rows = read()
    wanted.check(rows, lambda: find_names(places))
    shown = placed(columns, places)
    if not watch or output == "table":
        emit(rows, shown, output, "no entries")
    if watch:
        with suppress(KeyboardInterrupt):  # the way in which it ends
            for sign, row in _changes(rows if output == "table" else [], read):
                click.echo(_change_line(sign, row, shown, output), nl=output != "yaml")


def _changes(before: list[Row], read: Callable[[], list[Row]]) -> Iterator[tuple[str, Row]]:
    """Yield what goes (-) and what comes (+), for ever."""
    known = {json.dumps(row): row for row in before}
    while True:
        found = {json.dumps(row): row for row in read()}
        yield from (("-", known[key]) for key in known if key not in found)
        yield from (("+", found[key]) for key in found if key not in known)
        known = found
        time.sleep(WATCH_SECONDS)


def _change_line(sign: str, row: Row, columns: tuple[str, ...], output: Output) -> str:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    if output == "table":
        return f"{sign} {now}  {'   '.join(str(cell(row.get(column))) for column in columns)}"
    change = {"time": now, "change": "added" if sign == "+" else "removed", "entry": row}
    if output == "json":
        return json.dumps(change)
    return "---\n" + yaml.safe_dump(change, sort_keys=False)
