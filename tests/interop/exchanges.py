"""What is said through a tunnel between an Envoy and us, whichever of both dials."""

from __future__ import annotations

import hashlib
import os
import socket
import threading

from agent.model.bounds import Bounds
from tests.node.test_tunnel import read_all

# Of an Envoy, and of us.
SMALL = {
    "initial_stream_window_size": 65535,
    "initial_connection_window_size": 65535,
    "max_concurrent_streams": 2,
}
SMALL_BOUNDS = Bounds(stream_buffer_bytes=65535)


def ends_without_data(connection: socket.socket) -> bool:
    """Whether a connection ends, in whatever way, before anything came."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def answer_backwards(accepted: socket.socket) -> None:
    """Answer when the question has ended, and not before."""
    accepted.sendall(read_all(accepted)[::-1])


def ask_and_hang_up(connection: socket.socket) -> None:
    """Ask one that answers backwards."""
    connection.sendall(b"question")
    connection.shutdown(socket.SHUT_WR)
    assert read_all(connection) == b"noitseuq"


def transfer(connections: list[socket.socket]) -> None:
    """Send 12 MiB by each of some connections that echo, and have all of it back."""
    data = os.urandom(1 << 20) * 12

    def send(connection: socket.socket) -> None:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)

    senders = [threading.Thread(target=send, args=(connection,)) for connection in connections]
    for connection, sender in zip(connections, senders, strict=True):
        connection.settimeout(30)
        sender.start()
    for connection in connections:
        assert hashlib.sha256(read_all(connection)).digest() == hashlib.sha256(data).digest()
    for sender in senders:
        sender.join()
