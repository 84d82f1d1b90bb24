"""A pod anywhere in the cluster, as the data path needs it. Pure.

The other side of `pod.py`: a LocalPod is what this node enrolls, a Workload is what any
node may connect to. `is_hbone` says that the workload's own node has captured it, so that
a tunnel to it will be answered; until then it is reached as plain TCP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent.model.identity import SpiffeId
from agent.model.policy import NO_LABELS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from agent.model.pod import Address
    from agent.model.policy import Labels


@dataclass(frozen=True, slots=True)
class Locality:
    """Where something runs, in the cloud's words; empty where nobody says."""

    region: str = ""
    zone: str = ""


NOWHERE = Locality()


@dataclass(frozen=True, slots=True)
class Workload:
    """One pod that has addresses of its own and has not ended, or a machine outside the cluster.

    A machine has no node (an empty name), and its uid is no pod's. A network, in the sense of the
    mesh, is where addresses can be reached from one another; empty is that of the cluster.
    """

    uid: str
    namespace: str
    name: str
    node: str
    service_account: str
    addresses: tuple[Address, ...]
    is_hbone: bool
    labels: Labels = NO_LABELS
    owner: str = ""  # the Deployment, Job or the like that made the pod; empty if nothing did
    locality: Locality = NOWHERE  # of its node
    network: str = ""
    created: str = ""  # in UTC as Kubernetes writes it; empty if nobody says
    is_leaving: bool = False  # its deletion was asked for

    @property
    def claim(self) -> tuple[bool, bool, str, str]:
        """Compare by this those that have one address: the greatest counts.

        Who leaves may have given it away already. Of the others who is captured: a claim that is
        out of date must not make plaintext of a tunnel. Then the newest.
        """
        return not self.is_leaving, self.is_hbone, self.created, self.uid

    def identity(self, trust_domain: str) -> SpiffeId:
        """Name the identity that the workload must prove."""
        return SpiffeId(trust_domain, self.namespace, self.service_account)


def owners(workloads: Iterable[Workload]) -> dict[Address, Workload]:
    """Return who has each address."""
    found: dict[Address, Workload] = {}
    for workload in workloads:
        for address in workload.addresses:
            other = found.get(address)
            if other is None or other.claim < workload.claim:
                found[address] = workload
    return found
