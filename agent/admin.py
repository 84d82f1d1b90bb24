"""The agent's own socket: state for the command line, one JSON object a line.

    {"command": "state"}                            one line, then the end
    {"command": "watch"}                            a line now and at each change
    {"command": NAME, "arguments": {NAME: VALUE}}   the answer to a question, one line

An answer that cannot be given is {"error": message, "reason": word}. Below the run directory, mode
0600: who may read it is root already. `ask` is the other end, for commands.
"""

from __future__ import annotations

import asyncio
import json
import socket
from typing import TYPE_CHECKING, Any

from agent.errors import AgentUnreachable, RequestRefused, SidestepError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    State = dict[str, object]
    Question = Callable[[dict[str, Any]], object]

ANSWER_SECONDS = 10.0


class Admin:
    """Serves `describe()` and the answers to questions; call `changed` after each change."""

    def __init__(
        self,
        path: Path,
        describe: Callable[[], State],
        questions: Mapping[str, Question] | None = None,
    ) -> None:
        self._path = path
        self._describe = describe
        self._questions = questions or {}
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
                request = json.loads(line)
                command, arguments = request["command"], request.get("arguments", {})
            except (ValueError, TypeError, LookupError, AttributeError):
                command, arguments = None, {}
            if command not in ("state", "watch"):
                writer.write(_line(self._answer(command, arguments)))
                return
            while True:
                writer.write(_line(self._describe()))
                await writer.drain()
                if command == "state":
                    return
                async with self._condition:
                    await self._condition.wait()
        except ConnectionError:
            pass
        finally:
            writer.close()

    def _answer(self, command: object, arguments: dict[str, Any]) -> object:
        question = self._questions.get(command) if isinstance(command, str) else None
        if question is None:
            known = ", ".join(["state", "watch", *self._questions])
            return {"error": f"the commands are {known}", "reason": RequestRefused.reason}
        try:
            return question(arguments)
        except SidestepError as error:
            return {"error": str(error), "reason": error.reason}

    def stop(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.close()
        self._path.unlink(missing_ok=True)


def _line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


def ask(path: Path, command: str, **arguments: Any) -> Any:
    """Ask the agent behind a socket, and return its answer.

    Raises:
        AgentUnreachable: nobody answers there.
        RequestRefused: the agent cannot answer this.
    """
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ANSWER_SECONDS)
            connection.connect(str(path))
            connection.sendall(_line({"command": command, "arguments": arguments}))
            with connection.makefile("r") as lines:
                answer = json.loads(lines.readline())
    except (OSError, ValueError) as error:
        raise AgentUnreachable(f"no agent answers at {path}: {error}") from error
    if isinstance(answer, dict) and "error" in answer:
        raise RequestRefused(str(answer["error"]))
    return answer
