"""The table of docs/reliability.md, from what drills saw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

BEGIN, END = "<!-- begin drills -->\n", "<!-- end drills -->\n"
HEAD = (
    "| what fails | new connections, node to node | open ones, node to node | direct, both |"
    " whole again after | plaintext packets |",
    "|---|---|---|---|---|---|",
)


@dataclass
class Row:
    """What one drill saw."""

    name: str
    far_new: str
    far_open: str
    near: str
    whole_seconds: float
    plaintext: int

    def line(self) -> str:
        """Return the row as Markdown has it."""
        return (
            f"| {self.name} | {self.far_new} | {self.far_open} | {self.near} |"
            f" {self.whole_seconds:.1f} s | {self.plaintext} |"
        )


def merge(page: str, rows: Iterable[Row]) -> str:
    """Return a page whose table has the rows: in the place of those of the same name, or last."""
    before, _mark, rest = page.partition(BEGIN)
    table, _mark, after = rest.partition(END)
    known = {_name(line): line for line in table.splitlines()[len(HEAD) :]}
    lines = known | {row.name: row.line() for row in rows}
    return before + BEGIN + "\n".join((*HEAD, *lines.values())) + "\n" + END + after


def _name(line: str) -> str:
    return line.split("|")[1].strip()


def write(path: Path, rows: Iterable[Row]) -> None:
    """Put rows into the page at `path`; those of drills that were not run stay."""
    path.write_text(merge(path.read_text(), rows))
