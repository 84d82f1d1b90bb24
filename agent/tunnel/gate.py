"""Who may come in: a worker's policies, and the connections that they let in. Pure.

Changes are gathered and come into force together, so that no connection is judged by half of them.
Then every open inbound connection is judged again, and whoever it belongs to closes it if it does
not pass any more. A connection is registered before it is judged for the first time: there is no
moment at which a change could miss it.

`inbound` asks, the worker passes on what the control process says.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from agent.model.verdict import Basis, Verdict
from agent.state.rulebook import Rulebook

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from agent.model.condition import Connection
    from agent.model.policy import AnyPolicy, PolicyKey
    from agent.tunnel.mesh import Mesh

NO_WORKLOAD = Verdict(False, Basis.NO_WORKLOAD)


def _nothing(_verdict: Verdict) -> None:
    pass


class Admission:
    """One inbound connection, from before its first verdict until `end`.

    Set `on_revoked` to what closes it; it is called at most once, and not after `end`.
    """

    __slots__ = ("_gate", "connection", "on_revoked", "pod_uid", "verdict")

    def __init__(self, gate: Gate, pod_uid: str, connection: Connection) -> None:
        self._gate = gate
        self.pod_uid = pod_uid
        self.connection = connection
        self.on_revoked: Callable[[Verdict], None] = _nothing
        self.verdict = NO_WORKLOAD

    def end(self) -> None:
        """Judge it no more."""
        self.on_revoked = _nothing
        self._gate.forget(self)


class Gate:
    """Judges the inbound connections of the pods of one worker."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._rulebook = Rulebook()
        self._changes: list[AnyPolicy | PolicyKey] = []
        self._admissions: dict[int, Admission] = {}
        self._open = Counter[str]()
        self.on_ended: Callable[[str], None] = lambda _pod_uid: None

    def put(self, policies: Iterable[AnyPolicy]) -> None:
        """Add or replace policies, at the next `enforce`."""
        self._changes += policies

    def remove(self, keys: Iterable[PolicyKey]) -> None:
        """Take policies out, at the next `enforce`."""
        self._changes += keys

    def enforce(self) -> int:
        """Bring the changes into force and judge what is open; return how many changes."""
        changes, self._changes = self._changes, []
        self._rulebook.change(changes)
        for admission in list(self._admissions.values()):
            verdict = self._judge(admission)
            if not verdict.is_allowed and id(admission) in self._admissions:
                self.forget(admission)
                admission.verdict = verdict
                admission.on_revoked(verdict)
        return len(changes)

    def admit(self, pod_uid: str, connection: Connection) -> Admission:
        """Register and judge a connection to a pod; the caller ends it if it may not pass."""
        admission = Admission(self, pod_uid, connection)
        self._admissions[id(admission)] = admission
        self._open[pod_uid] += 1
        admission.verdict = self._judge(admission)
        return admission

    def open_connections(self, pod_uid: str) -> int:
        """Count the connections to a pod that have not ended."""
        return self._open[pod_uid]

    def forget(self, admission: Admission) -> None:
        """Judge a connection no more; see Admission.end. `on_ended` gets the pod's uid."""
        if self._admissions.pop(id(admission), None) is None:
            return
        self._open[admission.pod_uid] -= 1
        if not self._open[admission.pod_uid]:
            del self._open[admission.pod_uid]
        self.on_ended(admission.pod_uid)

    def _judge(self, admission: Admission) -> Verdict:
        workload = self._mesh.workload(admission.pod_uid)
        if workload is None:
            return NO_WORKLOAD
        return self._rulebook.judge(workload.namespace, workload.labels, admission.connection)
