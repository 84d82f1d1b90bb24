"""A lab as tests use it: put servers and clients into its pods, read its agents' logs."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from prometheus_client.parser import text_string_to_metric_families

from agent import netns
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import ExitStack

    from agent.lab.cluster import LabNode
    from agent.lab.lab import Lab

SECONDS = 10.0
CERTIFICATES_SECONDS = 60.0


def entries(lab: Lab, node: LabNode, message: str) -> list[dict[str, Any]]:
    """Return what a node's agent has logged with this message."""
    lines = lab.agent_log(node).read_text().splitlines()
    logged = [json.loads(line) for line in lines if line.startswith("{")]
    return [entry for entry in logged if entry.get("message") == message]


def wait_for_entry(
    lab: Lab, node: LabNode, message: str, matches: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """Return the first entry that matches; a log tells of what has happened a moment later."""
    found: list[dict[str, Any]] = []

    def is_logged() -> bool:
        found.extend(filter(matches, entries(lab, node, message)))
        return bool(found)

    wait_until(is_logged, SECONDS, f"the agent of {node.name} logs no such {message!r}")
    return found[0]


def are_available(certificates: list[dict[str, Any]]) -> bool:
    return all(row["state"] == "Available" for row in certificates)


def wait_for_certificates(
    lab: Lab, holds: Callable[[list[dict[str, Any]]], bool] = are_available
) -> None:
    """Wait until each agent has certificates, and says of them what is wanted."""
    for node in lab.cluster().nodes:
        deadline = time.monotonic() + CERTIFICATES_SECONDS
        for state in lab.agent_states(node):
            rows = state["identity"]["certificates"]
            if rows and holds(rows):
                break
            assert time.monotonic() < deadline, rows


def scrape(lab: Lab, node: LabNode) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return the metrics of a node's agent by name and labels, asked for on its own loopback."""
    fd = netns.open_netns(lab.node_netns(node))
    try:
        connection = netns.run_in(fd, lambda: socket.create_connection(("127.0.0.1", 15020)))
    finally:
        os.close(fd)
    with connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        with connection.makefile("rb") as answer:
            text = answer.read().partition(b"\r\n\r\n")[2].decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class PodEnd:
    """A test's own program inside a pod: sockets made there act as the pod's."""

    def __init__(self, lab: Lab, pod: str, stack: ExitStack) -> None:
        self.pod = lab.find_pod(pod)
        self._stack = stack
        self._fd = netns.open_netns(lab.pod_netns(self.pod))
        stack.callback(os.close, self._fd)

    @property
    def address(self) -> str:
        return str(self.pod.address4)

    def _socket(self) -> socket.socket:
        made = netns.run_in(self._fd, socket.socket)
        made.settimeout(SECONDS)
        return self._stack.enter_context(made)

    def connect(self, host: str, port: int) -> socket.socket:
        """Return a connection that lasts until the test ends."""
        return self._stack.enter_context(self.open(host, port))

    def open(self, host: str, port: int, seconds: float = SECONDS) -> socket.socket:
        """Return a connection that is the caller's, and waits so long for anything."""
        made = netns.run_in(self._fd, socket.socket)
        made.settimeout(seconds)
        try:
            made.connect((host, port))
        except BaseException:
            made.close()
            raise
        return made

    def echo(self, port: int) -> list[tuple[str, int]]:
        """Serve echo in a thread until the test ends; return the peers that it sees, growing."""

        def handle(accepted: socket.socket) -> None:
            with accepted:
                try:
                    while data := accepted.recv(65536):
                        accepted.sendall(data)
                except ConnectionError:
                    return

        return self.serve(port, handle)

    def serve(self, port: int, handle: Callable[[socket.socket], None]) -> list[tuple[str, int]]:
        """Serve each connection in a thread, until the test ends; return the peers, growing."""
        listener = self._socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("0.0.0.0", port))
        listener.listen(128)
        listener.settimeout(None)
        peers: list[tuple[str, int]] = []

        def accept() -> None:
            threads = []
            while True:
                try:
                    accepted, peer = listener.accept()
                except OSError:
                    break  # shut down
                peers.append(peer)
                threads.append(threading.Thread(target=handle, args=(accepted,)))
                threads[-1].start()
            for thread in threads:
                thread.join()

        server = threading.Thread(target=accept)
        server.start()
        self._stack.callback(server.join)
        self._stack.callback(listener.shutdown, socket.SHUT_RDWR)
        return peers


def is_alive(connection: socket.socket, text: bytes = b"alive") -> bool:
    """Whether the connection still echoes; False if it was reset or ended."""
    try:
        connection.sendall(text)
        found = b""
        while len(found) < len(text):
            data = connection.recv(len(text) - len(found))
            if not data:
                return False
            found += data
    except ConnectionError:
        return False
    return found == text
