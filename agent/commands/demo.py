"""`sidestep demo`: see it work on this machine, with evidence."""

from __future__ import annotations

import contextlib
import fcntl
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from agent.commands.examples import examples
from agent.demo.screen import SilentScreen, TerminalScreen
from agent.demo.story import Story
from agent.errors import LabError
from agent.lab.lab import Lab

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = "demo"
LOCK = Path("/run/lock/sidestep-demo.lock")


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Hold the lock of the demo's lab, which a second demo would take down (LabError)."""
    with LOCK.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LabError("another demo runs on this machine: wait until it has ended") from None
        yield


@click.command(epilog=examples("sidestep demo", "sidestep demo -o json"))
@click.option(
    "-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True,
    help="For a person, or one object with `claims` and `evidence`.",
)  # fmt: skip
def demo(output: str) -> None:
    """Show on this machine what Sidestep does, and prove it.

    Brings up a small cluster, sends a request before and after one label, records the link between
    the nodes, and takes everything down. Exit code 0 if every claim holds, else 1.
    """
    lab = Lab(NAME)
    with _alone():
        if output == "json":
            report = Story(lab, SilentScreen()).tell()
            click.echo(json.dumps({"claims": report.claims, "evidence": report.evidence}, indent=2))
        else:
            screen = TerminalScreen()
            try:
                report = Story(lab, screen).tell()
            except BaseException:
                screen.abandon()
                raise
            screen.finish(report)
    sys.exit(0 if report.is_proven else 1)
