"""The control side of policies: what workers are told of a change, and what is judged here.

Workers judge the connections that pass through them. The connections that the kernel carries on the
direct path are judged here, when something changes. Called by the composition root.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent.model.condition import Connection
from agent.model.identity import SpiffeId
from agent.model.policy import NO_LABELS, Policy
from agent.state.explanation import describe_policy
from agent.state.rulebook import Rulebook
from agent.tunnel import messages

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from agent.datapath.direct import Subject
    from agent.model.pod import LocalPod
    from agent.model.policy import AnyPolicy, Labels, PolicyKey
    from agent.model.workload import Workload
    from agent.state.store import Snapshot


class Enforcement:
    """The policies of one node's agent."""

    def __init__(self, node: str, trust_domain: str) -> None:
        self._node = node
        self._trust_domain = trust_domain
        self._rulebook = Rulebook()
        self._unread: list[AnyPolicy | PolicyKey] = []
        self._labels: dict[str, Labels] = {}
        self._policies: dict[PolicyKey, AnyPolicy] = {}

    def change(self, after: Snapshot) -> list[messages.ToWorker]:
        """Take a new state; return what to tell each worker, after its workloads.

        Nothing if neither policies nor the labels of this node's pods have changed.
        """
        labels = {each.uid: each.labels for each in after.workloads if each.node == self._node}
        before, self._policies = self._policies, {policy.key: policy for policy in after.policies}
        removed = [key for key in before if key not in self._policies]
        changed = [policy for key, policy in self._policies.items() if before.get(key) != policy]
        is_same = not removed and not changed and labels == self._labels
        self._labels = labels
        self._unread += removed
        self._unread += changed
        return [] if is_same else list(_told(removed, changed))

    def learn(self, workload: Workload) -> None:
        """Know the labels of a pod of this node before the next state tells them."""
        self._labels[workload.uid] = workload.labels

    @property
    def rulebook(self) -> Rulebook:
        """The policies, indexed at the first question after a change: workers are told before."""
        unread, self._unread = self._unread, []
        self._rulebook.change(unread)
        return self._rulebook

    def introduction(self) -> list[messages.ToWorker]:
        """Return what a new worker must know before it serves a pod."""
        return list(_told([], list(self._policies.values())))

    def passes(self, subject: Subject, source: LocalPod, destination: LocalPod) -> bool:
        """Judge connections on the direct path, whose ends the kernel knows."""
        labels = self._labels.get(destination.uid)
        if labels is None:
            return False
        identity = SpiffeId(self._trust_domain, source.namespace, source.service_account)
        connection = Connection(
            subject.source, identity, subject.destination, subject.destination_port
        )
        return self.rulebook.judge(destination.namespace, labels, connection).is_allowed

    def plaintext_ports(self, pod: LocalPod) -> frozenset[int] | None:
        """Return the only ports at which a STRICT pod takes plaintext; None if it is not STRICT."""
        return self.rulebook.plaintext_ports(pod.namespace, self._labels.get(pod.uid, NO_LABELS))

    def list_policies(self, snapshot: Snapshot) -> list[dict[str, object]]:
        """List the policies and the pods of this node that they are about, for people."""
        own = [pod for pod in snapshot.local_pods.get(self._node, ()) if pod.uid in self._labels]
        rows: list[dict[str, object]] = []
        for key, policy in sorted(self._policies.items()):
            does, state = describe_policy(policy)
            rows.append(
                {
                    "node": self._node,
                    "policy": str(key),
                    "does": does,
                    "state": state,
                    "for": ", ".join(policy.targets)
                    if isinstance(policy, Policy) and policy.targets
                    else str(policy.scope),
                    "rules": len(policy.rules) if isinstance(policy, Policy) else None,
                    "pods": [
                        f"{pod.namespace}/{pod.name}"
                        for pod in own
                        if policy.is_enforced_here
                        and policy.scope.covers(pod.namespace, self._labels[pod.uid])
                    ],
                    "warnings": list(policy.warnings),
                }
            )
        return rows


def _told(removed: list[PolicyKey], changed: list[AnyPolicy]) -> Iterator[messages.ToWorker]:
    if removed:
        yield messages.RemovePolicies(tuple(removed))
    for part in _parts(changed, messages.POLICIES_AT_ONCE):
        yield messages.PutPolicies(tuple(part))
    yield messages.Enforce()


def _parts(policies: list[AnyPolicy], size: int) -> Iterable[list[AnyPolicy]]:
    return (policies[start : start + size] for start in range(0, len(policies), size))
