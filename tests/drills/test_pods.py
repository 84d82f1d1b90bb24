"""Pods that come and go while others work."""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import ExitStack
from itertools import count
from typing import TYPE_CHECKING

import pytest

from agent.datapath import pins
from tests.drills.ground import LONG, Ground, pause, run_drill
from tests.support.labs import PodEnd
from tests.support.load import ECHO_PORT
from tests.support.passing_pods import PassingPod

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import TextIO

    from agent.lab.cluster import LabNode
    from agent.lab.lab import Lab

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]
DELETIONS = 20 if LONG else 3
PODS, SECONDS = (500, 60.0) if LONG else (40, 5.0)
ALIVE_TOGETHER = 20
ATTEMPT_SECONDS = 10.0
# Not one that the sniffer looks for: who connects to an address that is no pod's any more is passed
# through, so its SYN is on the link.
PORT = 9002
SERVER = ("python3", "-m", "http.server", str(PORT), "--directory", "/run")
NUMBERS = count()


class Follower:
    """What the agent of a node says of its pods, until `stack` ends."""

    def __init__(self, lab: Lab, node: LabNode, stack: ExitStack) -> None:
        self._changed = threading.Condition()
        self.enrolled: dict[str, float] = {}  # since when, by uid
        self.gone: dict[str, float] = {}
        connection = stack.enter_context(socket.socket(socket.AF_UNIX))
        connection.connect(str(lab.admin_socket(node)))
        connection.sendall(b'{"command": "watch"}\n')
        lines = stack.enter_context(connection.makefile("r"))
        thread = threading.Thread(target=self._run, args=(lines,))
        thread.start()
        stack.callback(thread.join)
        stack.callback(connection.shutdown, socket.SHUT_RDWR)

    def _run(self, lines: TextIO) -> None:
        for line in lines:
            now = time.monotonic()
            pods = json.loads(line)["pods"]
            found = {pod["uid"] for pod in pods if pod["state"] == "enrolled"}
            with self._changed:
                for uid in found:
                    self.enrolled.setdefault(uid, now)
                for uid in self.enrolled.keys() - found:
                    self.gone.setdefault(uid, now)
                self._changed.notify_all()

    def wait(self, uid: str, seconds: float, *, is_gone: bool = False) -> float:
        """Return when the pod was enrolled, or was so no more."""
        moments = self.gone if is_gone else self.enrolled
        with self._changed:
            assert self._changed.wait_for(lambda: uid in moments, seconds), uid
        return moments[uid]


def attempt(client: PodEnd, host: str) -> str:
    """Ask a web server for a page, and say how it ended."""
    try:
        with client.open(host, PORT) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            data = connection.recv(1 << 16)
    except OSError as error:
        return type(error).__name__
    return "answered" if data else "ended"


def test_pod_is_deleted_while_others_connect_to_it_and_it_connects(
    ground: Ground, measured: Callable[[str], None]
) -> None:
    lab = ground.lab
    ends: list[tuple[str, float]] = []

    def keep_connecting(client: PodEnd, host: str, is_over: threading.Event) -> None:
        while not is_over.is_set():
            began = time.monotonic()
            ends.append((attempt(client, host), time.monotonic() - began))

    def deleted(ground: Ground) -> None:
        east, west = ground.nodes
        with ExitStack() as stack:
            here, there = Follower(lab, east, stack), Follower(lab, west, stack)
            client = PodEnd(lab, "client", stack)
            target = str(lab.find_pod("server").address4)
            loop = f"while :; do curl -s -m 2 http://{target}:{ECHO_PORT}/; done"
            for _ in range(DELETIONS):
                brief = PassingPod(lab, west, next(NUMBERS), *SERVER)
                caller = PassingPod(lab, east, next(NUMBERS), "sleep", "infinity")
                for pod, follower in ((brief, there), (caller, here)):
                    stack.callback(pod.go)
                    pod.come()
                    follower.wait(pod.pod.uid, 10)
                caller.run("sh", "-c", loop)  # not before it is in the mesh
                is_over = threading.Event()
                host = str(brief.pod.address4)
                while attempt(client, host) != "answered":
                    pause(0.02)
                threads = [
                    threading.Thread(target=keep_connecting, args=(client, host, is_over))
                    for _ in range(4)
                ]
                for thread in threads:
                    thread.start()
                pause(0.3)
                brief.go()
                caller.go()
                pause(0.3)
                is_over.set()
                for thread in threads:
                    thread.join()
                for pod, follower in ((brief, there), (caller, here)):
                    follower.wait(pod.pod.uid, 10, is_gone=True)

    run_drill(ground, f"{2 * DELETIONS} pods deleted while they connect", deleted, survives=True)
    assert {"answered"} < {how for how, _seconds in ends}
    longest = max(seconds for _how, seconds in ends)
    measured(f"connections to a pod that is deleted: {len(ends)}, the longest {longest:.1f} s")
    assert longest < ATTEMPT_SECONDS + 1


def test_many_pods_come_and_go(ground: Ground, measured: Callable[[str], None]) -> None:
    lab = ground.lab
    waits: list[float] = []

    def churn(ground: Ground) -> None:
        east = ground.nodes[0]
        with ExitStack() as stack:
            follower = Follower(lab, east, stack)
            began = time.monotonic()
            alive: list[tuple[PassingPod, float]] = []
            for number in range(PODS):
                pod = PassingPod(lab, east, next(NUMBERS), "sleep", "infinity")
                pod.come()
                stack.callback(pod.go)
                alive.append((pod, time.monotonic()))
                if len(alive) >= ALIVE_TOGETHER:
                    _go(alive.pop(0), follower, waits)
                pause(max(0.0, began + (number + 1) * SECONDS / PODS - time.monotonic()))
            for each in alive:
                _go(each, follower, waits)
            for each in alive:
                follower.wait(each[0].pod.uid, 20, is_gone=True)

    directory = _directory(ground)
    before = _traces(directory)
    run_drill(ground, f"{PODS} pods created and deleted in {SECONDS:.0f} s", churn, survives=True)
    assert len(waits) == PODS
    middle = sorted(waits)[PODS // 2]
    measured(f"{PODS} pods, each in the mesh after {middle:.2f} s, at most {max(waits):.2f} s")
    assert max(waits) < 10
    assert _traces(directory) == before


def _go(came: tuple[PassingPod, float], follower: Follower, waits: list[float]) -> None:
    pod, since = came
    waits.append(follower.wait(pod.pod.uid, 20) - since)
    pod.go()


def _directory(ground: Ground) -> Path:
    (directory,) = (ground.lab.pins / ground.nodes[0].name).glob("[0-9a-f]*")
    return directory


def _traces(directory: Path) -> dict[str, int]:
    """Count what pods leave: links, and entries of the maps that enrollment writes."""
    opened = pins.Pins(directory)
    try:
        names = ("ss_pods", "ss_pod_names", "ss_local", "ss_listeners", "ss_guards", "ss_bypass")
        found = {name: sum(1 for _entry in opened.maps[name].items()) for name in names}
    finally:
        opened.close()
    return found | {"links": sum(1 for _link in (directory / "links").iterdir())}
