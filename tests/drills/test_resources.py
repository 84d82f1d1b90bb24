"""What an agent needs of its node runs out: disk, descriptors, memory."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import select
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from agent.lab import machine
from tests.drills.ground import LONG, Ground, pause, run_drill
from tests.drills.memory import limited
from tests.support.descriptors import none_left
from tests.support.labs import PodEnd, entries, is_alive
from tests.support.processes import cpu_seconds

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from agent.lab.cluster import LabNode

pytestmark = [pytest.mark.root, pytest.mark.timeout(150)]
ECHO_PORT, STALL_PORT = 9003, 9004
MORE_BYTES = 48 << 20
DESCRIPTORS, CONNECTIONS = 160, 300


@contextlib.contextmanager
def full(directory: Path) -> Iterator[None]:
    """Leave neither a byte nor an inode on the file system of a directory."""
    fills = directory / "fills"
    fills.mkdir()
    try:
        with (fills / "bytes").open("wb", buffering=0) as file:
            until_full(lambda: file.write(bytes(1 << 20)))
            until_full(lambda: file.write(b"x"))
        names = itertools.count()
        until_full(lambda: (fills / str(next(names))).touch())
        yield
    finally:
        shutil.rmtree(fills)


def lost_lines(ground: Ground, node: LabNode) -> int:
    """Return how many lines an agent says that its log has lost; the log begins anew.

    Several processes write there, so the end of a line that found no room for it may come after
    another's line: nobody could read this log any more.
    """
    path = ground.lab.agent_log(node)
    told = re.findall(r'{"message": "log lines lost", "count": (\d+)}$', path.read_text(), re.M)
    os.truncate(path, 0)
    return sum(map(int, told))


def until_full(write: Callable[[], object]) -> None:
    while True:
        try:
            write()
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017
            return


def test_full_disk_costs_lines_of_the_log_and_they_are_counted(ground: Ground) -> None:
    def fill(ground: Ground) -> None:
        with full(ground.lab.run):
            pause(30 if LONG else 1)

    run_drill(ground, "disk full", fill, survives=True)
    assert all(lost_lines(ground, node) > 1 for node in ground.nodes)


def test_agent_starts_on_a_full_disk(ground: Ground) -> None:
    def fill_and_restart(ground: Ground) -> None:
        east = ground.nodes[0]
        with full(ground.lab.run):
            for pid in (pids := ground.lab.agent_processes(east)):
                os.kill(pid, signal.SIGKILL)
            assert all(machine.wait_for_exit(pid, 5) for pid in pids)
            ground.lab.restart_agent(east)

    run_drill(
        ground, "agent killed with -9 and started, disk full", fill_and_restart, survives=False
    )
    for node in ground.nodes:
        lost_lines(ground, node)


def lasting_processes(ground: Ground, node: LabNode) -> list[int]:
    """Return the process of a node's agent, and those of its workers."""
    agent = ground.lab.agent_pid(node)
    assert agent is not None
    state = next(ground.lab.agent_states(node, "state"))
    return [agent, *(worker["pid"] for worker in state["workers"])]


def test_agent_without_descriptors_waits_at_rest(ground: Ground) -> None:
    shares = []

    def exhaust(ground: Ground) -> None:
        pids = lasting_processes(ground, ground.nodes[0])
        seconds = 8.0 if LONG else 2.0  # less than a client waits for an answer
        with none_left(pids):
            pause(0.5)  # what is ready still is dealt with
            before = sum(map(cpu_seconds, pids))
            pause(seconds)
            shares.append((sum(map(cpu_seconds, pids)) - before) / seconds)

    run_drill(ground, "no descriptor left in all processes of an agent", exhaust, survives=True)
    assert shares[0] < 0.3
    failed = entries(ground.lab, ground.nodes[0], "accept failed")
    assert 0 < len(failed) < 100


def test_more_connections_than_descriptors_are_refused_and_the_others_go_on(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    east = ground.nodes[0]
    # As an interpreter, since few may raise a hard limit again that they have lowered.
    launcher = tmp_path / "python"
    launcher.write_text(f'#!/bin/sh\nexec prlimit --nofile={DESCRIPTORS} {sys.executable} "$@"\n')
    launcher.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(launcher))
        ground.lab.restart_agent(east)

    def flood(ground: Ground) -> None:
        with ExitStack() as stack:
            client, server = (
                PodEnd(ground.lab, "client", stack),
                PodEnd(ground.lab, "server", stack),
            )
            server.echo(ECHO_PORT)
            held = []
            for _ in range(CONNECTIONS):
                with contextlib.suppress(ConnectionError):
                    held.append(client.connect(server.address, ECHO_PORT))
            served = [connection for connection in held if is_alive(connection)]
            assert 20 < len(served) < CONNECTIONS
            pause(30 if LONG else 1)
            assert all(is_alive(connection) for connection in served)

    run_drill(ground, "more connections than an agent may have descriptors", flood, survives=True)
    ground.lab.restart_agent(east)


def stall_until_one_ends(client: PodEnd, server: PodEnd, pids: list[int], stack: ExitStack) -> int:
    """Send what nobody reads, by more and more connections; return the process that ends of it."""
    accepted: list[socket.socket] = []

    def accept(connection: socket.socket) -> None:
        accepted.append(stack.enter_context(connection))

    server.serve(STALL_PORT, accept)
    by_fd = {os.pidfd_open(pid): pid for pid in pids}
    for fd in by_fd:
        stack.callback(os.close, fd)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            connection = client.connect(server.address, STALL_PORT)
            connection.setblocking(False)
            while True:
                connection.send(bytes(1 << 20))
        if gone := select.select(list(by_fd), [], [], 0.01)[0]:
            return by_fd[gone[0]]
    raise AssertionError(f"{len(accepted)} connections that nobody reads are no load")


def test_memory_that_runs_out_costs_one_worker(ground: Ground) -> None:
    west = ground.nodes[1]

    def stall(ground: Ground) -> None:
        with ExitStack() as stack:
            client, server = (
                PodEnd(ground.lab, "client", stack),
                PodEnd(ground.lab, "server", stack),
            )
            server.echo(ECHO_PORT)
            held = [client.connect(server.address, ECHO_PORT) for _ in range(10)]
            assert all(is_alive(connection) for connection in held)
            rows: Any = next(ground.lab.agent_states(west, "connections"))
            carriers = Counter(
                row["worker"] for row in rows if row["destination"].endswith(f":{ECHO_PORT}")
            )
            assert carriers.total() == len(held)
            stack.enter_context(limited(ground.lab, west, MORE_BYTES))
            agent, *workers = lasting_processes(ground, west)
            killed = stall_until_one_ends(client, server, [agent, *workers], stack)
            assert killed in workers
            survived = sum(is_alive(connection) for connection in held)
            assert survived == len(held) - carriers[killed]
            assert ground.lab.agent_pid(west) == agent

    run_drill(ground, "memory limit of an agent hit: one worker killed", stall, survives=False)
