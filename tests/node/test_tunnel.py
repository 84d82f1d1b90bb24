"""Two pods of the mesh speak through the tunnel; their applications notice nothing."""

from __future__ import annotations

import errno
import hashlib
import select
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agent import netns
from agent.tunnel.connection import Limits
from agent.tunnel.sockets import LINGER_RESET
from tests.bpf.conftest import PEER4, PEER6, POD4, POD6, Namespace, Network
from tests.support.processes import descriptor_count, resident_bytes, thread_count

if TYPE_CHECKING:
    from tests.node.conftest import MeshPair

pytestmark = pytest.mark.root

Serve = Callable[..., threading.Thread]
IPPROTO_MPTCP, TCP_FASTOPEN_CONNECT = 262, 30  # linux/in.h, linux/tcp.h


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def echo(accepted: socket.socket) -> None:
    while data := accepted.recv(65536):
        accepted.sendall(data)


@pytest.mark.parametrize(("server", "client"), [(PEER4, POD4), (PEER6, POD6)], ids=["v4", "v6"])
def test_pod_to_pod_goes_through_the_tunnel(
    mesh: MeshPair, serve: Serve, server: str, client: str
) -> None:
    listener = mesh.server.namespace.listen(server, 8080)
    seen: list[str] = []

    def handle(accepted: socket.socket) -> None:
        seen.append(accepted.getpeername()[0])
        echo(accepted)

    serve(listener, handle)
    connection = mesh.client.namespace.connect(server, 8080)
    assert connection.getpeername()[:2] == (server, 8080)
    assert connection.getsockname()[0] == client
    connection.sendall(b"hello")
    assert connection.recv(5) == b"hello"
    connection.shutdown(socket.SHUT_WR)
    assert read_all(connection) == b""
    assert seen == [client]


def open_mptcp(namespace: Namespace) -> socket.socket:
    client = namespace.open_socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP)
    client.connect((PEER4, 8080))
    client.sendall(b"hello")
    return client


def open_with_data(namespace: Namespace) -> socket.socket:
    client = namespace.open_socket()
    client.settimeout(None)
    client.sendto(b"hello", socket.MSG_FASTOPEN, (PEER4, 8080))
    return client


def open_deferred(namespace: Namespace) -> socket.socket:
    client = namespace.open_socket()
    client.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
    client.connect((PEER4, 8080))
    client.sendall(b"hello")
    return client


def open_without_blocking(namespace: Namespace) -> socket.socket:
    client = namespace.open_socket()
    client.setblocking(False)
    assert client.connect_ex((PEER4, 8080)) == errno.EINPROGRESS
    assert select.select([], [client], [], 5)[1]
    assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    client.setblocking(True)
    client.sendall(b"hello")
    return client


@pytest.mark.parametrize(
    "connect", [open_mptcp, open_with_data, open_deferred, open_without_blocking]
)
def test_client_of_any_kind_reaches_the_application(
    mesh: MeshPair, serve: Serve, connect: Callable[[Namespace], socket.socket]
) -> None:
    seen: list[str] = []

    def handle(accepted: socket.socket) -> None:
        seen.append(accepted.getpeername()[0])
        echo(accepted)

    serve(mesh.server.namespace.listen(PEER4, 8080), handle)
    client = connect(mesh.client.namespace)
    client.settimeout(5)
    assert client.recv(5) == b"hello"
    assert client.getpeername() == (PEER4, 8080)
    client.shutdown(socket.SHUT_WR)
    assert read_all(client) == b""
    assert seen == [POD4]
    mesh.client.worker.settle()
    assert '"path": "hbone"' in mesh.client.worker.log.read_text()


def test_peer_identities_are_in_the_access_log(mesh: MeshPair, serve: Serve) -> None:
    serve(mesh.server.namespace.listen(PEER4, 8080), echo)
    connection = mesh.client.namespace.connect(PEER4, 8080)
    connection.shutdown(socket.SHUT_WR)
    assert read_all(connection) == b""
    mesh.client.worker.settle()
    mesh.server.worker.settle()
    assert '"dst.identity": "spiffe://cluster.local/ns/default/sa/server"' in (
        mesh.client.worker.log.read_text()
    )
    assert '"src.identity": "spiffe://cluster.local/ns/default/sa/client"' in (
        mesh.server.worker.log.read_text()
    )


def test_server_may_speak_first(mesh: MeshPair, serve: Serve) -> None:
    serve(mesh.server.namespace.listen(PEER4, 25), lambda accepted: accepted.sendall(b"220 hi"))
    connection = mesh.client.namespace.connect(PEER4, 25)
    assert read_all(connection) == b"220 hi"


def test_half_close_of_the_client_leaves_the_answer(mesh: MeshPair, serve: Serve) -> None:
    serve(mesh.server.namespace.listen(PEER4, 8080), lambda a: a.sendall(read_all(a)[::-1]))
    connection = mesh.client.namespace.connect(PEER4, 8080)
    connection.sendall(b"question")
    connection.shutdown(socket.SHUT_WR)
    assert read_all(connection) == b"noitseuq"


def test_half_close_of_the_server_leaves_the_question(mesh: MeshPair, serve: Serve) -> None:
    received: list[bytes] = []

    def handle(accepted: socket.socket) -> None:
        accepted.shutdown(socket.SHUT_WR)
        received.append(read_all(accepted))

    thread = serve(mesh.server.namespace.listen(PEER4, 8080), handle)
    connection = mesh.client.namespace.connect(PEER4, 8080)
    assert read_all(connection) == b""
    connection.sendall(b"late")
    connection.close()
    thread.join()
    deadline = time.monotonic() + 5
    while not received and time.monotonic() < deadline:
        thread.join(0.01)
    assert received == [b"late"]


def test_reset_of_the_client_is_a_reset_at_the_server(mesh: MeshPair, serve: Serve) -> None:
    outcome: list[str] = []
    arrived, done = threading.Event(), threading.Event()

    def handle(accepted: socket.socket) -> None:
        accepted.recv(1)
        arrived.set()
        try:
            outcome.append(repr(accepted.recv(1)))
        except ConnectionResetError:
            outcome.append("reset")
        done.set()

    serve(mesh.server.namespace.listen(PEER4, 8080), handle)
    connection = mesh.client.namespace.connect(PEER4, 8080)
    connection.sendall(b"x")
    assert arrived.wait(5)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
    connection.close()
    assert done.wait(5)
    assert outcome == ["reset"]


def test_reset_of_the_server_is_a_reset_at_the_client(mesh: MeshPair, serve: Serve) -> None:
    def handle(accepted: socket.socket) -> None:
        accepted.recv(1)
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)

    serve(mesh.server.namespace.listen(PEER4, 8080), handle)
    connection = mesh.client.namespace.connect(PEER4, 8080)
    connection.sendall(b"x")
    with pytest.raises(ConnectionResetError):
        connection.recv(1)


def test_connect_to_a_port_without_listener_is_reset_within_a_second(mesh: MeshPair) -> None:
    connection = mesh.client.namespace.connect(PEER4, 9)
    began = time.monotonic()
    with pytest.raises(ConnectionResetError):
        connection.recv(1)
    assert time.monotonic() - began < 1


def test_unknown_address_is_reached_as_plain_tcp_with_the_pods_address(
    mesh: MeshPair, network: Network, serve: Serve
) -> None:
    unknown = "10.77.0.9"

    def add() -> None:
        from ipaddress import ip_interface

        from agent import netlink

        netlink.add_address("pod0", ip_interface(f"{unknown}/24"))

    # An address of the other end that no workload has; its pod does not capture 15008 only.
    netns.run_in(network.peer.fd, add)
    seen: list[str] = []

    def handle(accepted: socket.socket) -> None:
        seen.append(accepted.getpeername()[0])
        echo(accepted)

    serve(network.peer.listen(unknown, 8080), handle)
    connection = mesh.client.namespace.connect(unknown, 8080)
    connection.sendall(b"plain")
    assert connection.recv(5) == b"plain"
    connection.close()
    mesh.client.worker.settle()
    assert seen == [POD4]


def test_one_tunnel_carries_many_streams(mesh: MeshPair, serve: Serve) -> None:
    serve(mesh.server.namespace.listen(PEER4, 8080), echo, 20)
    connections = [mesh.client.namespace.connect(PEER4, 8080) for _ in range(20)]
    for number, connection in enumerate(connections):
        connection.sendall(b"%02d" % number)
    for number, connection in enumerate(connections):
        assert connection.recv(2) == b"%02d" % number

    def established() -> int:
        table = Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:]
        rows = [line.split() for line in table]
        return sum(1 for row in rows if row[2].endswith(":3AA0") and row[3] == "01")

    assert netns.run_in(mesh.client.namespace.fd, established) == 1
    for connection in connections:
        connection.close()


def test_stalled_reader_costs_its_window_and_does_not_stall_another_stream(
    mesh: MeshPair, serve: Serve, measured: Callable[[str], None]
) -> None:
    release = threading.Event()

    def stall_then_count(accepted: socket.socket) -> None:
        assert release.wait(20)
        while accepted.recv(1 << 20):
            pass

    listener = mesh.server.namespace.listen(PEER4, 8080)
    serve(listener, stall_then_count)
    workers = [mesh.client.worker.process.pid, mesh.server.worker.process.pid]
    before = [resident_bytes(pid) for pid in workers]
    stalled = mesh.client.namespace.connect(PEER4, 8080)
    stalled.setblocking(False)
    sent, quiet = 0, 0
    while quiet < 50:  # until neither side has taken anything for a while
        try:
            sent += stalled.send(b"x" * 65536)
            quiet = 0
        except BlockingIOError:
            quiet += 1
            threading.Event().wait(0.01)
    grown = [resident_bytes(pid) - size for pid, size in zip(workers, before, strict=True)]
    measured(f"a stalled reader after {sent >> 20} MiB: workers grew by {grown} bytes")
    # A stream's window, and as much again where it is copied; TLS takes its memory at the first.
    assert max(grown) < 4 * Limits().stream_window
    serve(mesh.server.namespace.listen(PEER4, 8081), echo)
    other = mesh.client.namespace.connect(PEER4, 8081)
    other.sendall(b"alive")
    assert other.recv(5) == b"alive"
    other.close()
    release.set()
    stalled.close()


def test_bulk_both_ways_at_once_is_intact(
    mesh: MeshPair, serve: Serve, measured: Callable[[str], None]
) -> None:
    size, chunk = 1 << 30, 1 << 20
    block = hashlib.sha256(b"block").digest() * (chunk // 32)
    expected = hashlib.sha256()
    for _ in range(size // chunk):
        expected.update(block)
    digests: list[str] = []

    def pump(connection: socket.socket) -> None:
        def send() -> None:
            for _ in range(size // chunk):
                connection.sendall(block)
            connection.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        digest = hashlib.sha256()
        while data := connection.recv(chunk):
            digest.update(data)
        sender.join()
        digests.append(digest.hexdigest())

    thread = serve(mesh.server.namespace.listen(PEER4, 8080), pump)
    connection = mesh.client.namespace.connect(PEER4, 8080)
    connection.settimeout(50)
    began = time.monotonic()
    pump(connection)
    thread.join()
    took = time.monotonic() - began
    measured(f"1 GiB each way at once: {took:.1f} s, {2 * 8.6 / took:.2f} Gbit/s")
    deadline = time.monotonic() + 10
    while len(digests) < 2 and time.monotonic() < deadline:
        thread.join(0.01)
    assert digests == [expected.hexdigest()] * 2


@dataclass(frozen=True)
class Holdings:
    """What a process holds."""

    descriptors: int
    threads: int
    resident: int

    @classmethod
    def of(cls, pid: int) -> Holdings:
        return cls(descriptor_count(pid), thread_count(pid), resident_bytes(pid))


def in_a_row(mesh: MeshPair, count: int) -> None:
    """Open, use and close connections one after the other."""
    listener = mesh.server.namespace.listen(PEER4, 8080)
    listener.listen(64)

    def answer() -> None:
        for _ in range(count):
            accepted, _ = listener.accept()
            with accepted:
                accepted.sendall(accepted.recv(64))

    thread = threading.Thread(target=answer)
    thread.start()
    client = mesh.client.namespace

    def ask() -> None:
        for number in range(count):
            with socket.socket() as connection:
                connection.settimeout(5)
                connection.connect((PEER4, 8080))
                question = b"%d" % number
                connection.sendall(question)
                assert connection.recv(64) == question

    netns.run_in(client.fd, ask)
    thread.join(10)
    assert not thread.is_alive()
    listener.close()


def test_ten_thousand_connections_leave_nothing_behind(mesh: MeshPair) -> None:
    workers = [member.worker for member in (mesh.client, mesh.server)]
    in_a_row(mesh, 1000)  # the tunnel is there, and what a worker allocates once
    before = [Holdings.of(worker.process.pid) for worker in workers]
    in_a_row(mesh, 10_000)
    for worker, old in zip(workers, before, strict=True):
        deadline = time.monotonic() + 10
        # Fewer, if the last of the first thousand had not ended when it was looked at.
        while (new := Holdings.of(worker.process.pid)).descriptors > old.descriptors:
            assert time.monotonic() < deadline, (old, new)
            worker.settle()  # a round of its loop
        grown = new.resident - old.resident
        print(f"10,000 connections: {grown / 1024:.0f} KiB more, {new}")  # noqa: T201
        assert new.threads == old.threads == 1
        assert grown < 1 << 20


def test_five_hundred_connections_at_once(mesh: MeshPair) -> None:
    listener = mesh.server.namespace.listen(PEER4, 8080)
    listener.listen(1024)
    barrier: list[socket.socket] = []

    def answer() -> None:
        for _ in range(500):
            accepted, _ = listener.accept()
            barrier.append(accepted)
        for accepted in barrier:
            accepted.sendall(b"all")
            accepted.close()

    thread = threading.Thread(target=answer)
    thread.start()

    def open_one() -> socket.socket:
        connection = socket.socket()
        connection.settimeout(30)
        connection.connect((PEER4, 8080))
        return connection

    def open_all() -> list[socket.socket]:
        return [open_one() for _ in range(500)]

    connections = netns.run_in(mesh.client.namespace.fd, open_all)
    with ThreadPoolExecutor(16) as readers:
        answers = list(readers.map(read_all, connections))
    for connection in connections:
        connection.close()
    thread.join(10)
    assert answers == [b"all"] * 500
