"""A pod's limits."""

from __future__ import annotations

from agent.model.bounds import DEFAULT_BOUNDS
from agent.model.pod import LocalPod
from agent.tunnel.buffers import FULL, PARTS
from agent.tunnel.reactor import Reactor
from agent.tunnel.served import ServedPod, refusal
from tests.support.stalled import Stalled
from tests.support.tunnel import CLIENT
from tests.support.wire import buffer_limit


def test_pod_whose_readers_hold_all_they_may_is_refused_and_no_other_pod() -> None:
    full, other = (
        ServedPod(LocalPod(f"uid-{name}", "shop", name, "client", ()), CLIENT, -1, 1)
        for name in ("full", "other")
    )
    with buffer_limit(Reactor(), PARTS << 20):
        stalled, slow = Stalled(full.share), Stalled(other.share)
        slow.keep(1)
        stalled.keep(1 << 20)
        assert refusal(full, DEFAULT_BOUNDS) == FULL
        assert refusal(other, DEFAULT_BOUNDS) == ""
        slow.give_up()
        stalled.give_up()
        assert refusal(full, DEFAULT_BOUNDS) == ""
