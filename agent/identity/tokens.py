"""Callers of the CA by a file of tokens, for the lab and for clusters without TokenReview.

    <token> <node>      one a line; # begins a comment

The file has mode 0600 and is read again when it changed.
"""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING

from agent.errors import CallerUnknown, ConfigError
from agent.identity.keys import read_private
from agent.model.caller import Caller

if TYPE_CHECKING:
    from pathlib import Path

SHORTEST = 16  # characters: shorter ones can be guessed over the network


def parse_tokens(text: str, place: str) -> dict[str, str]:
    """Read nodes by token (ConfigError names the line, never the token)."""
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or len(words[0]) < SHORTEST or words[0] in found:
            raise ConfigError(
                f"{place}, line {number}: must be a token of {SHORTEST} characters or more that "
                "is not there yet, and a node"
            )
        found[words[0]] = words[1]
    return found


class TokenFile:
    """Implements Authenticator."""

    def __init__(self, path: Path) -> None:
        """Read the file (ConfigError, KeyExposed)."""
        self._path = path
        self._stamp: tuple[int, int] | None = None
        self._nodes: dict[str, str] = {}
        self._reload()

    def _reload(self) -> None:
        try:
            status = self._path.stat()
            stamp = (status.st_ino, status.st_mtime_ns)
            if stamp != self._stamp:
                text = read_private(self._path).decode()
                self._nodes = parse_tokens(text, str(self._path))
                self._stamp = stamp
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self._path} cannot be read: {error}") from error

    async def identify(self, token: str) -> Caller:
        """Return the agent whose token it is (CallerUnknown)."""
        try:
            self._reload()
        except ConfigError as error:
            raise CallerUnknown(str(error)) from error
        for known, node in self._nodes.items():
            if hmac.compare_digest(known.encode(), token.encode()):
                return Caller(f"token of {node}", node)
        raise CallerUnknown("the token is not in the file of tokens")
