"""Limits of a worker as a pod and its peers meet them: what is beyond is refused, and no more."""

from __future__ import annotations

import resource
import selectors
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from agent.model.bounds import Bounds
from agent.tunnel import messages
from tests.node.conftest import TRUST_DOMAIN, listener_message
from tests.support.labs import is_alive
from tests.support.namespaces import PEER4
from tests.support.processes import cpu_seconds, descriptor_count

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agent.datapath import pins
    from tests.node.conftest import MeshPair, MeshPod

pytestmark = pytest.mark.root

PORT = 8080


@pytest.fixture
def application(mesh: MeshPair) -> Iterator[None]:
    """Echo in the server's pod while the test runs."""
    listener = mesh.server.namespace.listen(PEER4, PORT)
    listener.listen(256)
    stop, stopped = socket.socketpair()

    def run() -> None:
        with selectors.DefaultSelector() as ready:
            ready.register(stopped, selectors.EVENT_READ)
            ready.register(listener, selectors.EVENT_READ)
            while stopped not in (found := [key.fileobj for key, _ in ready.select()]):
                for each in found:
                    assert isinstance(each, socket.socket)
                    if each is listener:
                        ready.register(listener.accept()[0], selectors.EVENT_READ)
                    elif data := each.recv(65536):
                        each.sendall(data)
                    else:
                        ready.unregister(each)
                        each.close()
            for key in list(ready.get_map().values()):
                assert isinstance(key.fileobj, socket.socket)
                key.fileobj.close()

    thread = threading.Thread(target=run)
    thread.start()
    yield
    stop.close()
    thread.join()


def bound(member: MeshPod, loaded: pins.Pins, **limits: Any) -> None:
    """Have a worker serve its pod with these limits from now on."""
    bounds = Bounds(**limits)
    member.worker.tell(messages.Configure(str(loaded.directory), TRUST_DOMAIN, bounds=bounds))
    message, fds = listener_message(member.enrollment)
    messages.Outbox(member.worker.channel).put(message, fds)
    member.worker.settle()


def held(member: MeshPod) -> int:
    """Count the worker's descriptors."""
    return descriptor_count(member.worker.process.pid)


def allow(member: MeshPod, soft: int, hard: int) -> None:
    """Let the worker have so many descriptors."""
    resource.prlimit(member.worker.process.pid, resource.RLIMIT_NOFILE, (soft, hard))


def reach(member: MeshPod) -> socket.socket | None:
    """Return a connection to the application; None if it was reset, now or at its first word."""
    connection = member.namespace.open_socket()
    try:
        connection.connect((PEER4, PORT))
    except ConnectionResetError:
        return None
    return connection if is_alive(connection) else None


def wait_reach(member: MeshPod) -> None:
    """Wait until the application is reached again."""
    deadline = time.monotonic() + 10
    while reach(member) is None:
        assert time.monotonic() < deadline


@pytest.mark.usefixtures("application")
def test_connections_stop_before_the_last_descriptors_and_fit_again_later(
    mesh: MeshPair, loaded: pins.Pins
) -> None:
    client = mesh.client
    allow(client, held(client) + 60, held(client) + 60)
    bound(client, loaded, spare_descriptors=40)
    opened: list[socket.socket] = []
    while (connection := reach(client)) is not None:
        opened.append(connection)
    assert 10 < len(opened) < 30
    assert all(is_alive(connection) for connection in opened)
    client.worker.settle()
    log = client.worker.log.read_text()
    assert "descriptors are in use: raise the hard limit of open files" in log
    for connection in opened:
        connection.close()
    wait_reach(client)


@pytest.mark.usefixtures("application")
def test_worker_without_any_descriptor_is_at_rest_and_serves_who_waited(mesh: MeshPair) -> None:
    client = mesh.client
    assert is_alive(client.namespace.connect(PEER4, PORT))  # the tunnel is there
    soft, hard = resource.prlimit(client.worker.process.pid, resource.RLIMIT_NOFILE)
    allow(client, held(client) + 1, hard)
    opened = [client.namespace.connect(PEER4, PORT) for _ in range(5)]
    assert is_alive(opened[0])
    before, began = cpu_seconds(client.worker.process.pid), time.monotonic()
    opened[1].settimeout(1)
    with pytest.raises(TimeoutError):
        opened[1].recv(1)
    share = (cpu_seconds(client.worker.process.pid) - before) / (time.monotonic() - began)
    assert share < 0.2
    assert client.worker.log.read_text().count("Too many open files") == 1
    allow(client, soft, hard)
    for connection in opened:
        connection.settimeout(5)
        assert is_alive(connection)
