"""The agent's own socket: state for the command line, one JSON object a line.

    {"command": "state"}                            one line, then the end
    {"command": "watch"}                            a line now and at each change
    {"command": NAME, "arguments": {NAME: VALUE}}   the answer to a question, one line
    GET /PATH HTTP/1.1                              a page of `agent.pages`, as on the admin port

An answer that cannot be given is {"error": message, "reason": word}. Below the run directory, mode
0600: who may read it is root already. The other end, for commands, is `agent.question`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import socket
from typing import TYPE_CHECKING, Any

from agent import web
from agent.errors import AgentRunning, RequestRefused, SidestepError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from pathlib import Path

    State = dict[str, object]
    Question = Callable[[dict[str, Any]], Awaitable[object]]

REQUEST_SECONDS = 5.0  # for a client to say what it wants
PROBE_SECONDS = 1.0


class Admin:
    """Serves `describe()` and the answers to questions; call `changed` after each change."""

    def __init__(
        self,
        path: Path,
        describe: Callable[[], State],
        questions: Mapping[str, Question] | None = None,
        routes: web.Routes | None = None,
    ) -> None:
        self._path = path
        self._describe = describe
        self._questions = questions or {}
        self._routes = routes or {}
        self._condition = asyncio.Condition()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen; a socket that a dead agent left is replaced.

        Raises:
            AgentRunning: a process listens there. It may be stuck, but it is not dead.
        """
        if _is_served(self._path):
            raise AgentRunning(
                f"an agent listens at {self._path} already: stop it first, or choose another "
                "--run-dir"
            )
        self._path.unlink(missing_ok=True)
        limit = web.REQUEST_BYTES
        self._server = await asyncio.start_unix_server(self._serve, self._path, limit=limit)
        self._path.chmod(0o600)

    async def changed(self) -> None:
        """Wake the watchers."""
        async with self._condition:
            self._condition.notify_all()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                line, head = await _read_request(reader)
            if head:
                writer.write(await web.answer(head, self._routes))
                await writer.drain()
                return
            try:
                request = json.loads(line)
                command, arguments = request["command"], request.get("arguments", {})
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
                command, arguments = None, {}
            if command not in ("state", "watch"):
                writer.write(_line(await self._answer(command, arguments)))
                await writer.drain()
                return
            while True:
                writer.write(_line(self._describe()))
                await writer.drain()
                if command == "state":
                    return
                async with self._condition:
                    await self._condition.wait()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # whoever asked has gone, says nothing, or too much
        finally:
            writer.close()

    async def _answer(self, command: object, arguments: dict[str, Any]) -> object:
        question = self._questions.get(command) if isinstance(command, str) else None
        if question is None or not isinstance(arguments, dict):
            known = ", ".join(["state", "watch", *self._questions])
            return {"error": f"the commands are {known}", "reason": RequestRefused.reason}
        try:
            return await question(arguments)
        except SidestepError as error:
            return {"error": str(error), "reason": error.reason}

    def step_aside(self, path: Path, questions: Mapping[str, Question]) -> None:
        """Answer at another path from now on, and only these questions: another agent comes."""
        with contextlib.suppress(FileNotFoundError):
            self._path.rename(path)
        self._path, self._questions = path, questions

    def stop(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.close()
            self._server = None
            self._path.unlink(missing_ok=True)


async def _read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Return one line, and the head of the request if it begins one of HTTP, else nothing."""
    line = await reader.readuntil(b"\n")
    if not line.startswith((b"GET ", b"POST ")):
        return line, b""
    head = line
    while not head.endswith(web.END_OF_HEAD) and len(head) < web.REQUEST_BYTES:
        head += await reader.readuntil(b"\n")
    return line, head


def _is_served(path: Path) -> bool:
    """Say whether somebody listens at a socket: a dead process's refuses."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(PROBE_SECONDS)
        number = probe.connect_ex(str(path))
    return number not in (errno.ENOENT, errno.ECONNREFUSED)


def _line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"
