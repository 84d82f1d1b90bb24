"""One failure after the other of processes, links and what an agent reads.

`make drills` runs the long form and writes the table of docs/reliability.md from what was seen.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from agent import netns
from agent.lab import machine
from tests.drills.ground import LONG, Ground, pause, run_drill, wait_good
from tests.drills.sniffer import Sniffer
from tests.support.labs import PodEnd
from tests.support.load import Load
from tests.support.modules import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from agent.lab.cluster import LabNode

pytestmark = [pytest.mark.root, pytest.mark.timeout(150)]


def of_agent(ground: Ground, node: LabNode, number: int) -> None:
    for pid in ground.lab.agent_processes(node):
        os.kill(pid, number)


def kill_and_restart(ground: Ground, node: LabNode) -> None:
    pids = ground.lab.agent_processes(node)
    of_agent(ground, node, signal.SIGKILL)
    assert all(machine.wait_for_exit(pid, 5) for pid in pids)
    ground.lab.restart_agent(node)


def killed(ground: Ground) -> None:
    kill_and_restart(ground, ground.nodes[0])


def peer_killed(ground: Ground) -> None:
    kill_and_restart(ground, ground.nodes[1])


def stopped_and_started(ground: Ground) -> None:
    ground.lab.restart_agent(ground.nodes[0])


def worker_killed(ground: Ground) -> None:
    state = next(ground.lab.agent_states(ground.nodes[0], "state"))
    os.kill(state["workers"][0]["pid"], signal.SIGKILL)


def frozen(ground: Ground) -> None:
    of_agent(ground, ground.nodes[0], signal.SIGSTOP)
    try:
        pause(30 if LONG else 2)
    finally:
        of_agent(ground, ground.nodes[0], signal.SIGCONT)


def authority_away(ground: Ground) -> None:
    machine.kill_cgroup(ground.lab.cgroup / "ca")
    pause(10 if LONG else 1)
    wait = ground.lab.start_ca()
    assert wait is not None
    wait()


def objects_away(ground: Ground) -> None:
    away = ground.lab.objects.with_name("away")
    ground.lab.objects.rename(away)
    pause(10 if LONG else 1)
    away.rename(ground.lab.objects)


def on_fabric(ground: Ground, *command: str) -> None:
    fd = netns.open_netns(ground.lab.netns("fabric"))
    try:
        netns.run_in(fd, lambda: subprocess.run(command, check=True, capture_output=True))
    finally:
        os.close(fd)


def link_down(ground: Ground) -> None:
    west = ground.nodes[1]
    link = f"node{west.number}"
    on_fabric(ground, "ip", "link", "set", link, "down")
    pause(5 if LONG else 1)
    on_fabric(ground, "ip", "link", "set", link, "up")
    lab = ground.lab
    machine.connect_node(lab.netns("fabric"), west, lab.node_netns(west))  # its routes


def small_mtu(ground: Ground) -> None:
    on_fabric(ground, "ip", "link", "set", f"node{ground.nodes[1].number}", "mtu", "1280")
    pause(2)
    on_fabric(ground, "ip", "link", "set", f"node{ground.nodes[1].number}", "mtu", "1500")


# name, what to do, and whether open connections by tunnel have to survive it
DRILLS: list[tuple[str, Callable[[Ground], None], bool]] = [
    ("agent killed with -9, then started", killed, False),
    ("agent stopped in order, then started", stopped_and_started, False),
    ("one worker killed", worker_killed, False),
    ("agent frozen (SIGSTOP)", frozen, not LONG),
    ("CA away", authority_away, True),
    ("source of objects away", objects_away, True),
    ("link of a node down", link_down, not LONG),
    ("link with an MTU of 1280", small_mtu, True),
    ("agent of the peer killed, then started", peer_killed, False),
]


def test_plaintext_would_be_seen(ground: Ground) -> None:
    ground.lab.label_namespace("shop", None)
    with ExitStack() as stack:
        sniffer = Sniffer(ground.lab, ground.nodes[1], stack)
        client, server = PodEnd(ground.lab, "client", stack), PodEnd(ground.lab, "server", stack)
        load = Load(client, server, stack)
        load.start(streams=0, has_bulk=False)
        wait_good(load, time.monotonic(), 20)
    assert sniffer.plaintext > 0
    ground.lab.label_namespace("shop", "ambient")


@pytest.mark.parametrize(("name", "break_it", "survives"), DRILLS, ids=[row[0] for row in DRILLS])
def test_traffic_is_whole_again_and_never_plain(
    ground: Ground, name: str, break_it: Callable[[Ground], None], survives: bool
) -> None:
    run_drill(ground, name, break_it, survives=survives)


def test_half_of_a_cluster_is_upgraded_and_no_connection_ends(
    ground: Ground, tmp_path: Path
) -> None:
    for part in ("agent", "bpf"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "bpf/lookup.c").open("a") as file:
        file.write("/* another version */\n")

    def half_upgraded(ground: Ground) -> None:
        ground.lab.upgrade_agent(ground.nodes[1], tmp_path)

    run_drill(ground, "half of the cluster upgraded", half_upgraded, survives=True)
