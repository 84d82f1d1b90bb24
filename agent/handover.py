"""From one agent to the next on the same node, on a unix socket in the run directory.

One datagram (SOCK_SEQPACKET) is one JSON object; descriptors travel beside it (SCM_RIGHTS).

    successor                                 agent that runs
    {"request": "handover", "version": 1} ->
                                           <- {"reply": "begin", "pods": 2}   the lock, elders
                                           <- agent.inheritance, for each pod   netns, listeners
    {"request": "commit"}                  ->
                                           <- {"reply": "committed"}
                                           <- {"counts": [[NAME, [[LABEL, VALUE], ...], N], ...]}
                                              the connection's end: it has ended

    {"request": "leave"}                   -> {"reply": "leaving"}, then the end: all pods are out

Until the commit the agent that runs goes on as if nobody had asked, and changes no pod; a successor
that dies or is slow changes nothing. After it, all that is the node's is the successor's. An agent
that was told to end before it answers no more: its end is the answer, and the successor has what it
was given. The lock of the pins and the listeners are not given up and taken again but shared, so no
moment is without.

Only root can connect: the run directory is 0700, the socket 0600. Does not know what a pod is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import struct
from typing import TYPE_CHECKING, Any

from agent.errors import HandoverFailed
from agent.inheritance import Inheritance, decode, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from agent.tunnel.counts import Counted

log = logging.getLogger(__name__)
VERSION = 1
SOCKET_NAME = "handover.sock"
# A pod has at most 16,384 excluded networks (ss_bypass), in at most 256 KiB of annotations.
MESSAGE_BYTES = 512 * 1024
MAX_FDS = 64
COMMIT_SECONDS = 30.0  # for a successor to serve what it was given; no pod changes meanwhile
ANSWER_SECONDS = 40.0  # more, since whoever waits for an answer has to know who is right
COUNTS_AT_ONCE = 16  # in one datagram: labels may be long
GIVE_SECONDS = 2.0  # for a successor to take what was counted
GONE_SECONDS = 2.0  # between a process's last descriptor and its end
Heritage = tuple[Inheritance, list[int]]


class PredecessorGone(Exception):
    """The agent that ran has ended without handing over."""


class HandoverServer:
    """The side of the agent that runs."""

    def __init__(
        self,
        path: Path,
        turn: asyncio.Lock,
        heritage: Callable[[], tuple[list[int], Iterable[Heritage]]],
        on_committed: Callable[[], None],
        on_leave: Callable[[], None],
    ) -> None:
        """Prepare.

        `turn` is held while nothing of a pod may change, `heritage()` are descriptors for the whole
        node and the pods, `on_committed()` ends what two agents cannot do at once.
        """
        self._path = path
        self._turn = turn
        self._heritage = heritage
        self._on_committed = on_committed
        self._on_leave = on_leave
        self._kept: list[socket.socket] = []  # until nothing is open here any more
        self._heir: socket.socket | None = None
        self._successor = -1  # its process
        self._is_withheld = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None
        self._listener: socket.socket | None = None

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """Answer whoever asks, in `tasks`; a socket that a dead agent left is replaced."""
        self._path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.setblocking(False)
        self._listener.bind(str(self._path))
        self._path.chmod(0o600)
        self._listener.listen()
        listener = self._listener
        self._accepting = tasks.create_task(self._serve(listener, tasks))
        # Not by the task itself, which may be cancelled before it has begun.
        self._accepting.add_done_callback(lambda _task: listener.close())

    def withhold(self) -> None:
        """Hand nothing over from now on: this agent ends without, and who has asked waits."""
        self._is_withheld = True

    def stop(self) -> None:
        """Listen no more."""
        if self._listener is not None:
            self._listener = None  # closed when nobody accepts any more
            self._path.unlink(missing_ok=True)
        if self._accepting is not None:
            self._accepting.cancel()

    def close(self) -> None:
        """Talk to nobody any more; those who wait for this process's end learn it from the end."""
        self.stop()
        for task in self._tasks:
            task.cancel()

    def forget(self) -> None:
        """Close what is kept: this agent has ended."""
        for connection in self._kept:
            connection.close()
        self._kept.clear()

    async def wait_until_alone(self) -> None:
        """Wait until the agent that has taken over has ended."""
        if self._successor < 0:
            return
        try:
            await _until_ready(self._successor, is_write=False)
        finally:
            os.close(self._successor)
            self._successor = -1

    async def _serve(self, listener: socket.socket, tasks: asyncio.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _address = await loop.sock_accept(listener)
            connection.setblocking(False)
            # A datagram must fit; the kernel gives 416 KiB if net.core.wmem_max is as it ships.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MESSAGE_BYTES)
            task = tasks.create_task(self._answer(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, connection: socket.socket) -> None:
        is_kept = False
        try:
            request, _fds = await _receive(connection)
            match request.get("request"):
                case "leave":
                    self._on_leave()
                    await _send(connection, {"reply": "leaving"})
                    is_kept = True
                case "handover" if request.get("version") == VERSION:
                    async with self._turn:
                        if self._is_withheld:
                            is_kept = True
                        elif self._listener is not None:  # else another one was first
                            is_kept = await self._hand_over(connection)
                case _:
                    reason = f"this agent hands over in version {VERSION} of the protocol"
                    await _send(connection, {"reply": "refused", "reason": reason})
        except (OSError, TimeoutError, HandoverFailed) as error:
            log.warning("nothing was handed over", extra={"error": str(error) or "too slow"})
        finally:
            if is_kept:
                self._kept.append(connection)
            else:
                connection.close()

    async def _hand_over(self, connection: socket.socket) -> bool:
        lock_and_elders, pods = self._heritage()
        pods = list(pods)
        begin = {"reply": "begin", "pods": len(pods)}
        async with asyncio.timeout(COMMIT_SECONDS):
            await _send(connection, begin, lock_and_elders)
            for inheritance, fds in pods:
                await _send_raw(connection, encode(inheritance), fds)
            request, _fds = await _receive(connection)
        if request.get("request") != "commit":
            raise HandoverFailed("the successor has ended, or says something strange")
        if self._is_withheld:
            return True
        self._successor = _open_process(peer_of(connection))
        self.stop()
        self._on_committed()
        with contextlib.suppress(
            OSError
        ):  # it may have died just now: whoever comes next takes over
            await _send(connection, {"reply": "committed"})
            self._heir = connection
        return True

    async def give(self, counts: Counted) -> Counted:
        """Tell the successor what was counted here; return what it does not take."""
        if self._heir is None:
            return counts
        given = 0
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(GIVE_SECONDS):
                while given < len(counts):
                    part = counts[given : given + COUNTS_AT_ONCE]
                    await _send(self._heir, {"counts": part})
                    given += len(part)
        return counts[given:]


class Predecessor:
    """The side of the agent that comes."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.pid = peer_of(connection)
        self._pidfd = _open_process(self.pid)

    @staticmethod
    def find(path: Path) -> Predecessor | None:
        """Return the agent that runs, if one does that can hand over."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            return None
        connection.setblocking(False)
        return Predecessor(connection)

    async def begin(self) -> tuple[int, list[int], list[Heritage]]:
        """Return the lock, elders' connections and pods (PredecessorGone, HandoverFailed)."""
        # Of an agent that has ended they would keep what is the node's: its lock, its listeners.
        with contextlib.ExitStack() as unless_all_came:
            async with self._waiting():
                await _send(self.connection, {"request": "handover", "version": VERSION})
                data, fds = await _receive_raw(self.connection)
                unless_all_came.callback(_close_all, fds)
                reply = _parse(data)
                if reply.get("reply") != "begin" or not fds:
                    raise HandoverFailed(
                        str(reply.get("reason", "the agent that runs hands nothing over"))
                    )
                pods = []
                for _ in range(int(reply["pods"])):
                    data, pod_fds = await _receive_raw(self.connection)
                    unless_all_came.callback(_close_all, pod_fds)
                    pods.append((decode(data), pod_fds))
            unless_all_came.pop_all()
            return fds[0], fds[1:], pods

    async def commit(self) -> None:
        """Become the node's agent (PredecessorGone: already, then; HandoverFailed: not)."""
        async with self._waiting():
            await _send(self.connection, {"request": "commit"})
            reply, _fds = await _receive(self.connection)
        if reply.get("reply") != "committed":
            raise HandoverFailed("the agent that runs did not wait for this one")

    async def leave(self) -> None:
        """Tell it to take every pod out and to end; returns when it has ended."""
        async with self._waiting():
            await _send(self.connection, {"request": "leave"})
            await _receive(self.connection)
        with contextlib.suppress(OSError):
            while await asyncio.get_running_loop().sock_recv(self.connection, MESSAGE_BYTES):
                pass

    @contextlib.asynccontextmanager
    async def _waiting(self) -> Any:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                yield
        except TimeoutError as error:
            raise HandoverFailed(f"the agent that runs (pid {self.pid}) does not answer") from error
        except (ConnectionError, EOFError) as error:
            # It has ended, or it has ended this alone: only then is it still the node's agent.
            if await self.has_ended():
                raise PredecessorGone from error
            raise HandoverFailed(f"the agent that runs (pid {self.pid}) waits no longer") from error

    async def wait_gone(self) -> None:
        """Wait until it has ended, while nothing is asked of it."""
        with contextlib.suppress(OSError):
            await asyncio.get_running_loop().sock_recv(self.connection, MESSAGE_BYTES)

    async def has_ended(self) -> bool:
        """Whether its process is gone, or goes just now."""
        if self._pidfd < 0:
            return True
        try:
            async with asyncio.timeout(GONE_SECONDS):
                await _until_ready(self._pidfd, is_write=False)
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Forget it; the connection stays open for who has taken it."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def peer_of(connection: socket.socket) -> int:
    """Return the process at the other end."""
    size = struct.calcsize("3i")
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    pid: int = struct.unpack("3i", credentials)[0]
    return pid


def _open_process(pid: int) -> int:
    """Return a descriptor that is readable when the process has ended; -1 if it has."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return -1


async def _send(
    connection: socket.socket, message: dict[str, object], fds: list[int] | None = None
) -> None:
    await _send_raw(connection, json.dumps(message).encode(), fds or [])


async def _send_raw(connection: socket.socket, data: bytes, fds: list[int]) -> None:
    while True:
        try:
            socket.send_fds(connection, [data], fds)
            return
        except BlockingIOError:
            await _until_ready(connection, is_write=True)


async def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    data, fds = await _receive_raw(connection)
    return _parse(data), fds


def _parse(data: bytes) -> dict[str, Any]:
    try:
        message = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise HandoverFailed(f"what came is no JSON: {error}") from error
    if not isinstance(message, dict):
        raise HandoverFailed("what came is no JSON object")
    return message


async def _receive_raw(connection: socket.socket) -> tuple[bytes, list[int]]:
    while True:
        try:
            data, fds, flags, _address = socket.recv_fds(connection, MESSAGE_BYTES, MAX_FDS)
        except BlockingIOError:
            await _until_ready(connection, is_write=False)
            continue
        if not data:
            raise ConnectionResetError("the other side has ended")
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            _close_all(fds)
            raise HandoverFailed(
                f"a part of a message is lost: it is longer than {MESSAGE_BYTES} bytes, or it has "
                "more descriptors than this process can open"
            )
        return data, fds


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


async def _until_ready(connection: socket.socket | int, *, is_write: bool) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    add, remove = (
        (loop.add_writer, loop.remove_writer) if is_write else (loop.add_reader, loop.remove_reader)
    )

    def on_ready() -> None:
        if not ready.done():
            ready.set_result(None)

    add(connection, on_ready)
    try:
        await ready
    finally:
        remove(connection)
