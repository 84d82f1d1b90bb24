"""A pod that has no address yet gets some."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

from agent.model.pod import LocalPod
from agent.model.starting import StartingPod
from agent.model.workload import Workload

ADDRESSES = (ip_address("10.0.0.1"),)
WORKLOAD = Workload("a", "shop", "cart", "node-1", "cart", (), is_hbone=False)
LOCAL = LocalPod("a", "shop", "cart", "cart", ())


def test_pod_is_the_same_at_its_addresses() -> None:
    pod = StartingPod(WORKLOAD, LOCAL)
    assert (pod.uid, pod.node) == ("a", "node-1")
    assert pod.at(ADDRESSES) == StartingPod(
        replace(WORKLOAD, addresses=ADDRESSES), replace(LOCAL, addresses=ADDRESSES)
    )


def test_pod_that_wants_no_mesh_has_addresses_too() -> None:
    found = StartingPod(WORKLOAD, None).at(ADDRESSES)
    assert found.local is None
    assert found.workload.addresses == ADDRESSES
