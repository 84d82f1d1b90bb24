"""Peers on 15008 that break the rules: each is dropped with one log line and harms nobody else."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
from typing import TYPE_CHECKING, Any

import pytest

from agent.identity.local import LocalAuthority
from agent.model.capture import HBONE_PORT
from agent.model.identity import SpiffeId
from agent.tunnel import frames, tls
from agent.tunnel.connection import Connection, Role
from agent.tunnel.events import ConnectionTerminated, Event, ResponseReceived, StreamReset
from agent.tunnel.frames import ErrorCode, FrameType
from tests.node.conftest import TRUST_DOMAIN, MeshPair, RunningWorker, certificate_for
from tests.support.namespaces import PEER4, PEER6, POD4, POD6

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.root


class HandMadePeer:
    """A client of 15008 that speaks HTTP/2 by hand over real TLS, from the client's namespace."""

    def __init__(self, mesh: MeshPair, context: ssl.SSLContext) -> None:
        raw = mesh.client.namespace.open_socket()
        from agent.datapath.exemption import exempt

        exempt(mesh.exempt_map, raw)  # as the agent there would: not captured
        raw.connect((PEER4, HBONE_PORT))
        self.tls = context.wrap_socket(raw)
        self.connection = Connection(Role.CLIENT)
        mesh.client.namespace.cleanup.enter_context(self.tls)

    def exchange(self, until: type[Any]) -> list[Event]:
        """Write what is to be written and read until an event of a kind, or the end."""
        found: list[Event] = []
        while not any(isinstance(event, until) for event in found):
            try:
                self.tls.sendall(self.connection.take_output())
                data = self.tls.recv(65536)
            except (ConnectionResetError, ssl.SSLError):
                break
            if not data:
                break
            found += self.connection.receive(data)
        return found

    def request(self, authority: str) -> list[Event]:
        self.connection.open_stream(authority, {})
        return self.exchange(ResponseReceived)


def good_context(mesh: MeshPair, trust_domain: str = TRUST_DOMAIN) -> ssl.SSLContext:
    identity = SpiffeId(trust_domain, "default", "client")
    return tls.build_context(certificate_for(mesh.authority, identity), is_server=False)


def entries(worker: RunningWorker, message: str) -> list[dict[str, Any]]:
    worker.settle()
    lines = [json.loads(line) for line in worker.log.read_text().splitlines()]
    return [line for line in lines if line["message"] == message]


@pytest.mark.parametrize(
    ("authority", "status"),
    [
        (f"{PEER4}:9", 503),  # nobody listens
        (f"{PEER4}:15006", 503),
        (f"{POD4}:80", 400),  # another pod's address
        ("example.com:80", 400),
        (f"{PEER4}", 400),
        (f"{PEER4}:0", 400),
        (f"{PEER4}:65536", 400),
        ("[fd77::1:80", 400),
    ],
)
def test_request_that_cannot_be_served_gets_its_status(
    mesh: MeshPair, authority: str, status: int
) -> None:
    found = HandMadePeer(mesh, good_context(mesh)).request(authority)
    assert ResponseReceived(1, status) in found


def works(mesh: MeshPair) -> bool:
    """Whether the pod is still served."""
    return ResponseReceived(1, 503) in HandMadePeer(mesh, good_context(mesh)).request(f"{PEER4}:9")


def test_peer_without_a_certificate_is_dropped(mesh: MeshPair) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    peer = HandMadePeer(mesh, context)
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        peer.tls.recv(1)
    (line,) = entries(mesh.server.worker, "tunnel closed")
    assert line["code"] == "peer_certificate_missing"
    assert works(mesh)


def test_peer_of_another_authority_is_dropped(mesh: MeshPair, tmp_path: Path) -> None:
    other = LocalAuthority.create(tmp_path / "other", TRUST_DOMAIN)
    certificate = certificate_for(other, SpiffeId(TRUST_DOMAIN, "default", "client"))
    context = tls.build_context(certificate, is_server=False)
    context.verify_mode = ssl.CERT_NONE
    peer = HandMadePeer(mesh, context)
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        peer.tls.recv(1)
    (line,) = entries(mesh.server.worker, "tunnel closed")
    assert line["code"] == "peer_authority_unknown"
    assert works(mesh)


def test_peer_of_another_trust_domain_is_dropped(mesh: MeshPair) -> None:
    peer = HandMadePeer(mesh, good_context(mesh, "example.org"))
    assert not any(isinstance(e, ResponseReceived) for e in peer.request(f"{PEER4}:9"))
    (line,) = entries(mesh.server.worker, "tunnel closed")
    assert line["code"] == "peer_trust_domain"
    assert "example.org" in line["reason"]


def test_garbage_instead_of_tls_is_dropped(mesh: MeshPair) -> None:
    from agent.datapath.exemption import exempt

    raw = mesh.client.namespace.open_socket()
    exempt(mesh.exempt_map, raw)
    raw.connect((PEER4, HBONE_PORT))
    raw.sendall(b"GET / HTTP/1.1\r\n\r\n" * 10)
    try:
        while raw.recv(4096):
            pass
    except ConnectionResetError:
        pass
    assert len(entries(mesh.server.worker, "tunnel closed")) == 1
    assert works(mesh)


@pytest.mark.parametrize(
    "sent",
    [
        b"\xff" * 64,
        frames.build_head(9, FrameType.HEADERS, frames.END_HEADERS, 1) + b"\xff" * 9,
        frames.build_head(2**24 - 1, FrameType.DATA, 0, 1),
        b"".join(frames.build_ping(b"12345678", is_ack=False) for _ in range(100_000)),
    ],
    ids=["noise", "header-block", "huge-frame", "ping-flood"],
)
def test_garbage_inside_the_tunnel_ends_that_tunnel_alone(mesh: MeshPair, sent: bytes) -> None:
    bystander = HandMadePeer(mesh, good_context(mesh))
    bystander.request(f"{PEER4}:9")
    peer = HandMadePeer(mesh, good_context(mesh))
    peer.tls.sendall(peer.connection.take_output())
    with contextlib.suppress(ConnectionResetError, BrokenPipeError, ssl.SSLError):
        peer.tls.sendall(sent)
    if sent[:1] != b"\x00" or len(sent) < 1000:
        peer.exchange(ConnectionTerminated)
        (line,) = entries(mesh.server.worker, "tunnel closed")
        assert "broke HTTP/2" in line["reason"]
    found = bystander.request(f"{PEER4}:9")
    assert ResponseReceived(3, 503) in found


def test_oversized_headers_end_the_tunnel(mesh: MeshPair) -> None:
    peer = HandMadePeer(mesh, good_context(mesh))
    peer.connection.open_stream(f"{PEER4}:9", {"x": "y" * 40_000})
    assert not any(isinstance(e, ResponseReceived) for e in peer.exchange(ResponseReceived))
    (line,) = entries(mesh.server.worker, "tunnel closed")
    assert "broke HTTP/2" in line["reason"]
    assert works(mesh)


def test_streams_beyond_the_limit_are_refused(mesh: MeshPair) -> None:
    peer = HandMadePeer(mesh, good_context(mesh))
    listener = mesh.server.namespace.listen(PEER4, 8080)
    listener.listen(1024)
    peer.connection.peer_concurrent_streams = 1000
    for _ in range(201):
        peer.connection.open_stream(f"{PEER4}:8080", {})
    found = peer.exchange(StreamReset)
    assert StreamReset(401, ErrorCode.REFUSED_STREAM) in found
    assert works(mesh)


@pytest.mark.parametrize(("server", "client"), [(PEER4, POD4), (PEER6, POD6)], ids=["v4", "v6"])
def test_plaintext_that_is_captured_reaches_the_application(
    mesh: MeshPair, server: str, client: str
) -> None:
    """From outside the mesh, with the client's own address at the application."""
    from agent.datapath.exemption import exempt

    listener = mesh.server.namespace.listen(server, 8080)
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    raw = mesh.client.namespace.open_socket(family)
    exempt(mesh.exempt_map, raw)
    raw.connect((server, 8080))
    accepted, address = listener.accept()
    with accepted:
        assert address[0] == client
        raw.sendall(b"plain")
        assert accepted.recv(5) == b"plain"
        raw.shutdown(socket.SHUT_WR)
        assert accepted.recv(5) == b""
    assert raw.recv(1) == b""
    (line,) = entries(mesh.server.worker, "connection complete")
    assert (line["path"], line["result"]) == ("plaintext", "ok")


def test_client_refuses_a_server_with_another_identity(mesh: MeshPair) -> None:
    identity = SpiffeId(TRUST_DOMAIN, "default", "server")
    impostor = SpiffeId(TRUST_DOMAIN, "default", "impostor")
    certificate = certificate_for(mesh.authority, impostor)
    from dataclasses import replace

    mesh.server.worker.tell(replace(certificate, identity=str(identity)))
    mesh.server.worker.settle()
    connection = mesh.client.namespace.connect(PEER4, 8080)
    with pytest.raises(ConnectionResetError):
        connection.recv(1)
    (line,) = entries(mesh.client.worker, "connection complete")
    assert "impostor" in line["result"]
