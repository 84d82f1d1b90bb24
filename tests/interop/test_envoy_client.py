"""An Envoy as the client of our 15008."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from agent.bench.envoy import build_client
from agent.identity.local import LocalAuthority
from agent.model.bounds import DEFAULT_BOUNDS
from agent.model.capture import HBONE_PORT
from agent.model.identity import SpiffeId
from agent.tunnel import messages
from tests.interop.conftest import Neighbors, identity
from tests.interop.exchanges import (
    SMALL,
    SMALL_BOUNDS,
    answer_backwards,
    ask_and_hang_up,
    ends_without_data,
    transfer,
)
from tests.node.test_tunnel import echo, read_all
from tests.support.namespaces import PEER4, POD4
from tests.support.policies import authorization

if TYPE_CHECKING:
    from pathlib import Path

    from agent.bench.envoy import Credentials

pytestmark = pytest.mark.root

Serve = Callable[..., threading.Thread]
LOCAL_PORT, APP_PORT = 9000, 8080


def start(
    server: Neighbors,
    credentials: Credentials | None = None,
    port: int = APP_PORT,
    **http2: Any,
) -> None:
    credentials = credentials or server.credentials(identity("client"), identity("server"))
    tunneled = [(LOCAL_PORT, f"{PEER4}:{port}")]
    server.start_envoy(build_client((PEER4, HBONE_PORT), tunneled, credentials, http2))


def dial(server: Neighbors) -> socket.socket:
    return server.theirs.connect("127.0.0.1", LOCAL_PORT)


def test_echo_and_the_clients_own_address(server: Neighbors, serve: Serve) -> None:
    start(server)
    seen: list[str] = []

    def handle(accepted: socket.socket) -> None:
        seen.append(accepted.getpeername()[0])
        echo(accepted)

    serve(server.ours.namespace.listen(PEER4, APP_PORT), handle)
    connection = dial(server)
    connection.sendall(b"hello")
    assert connection.recv(5) == b"hello"
    connection.shutdown(socket.SHUT_WR)
    assert read_all(connection) == b""
    assert seen == [POD4]
    server.ours.worker.settle()
    assert f'"src.identity": "{identity("client")}"' in server.ours.worker.log.read_text()


def test_half_close_leaves_the_answer(server: Neighbors, serve: Serve) -> None:
    start(server)
    serve(server.ours.namespace.listen(PEER4, APP_PORT), answer_backwards)
    ask_and_hang_up(dial(server))


def answer_then_listen(accepted: socket.socket) -> None:
    """End first, and say how much came after that."""
    accepted.sendall(b"done")
    accepted.shutdown(socket.SHUT_WR)
    assert read_all(accepted) == b"still here"


def test_application_that_ends_first_hears_the_rest(server: Neighbors, serve: Serve) -> None:
    start(server)
    serve(server.ours.namespace.listen(PEER4, APP_PORT), answer_then_listen)
    connection = dial(server)
    assert read_all(connection) == b"done"
    connection.sendall(b"still here")
    connection.close()


# Ours are small by the worker's own limit; frames of 16 KiB are the smallest there are, and what an
# Envoy takes.
@pytest.mark.parametrize(
    ("http2", "bounds"),
    [({}, DEFAULT_BOUNDS), (SMALL, DEFAULT_BOUNDS), ({}, SMALL_BOUNDS)],
    ids=["defaults", "the peer's windows are small", "our windows are small"],
)
def test_large_transfers_both_ways_at_once(
    server: Neighbors, serve: Serve, http2: dict[str, Any]
) -> None:
    start(server, **http2)
    serve(server.ours.namespace.listen(PEER4, APP_PORT), echo, 3)
    transfer([dial(server) for _ in range(3)])


def test_application_that_is_not_there_ends_the_connection(server: Neighbors) -> None:
    start(server)
    assert ends_without_data(dial(server))
    server.ours.worker.settle()
    assert "503: the application cannot be reached" in server.ours.worker.log.read_text()


def test_client_that_policy_stops_is_answered_401(server: Neighbors, serve: Serve) -> None:
    start(server)

    def handle(accepted: socket.socket) -> None:
        with suppress(ConnectionResetError):
            echo(accepted)

    serve(server.ours.namespace.listen(PEER4, APP_PORT), handle)
    with dial(server) as connection:
        connection.sendall(b"a")
        assert connection.recv(1) == b"a"
        denial = authorization("nobody", "ALLOW")
        server.ours.worker.tell(messages.PutPolicies((denial,)), messages.Enforce())
        assert ends_without_data(connection)  # what was open is closed
    assert ends_without_data(dial(server))
    server.ours.worker.settle()
    assert '"result": "401: ' in server.ours.worker.log.read_text()


def test_goaway_of_a_worker_that_retires_fails_no_connection(
    server: Neighbors, serve: Serve
) -> None:
    start(server)
    serve(server.ours.namespace.listen(PEER4, APP_PORT), echo, 11)
    kept = dial(server)
    kept.sendall(b"k")
    assert kept.recv(1) == b"k"
    old = server.ours.worker
    successor = server.start_worker("successor")
    old.tell(messages.Retire(has_successor=True))
    for _ in range(10):
        with dial(server) as connection:
            connection.sendall(b"x")
            assert connection.recv(1) == b"x"
    kept.sendall(b"l")
    assert kept.recv(1) == b"l"
    kept.close()
    assert old.process.wait(10) == 0
    successor.settle()
    assert '"message": "connection complete"' in successor.log.read_text()


def test_reset_of_the_application_ends_the_connection(server: Neighbors, serve: Serve) -> None:
    start(server)

    def handle(accepted: socket.socket) -> None:
        accepted.recv(1)
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    serve(server.ours.namespace.listen(PEER4, APP_PORT), handle)
    connection = dial(server)
    connection.sendall(b"x")
    assert ends_without_data(connection)


def test_client_of_another_trust_domain_is_refused(server: Neighbors) -> None:
    stranger = SpiffeId("elsewhere", "default", "client")
    start(server, server.credentials(stranger, identity("server")))
    server.ours.namespace.listen(PEER4, APP_PORT)
    assert ends_without_data(dial(server))
    server.ours.worker.settle()
    assert "is not of trust domain" in server.ours.worker.log.read_text()


def test_client_of_another_authority_is_refused(server: Neighbors, tmp_path: Path) -> None:
    other = LocalAuthority.create(tmp_path / "other", "cluster.local")
    start(server, server.credentials(identity("client"), identity("server"), other))
    server.ours.namespace.listen(PEER4, APP_PORT)
    assert ends_without_data(dial(server))


def test_envoy_checks_our_name(server: Neighbors) -> None:
    start(server, server.credentials(identity("client"), identity("somebody-else")))
    server.ours.namespace.listen(PEER4, APP_PORT)
    assert ends_without_data(dial(server))


def test_one_stream_of_two_ends_and_the_other_goes_on(server: Neighbors, serve: Serve) -> None:
    start(server)
    serve(server.ours.namespace.listen(PEER4, APP_PORT), echo, 2)
    with dial(server) as first, dial(server) as second:
        for connection in (first, second):
            connection.sendall(b"a")
            assert connection.recv(1) == b"a"
        first.close()
        second.sendall(b"c")
        assert second.recv(1) == b"c"
