"""The pin directories that a command reads: those of the node's agent, or of the labs."""

from __future__ import annotations

import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent.commands.asking import RUN, ask_names, find_sockets
from agent.commands.filters import Names
from agent.datapath import features, listing
from agent.errors import AdminError, ConfigError, FeatureMissing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from agent.output import Row

LABS = listing.ROOTS[1]


@dataclass(frozen=True, slots=True)
class Place:
    """One pin directory, and whose it is."""

    directory: Path
    node: str
    lab: str | None

    def label(self, rows: Iterable[Row]) -> list[Row]:
        """Return rows that say where they are from."""
        return [{"node": self.node, "lab": self.lab} | row for row in rows]


def pins_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that say which pins to read; see `find_places`."""
    pins = click.option(
        "--pins",
        "root",
        type=click.Path(path_type=Path),
        help="Look for pins at and below this directory only.",
    )
    lab = click.option("--lab", help="Look at the agents of this lab only.")
    return pins(lab(command))


def find_places(root: Path | None, lab: str | None = None) -> list[Place]:
    """Return the pin directories.

    Raises:
        FeatureMissing: root is missing, or there is none.
    """
    features.require_root()
    roots = (LABS / lab,) if lab else listing.ROOTS if root is None else (root,)
    places = [_place(directory) for directory in listing.find_directories(roots)]
    if not places:
        named = " or ".join(str(place) for place in roots)
        raise FeatureMissing(f"no pins below {named}: no agent has started on this machine")
    return places


def _place(directory: Path) -> Place:
    if directory.is_relative_to(LABS):
        lab, node, *_hash = directory.relative_to(LABS).parts
        return Place(directory, node, lab)
    return Place(directory, platform.node(), None)


def placed(columns: tuple[str, ...], places: list[Place]) -> tuple[str, ...]:
    """Return the table's columns: node and lab come first where there are several."""
    labs, nodes = {place.lab for place in places}, {place.node for place in places}
    more = (*(("lab",) if len(labs) > 1 else ()), *(("node",) if len(nodes) > 1 else ()))
    return (*more, *columns)


def find_names(places: list[Place]) -> Names:
    """Return all names that the pins have, and those that agents know which answer."""
    found = Names()
    for place in places:
        pods = set(listing.pod_names(place.directory).values())
        rows: list[Row] = [{"pod": pod, "node": place.node} for pod in pods]
        found.add(rows, {pod.partition("/")[0] for pod in pods}, {place.node})
    for lab in {place.lab for place in places}:
        with suppress(AdminError, ConfigError, FeatureMissing):
            names = ask_names(find_sockets(RUN, lab))
            found.add(names.pods.values(), names.namespaces, names.nodes)
    return found


def read_all(places: list[Place], read: Callable[[Path], Iterable[Row]]) -> list[Row]:
    """Return the rows of every directory, each with its node."""
    return [row for place in places for row in place.label(read(place.directory))]
