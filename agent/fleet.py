"""All workers of this node: they are told the same, and one that dies is replaced.

    introduction -> each new worker        tell -> all of them        drain -> until all are done

Nothing but a dead worker's own connections is lost. One that dies young is replaced later and
later, so that a cause that stays costs no processor. Knows no message's meaning but that of Retire.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from agent.tunnel.messages import Retire
from agent.workers import WorkerProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from agent.tunnel.counts import Counted
    from agent.tunnel.messages import Answer, ToWorker

log = logging.getLogger(__name__)
YOUNG_SECONDS = 10.0  # who lives so long did not die of its start
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.1, 10.0
Told = tuple["ToWorker", list[int]]  # a message, and the descriptors that go with it


def wait_before(early_deaths: int) -> float:
    """Return the seconds to wait after so many workers in a row that died young; 0 after none."""
    if not early_deaths:
        return 0.0
    return float(min(FIRST_WAIT_SECONDS * 2 ** (early_deaths - 1), LONGEST_WAIT_SECONDS))


class Fleet:
    """The workers of one agent."""

    def __init__(
        self,
        introduction: Callable[[], Iterable[Told]],
        on_needed: Callable[[str], None],
        on_counts: Callable[[Counted], None],
        on_replaced: Callable[[], None],
    ) -> None:
        """Have no worker yet; `introduction()` is all that a new one has to know.

        `on_needed(identity)` when a connection waits for a certificate, `on_counts(counts)` now and
        then, `on_replaced()` when a worker that died has a successor.
        """
        self._introduction = introduction
        self._on_needed = on_needed
        self._on_counts = on_counts
        self._on_replaced = on_replaced
        self._workers: list[WorkerProcess] = []
        self._draining: dict[str, tuple[set[WorkerProcess], Callable[[], None]]] = {}
        self._is_stopping = False
        self.replaced = 0  # workers that died
        self._early_deaths = 0
        self._waiting: list[asyncio.TimerHandle] = []
        self._all_gone = asyncio.Event()

    def start(self, count: int) -> None:
        """Start `count` workers."""
        for _ in range(count):
            self._add()

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self._workers]

    def tell(self, message: ToWorker, fds: list[int] | None = None) -> None:
        """Tell every worker; `fds` stay the caller's."""
        for worker in self._workers:
            worker.send(message, fds)

    async def wait_taken(self) -> None:
        """Wait until every worker has what it was told in its socket."""
        for worker in list(self._workers):
            await worker.wait_taken()

    async def wait_in_force(self) -> None:
        """Wait until every worker acts by everything that it was told."""
        for worker in list(self._workers):
            await worker.wait_in_force()

    @property
    def members(self) -> tuple[WorkerProcess, ...]:
        """The workers that are there now, for questions to each."""
        return tuple(self._workers)

    async def ask(
        self, build: Callable[[int], ToWorker], seconds: float
    ) -> dict[int, Answer | None]:
        """Ask every worker the same; return each one's answer by its pid, None if it gives none."""
        async with asyncio.TaskGroup() as tasks:
            asked = {
                worker.pid: tasks.create_task(worker.ask(build, seconds))
                for worker in self._workers
            }
        return {pid: task.result() for pid, task in asked.items()}

    def expect_drained(self, uid: str, on_drained: Callable[[], None]) -> None:
        """Call `on_drained` when each worker that is there now serves a pod no more, or is gone."""
        self._draining[uid] = (set(self._workers), on_drained)
        if not self._workers:  # nobody is left to say so
            asyncio.get_running_loop().call_soon(self._end_drain, uid)

    def expect_no_more(self, uid: str) -> None:
        """Forget what `expect_drained` was to call."""
        self._draining.pop(uid, None)

    async def retire(self, seconds: float, *, has_successor: bool) -> bool:
        """Let the workers end when their connections have; False if some are left after `seconds`.

        `stop` has to follow.
        """
        self._is_stopping = True
        self._cancel_waiting()
        if not self._workers:
            return True
        self.tell(Retire(has_successor))
        try:
            async with asyncio.timeout(seconds):
                await self._all_gone.wait()
        except TimeoutError:
            return False
        return True

    def _cancel_waiting(self) -> None:
        for timer in self._waiting:
            timer.cancel()
        self._waiting.clear()

    def stop(self) -> None:
        """End the workers and wait for them; their connections end with them."""
        self._is_stopping = True
        self._cancel_waiting()
        for worker in self._workers:
            worker.stop()

    def _add(self) -> None:
        worker = WorkerProcess(self._on_exit, self._on_needed, self._on_drained, self._on_counts)
        self._workers.append(worker)
        try:
            for message, fds in self._introduction():
                worker.send(message, fds)
        except OSError:
            worker.process.kill()  # it knows the half; the next one comes when this one is gone

    def _on_drained(self, worker: WorkerProcess, uid: str) -> None:
        if uid in self._draining:
            self._draining[uid][0].discard(worker)
            self._end_drain(uid)

    def _end_drain(self, uid: str) -> None:
        """Say that a pod is drained, if nobody serves it any more."""
        if uid in self._draining and not self._draining[uid][0]:
            _left, on_drained = self._draining.pop(uid)
            on_drained()

    def _on_exit(self, worker: WorkerProcess) -> None:
        worker.stop()
        self._workers.remove(worker)
        for uid in list(self._draining):
            self._on_drained(worker, uid)
        if self._is_stopping:
            if not self._workers:
                self._all_gone.set()
            return
        lived = asyncio.get_running_loop().time() - worker.began
        self._early_deaths = self._early_deaths + 1 if lived < YOUNG_SECONDS else 0
        # The first of a row may have been a chance, and a node without a worker serves nobody.
        seconds = wait_before(self._early_deaths - 1 if self._early_deaths else 0)
        log.error(
            "worker died and is replaced",
            extra={
                "pid": worker.pid,
                "exit_code": worker.process.returncode,
                "lived_seconds": round(lived, 1),
                "wait_seconds": seconds,
            },
        )
        if seconds:
            self._waiting.append(asyncio.get_running_loop().call_later(seconds, self._replace))
        else:
            self._replace()

    def _replace(self) -> None:
        if self._is_stopping:
            return
        now = asyncio.get_running_loop().time()
        self._waiting = [timer for timer in self._waiting if timer.when() > now]
        try:
            self._add()
        except OSError as error:
            self._early_deaths += 1
            seconds = wait_before(self._early_deaths)
            fields = {"error": str(error), "wait_seconds": seconds}
            log.error("worker cannot be started, and is later", extra=fields)
            self._waiting.append(asyncio.get_running_loop().call_later(seconds, self._replace))
            return
        self.replaced += 1
        self._on_replaced()
