"""The wall clock jumps: of the whole cluster, as after a suspended machine wakes, or of one node.

The kernel has one wall clock for all namespaces, so agents and CA get theirs by a shim
(tests/support/clock.c), which shifts what they and their OpenSSL read.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from datetime import datetime
from typing import TYPE_CHECKING

import pytest

from agent.lab import machine
from tests.drills.ground import LONG, Ground, pause, run_drill
from tests.support.clock import Clock, build_shim
from tests.support.labs import PodEnd, is_alive

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from agent.lab.cluster import LabNode

pytestmark = [pytest.mark.root, pytest.mark.timeout(150)]
HOUR_SECONDS = 3600
AHEAD_SECONDS = 30 * HOUR_SECONDS  # past the end of every certificate, which lasts for a day
PORT = 9002
RENEWED_SECONDS = 15.0


class Clocks:
    """East's agent has a clock of its own; west's agent and the CA share one."""

    def __init__(self, directory: Path) -> None:
        shim = build_shim(directory)
        self.east, self.others = Clock(shim, directory / "east"), Clock(shim, directory / "others")

    def set_ahead(self, seconds: float) -> None:
        """Make all jump."""
        self.east.set_ahead(seconds)
        self.others.set_ahead(seconds)


@pytest.fixture(scope="module")
def clocks(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clocks]:
    made = Clocks(tmp_path_factory.mktemp("clock"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in made.others.environment.items():
            patch.setenv(name, value)
        restart_ca(ground)
        ground.lab.restart_agent(ground.nodes[1])
        for name, value in made.east.environment.items():
            patch.setenv(name, value)
        ground.lab.restart_agent(ground.nodes[0])
    yield made
    restart_ca(ground)
    for node in ground.nodes:
        ground.lab.restart_agent(node)


def restart_ca(ground: Ground) -> None:
    machine.kill_cgroup(ground.lab.cgroup / "ca")
    wait = ground.lab.start_ca()
    assert wait is not None
    wait()


def wait_renewed(ground: Ground, node: LabNode, now: float) -> None:
    """Wait until every certificate of a node is valid at `now`, by the clock of the drill."""
    deadline = time.monotonic() + RENEWED_SECONDS
    for state in ground.lab.agent_states(node):
        found = [
            (moment(row["not_before"]), moment(row["not_after"]))
            for row in state["identity"]["certificates"]
        ]
        if found and all(begin <= now < end for begin, end in found):
            return
        assert time.monotonic() < deadline, state["identity"]["certificates"]


def moment(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def wait_tunnel(ground: Ground) -> float:
    """Wait until a tunnel that was not there can be made: of west's server to east's client."""
    began = time.monotonic()
    with ExitStack() as stack:
        server, client = PodEnd(ground.lab, "server", stack), PodEnd(ground.lab, "client", stack)
        client.echo(PORT)
        while time.monotonic() < began + RENEWED_SECONDS:
            try:
                with server.open(client.address, PORT) as connection:
                    if is_alive(connection):
                        return time.monotonic() - began
            except OSError:
                pause(0.05)
    raise AssertionError("no tunnel can be made")


def test_clocks_jump_past_the_end_of_certificates_and_they_are_renewed(
    ground: Ground, clocks: Clocks
) -> None:
    def jump(ground: Ground) -> None:
        clocks.set_ahead(AHEAD_SECONDS)
        for node in ground.nodes:
            wait_renewed(ground, node, time.time() + AHEAD_SECONDS)
        wait_tunnel(ground)
        pause(10 if LONG else 0)

    run_drill(ground, "all clocks jump 30 hours forwards", jump, survives=True)


def test_clocks_jump_before_the_begin_of_certificates_and_they_are_renewed(
    ground: Ground, clocks: Clocks
) -> None:
    clocks.set_ahead(AHEAD_SECONDS)
    for node in ground.nodes:
        wait_renewed(ground, node, time.time() + AHEAD_SECONDS)

    def jump(ground: Ground) -> None:
        clocks.set_ahead(0)
        for node in ground.nodes:
            wait_renewed(ground, node, time.time())
        wait_tunnel(ground)
        pause(10 if LONG else 0)

    run_drill(ground, "all clocks jump 30 hours back", jump, survives=True)


def test_node_with_a_wrong_clock_fails_closed_until_it_is_set(
    ground: Ground, clocks: Clocks
) -> None:
    def jump(ground: Ground) -> None:
        clocks.east.set_ahead(AHEAD_SECONDS)
        pause(30 if LONG else 6)
        clocks.east.set_ahead(0)

    run_drill(ground, "clock of one node 30 hours ahead, then right again", jump, survives=True)
