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
        self._channel.setblocking(False)
        self._inbox = messages.Inbox(self._channel)
        self._outbox = messages.Outbox(self._channel)
        self._has_taken_all = asyncio.Event()
        self._has_taken_all.set()
        self._patience: asyncio.TimerHandle | None = None  # while it has not
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
        """Tell the worker, now or when it has room; a dead one is noticed at its socket, not here.

        Who tells very much has to `wait_taken` before there is more.
        """
        if self._channel.fileno() >= 0:
            self._deliver(lambda: self._outbox.put(message, fds or ()))

    def _deliver(self, send: Callable[[], None]) -> None:
        try:
            send()
        except (BrokenPipeError, ConnectionResetError):
            log.warning("worker is gone", extra={"pid": self.pid})
        except OSError as error:
            self._end(str(error))
        if self._outbox and self._patience is None:
            loop = asyncio.get_running_loop()
            loop.add_writer(self._channel, self._on_room)
            self._patience = loop.call_later(
                SEND_SECONDS, self._end, f"it has read nothing for {SEND_SECONDS:.0f} s"
            )
            self._has_taken_all.clear()

    def _on_room(self) -> None:
        self._stop_waiting()
        self._deliver(self._outbox.flush)
        if not self._outbox:
            self._has_taken_all.set()

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            asyncio.get_running_loop().remove_writer(self._channel)
            self._patience.cancel()
            self._patience = None

    def _end(self, error: str) -> None:
        # It missed something, a new policy perhaps, and nobody would know; a new worker learns
        # everything.
        log.error("worker takes no messages and is ended", extra={"pid": self.pid, "error": error})
        self.process.kill()

    async def wait_taken(self) -> None:
        """Wait until the worker has all that was sent in its socket (or is gone).

        One that reads nothing is ended.
        """
        await self._has_taken_all.wait()

    async def wait_in_force(self) -> None:
        """Wait until everything that was sent is in force (or the worker is gone).

        One that does not answer is ended: nobody could be enrolled, and the agent not be stopped.
        """
        await self.wait_taken()
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
        self._stop_waiting()
        self._channel.close()
        self._outbox.clear()
        self._has_taken_all.set()
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
