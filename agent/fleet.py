"""All workers of this node: they are told the same, and one that dies is replaced.

    introduction -> each new worker        tell -> all of them        drain -> until all are done

Nothing but a dead worker's own connections is lost. Does not know what the messages mean.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from agent.workers import WorkerProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from agent.tunnel.counts import Counted
    from agent.tunnel.messages import Answer, ToWorker

log = logging.getLogger(__name__)
Told = tuple["ToWorker", list[int]]  # a message, and the descriptors that go with it


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

    def expect_no_more(self, uid: str) -> None:
        """Forget what `expect_drained` was to call."""
        self._draining.pop(uid, None)

    def stop(self) -> None:
        """End the workers and wait for them; their connections end with them."""
        self._is_stopping = True
        for worker in self._workers:
            worker.stop()

    def _add(self) -> None:
        worker = WorkerProcess(self._on_exit, self._on_needed, self._on_drained, self._on_counts)
        self._workers.append(worker)
        for message, fds in self._introduction():
            worker.send(message, fds)

    def _on_drained(self, worker: WorkerProcess, uid: str) -> None:
        left, on_drained = self._draining.get(uid, (None, None))
        if left is None or on_drained is None:
            return
        left.discard(worker)
        if not left:
            del self._draining[uid]
            on_drained()

    def _on_exit(self, worker: WorkerProcess) -> None:
        worker.stop()
        self._workers.remove(worker)
        for uid in list(self._draining):
            self._on_drained(worker, uid)
        if not self._is_stopping:
            log.error(
                "worker died and is replaced",
                extra={"pid": worker.pid, "exit_code": worker.process.returncode},
            )
            self.replaced += 1
            self._add()
            self._on_replaced()
