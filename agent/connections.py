"""The open connections of this node: those that workers carry, and those of the direct path.

An agent before this one that still serves some is asked for them as well.

Workers are asked in parts, so that an answer never stops the bytes that a worker moves for long.
A worker that does not answer is left out and named; it is not ended for that.

Called by the composition root, for `sidestep connections` and the dump of the configuration.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from agent.model.open_connection import OpenConnection
from agent.tunnel import messages

if TYPE_CHECKING:
    from agent.direct import DirectPath
    from agent.elders import Elders
    from agent.fleet import Fleet
    from agent.workers import WorkerProcess

log = logging.getLogger(__name__)
ANSWER_SECONDS = 3.0  # for each part


async def list_connections(
    fleet: Fleet,
    direct: DirectPath,
    elders: Elders,
    namespace: str | None = None,
    pod: str | None = None,
) -> list[tuple[int | None, OpenConnection]]:
    """List the connections, each with the pid of its worker, None for the kernel.

    `namespace` and `pod` leave out those of other pods.
    """
    async with asyncio.TaskGroup() as tasks:
        asked = {
            worker.pid: tasks.create_task(_ask(worker, namespace, pod)) for worker in fleet.members
        }
        of_elders = tasks.create_task(elders.ask("connections", namespace=namespace, pod=pod))
    found: list[tuple[int | None, OpenConnection]] = [
        (pid, connection) for pid, task in asked.items() for connection in task.result()
    ]
    found += [
        (None, connection)
        for connection in direct.list_connections()
        if namespace in (None, connection.namespace) and pod in (None, connection.pod)
    ]
    found += _read(of_elders.result())
    return found


def _read(answers: list[Any]) -> list[tuple[int | None, OpenConnection]]:
    try:
        return [(row["worker"], OpenConnection.parse(row)) for rows in answers for row in rows]
    except (LookupError, TypeError) as error:  # of a version that tells less
        log.warning("an agent before this one is not understood", extra={"error": repr(error)})
        return []


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
