"""Policies at the destination: who is let in, who is closed when they change, what the log says."""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from agent import netns
from agent.datapath.exemption import exempt
from agent.model.policy import Policy
from agent.tunnel import messages
from agent.tunnel.events import ResponseReceived
from tests.node.test_hostile_peers import HandMadePeer, entries, good_context
from tests.node.test_tunnel import Serve, read_all
from tests.support.namespaces import PEER4, PEER6
from tests.support.policies import authentication, authorization, from_account

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agent.model.policy import AnyPolicy
    from tests.node.conftest import MeshPair

pytestmark = pytest.mark.root

both_families = pytest.mark.parametrize("server", [PEER4, PEER6], ids=["v4", "v6"])
NOBODY = authorization("nobody", "ALLOW")
ONLY_CLIENT = authorization("only-client", "ALLOW", from_account("client", "8080"))
NOT_CLIENT = authorization("not-client", "DENY", from_account("client"))


def enforce(mesh: MeshPair, *policies: AnyPolicy, without: tuple[AnyPolicy, ...] = ()) -> None:
    keys = tuple(policy.key for policy in without)
    told = (messages.RemovePolicies(keys), messages.PutPolicies(policies), messages.Enforce())
    mesh.server.worker.tell(*told)
    mesh.server.worker.settle()


class Visitor:
    """Connects to the server from the client's pod; closes what is open at the end."""

    def __init__(self, mesh: MeshPair) -> None:
        self._mesh = mesh
        self.opened: list[socket.socket] = []

    def tunneled(self, server: str, port: int = 8080) -> socket.socket:
        """Connect as an application of the pod."""
        self.opened.append(self._mesh.client.namespace.connect(server, port))
        return self.opened[-1]

    def plaintext(self, server: str, port: int = 8080) -> socket.socket:
        """Connect as if from outside the mesh: the client's own agent takes no part."""
        family = socket.AF_INET6 if ":" in server else socket.AF_INET
        self.opened.append(self._mesh.client.namespace.open_socket(family))
        exempt(self._mesh.exempt_map, self.opened[-1])
        self.opened[-1].connect((server, port))
        return self.opened[-1]


@pytest.fixture
def visitor(mesh: MeshPair, serve: Serve) -> Iterator[Visitor]:
    made = Visitor(mesh)
    yield made
    for connection in made.opened:
        connection.close()  # before the server's threads are waited for


def echo(accepted: socket.socket) -> None:
    with suppress(ConnectionResetError):
        while data := accepted.recv(65536):
            accepted.sendall(data)


def is_echoed(connection: socket.socket) -> bool:
    connection.sendall(b"ping")
    return connection.recv(4) == b"ping"


def last_entry(mesh: MeshPair) -> dict[str, Any]:
    return entries(mesh.server.worker, "connection complete")[-1]


@both_families
def test_allowed_account_comes_in_and_the_log_names_the_rule(
    mesh: MeshPair, visitor: Visitor, serve: Serve, server: str
) -> None:
    enforce(mesh, ONLY_CLIENT)
    serve(mesh.server.namespace.listen(server, 8080), echo)
    connection = visitor.tunneled(server, 8080)
    assert is_echoed(connection)
    connection.shutdown(socket.SHUT_WR)
    assert read_all(connection) == b""
    entry = last_entry(mesh)
    assert entry["verdict"] == "allow"
    assert entry["policy"] == "AuthorizationPolicy default/only-client rules[0]"


@both_families
def test_denied_pod_is_reset_and_the_application_never_sees_it(
    mesh: MeshPair, visitor: Visitor, server: str
) -> None:
    enforce(mesh, NOT_CLIENT)
    listener = mesh.server.namespace.listen(server, 8080)
    connection = visitor.tunneled(server, 8080)
    with pytest.raises(ConnectionResetError):
        connection.recv(1)
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.accept()
    entry = last_entry(mesh)
    assert (entry["path"], entry["verdict"]) == ("hbone", "deny")
    assert entry["policy"] == "AuthorizationPolicy default/not-client rules[0]"
    (told,) = entries(mesh.client.worker, "connection complete")
    assert told["result"] == "the peer answered 401: denied by a policy at the destination"


def test_denied_hbone_peer_gets_401(mesh: MeshPair) -> None:
    enforce(mesh, ONLY_CLIENT)
    peer = HandMadePeer(mesh, good_context(mesh))
    assert ResponseReceived(1, 401) in peer.request(f"{PEER4}:9")  # another port
    assert ResponseReceived(3, 503) in peer.request(f"{PEER4}:8080")  # allowed, nobody listens


@both_families
def test_denied_plaintext_is_reset(mesh: MeshPair, visitor: Visitor, server: str) -> None:
    enforce(mesh, ONLY_CLIENT)
    mesh.server.namespace.listen(server, 8080)
    with pytest.raises(ConnectionResetError):
        visitor.plaintext(server).recv(1)
    entry = last_entry(mesh)
    assert (entry["path"], entry["verdict"]) == ("plaintext", "deny")
    assert entry["policy"] == "AuthorizationPolicy default/only-client"


@both_families
def test_strict_refuses_plaintext_alone(
    mesh: MeshPair, visitor: Visitor, serve: Serve, server: str
) -> None:
    enforce(mesh, authentication("default", "STRICT"))
    serve(mesh.server.namespace.listen(server, 8080), echo)
    with pytest.raises(ConnectionResetError):
        visitor.plaintext(server).recv(1)
    assert last_entry(mesh)["policy"] == "PeerAuthentication default/default"
    assert is_echoed(visitor.tunneled(server, 8080))


def test_port_of_a_strict_pod_may_be_open_to_plaintext(
    mesh: MeshPair, visitor: Visitor, serve: Serve
) -> None:
    labeled = replace(mesh.server.workload, labels=frozenset({("app", "web")}))
    mesh.server.worker.tell(messages.PutWorkload(labeled))
    selector = {"matchLabels": {"app": "web"}}
    ports = {"8081": {"mode": "PERMISSIVE"}}
    strict = authentication("web", "STRICT", selector=selector, portLevelMtls=ports)
    enforce(mesh, strict)
    serve(mesh.server.namespace.listen(PEER4, 8081), echo)
    assert is_echoed(visitor.plaintext(PEER4, 8081))
    with pytest.raises(ConnectionResetError):
        visitor.plaintext(PEER4, 8080).recv(1)


@both_families
def test_change_closes_what_no_longer_passes_within_a_second(
    mesh: MeshPair, visitor: Visitor, serve: Serve, server: str
) -> None:
    serve(mesh.server.namespace.listen(server, 8080), echo, 2)
    serve(mesh.server.namespace.listen(server, 8081), echo)
    tunneled = visitor.tunneled(server, 8080)
    plain = visitor.plaintext(server)
    other = visitor.tunneled(server, 8081)
    assert is_echoed(tunneled)
    assert is_echoed(plain)
    assert is_echoed(other)
    began = time.monotonic()
    enforce(mesh, authorization("p", "DENY", {"to": [{"operation": {"ports": ["8080"]}}]}))
    for connection in (tunneled, plain):
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    assert time.monotonic() - began < 1
    assert is_echoed(other)
    closed = entries(mesh.server.worker, "connection complete")
    assert [entry["result"] for entry in closed] == [
        "closed: denied by AuthorizationPolicy default/p rules[0]"
    ] * 2
    assert {entry["bytes_sent"] for entry in closed} == {4}


def test_label_of_a_pod_brings_it_under_a_policy_while_connections_are_open(
    mesh: MeshPair, visitor: Visitor, serve: Serve
) -> None:
    selective = authorization("web", "ALLOW", selector={"matchLabels": {"app": "web"}})
    enforce(mesh, selective)
    serve(mesh.server.namespace.listen(PEER4, 8080), echo)
    connection = visitor.tunneled(PEER4, 8080)
    assert is_echoed(connection)
    labeled = replace(mesh.server.workload, labels=frozenset({("app", "web")}))
    mesh.server.worker.tell(messages.PutWorkload(labeled), messages.Enforce())
    with pytest.raises(ConnectionResetError):
        connection.recv(1)


def test_connection_whose_application_is_not_reached_yet_is_denied_by_a_change(
    mesh: MeshPair,
) -> None:
    listener = mesh.server.namespace.listen(PEER4, 8080)
    listener.listen(0)
    # With its queue full, the application answers no further connect.
    queued = [mesh.server.namespace.open_socket() for _ in range(2)]
    for waiting in queued:
        waiting.setblocking(False)
        waiting.connect_ex((PEER4, 8080))
    peer = HandMadePeer(mesh, good_context(mesh))
    peer.request(f"{PEER4}:9")
    peer.connection.open_stream(f"{PEER4}:8080", {})
    peer.tls.sendall(peer.connection.take_output())
    wait_for_dial(mesh)
    enforce(mesh, NOBODY)
    assert ResponseReceived(3, 401) in peer.exchange(ResponseReceived)
    assert last_entry(mesh)["policy"] == "AuthorizationPolicy default/nobody"


def wait_for_dial(mesh: MeshPair) -> None:
    """Wait until the worker's own SYN to the application is out."""

    def is_dialing() -> bool:
        rows = Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:]
        # local 10.77.0.2, the client's address that the worker borrows; state 02 is SYN_SENT
        return any(row.split()[1].startswith("02004D0A") and row.split()[3] == "02" for row in rows)

    deadline = time.monotonic() + 5
    while not netns.run_in(mesh.server.namespace.fd, is_dialing):
        assert time.monotonic() < deadline
        mesh.server.worker.settle()


def test_nothing_is_in_force_before_all_of_a_change_is(
    mesh: MeshPair, visitor: Visitor, serve: Serve
) -> None:
    serve(mesh.server.namespace.listen(PEER4, 8080), echo, 2)
    mesh.server.worker.tell(messages.PutPolicies((NOBODY,)))
    mesh.server.worker.settle()
    connection = visitor.tunneled(PEER4, 8080)
    assert is_echoed(connection)
    enforce(mesh, ONLY_CLIENT, without=(NOBODY,))
    assert is_echoed(connection)
    assert is_echoed(visitor.tunneled(PEER4, 8080))


def test_dry_run_denies_nothing_and_is_in_the_log(
    mesh: MeshPair, visitor: Visitor, serve: Serve
) -> None:
    assert isinstance(NOBODY, Policy)
    enforce(mesh, replace(NOBODY, is_dry_run=True))
    serve(mesh.server.namespace.listen(PEER4, 8080), echo)
    connection = visitor.tunneled(PEER4, 8080)
    assert is_echoed(connection)
    connection.shutdown(socket.SHUT_WR)
    assert read_all(connection) == b""
    entry = last_entry(mesh)
    assert entry["verdict"] == "allow"
    assert "default/nobody" in entry["dry_run"]


def test_unknown_pod_lets_nobody_in(mesh: MeshPair) -> None:
    mesh.server.worker.tell(messages.RemoveWorkload(mesh.server.workload.uid))
    peer = HandMadePeer(mesh, good_context(mesh))
    assert ResponseReceived(1, 401) in peer.request(f"{PEER4}:8080")
