"""`sidestep bundle`: what a person who helps needs to know, in one archive, without secrets.

Everything in it is what the other commands show; nothing is copied from the run directory or the
certificate authority's, so no private key and no token can be in it. Each part that could not be
had is an entry of `problems.txt` instead.
"""

from __future__ import annotations

import io
import json
import platform
import tarfile
import time
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent.commands.asking import agent_options, chosen_sockets
from agent.commands.examples import examples
from agent.commands.exits import PROBLEM
from agent.commands.pinned import find_places
from agent.datapath import features, listing
from agent.errors import ConfigError, SidestepError
from agent.identity.keys import write_private
from agent.question import ask

if TYPE_CHECKING:
    from collections.abc import Callable

# What each agent is asked; see agent.answers.
QUESTIONS = (
    "state", "policies", "workloads", "services", "connections", "diff", "config_dump", "metrics",
)  # fmt: skip
LOG_BYTES = 4 << 20  # the end of each log of a lab
MODE = 0o600


class Bundle:
    """An archive that is being written."""

    def __init__(self, archive: tarfile.TarFile, top: str) -> None:
        self._archive = archive
        self._top = top
        self.problems: list[str] = []

    def add(self, name: str, content: bytes) -> None:
        """Add a file."""
        entry = tarfile.TarInfo(f"{self._top}/{name}")
        entry.size, entry.mtime, entry.mode = len(content), int(time.time()), MODE
        self._archive.addfile(entry, io.BytesIO(content))

    def collect(self, name: str, read: Callable[[], object]) -> None:
        """Add what `read` returns, as JSON unless it is text; note what could not be had."""
        try:
            found = read()
        except (SidestepError, OSError) as error:
            self.problems.append(f"{name}: {error}")
            return
        text = found if isinstance(found, str) else json.dumps(found, indent=2, default=str)
        self.add(name, text.encode())


@click.command(
    epilog=examples("sidestep bundle", "sidestep bundle -f /tmp/sidestep.tar.gz --lab lab")
)
@click.option(
    "-f", "--file", "path", type=click.Path(path_type=Path, dir_okay=False),
    help="Where to write it, over what is there; by default sidestep-bundle-TIME.tar.gz here.",
)  # fmt: skip
@agent_options
def bundle(path: Path | None, socket_path: Path | None, lab: str | None, run_dir: Path) -> None:
    """Collect a support archive: state, maps, programs, differences, metrics. No secrets.

    It names pods, addresses, services and policies of this node. Works as far as it can when the
    agent is dead; exit code 1 if something could not be had.
    """
    features.require_root()
    top = f"sidestep-bundle-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    path = path or Path(f"{top}.tar.gz")
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        made = Bundle(archive, top)
        _machine(made)
        _agents(made, socket_path, lab, run_dir)
        _pins(made, lab)
        made.add("problems.txt", "".join(f"{each}\n" for each in made.problems).encode())
    try:
        write_private(path, content.getvalue())
    except OSError as error:
        raise ConfigError(f"--file {path}: {error.strerror}") from error
    click.echo(str(path))
    for problem in made.problems:
        click.echo(f"missing: {problem}", err=True)
    if made.problems:
        click.get_current_context().exit(PROBLEM)


def _machine(made: Bundle) -> None:
    made.collect(
        "machine.json",
        lambda: {
            "sidestep": version("sidestep"),
            "kernel": platform.release(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "os": platform.freedesktop_os_release().get("PRETTY_NAME"),
        },
    )
    made.collect(
        "checks.json",
        lambda: [
            {"check": each.name, "ok": each.is_ok, "detail": each.detail}
            for each in features.run_checks()
        ],
    )


def _agents(made: Bundle, socket_path: Path | None, lab: str | None, run_dir: Path) -> None:
    try:
        sockets = chosen_sockets(socket_path, lab, run_dir)
    except SidestepError as error:
        made.problems.append(f"agents: {error}")
        return
    for socket in sockets:
        node = socket.parent.name
        for question in QUESTIONS:
            made.collect(f"agents/{node}/{question}.json", _asking(socket, question))
        log = socket.parent.parent / "logs" / f"agent-{node}.log"  # of a lab
        if log.exists():
            made.collect(f"agents/{node}/agent.log", _reading(log))


def _asking(socket: Path, question: str) -> Callable[[], Any]:
    def read() -> object:
        found = ask(socket, question)
        return found["text"] if question == "metrics" else found

    return read


def _reading(path: Path) -> Callable[[], str]:
    def read() -> str:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_BYTES))
            return file.read().decode(errors="replace")

    return read


def _pins(made: Bundle, lab: str | None) -> None:
    try:
        places = find_places(None, lab)
    except SidestepError as error:
        made.problems.append(f"pins: {error}")
        return
    for place in places:
        own = f"pins/{place.lab or 'node'}/{place.node}"
        made.collect(f"{own}/maps.json", partial(listing.list_maps, place.directory))
        made.collect(f"{own}/programs.json", partial(listing.list_programs, place.directory))
        for name in listing.COLUMNS:
            made.collect(f"{own}/{name}.json", partial(listing.dump_map, place.directory, name))
