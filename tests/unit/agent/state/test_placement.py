"""Which identities run on which node."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest

from agent.model.identity import SpiffeId
from agent.model.workload import Workload
from agent.state.placement import Placement
from agent.state.store import Snapshot

CART = Workload("1", "shop", "cart-0", "east", "cart", (ip_address("10.0.0.1"),), is_hbone=False)


@pytest.mark.parametrize(
    ("node", "namespace", "account", "runs"),
    [
        ("east", "shop", "cart", True),
        ("west", "shop", "cart", False),
        ("east", "stock", "cart", False),
        ("east", "shop", "default", False),
        ("", "shop", "cart", False),
    ],
)
def test_identity_runs_where_a_pod_with_it_is(
    node: str, namespace: str, account: str, runs: bool
) -> None:
    placement = Placement(Snapshot(workloads=(CART,)))
    assert placement.runs_on(node, SpiffeId("cluster.local", namespace, account)) is runs


def test_one_identity_may_run_on_several_nodes() -> None:
    placement = Placement(Snapshot(workloads=(CART, replace(CART, uid="2", node="west"))))
    identity = SpiffeId("cluster.local", "shop", "cart")
    assert placement.runs_on("east", identity)
    assert placement.runs_on("west", identity)


def test_no_node_vouches_for_a_machine_outside_the_cluster() -> None:
    placement = Placement(Snapshot(workloads=(replace(CART, node=""),)))
    assert not placement.runs_on("", SpiffeId("cluster.local", "shop", "cart"))
