"""One failure after the other in one lab: what traffic sees, and how long until all is whole.

Two kinds of traffic run: from node to node by tunnel, and within a node directly. A raw socket on
the link between the nodes looks for the applications' ports, which only plaintext shows.

`make drills` runs the long form and writes the table of docs/reliability.md from what was seen.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agent import netns
from agent.lab import machine
from agent.lab.lab import DEFAULT_CLUSTER, Lab
from tests.support.labs import PodEnd
from tests.support.load import BULK_PORT, ECHO_PORT, Load
from tests.support.modules import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from agent.lab.cluster import LabNode

pytestmark = [pytest.mark.root, pytest.mark.timeout(150)]
REPORT = os.environ.get("DRILLS_REPORT")  # where the table goes; also asks for the long form
LONG = REPORT is not None
ETH_P_ALL, ETHERNET_BYTES = 3, 14
BEGIN, END = "<!-- begin drills -->\n", "<!-- end drills -->\n"
WHOLE_SECONDS = 30.0


@dataclass
class Row:
    """What one drill saw."""

    name: str
    far_new: str
    far_open: str
    near: str
    whole_seconds: float
    plaintext: int


@dataclass
class Ground:
    """The lab that all drills share, and what they have seen."""

    lab: Lab
    other_version: Path
    rows: list[Row] = field(default_factory=list)

    @property
    def nodes(self) -> tuple[LabNode, LabNode]:
        east, west = self.lab.cluster().nodes
        return east, west


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    tree = tmp_path_factory.mktemp("other")
    for part in ("agent", "bpf"):
        shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
    with (tree / "bpf/lookup.c").open("a") as file:
        file.write("/* another version */\n")
    lab = Lab(f"t{os.getpid()}")
    try:
        lab.up(DEFAULT_CLUSTER, print)
        lab.label_namespace("shop", "ambient")
        found = Ground(lab, tree)
        yield found
        if REPORT is not None:
            write_report(Path(REPORT), found.rows)
    finally:
        lab.down()


def write_report(path: Path, rows: list[Row]) -> None:
    """Put the table between the two marks of the page."""
    lines = [
        "| what fails | new connections, node to node | open ones, node to node | direct, both |"
        " whole again after | plaintext packets |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.name} | {row.far_new} | {row.far_open} | {row.near} | {row.whole_seconds:.1f} s |"
        f" {row.plaintext} |"
        for row in rows
    ]
    before, _mark, rest = path.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + after)


class Sniffer:
    """Counts packets of the applications' ports on the link of a node."""

    def __init__(self, lab: Lab, node: LabNode, stack: ExitStack) -> None:
        fd = netns.open_netns(lab.node_netns(node))
        try:
            self._socket = netns.run_in(fd, self._open)
        finally:
            os.close(fd)
        self.seen = self.plaintext = 0
        self._is_over = threading.Event()
        thread = threading.Thread(target=self._run)
        thread.start()
        stack.callback(self._socket.close)
        stack.callback(thread.join)
        stack.callback(self._is_over.set)

    @staticmethod
    def _open() -> socket.socket:
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        made.bind(("eth0", ETH_P_ALL))
        made.settimeout(0.1)
        return made

    def _run(self) -> None:
        while not self._is_over.is_set():
            try:
                packet = self._socket.recv(128)
            except (TimeoutError, OSError):
                continue  # none for a while, or the link is down
            self.seen += 1
            head = packet[ETHERNET_BYTES:]
            if len(head) > 40 and head[0] >> 4 == 4 and head[9] == socket.IPPROTO_TCP:
                start = (head[0] & 15) * 4
                ports = {
                    int.from_bytes(head[start : start + 2], "big"),
                    int.from_bytes(head[start + 2 : start + 4], "big"),
                }
                self.plaintext += bool(ports & {ECHO_PORT, BULK_PORT})


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


def half_upgraded(ground: Ground) -> None:
    ground.lab.upgrade_agent(ground.nodes[1], ground.other_version)


def pause(seconds: float) -> None:
    """Let what is broken be broken for a while."""
    threading.Event().wait(seconds)


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
    ("half of the cluster upgraded", half_upgraded, True),
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
    lab = ground.lab
    with ExitStack() as stack:
        sniffer = Sniffer(lab, ground.nodes[1], stack)
        client, cache = PodEnd(lab, "client", stack), PodEnd(lab, "cache", stack)
        far = Load(client, PodEnd(lab, "server", stack), stack)
        near = Load(client, cache, stack)
        far.start(streams=2, has_bulk=False)
        near.start(streams=0, has_bulk=False)
        wait_good(far, time.monotonic(), 20)
        wait_good(near, time.monotonic(), 20)
        far.connects.failed.clear()
        near.connects.failed.clear()
        break_it(ground)
        mended = time.monotonic()
        for load in (far, near):
            wait_good(load, mended, WHOLE_SECONDS)
        whole = max(load.connects.longest_wait(mended) for load in (far, near))
        far.stop()
        near.stop()
        assert sniffer.seen > 0
        ground.rows.append(
            Row(
                name,
                said(len(far.connects.failed), "refused or reset", far.connects.gap()),
                "cut" if far.streams.failed else f"go on, longest pause {far.streams.gap():.1f} s",
                said(len(near.connects.failed), "refused", near.connects.gap()),
                max(whole, 0.0),
                sniffer.plaintext,
            )
        )
        assert sniffer.plaintext == 0
        assert not survives or not far.streams.failed


def said(failed: int, how: str, gap: float) -> str:
    """Say how new connections fared."""
    return f"{how} for {gap:.1f} s" if failed else f"all, longest pause {gap:.1f} s"


def wait_good(load: Load, since: float, seconds: float) -> None:
    """Wait until a connection has succeeded after `since`."""
    deadline = time.monotonic() + seconds
    while not any(moment > since for moment in load.connects.good[-50:]):
        assert time.monotonic() < deadline, load.connects.failed[-3:]
        pause(0.05)
