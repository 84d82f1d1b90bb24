"""The identity that a workload must prove."""

from __future__ import annotations

from agent.model.identity import SpiffeId
from agent.model.workload import Workload


def test_identity_is_made_of_namespace_and_service_account_not_of_names() -> None:
    workload = Workload("u-1", "shop", "cart-0", "node-1", "cart", (), is_hbone=False)
    assert workload.identity("example.org") == SpiffeId("example.org", "shop", "cart")
