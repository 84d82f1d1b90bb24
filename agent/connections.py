"""The open connections of this node: those that workers carry, and those of the direct path.

Workers are asked in parts, so that an answer never stops the bytes that a worker moves for long.
A worker that does not answer is left out and named; it is not ended for that.

Called by the composition root, for `sidestep connections` and the dump of the configuration.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from agent.tunnel import messages

if TYPE_CHECKING:
    from agent.direct import DirectPath
    from agent.fleet import Fleet
    from agent.model.open_connection import OpenConnection
    from agent.workers import WorkerProcess

log = logging.getLogger(__name__)
ANSWER_SECONDS = 3.0  # for each part


async def list_connections(
    fleet: Fleet, direct: DirectPath, namespace: str | None = None, pod: str | None = None
) -> list[tuple[int | None, OpenConnection]]:
    """List the connections, each with the pid of its worker, None for the kernel.

    `namespace` and `pod` leave out those of other pods.
    """
    async with asyncio.TaskGroup() as tasks:
        asked = {
            worker.pid: tasks.create_task(_ask(worker, namespace, pod)) for worker in fleet.members
        }
    found: list[tuple[int | None, OpenConnection]] = [
        (pid, connection) for pid, task in asked.items() for connection in task.result()
    ]
    found += [
        (None, connection)
        for connection in direct.list_connections()
        if namespace in (None, connection.namespace) and pod in (None, connection.pod)
    ]
    return found


async def _ask(
    worker: WorkerProcess, namespace: str | None, pod: str | None
) -> list[OpenConnection]:
    found: list[OpenConnection] = []
    last = 0
    while True:

        def build(number: int, last: int = last) -> messages.ToWorker:
            return messages.ListConnections(number, last, namespace, pod)

        answer = await worker.ask(build, ANSWER_SECONDS)
        if not isinstance(answer, messages.Connections):
            log.warning("worker does not list its connections", extra={"pid": worker.pid})
            return found
        found += answer.found
        last = answer.last
        if not last:
            return found
