"""Agents before this one that still serve connections: watched, heard, and asked.

    on the connection of the handover   {"counts": [[NAME, [[LABEL, VALUE], ...], AMOUNT], ...]}
                                        its end: the elder has ended
    at agent-PID.sock                   answers to questions, as those of `agent.admin`

So what is open and what is counted there is seen here, where people and Prometheus ask. An elder
may be of another version: what it says and we do not understand is left out.

Called by the composition root.
"""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from agent.handover import MESSAGE_BYTES, peer_of
from agent.inheritance import STRANGE

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from pathlib import Path

    from agent.tunnel.counts import Counted

log = logging.getLogger(__name__)
ANSWER_SECONDS = 3.0


def socket_name(pid: int) -> str:
    """Name the socket at which an agent answers after another one has taken over."""
    return f"agent-{pid}.sock"


class Elders:
    """The elders of one agent, by the connections that they have handed over on."""

    def __init__(
        self,
        run_directory: Path,
        on_counts: Callable[[Counted], None],
        on_gone: Callable[[], None],
    ) -> None:
        """Have none yet; `on_gone()` when the last has ended."""
        self._run_directory = run_directory
        self._on_counts = on_counts
        self._on_gone = on_gone
        self._pids: dict[socket.socket, int] = {}

    def add(self, connection: socket.socket) -> None:
        """Watch one; its connection is ours."""
        connection.setblocking(False)
        self._pids[connection] = peer_of(connection)
        asyncio.get_running_loop().add_reader(connection, self._on_readable, connection)

    @property
    def fds(self) -> list[int]:
        """Their connections, for the agent after us."""
        return [connection.fileno() for connection in self._pids]

    @property
    def pids(self) -> list[int]:
        """Their processes."""
        return list(self._pids.values())

    async def ask(self, command: str, **arguments: Any) -> list[Any]:
        """Ask each of them; return the answers, without those of elders that give none in time."""
        request = json.dumps({"command": command, "arguments": arguments}).encode() + b"\n"
        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(self._ask(pid, request)) for pid in self.pids]
        return [task.result() for task in asked if task.result() is not None]

    async def _ask(self, pid: int, request: bytes) -> Any:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                path = self._run_directory / socket_name(pid)
                reader, writer = await asyncio.open_unix_connection(path)
                try:
                    writer.write(request)
                    return json.loads(await reader.read())
                finally:
                    writer.close()
        except FileNotFoundError:
            return None  # it has just ended, or its version answers nobody
        except (OSError, TimeoutError, *STRANGE) as error:
            fields = {"pid": pid, "error": str(error) or "no answer in time"}
            log.warning("an agent before this one does not answer", extra=fields)
            return None

    def _on_readable(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(MESSAGE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._on_counts(parse_counts(data))
            return
        asyncio.get_running_loop().remove_reader(connection)
        pid = self._pids.pop(connection)
        connection.close()
        # One that was killed has left it.
        (self._run_directory / socket_name(pid)).unlink(missing_ok=True)
        if not self._pids:
            self._on_gone()

    def stop(self) -> None:
        """Watch no more; they go on, and the agent after us watches them."""
        for connection in self._pids:
            asyncio.get_running_loop().remove_reader(connection)
            connection.close()
        self._pids.clear()


def parse_counts(data: bytes) -> Counted:
    """Read a datagram of an elder; one that is not understood has no counts."""
    with suppress(*STRANGE):
        return read_counts(json.loads(data)["counts"])
    return ()


def read_counts(found: Any) -> Counted:
    """Read counts as JSON has them; what is not understood is none."""
    with suppress(*STRANGE):
        return tuple(
            (str(name), tuple((str(label), str(value)) for label, value in labels), int(amount))
            for name, labels, amount in found
        )
    return ()
