"""The identity that a workload must prove, and which of several an address belongs to."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address
from itertools import permutations

from agent.model.identity import SpiffeId
from agent.model.workload import Workload, owners

SHARED, OWN = ip_address("10.0.0.1"), ip_address("10.0.0.2")


def test_identity_is_made_of_namespace_and_service_account_not_of_names() -> None:
    workload = Workload("u-1", "shop", "cart-0", "node-1", "cart", (), is_hbone=False)
    assert workload.identity("example.org") == SpiffeId("example.org", "shop", "cart")


def test_address_belongs_to_who_stays_then_to_who_is_captured_then_to_the_newest() -> None:
    plain = Workload("u-1", "shop", "a", "node-1", "a", (SHARED,), False, created="2026-01-01")
    newer = replace(plain, uid="u-0", created="2026-01-02")
    captured = replace(plain, uid="u-2", is_hbone=True, created="")
    leaving = replace(captured, uid="u-3", is_leaving=True, created="2026-01-03")
    for workloads in permutations((plain, newer, captured, leaving)):
        assert owners(workloads) == {SHARED: captured}
    assert owners([plain, newer, leaving]) == {SHARED: newer}
    assert owners([leaving]) == {SHARED: leaving}
    assert owners([replace(plain, addresses=(OWN, SHARED)), newer]) == {
        SHARED: newer,
        OWN: replace(plain, addresses=(OWN, SHARED)),
    }
