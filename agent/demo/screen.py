"""The demo on a terminal, or nowhere: stages with their time, aligned tables, bytes as on the wire.

Colors and a spinner only where the output is a terminal.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from agent.output import render_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agent.demo.story import Report, Row

INDENT = "  "
EXCERPT_BYTES = 64
BYTES_PER_LINE = 16


class SilentScreen:
    """Shows nothing: for `-o json`."""

    def stage(self, title: str) -> None:
        """Show nothing."""

    def note(self, text: str) -> None:
        """Show nothing."""

    def table(self, columns: Sequence[str], rows: Sequence[Row]) -> None:
        """Show nothing."""

    def bytes(self, title: str, data: bytes) -> None:
        """Show nothing."""


class TerminalScreen:
    """Shows the story as it goes."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._number = 0
        self._began = 0.0
        self._spinner = self._console.status("")

    def stage(self, title: str) -> None:
        """Begin a numbered stage, and say how long the one before took."""
        self._end_stage()
        self._number += 1
        self._began = time.monotonic()
        self._console.print(Text(f"{self._number}  {title}", "bold"))
        self._spinner.update(title)
        self._spinner.start()

    def _end_stage(self) -> None:
        self._spinner.stop()
        if self._number:
            seconds = time.monotonic() - self._began
            self._console.print(Text(f"{INDENT} {seconds:.1f} s\n", "dim"))

    def note(self, text: str) -> None:
        """Print one line below the stage."""
        self._console.print(Text(f"{INDENT} {text}"))

    def table(self, columns: Sequence[str], rows: Sequence[Row]) -> None:
        """Print rows, aligned."""
        for line in render_table(rows, columns):
            self._console.print(Text.from_ansi(f"{INDENT} {line}"))

    def bytes(self, title: str, data: bytes) -> None:
        """Print the start of some bytes, in hex and as text."""
        self.note(title)
        for position in range(0, min(len(data), EXCERPT_BYTES), BYTES_PER_LINE):
            part = data[position : position + BYTES_PER_LINE]
            shown = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
            line = Text(f"{INDENT}   {part.hex(' '):<{BYTES_PER_LINE * 3}} ", "dim")
            self._console.print(line.append(shown, "cyan"))

    def finish(self, report: Report) -> None:
        """Print every claim and what became of it."""
        self._end_stage()
        for name, holds in report.claims.items():
            mark = Text("yes  ", "bold green") if holds else Text("NO   ", "bold red")
            self._console.print(Text(INDENT + " ").append_text(mark).append(report.sentences[name]))
        held = sum(report.claims.values())
        seconds = report.evidence["seconds"]
        self._console.print(
            f"\n{INDENT} {held} of {len(report.claims)} claims hold, shown in {seconds} s"
        )

    def abandon(self) -> None:
        """Give the terminal back after an error."""
        self._spinner.stop()
