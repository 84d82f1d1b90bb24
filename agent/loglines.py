"""One line of the log, as JSON or as text, and which lines are wanted. Pure.

    JSON   {"time": ..., "level": "info", "scope": "access", "message": ..., FIELD: VALUE ...}
    text   TIME <tab> LEVEL <tab> SCOPE <tab> MESSAGE <tab> FIELD=VALUE ...

as ztunnel writes them. A scope is a part of the agent: `access` has one line for each connection.
In text a value with spaces or quotes is written as JSON would write it, so a line stays one line
whatever a peer sent.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from agent.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

ACCESS, TUNNEL = "access", "tunnel"  # scopes that are no module's name
LEVELS = ("debug", "info", "warning", "error", "off")
_WORDS = {"warn": "warning", "trace": "debug"}  # of other tools
_encode = json.JSONEncoder(default=str).encode  # json.dumps would make one for each line


class Format(StrEnum):
    """How lines look."""

    JSON = "json"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class Levels:
    """The least important level that is written, and those of single scopes."""

    default: str = "info"
    scopes: tuple[tuple[str, str], ...] = ()

    def wants(self, scope: str, level: str) -> bool:
        """Say whether a line of that level is to be written; a scope includes those below it."""
        least, longest = self.default, -1
        for name, wanted in self.scopes:
            is_within = scope == name or scope.startswith(f"{name}.")
            if is_within and len(name) > longest:
                least, longest = wanted, len(name)
        return LEVELS.index(level) >= LEVELS.index(least)

    def __str__(self) -> str:
        return ",".join((self.default, *(f"{name}={level}" for name, level in self.scopes)))


def parse_levels(text: str, before: Levels | None = None) -> Levels:
    """Read `LEVEL` and `SCOPE=LEVEL`, separated by commas; what is not said stays as before.

    Raises:
        ConfigError: there is no such level, or a scope has no name.
    """
    before = before or Levels()
    default, scopes = before.default, dict(before.scopes)
    for part in text.split(","):
        name, separator, word = part.strip().rpartition("=")
        level = _WORDS.get(word.lower(), word.lower())
        if level not in LEVELS or (separator and not name):
            raise ConfigError(
                f"log level {part.strip()!r} is none: say LEVEL or SCOPE=LEVEL, and the levels are "
                + ", ".join(LEVELS)
            )
        if separator:
            scopes[name] = level
        else:
            default = level
    return Levels(default, tuple(sorted(scopes.items())))


def build_line(form: Format, entry: Mapping[str, object]) -> str:
    """Return one line, without its end; `entry` begins with time, level, scope and message."""
    if form is Format.JSON:
        return _encode(entry)
    (_, time), (_, level), (_, scope), (_, message), *fields = entry.items()
    given = [f"{name}={_plain(value)}" for name, value in fields if value is not None]
    return "\t".join((str(time), str(level), str(scope), _line(str(message)), " ".join(given)))


def _line(text: str) -> str:
    return text if text.isprintable() else _encode(text)


def _plain(value: object) -> str:
    if not isinstance(value, str):
        return _encode(value)
    is_plain = value.isprintable() and value and not set(value) & set(' "=\\')
    return value if is_plain else _encode(value)
