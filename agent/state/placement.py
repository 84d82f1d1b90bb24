"""Which identities run on which node: what the CA signs for whom. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent.model.identity import SpiffeId
    from agent.state.store import Snapshot


class Placement:
    """Immutable; a newer state is a new value."""

    __slots__ = ("_accounts",)

    def __init__(self, snapshot: Snapshot) -> None:
        self._accounts = frozenset(
            (workload.node, workload.namespace, workload.service_account)
            for workload in snapshot.workloads
            if workload.node  # a machine outside the cluster has none
        )

    def runs_on(self, node: str, identity: SpiffeId) -> bool:
        """Whether a pod with that identity is scheduled on the node."""
        return (node, identity.namespace, identity.service_account) in self._accounts
