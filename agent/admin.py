"""The agent's own socket: state for the command line, one JSON object a line.

    {"command": "state"}   one line, then the end
    {"command": "watch"}   a line now and at each change

Below the run directory, mode 0600: who may read it is root already.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    State = dict[str, object]


class Admin:
    """Serves `describe()`; call `changed` after each change."""

    def __init__(self, path: Path, describe: Callable[[], State]) -> None:
        self._path = path
        self._describe = describe
        self._condition = asyncio.Condition()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen; a socket that a dead agent left is replaced."""
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, self._path)
        self._path.chmod(0o600)

    async def changed(self) -> None:
        """Wake the watchers."""
        async with self._condition:
            self._condition.notify_all()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            line = await reader.readline()
            try:
                command = json.loads(line).get("command")
            except (ValueError, AttributeError):
                command = None
            if command not in ("state", "watch"):
                writer.write(b'{"error": "the commands are state and watch"}\n')
                return
            while True:
                writer.write(json.dumps(self._describe()).encode() + b"\n")
                await writer.drain()
                if command == "state":
                    return
                async with self._condition:
                    await self._condition.wait()
        except ConnectionError:
            pass
        finally:
            writer.close()

    def stop(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.close()
        self._path.unlink(missing_ok=True)
