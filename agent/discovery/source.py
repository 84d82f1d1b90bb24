"""What an agent asks of whoever knows the cluster: states, and a place to say who is captured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator

    from agent.discovery.translate import ObjectProblem
    from agent.model.pod import LocalPod
    from agent.model.starting import StartingPod
    from agent.model.workload import Workload
    from agent.state.store import Snapshot


class Source(Protocol):
    """Where state comes from, and where is said how pods fare."""

    @property
    def problems(self) -> tuple[ObjectProblem, ...]:
        """What cannot be used at the moment."""
        ...

    def watch(self, stop: asyncio.Event) -> AsyncIterator[Snapshot]:
        """Yield the state now and after each change, until `stop`."""
        ...

    async def ask_for_pod(self, namespace: str, name: str) -> StartingPod | None:
        """Ask for one pod now, where the state may be late (KubernetesError); None: not known."""
        ...

    def publish(self, pod: LocalPod | Workload, redirection: str | None) -> None:
        """Say for all whether a pod is captured (enabled) or will be (pending); None: it is not."""
        ...

    def report(self, pod: LocalPod, reason: str, note: str) -> None:
        """Say on a pod why it is not captured; as often as it happens, and nobody is flooded."""
        ...

    async def is_withdrawn(self) -> bool:
        """Say whether the agents are taken away for good: another one will not come."""
        ...

    async def close(self) -> None:
        """Bring to an end what was published."""
        ...
