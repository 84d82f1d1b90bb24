"""A snapshot: equal if and only if it says the same."""

from __future__ import annotations

from agent.model.workload import Workload
from agent.state.store import Snapshot

WORKLOAD = Workload("u-1", "shop", "cart-0", "node-1", "cart", (), is_hbone=False)


def test_snapshots_that_say_the_same_are_equal() -> None:
    # A source yields a snapshot only if it differs from the one before.
    assert Snapshot() == Snapshot((), (), {})
    assert Snapshot((WORKLOAD,)) == Snapshot((WORKLOAD,))
    assert Snapshot((WORKLOAD,)) != Snapshot()
    assert Snapshot(local_pods={"node-1": ()}) != Snapshot()


def test_snapshots_share_no_mapping() -> None:
    assert Snapshot().local_pods is not Snapshot().local_pods
