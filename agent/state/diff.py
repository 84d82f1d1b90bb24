"""The steps that lead from the observed pods of a node to the desired ones. Pure.

Pods that leave come first, since a new pod may reuse an address. A pod that changed is
unenrolled and enrolled in adjacent steps, so that it is uncaptured as briefly as can be.
Within each group the order is that of the uids, so equal input gives equal steps.
Called by the reconciler once per pass; applying the steps makes observed equal desired.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agent.model.pod import LocalPod


@dataclass(frozen=True, slots=True)
class Unenroll:
    """Take the pod out of the mesh."""

    uid: str


@dataclass(frozen=True, slots=True)
class Enroll:
    """Take the pod into the mesh."""

    pod: LocalPod


Step = Unenroll | Enroll


def diff(desired: Mapping[str, LocalPod], observed: Mapping[str, LocalPod]) -> tuple[Step, ...]:
    """List the steps, by uid, from `observed` to `desired`."""
    steps: list[Step] = [Unenroll(uid) for uid in sorted(observed.keys() - desired.keys())]
    for uid in sorted(desired.keys() & observed.keys()):
        if desired[uid] != observed[uid]:
            steps += [Unenroll(uid), Enroll(desired[uid])]
    steps += [Enroll(desired[uid]) for uid in sorted(desired.keys() - observed.keys())]
    return tuple(steps)
