"""Print a listing: one way for every command, as a table, as JSON or as YAML.

Rows are dictionaries of plain values (text, numbers, booleans, None, lists of those). JSON and YAML
print them as they are; the table prints the columns that the command chose, aligned and without
boxes, and colored only on a terminal. Lines are never cut: a terminal that is too narrow gets cells
of several lines, and who pipes a table wants each row on one.
"""

from __future__ import annotations

import json
import shutil
import sys
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

Output = Literal["table", "json", "yaml"]
Row = dict[str, object]
Command = TypeVar("Command", bound="Callable[..., Any]")
UNBOUNDED = 100_000  # columns: wider than any listing, so that nothing is folded


def output_option(command: Command) -> Command:
    """Give a command the option -o, passed to it as `output`."""
    option = click.option(
        "-o",
        "--output",
        type=click.Choice(["table", "json", "yaml"]),
        default="table",
        show_default=True,
        help="How to print the listing.",
    )
    return option(command)


def emit(rows: Iterable[Row], columns: Sequence[str], output: Output, nothing: str = "") -> None:
    """Print `rows`: their `columns` as a table, or all of them as JSON or YAML.

    A table that may be without rows has a sentence for that, `nothing`, which goes to stderr.
    """
    listed = list(rows)
    if output == "json":
        click.echo(json.dumps(listed, indent=2))
    elif output == "yaml":
        click.echo(yaml.safe_dump(listed, sort_keys=False), nl=False)
    else:
        # click drops the colors where the output is not a terminal.
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else UNBOUNDED
        click.echo("\n".join(render_table(listed, columns, width)))
        if nothing and not listed:
            click.echo(nothing, err=True)


def render_table(rows: Sequence[Row], columns: Sequence[str], width: int = UNBOUNDED) -> list[str]:
    """Return the lines of a table, aligned, with colors as escape sequences."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for column in columns:
        is_number = any(type(row.get(column)) is int for row in rows)
        heading = column.upper().replace("_", " ")
        table.add_column(
            heading, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold"
        )
    for row in rows:
        table.add_row(*(cell(row.get(column)) for column in columns))
    console = Console(file=sys.stdout, width=width, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().splitlines()]


def cell(value: object) -> Text:
    """Return a value as a table shows it."""
    if value is None or value == "":
        return Text("-")
    if isinstance(value, bool):
        return Text("yes", "green") if value else Text("no", "red")
    if isinstance(value, list):
        parts = [str(part) for part in value]
        # Sentences have commas of their own.
        separator = "; " if any(" " in part for part in parts) else ", "
        return Text(separator.join(parts) or "-")
    return Text(str(value))
