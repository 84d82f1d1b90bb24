"""A captured connection whose tunnel ends before the peer has answered: nobody has to notice."""

from __future__ import annotations

import os
import socket
import time
from contextlib import ExitStack
from dataclasses import replace
from ipaddress import ip_address
from typing import TYPE_CHECKING

import pytest

from agent import netlink, netns
from agent.identity.local import LocalAuthority
from agent.model.bounds import Bounds
from agent.model.capture import HBONE_PORT, Origin
from agent.model.pod import LocalPod
from agent.model.workload import Workload
from agent.tunnel import life_signs
from agent.tunnel import outbound as outbound_module
from agent.tunnel import session as session_module
from agent.tunnel import sockets as sockets_module
from agent.tunnel.access import Ledger
from agent.tunnel.buffers import FULL, PARTS, Share
from agent.tunnel.connection import Role
from agent.tunnel.contexts import Contexts
from agent.tunnel.frames import ErrorCode
from agent.tunnel.mesh import Mesh
from agent.tunnel.messages import PutCertificate
from agent.tunnel.outbound import TRIES, Outbound
from agent.tunnel.pool import Pool
from agent.tunnel.reactor import READ, Reactor
from agent.tunnel.served import TOO_MANY, ServedPod
from agent.tunnel.session import Session
from agent.tunnel.sockets import PodSockets
from agent.tunnel.tls import build_context
from agent.tunnel.trust import Trust
from tests.support.garbage import no_cyclic_garbage
from tests.support.loop import run_until
from tests.support.stalled import Stalled
from tests.support.tunnel import CLIENT, SERVER, TRUST_DOMAIN, end_sessions
from tests.support.wire import buffer_limit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from agent.model.pod import Address
    from agent.tunnel.events import ConnectRequested

pytestmark = pytest.mark.root

TCP_REPAIR = 19  # linux/tcp.h: whoever has it set closes without a word
SERVER_ADDRESS = ip_address("127.0.0.1")
SERVER_POD = Workload(
    "uid-server", "shop", "server-0", "node-2", "server", (SERVER_ADDRESS,), is_hbone=True
)


class Asked:
    """All connections wanted to go to the server pod, and none may go direct."""

    def lookup(self, _netns_cookie: int, _address: Address, _port: int) -> Origin:
        return Origin(SERVER_ADDRESS, 80, None)

    def candidate(
        self, _source: ServedPod, _destination_uid: str, _address: Address, _port: int
    ) -> None:
        return None


class Scene:
    """The outbound side of a pod, and a peer that answers each request as the test says."""

    def __init__(self, netns_fd: int, directory: Path, bounds: Bounds) -> None:
        self.reactor = Reactor()
        authority = LocalAuthority.create(directory, TRUST_DOMAIN)
        self.certificates = {
            identity: PutCertificate(str(identity), issued.chain, issued.key, issued.roots)
            for identity in (CLIENT, SERVER)
            for issued in (authority.issue(identity),)
        }
        trust = Trust(self.reactor, TRUST_DOMAIN)
        contexts = Contexts(self.reactor, lambda _identity: None)
        contexts.put(self.certificates[CLIENT])
        self.mesh = mesh = Mesh()
        mesh.put_workload(SERVER_POD)
        pod_sockets = PodSockets(lambda _own: None)
        ledger = Ledger(self.reactor, mesh)
        self.pool = Pool(self.reactor, pod_sockets, trust, contexts, ledger.may_log, bounds)
        self.sessions: list[Session] = []
        asked = Asked()
        self.outbound = Outbound(
            self.reactor,
            pod_sockets,
            asked,
            mesh,
            self.pool,
            contexts,
            asked,
            ledger,
            bounds,
        )
        pod = LocalPod("uid-client", "shop", "client-0", "client", (ip_address("127.0.0.2"),))
        self.served = ServedPod(pod, CLIENT, netns_fd, 1)
        self.listener = netns.run_in(netns_fd, socket.socket)
        netns.run_in(netns_fd, lambda: self.listener.bind(("127.0.0.1", HBONE_PORT)))
        self.listener.listen()
        self.listener.setblocking(False)
        self.reactor.watch(self.listener.fileno(), READ, lambda _ready: self._accept())
        self.requests = 0
        self.answer: Callable[[Session, int], None] = lambda _session, _stream_id: None

    def _accept(self) -> None:
        accepted, _address = self.listener.accept()
        accepted.setblocking(False)
        context = build_context(self.certificates[SERVER], is_server=True)
        trust = Trust(self.reactor, TRUST_DOMAIN)
        session = Session(
            self.reactor, accepted, context, Role.SERVER, trust, Share("shop/server-0")
        )
        session.on_request = self._on_request
        self.sessions.append(session)

    def _on_request(self, session: Session, event: ConnectRequested) -> None:
        self.requests += 1
        self.answer(session, event.stream_id)

    def close(self) -> None:
        """End what is open on both sides."""
        self.reactor.forget(self.listener.fileno())
        self.listener.close()
        end_sessions(self.reactor, self.sessions)
        run_until(self.reactor, lambda: not self.pool._entries and not self.served.connections)

    def connect(self) -> socket.socket:
        """Return the application's end of a captured connection."""
        own, accepted = socket.socketpair()
        own.setblocking(False)
        accepted.setblocking(False)
        self.outbound.serve(self.served, accepted, ("127.0.0.2", 40000))
        return own


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Callable[..., Scene]]:
    with ExitStack() as stack:

        def make(**limits: int) -> Scene:
            netns_fd = netns.create()
            stack.callback(os.close, netns_fd)
            netns.run_in(netns_fd, lambda: netlink.set_up("lo"))
            made = Scene(netns_fd, tmp_path, Bounds(**limits))
            stack.callback(made.close)
            return made

        yield make


def end_tunnel(session: Session, _stream_id: int) -> None:
    session.fail("the peer is restarted")


def say_goodbye(session: Session, stream_id: int) -> None:
    """GOAWAY for a request that was on its way (RFC 9113 §6.8)."""
    session.connection._last_peer_stream_id = max(0, stream_id - 2)
    session.connection.drain()
    session.wants_write()


def refuse_stream(session: Session, stream_id: int) -> None:
    session.channels[stream_id].abort(ErrorCode.REFUSED_STREAM)


def accept_and_end(session: Session, stream_id: int) -> None:
    channel = session.channels[stream_id]
    session.respond(stream_id, 200)
    channel.finish()
    channel.on_end = channel.close


def accept_and_reset(session: Session, stream_id: int) -> None:
    session.respond(stream_id, 200)
    session.channels[stream_id].abort()


def answer_503(session: Session, stream_id: int) -> None:
    session.respond(stream_id, 503)


def reset_stream(session: Session, stream_id: int) -> None:
    session.channels[stream_id].abort()


@pytest.mark.parametrize("first_answer", [end_tunnel, say_goodbye, refuse_stream])
def test_request_that_was_not_heard_is_made_again(
    scene: Callable[..., Scene], first_answer: Callable[[Session, int], None]
) -> None:
    stage = scene()

    def answer(session: Session, stream_id: int) -> None:
        if stage.requests == 1:
            first_answer(session, stream_id)
        else:
            session.channels[stream_id].on_data = lambda data: channel.write(bytes(data))
            channel = session.channels[stream_id]
            session.respond(stream_id, 200)

    stage.answer = answer
    with stage.connect() as application:
        application.sendall(b"question")
        received: list[bytes] = []

        def has_answer() -> bool:
            try:
                received.append(application.recv(64))
            except BlockingIOError:
                return False
            return True

        run_until(stage.reactor, has_answer)
    assert received == [b"question"]
    assert stage.requests == 2


def test_request_to_a_peer_that_has_died_is_made_again(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(life_signs, "LOOK_SECONDS", 0.02)
    stage = scene()
    stage.answer = lambda session, stream_id: session.respond(stream_id, 200)
    with stage.connect():
        run_until(stage.reactor, lambda: stage.requests == 1)
        ((entry,),) = stage.pool._entries.values()
        stage.reactor.forget(stage.sessions[0]._fd)  # it hears nothing any more
        with stage.connect():
            assert entry.session is not None
            entry.session._ping()  # as its timer does, after ten seconds
            run_until(stage.reactor, lambda: stage.requests == 2)
            assert len(stage.sessions) == 2


def test_request_that_the_peer_reset_is_not_made_again(scene: Callable[..., Scene]) -> None:
    stage = scene()
    stage.answer = lambda session, stream_id: session.channels[stream_id].abort()
    with stage.connect():
        run_until(stage.reactor, lambda: not stage.served.connections)
    assert stage.requests == 1


def test_peer_that_never_answers_is_not_asked_for_ever(scene: Callable[..., Scene]) -> None:
    stage = scene()
    stage.answer = end_tunnel
    with stage.connect():
        run_until(stage.reactor, lambda: not stage.served.connections)
    assert stage.requests == TRIES


def test_peer_that_is_silent_is_not_waited_for_for_ever(
    scene: Callable[..., Scene],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(outbound_module, "ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(session_module, "PING_SECONDS", 0.25)
    stage = scene()
    begun = time.monotonic()
    with stage.connect() as application:
        run_until(stage.reactor, lambda: stage.requests and not stage.served.connections)
        assert application.recv(1) == b""
    # Not before it has answered a ping, which says that it has the request.
    assert time.monotonic() - begun > session_module.PING_SECONDS
    assert "the peer did not answer in 0.1 s" in capsys.readouterr().err
    (session,) = stage.sessions
    run_until(stage.reactor, lambda: not session.channels)  # it is told, and the tunnel stays
    assert not session.is_closed
    assert stage.requests == 1


def test_pod_gets_no_more_connections_than_it_may_have(
    scene: Callable[..., Scene], capsys: pytest.CaptureFixture[str]
) -> None:
    stage = scene(connections_per_pod=1)
    stage.answer = lambda session, stream_id: session.respond(stream_id, 200)
    with stage.connect():
        run_until(stage.reactor, lambda: stage.requests)
        assert stage.served.connections == 1
        with stage.connect() as second:
            assert second.recv(1) == b""
        assert stage.served.connections == 1
    assert TOO_MANY in capsys.readouterr().err
    for channel in list(stage.sessions[0].channels.values()):
        channel.abort()
    run_until(stage.reactor, lambda: not stage.served.connections)
    with stage.connect():
        run_until(stage.reactor, lambda: stage.requests == 2)


def test_pod_that_buffers_all_it_may_gets_no_more_connections(
    scene: Callable[..., Scene], capsys: pytest.CaptureFixture[str]
) -> None:
    stage = scene()
    stalled = Stalled(stage.served.share)
    with buffer_limit(stage.reactor, PARTS << 20):
        stalled.keep(1 << 20)
        with stage.connect() as refused:
            assert refused.recv(1) == b""
        stalled.keep(-1 << 20)
        assert FULL in capsys.readouterr().err
        assert stage.requests == 0
        with stage.connect():
            run_until(stage.reactor, lambda: stage.requests)


def test_pod_in_another_network_is_not_dialed(
    scene: Callable[..., Scene], capsys: pytest.CaptureFixture[str]
) -> None:
    stage = scene()
    stage.mesh.put_workload(replace(SERVER_POD, network="west"))
    with stage.connect() as refused:
        assert refused.recv(1) == b""
    assert "shop/server-0 is in network 'west', and there is no gateway" in capsys.readouterr().err
    stage.mesh.put_workload(replace(SERVER_POD, uid="uid-client", addresses=(), network="west"))
    with stage.connect():
        run_until(stage.reactor, lambda: stage.requests)


@pytest.mark.parametrize(
    "answer", [accept_and_end, accept_and_reset, answer_503, reset_stream, refuse_stream]
)
def test_connection_that_has_ended_is_no_cyclic_garbage(
    scene: Callable[..., Scene], answer: Callable[[Session, int], None]
) -> None:
    stage = scene()
    stage.answer = accept_and_end
    with stage.connect() as first:  # dials the tunnel
        first.shutdown(socket.SHUT_WR)
        run_until(stage.reactor, lambda: stage.requests and not stage.served.connections)
    stage.answer = answer
    with no_cyclic_garbage():
        for _ in range(3):
            with stage.connect() as application:
                application.shutdown(socket.SHUT_WR)
                run_until(stage.reactor, lambda: not stage.served.connections)
                run_until(stage.reactor, lambda: not stage.sessions[0].channels)
    assert len(stage.sessions) == 1


def test_destination_outside_the_mesh_that_went_without_a_word_is_noticed(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = [(level, name, 1) for level, name, _value in sockets_module.KEEPALIVE]
    monkeypatch.setattr(sockets_module, "KEEPALIVE", quick)
    stage = scene()
    stage.mesh.remove_workload(SERVER_POD.uid)
    with netns.run_in(stage.served.netns_fd, socket.socket) as listener:
        netns.run_in(stage.served.netns_fd, lambda: listener.bind((str(SERVER_ADDRESS), 80)))
        listener.listen()
        with stage.connect() as application:
            server, _address = listener.accept()
            server.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
            server.close()
            run_until(stage.reactor, lambda: not stage.served.connections)
            assert application.recv(1) == b""
