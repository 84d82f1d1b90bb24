"""Our worker as the client of an Envoy's 15008."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from agent.bench.envoy import build_server
from agent.identity.local import LocalAuthority
from agent.model.bounds import DEFAULT_BOUNDS
from agent.model.capture import HBONE_PORT
from agent.model.identity import SpiffeId
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
from tests.support.namespaces import PEER4

if TYPE_CHECKING:
    from pathlib import Path

    from agent.bench.envoy import Credentials

pytestmark = pytest.mark.root

Serve = Callable[..., threading.Thread]
APP_PORT = 8080


def build(
    client: Neighbors, credentials: Credentials | None = None, **http2: Any
) -> dict[str, Any]:
    credentials = credentials or client.credentials(identity("server"), identity("client"))
    served = [(f"{PEER4}:{APP_PORT}", (PEER4, APP_PORT))]
    return build_server((PEER4, HBONE_PORT), served, credentials, http2)


def manager(config: dict[str, Any]) -> dict[str, Any]:
    """Return the HTTP connection manager in a bootstrap."""
    (listener,) = config["static_resources"]["listeners"]
    found: dict[str, Any] = listener["filter_chains"][0]["filters"][0]["typed_config"]
    return found


def dial(client: Neighbors) -> socket.socket:
    return client.ours.namespace.connect(PEER4, APP_PORT)


def test_echo_through_the_tunnel(client: Neighbors, serve: Serve) -> None:
    client.start_envoy(build(client))
    serve(client.theirs.listen(PEER4, APP_PORT), echo)
    connection = dial(client)
    connection.sendall(b"hello")
    assert connection.recv(5) == b"hello"
    connection.shutdown(socket.SHUT_WR)
    assert read_all(connection) == b""
    client.ours.worker.settle()
    log = client.ours.worker.log.read_text()
    assert (
        f'"dst.identity": "{identity("server")}", "direction": "outbound", "path": "hbone"' in log
    )


def test_half_close_leaves_the_answer(client: Neighbors, serve: Serve) -> None:
    client.start_envoy(build(client))
    serve(client.theirs.listen(PEER4, APP_PORT), answer_backwards)
    ask_and_hang_up(dial(client))


@pytest.mark.parametrize(
    ("http2", "bounds"),
    [({}, DEFAULT_BOUNDS), (SMALL, DEFAULT_BOUNDS), ({}, SMALL_BOUNDS)],
    ids=["defaults", "the peer's windows are small, two streams", "our windows are small"],
)
def test_large_transfers_both_ways_at_once(
    client: Neighbors, serve: Serve, http2: dict[str, Any]
) -> None:
    client.start_envoy(build(client, **http2))
    serve(client.theirs.listen(PEER4, APP_PORT), echo, 5)
    transfer([dial(client) for _ in range(5)])


def test_refusal_by_policy_is_a_reset(client: Neighbors) -> None:
    config = build(client)
    (route,) = manager(config)["route_config"]["virtual_hosts"][0]["routes"]
    del route["route"]
    route["direct_response"] = {"status": 401}
    client.start_envoy(config)
    with pytest.raises(ConnectionResetError):
        dial(client).recv(1)
    client.ours.worker.settle()
    assert "the peer answered 401" in client.ours.worker.log.read_text()


def test_application_that_is_not_there_is_a_reset(client: Neighbors) -> None:
    client.start_envoy(build(client))
    with pytest.raises(ConnectionResetError):
        dial(client).recv(1)
    client.ours.worker.settle()
    assert "the peer answered 503" in client.ours.worker.log.read_text()


def test_goaway_after_each_request_fails_no_connection(client: Neighbors, serve: Serve) -> None:
    config = build(client)
    manager(config)["common_http_protocol_options"] = {"max_requests_per_connection": 1}
    client.start_envoy(config)
    serve(client.theirs.listen(PEER4, APP_PORT), echo, 11)
    kept = dial(client)
    kept.sendall(b"k")
    assert kept.recv(1) == b"k"
    for _ in range(10):
        connection = dial(client)
        connection.sendall(b"x")
        assert connection.recv(1) == b"x"
        connection.close()
    kept.sendall(b"l")
    assert kept.recv(1) == b"l"
    kept.close()


def test_peer_with_another_name_is_refused(client: Neighbors) -> None:
    impostor = SpiffeId("cluster.local", "default", "impostor")
    client.start_envoy(build(client, client.credentials(impostor, identity("client"))))
    client.theirs.listen(PEER4, APP_PORT)
    assert ends_without_data(dial(client))
    client.ours.worker.settle()
    assert "impostor, not spiffe://" in client.ours.worker.log.read_text()


def test_server_of_another_authority_is_refused(client: Neighbors, tmp_path: Path) -> None:
    other = LocalAuthority.create(tmp_path / "other", "cluster.local")
    client.start_envoy(
        build(client, client.credentials(identity("server"), identity("client"), other))
    )
    client.theirs.listen(PEER4, APP_PORT)
    assert ends_without_data(dial(client))
    client.ours.worker.settle()
    assert "certificate" in client.ours.worker.log.read_text()


def test_envoy_checks_our_name(client: Neighbors) -> None:
    wanted = identity("somebody-else")
    client.start_envoy(build(client, client.credentials(identity("server"), wanted)))
    client.theirs.listen(PEER4, APP_PORT)
    assert ends_without_data(dial(client))
