"""The control side of the worker processes: start, tell, ask, replace.

Every worker is told the same. One that dies is replaced by a new one, which the owner introduces to
all that is known; nothing but its own connections is lost.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

from agent.tunnel import messages

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.tunnel.counts import Counted

log = logging.getLogger(__name__)
STOP_SECONDS = 5.0
SEND_SECONDS = 5.0  # a worker that takes nothing for so long is stuck
ANSWER_SECONDS = 15.0  # and one that says nothing: 100,000 policies at once take it a few


class WorkerProcess:
    """One worker and its message socket."""

    def __init__(
        self,
        on_exit: Callable[[WorkerProcess], None],
        on_needed: Callable[[str], None],
        on_drained: Callable[[WorkerProcess, str], None],
        on_counts: Callable[[Counted], None],
    ) -> None:
        """Start it (OSError if the kernel has no descriptor, process or memory to give).

        `on_needed(identity)` when a connection waits for a certificate, `on_drained(worker, uid)`
        when a pod that was to be drained is served no more, `on_counts(counts)` now and then.
        """
        self._on_exit = on_exit
        self._on_needed = on_needed
        self._on_drained = on_drained
        self._on_counts = on_counts
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.settimeout(SEND_SECONDS)
        self._inbox = messages.Inbox(self._channel)
        self._outbox = messages.Outbox(self._channel)
        with theirs:
            try:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "agent.worker", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                )
            except OSError:
                self._channel.close()
                raise
        self._answers: dict[int, asyncio.Future[messages.Answer | None]] = {}
        self._number = 0
        self.began = asyncio.get_running_loop().time()
        asyncio.get_running_loop().add_reader(self._channel, self._on_answer)

    @property
    def pid(self) -> int:
        return self.process.pid

    def send(self, message: messages.ToWorker, fds: list[int] | None = None) -> None:
        """Tell the worker; a dead one is noticed at its socket, not here."""
        if self._channel.fileno() < 0:
            return
        try:
            self._outbox.put(message, fds or ())
        except (BrokenPipeError, ConnectionResetError):
            log.warning("worker is gone", extra={"pid": self.pid})
        except OSError as error:
            # It missed this one, a new policy perhaps, and nobody would know; a new worker learns
            # everything.
            extra = {"pid": self.pid, "error": str(error)}
            log.error("worker takes no messages and is ended", extra=extra)
            self.process.kill()

    async def wait_in_force(self) -> None:
        """Wait until everything that was sent is in force (or the worker is gone).

        One that does not answer is ended: nobody could be enrolled, and the agent not be stopped.
        """
        if not (await self._ask(messages.Ask, ANSWER_SECONDS))[0]:
            log.error("worker does not answer and is ended", extra={"pid": self.pid})
            self.process.kill()

    async def ask(
        self, build: Callable[[int], messages.ToWorker], seconds: float
    ) -> messages.Answer | None:
        """Ask for an answer; None if the worker gives none in time, or is gone.

        `build(number)` makes the question, whose answer has the same number.
        """
        return (await self._ask(build, seconds))[1]

    async def _ask(
        self, build: Callable[[int], messages.ToWorker], seconds: float
    ) -> tuple[bool, messages.Answer | None]:
        """Return whether the worker has answered, or is gone, in time; and what."""
        if self._channel.fileno() < 0:
            return True, None
        self._number = number = self._number + 1
        answer: asyncio.Future[messages.Answer | None]
        answer = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        self.send(build(number))
        try:
            async with asyncio.timeout(seconds):
                return True, await answer
        except TimeoutError:
            return False, None
        finally:
            self._answers.pop(number, None)

    def _on_answer(self) -> None:
        try:
            received = self._inbox.receive()
        except OSError:
            self._close()
            self._on_exit(self)
            return
        if received is None:
            return
        match received[0]:
            case (
                messages.Ready() | messages.Connections() | messages.Gauges() | messages.Profile()
            ) as answer:
                asked = self._answers.pop(answer.number, None)
                if asked is not None and not asked.done():  # else it came too late
                    asked.set_result(answer)
            case messages.NeedCertificate(identity=identity):
                self._on_needed(identity)
            case messages.Drained(uid=uid):
                self._on_drained(self, uid)
            case messages.PutCounts(counts=counts):
                self._on_counts(counts)

    def _close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._channel)
        self._channel.close()
        answers, self._answers = self._answers, {}
        for answer in answers.values():
            if not answer.done():
                answer.set_result(None)

    def stop(self) -> None:
        """End the worker and wait for it; its connections end with it."""
        if self._channel.fileno() >= 0:
            self._close()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
