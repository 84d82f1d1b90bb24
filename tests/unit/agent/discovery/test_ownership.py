"""What made a pod, from the pod alone."""

from __future__ import annotations

from typing import Any

import pytest

from agent.discovery.fields import Field
from agent.discovery.ownership import read_owner


def owner(kind: str, name: str, *, controller: bool = True) -> dict[str, Any]:
    return {"kind": kind, "name": name, "controller": controller}


@pytest.mark.parametrize(
    ("owners", "labels", "expected"),
    [
        ([owner("ReplicaSet", "web-5d4f")], {"pod-template-hash": "5d4f"}, "web"),
        ([owner("ReplicaSet", "web-5d4f")], {}, "web-5d4f"),
        ([owner("ReplicaSet", "web")], {"pod-template-hash": "5d4f"}, "web"),
        ([owner("Job", "backup-27891234")], {}, "backup"),
        ([owner("Job", "import")], {}, "import"),
        ([owner("StatefulSet", "db")], {}, "db"),
        ([owner("Node", "n1", controller=False), owner("DaemonSet", "log")], {}, "log"),
        ([], {}, ""),
        (None, None, ""),
    ],
)
def test_owner_is_named_as_people_know_it(owners: Any, labels: Any, expected: str) -> None:
    metadata = {"ownerReferences": owners, "labels": labels}
    assert read_owner(Field(metadata, "metadata")) == expected
