"""The stream of a watch: bytes in, events out. Pure.

The API server sends a JSON document a line (Kubernetes API concepts, "Efficient detection of
changes"). A chunk may end anywhere. Called by `follow`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

GONE = 410
Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Changed:
    """An object is new or has another content."""

    version: str
    body: Body


@dataclass(frozen=True, slots=True)
class Deleted:
    """An object went; `body` is its last content."""

    version: str
    body: Body


@dataclass(frozen=True, slots=True)
class Progressed:
    """Nothing changed up to this version."""

    version: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The server ended the watch; GONE means that the objects must be listed again."""

    code: int
    message: str


Event = Changed | Deleted | Progressed | Failed


class Stream:
    """Puts the lines of one watch together."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[Event]:
        """Take bytes and return the events that are complete (ValueError: not a watch)."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [parse_event(line) for line in lines if line.strip()]


def parse_event(line: bytes) -> Event:
    """Parse one line (ValueError)."""
    event = json.loads(line)
    try:
        kind, body = event["type"], event["object"]
        if kind == "ERROR":
            return Failed(int(body.get("code") or 0), str(body.get("message") or ""))
        version = str(body["metadata"]["resourceVersion"])
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"not an event of a watch: {line[:100]!r}") from error
    match kind:
        case "ADDED" | "MODIFIED":
            return Changed(version, body)
        case "DELETED":
            return Deleted(version, body)
        case "BOOKMARK":
            return Progressed(version)
    raise ValueError(f"an event of unknown type {kind!r}")
