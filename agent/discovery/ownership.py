"""What made a pod, as Istio names workloads in metrics: the Deployment, CronJob or the like. Pure.

A pod is owned by a ReplicaSet or a Job, which is itself made by something that people know by name.
Its object is not read for that: both names follow from the pod's own. Called by `translate`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent.discovery.fields import Field

HASH_LABEL = "pod-template-hash"  # what a Deployment appends to the name of its ReplicaSet
SCHEDULED_JOB = re.compile(r"(.+)-\d{8,10}", re.ASCII)  # a CronJob appends minutes or seconds


def read_owner(metadata: Field) -> str:
    """Return the name of what made the pod; empty if nothing did.

    Raises:
        WrongField: the metadata is not that of an object.
    """
    for owner in metadata.get("ownerReferences").items():
        if not owner.get("controller").flag(default=False):
            continue
        kind, name = owner.get("kind").text(""), owner.get("name").text("")
        if kind == "ReplicaSet":
            suffix = metadata.get("labels").get(HASH_LABEL).text("")
            return name.removesuffix(f"-{suffix}") if suffix else name
        if kind == "Job" and (made := SCHEDULED_JOB.fullmatch(name)):
            return made[1]
        return name
    return ""
