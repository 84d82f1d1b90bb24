"""What workers are told of the mesh: who is where, which services there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent.state.store import Snapshot
from agent.tunnel import messages

if TYPE_CHECKING:
    from collections.abc import Iterator


def introduce(snapshot: Snapshot) -> Iterator[messages.ToWorker]:
    """Yield what a worker that knows nothing has to be told."""
    return changes(Snapshot(), snapshot)


def changes(before: Snapshot, after: Snapshot) -> Iterator[messages.ToWorker]:
    """Yield what has changed; what is gone comes first, since its address may be another's now.

    Of workloads that share an address each is told: a worker knows who has it, and who is next.
    """
    workloads = {workload.uid: workload for workload in before.workloads}
    wanted = {workload.uid: workload for workload in after.workloads}
    for uid in workloads.keys() - wanted.keys():
        yield messages.RemoveWorkload(uid)
    for uid, workload in wanted.items():
        if workloads.get(uid) != workload:
            yield messages.PutWorkload(workload)
    services = {service.key: service for service in before.services}
    wanted_services = {service.key: service for service in after.services}
    for key in services.keys() - wanted_services.keys():
        yield messages.RemoveService(*key)
    for key, service in wanted_services.items():
        if services.get(key) != service:
            yield messages.PutService(service)
