"""What goes wrong around a pod is no other pod's trouble: connections go on, the node is ready."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import ExitStack, suppress
from ipaddress import ip_interface
from typing import TYPE_CHECKING

import pytest

from agent import netlink, netns
from tests.cluster.test_agent import SPACE, Processes, agent_token, pod_body
from tests.cluster.test_rights import annotation, installed
from tests.support.cluster_objects import Body, namespace, pod
from tests.support.namespaces import PEER4, POD4, Namespace
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.api_server import ApiServer
    from tests.support.namespaces import Network

__all__ = ["installed", "pod_body"]
pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]
BROKEN4 = "10.77.1.2"
HBONE_PORT = 15008
ROUNDS = 200


class Traffic:
    """Connections from one namespace to another: one that stays, and always new ones."""

    def __init__(self, source: Namespace, destination: Namespace, host: str) -> None:
        self.rounds = 0
        self.errors: list[str] = []
        self._source = source
        self._listener = destination.listen(host)
        self._host, self._port = host, self._listener.getsockname()[1]
        self._is_over = threading.Event()
        self._threads = [
            threading.Thread(target=each, daemon=True) for each in (self._accept, self._run)
        ]
        for thread in self._threads:
            thread.start()

    def _accept(self) -> None:
        self._listener.settimeout(None)
        with suppress(OSError):  # the listener is shut down at the end
            while True:
                accepted, _peer = self._listener.accept()
                threading.Thread(target=self._echo, args=(accepted,), daemon=True).start()

    @staticmethod
    def _echo(accepted: socket.socket) -> None:
        with accepted, suppress(OSError):
            while data := accepted.recv(4096):
                accepted.sendall(data)

    def _open(self) -> socket.socket:
        made = netns.run_in(self._source.fd, lambda: socket.socket())
        made.settimeout(5)
        made.connect((self._host, self._port))
        return made

    def _run(self) -> None:
        step = ""
        try:
            with self._open() as lasting:
                while not self._is_over.wait(0.005):
                    step = "a new connection"
                    with self._open() as fresh:
                        _exchange(fresh)
                    step = "the lasting connection"
                    _exchange(lasting)
                    self.rounds += 1
        except (OSError, AssertionError) as error:
            self.errors.append(f"after {self.rounds} rounds: {step}: {error!r}")

    def wait_rounds(self, count: int) -> None:
        goal = self.rounds + count
        wait_until(lambda: self.rounds >= goal or self.errors)
        assert self.errors == []

    def end(self) -> None:
        self._is_over.set()
        self._threads[1].join(10)
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(10)


def _exchange(connection: socket.socket) -> None:
    connection.sendall(b"ping")
    assert connection.recv(16) == b"ping"


@pytest.fixture
def broken() -> Iterator[Namespace]:
    """Return the namespace of a pod that cannot be enrolled: it listens where we must."""
    with ExitStack() as stack:
        fd = netns.create()
        stack.callback(os.close, fd)
        made = Namespace(fd, stack.enter_context(ExitStack()))

        def set_up() -> None:
            netlink.set_up("lo")
            netlink.add_address("lo", ip_interface(f"{BROKEN4}/32"))

        netns.run_in(fd, set_up)
        yield made


def test_broken_pod_and_absent_server_disturb_no_connection(
    installed: ApiServer,
    pod_body: Body,
    network: Network,
    broken: Namespace,
    tmp_path: Path,
) -> None:
    in_the_way = broken.listen("0.0.0.0", HBONE_PORT)
    broken_body = pod(f"{SPACE}/broken", BROKEN4)
    events = f"/api/v1/namespaces/{SPACE}/events?fieldSelector=involvedObject.name=broken"
    with ExitStack() as stack:
        installed.apply(broken_body)
        stack.callback(installed.delete, broken_body)
        token = agent_token(installed, stack)
        processes = Processes(tmp_path, installed)
        stack.callback(processes.end)
        processes.start_pod(network.pod, pod_body)
        processes.start_pod(broken, broken_body)
        processes.start_ca()
        processes.start_agent(token)
        wait_until(lambda: processes.state()["ready"], 60.0)  # the machine may be busy

        def states() -> dict[str, str]:
            return {row["name"]: row["state"] for row in processes.state()["pods"]}

        inbound = Traffic(network.peer, network.pod, POD4)
        stack.callback(inbound.end)
        outbound = Traffic(network.pod, network.peer, PEER4)
        stack.callback(outbound.end)
        # Both pods want the mesh from now on; connections that are open are left alone.
        installed.apply(namespace(SPACE))
        wait_until(lambda: states() == {"server": "enrolled", "broken": "failed"})
        wait_until(lambda: annotation(installed, broken_body) == "pending")
        wait_until(lambda: installed.must("GET", events)["items"])
        (event,) = installed.must("GET", events)["items"]
        assert (event["reason"], event["type"]) == ("EnrollFailed", "Warning")
        assert "Address already in use" in event["message"]
        assert processes.state()["ready"]

        inbound.wait_rounds(ROUNDS)
        for _ in range(2):
            installed.kill()
            inbound.wait_rounds(ROUNDS)
            outbound.wait_rounds(ROUNDS)
            installed.start()
            inbound.wait_rounds(ROUNDS)
            outbound.wait_rounds(ROUNDS)
        assert states() == {"server": "enrolled", "broken": "failed"}
        assert processes.state()["ready"]

        # What was in the way goes, and the pod is taken in by itself.
        in_the_way.close()
        wait_until(lambda: states()["broken"] == "enrolled", 60.0)
        wait_until(lambda: annotation(installed, broken_body) == "enabled")
        outbound.wait_rounds(ROUNDS)
        assert (inbound.errors, outbound.errors) == ([], [])
