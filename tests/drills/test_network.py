"""The link between two nodes is slow and loses packets."""

from __future__ import annotations

import contextlib
import os
import socket
import time

import pytest

from agent import netns
from tests.drills.ground import LONG, Ground, pause, run_drill
from tests.drills.slow_link import SlowLink

pytestmark = [pytest.mark.root, pytest.mark.timeout(150)]
DELAY_SECONDS, LOSS = 0.05, 0.05


def test_slow_and_lossy_link_costs_time_and_nothing_else(ground: Ground) -> None:
    def slow(ground: Ground) -> None:
        fabric = ground.lab.netns("fabric")
        with contextlib.ExitStack() as stack:
            ways = [
                SlowLink(fabric, f"node{node.number}", DELAY_SECONDS, LOSS) for node in ground.nodes
            ]
            for way in ways:
                stack.callback(way.close)
            assert round_trip_seconds(ground) > 2 * DELAY_SECONDS
            pause(30 if LONG else 3)
        assert all(way.lost and way.passed for way in ways)

    run_drill(ground, "link of 50 ms and 5 % loss each way", slow, survives=True)


def round_trip_seconds(ground: Ground) -> float:
    """Connect from one node to the other, on a port that nobody has, and wait for the refusal."""
    fd = netns.open_netns(ground.lab.node_netns(ground.nodes[0]))
    try:
        probe = netns.run_in(fd, socket.socket)
    finally:
        os.close(fd)
    with probe:
        began = time.monotonic()
        with contextlib.suppress(ConnectionRefusedError):
            probe.connect((str(ground.nodes[1].link4(2)), 1))
        return time.monotonic() - began
