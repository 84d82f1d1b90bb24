"""What a DaemonSet's status says of its nodes."""

from __future__ import annotations

from typing import Any

import pytest

from agent.discovery.rollout import count_nodes


@pytest.mark.parametrize(
    ("generation", "status", "wanted", "ready"),
    [
        (1, {}, 0, -1),  # the controller has not come to it
        (1, {"observedGeneration": 1, "desiredNumberScheduled": 3, "numberReady": 2}, 3, 2),
        (1, {"observedGeneration": 1, "desiredNumberScheduled": 3, "numberReady": 3}, 3, 3),
        (2, {"observedGeneration": 1, "desiredNumberScheduled": 3, "numberReady": 3}, 3, -1),
        (1, {"observedGeneration": 1, "desiredNumberScheduled": 0}, 0, 0),  # a cluster of none
    ],
)
def test_nodes_are_counted(
    generation: int, status: dict[str, Any], wanted: int, ready: int
) -> None:
    found = count_nodes({"metadata": {"generation": generation}, "status": status})
    assert found[:2] == (wanted, ready)
