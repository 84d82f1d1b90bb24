"""The agent's end of the caller process: it lives as long as there are calls.

A process that dies fails the calls in flight, and the next call starts another.
"""

from __future__ import annotations

import asyncio
import pickle
import sys
from typing import TYPE_CHECKING

from agent.errors import AuthorityUnavailable
from agent.identity.caller import LENGTH_BYTES, build_message

if TYPE_CHECKING:
    from agent.identity.caller import Target

IDLE_SECONDS = 2.0  # a burst of pods is asked for one after the other
Answer = tuple[str, "bytes | str"]


class _Caller(asyncio.SubprocessProtocol):
    """One process: what it has been asked and not answered yet."""

    def __init__(self) -> None:
        self.pending: dict[int, asyncio.Future[Answer]] = {}
        self.is_gone = False
        self.exited = asyncio.get_running_loop().create_future()
        self._received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.SubprocessTransport)
        self.transport = transport

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self._received += data
        while len(self._received) >= LENGTH_BYTES:
            end = LENGTH_BYTES + int.from_bytes(self._received[:LENGTH_BYTES], "big")
            if len(self._received) < end:
                return
            number, status, body = pickle.loads(self._received[LENGTH_BYTES:end])
            del self._received[:end]
            waiting = self.pending.pop(number, None)
            if waiting is not None and not waiting.done():
                waiting.set_result((status, body))

    def process_exited(self) -> None:
        self.is_gone = True
        self.transport.close()
        for waiting in self.pending.values():
            if not waiting.done():
                waiting.set_exception(AuthorityUnavailable("the process that asks the CA ended"))
        if not self.exited.done():
            self.exited.set_result(None)


class Calls:
    """Calls to the CA, through a process that lives as long as there are some."""

    def __init__(self) -> None:
        self._caller: _Caller | None = None
        self._number = 0
        self._idle: asyncio.TimerHandle | None = None
        self._starting = asyncio.Lock()
        self._ending: list[_Caller] = []

    async def call(self, target: Target, token: str, request: bytes) -> Answer:
        """Return (name of the gRPC status, details), or ("", answer).

        Raises:
            AuthorityUnavailable: the process ended before it answered, or cannot be started.
        """
        caller, stdin = await self._start()
        self._number += 1
        number = self._number
        waiting: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        caller.pending[number] = waiting
        stdin.write(build_message((number, target, token, request)))
        try:
            answer: Answer = await waiting
            return answer
        finally:
            caller.pending.pop(number, None)
            self._end_when_idle()

    async def _start(self) -> tuple[_Caller, asyncio.WriteTransport]:
        async with self._starting:
            if self._idle is not None:
                self._idle.cancel()
                self._idle = None
            if self._caller is None or self._caller.is_gone:
                command = (sys.executable, "-m", "agent.identity.caller")
                try:
                    _transport, self._caller = await asyncio.get_running_loop().subprocess_exec(
                        _Caller, *command, stderr=None
                    )
                except OSError as error:
                    raise AuthorityUnavailable(
                        f"the process that asks the CA cannot be started: {error}"
                    ) from error
            caller = self._caller
        stdin = caller.transport.get_pipe_transport(0)
        assert isinstance(stdin, asyncio.WriteTransport)
        return caller, stdin

    def _end_when_idle(self) -> None:
        if self._caller is not None and not self._caller.pending and self._idle is None:
            self._idle = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._end)

    def _end(self) -> None:
        """Close its stdin, which it ends with; the next call starts another."""
        self._idle = None
        caller, self._caller = self._caller, None
        self._ending = [each for each in self._ending if not each.is_gone]
        if caller is not None and not caller.is_gone:
            self._ending.append(caller)
            stdin = caller.transport.get_pipe_transport(0)
            if stdin is not None:
                stdin.close()

    async def close(self) -> None:
        """End the process now; calls in flight fail."""
        if self._idle is not None:
            self._idle.cancel()
        self._end()
        for caller in self._ending:
            if not caller.is_gone:
                caller.transport.kill()
                await caller.exited
        self._ending.clear()
