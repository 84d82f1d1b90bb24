"""Peers that take no stream, and pods that leave: whoever waits is told, and nothing goes on.

Everything is real: sockets, TLS, both ends of the tunnels. Nothing captures here, so the tunnels of
the pool need no namespace of their own, and a pod that has left has none.
"""

from __future__ import annotations

import json
import socket
from contextlib import ExitStack
from ipaddress import ip_address
from typing import TYPE_CHECKING

import pytest

from agent.model.bounds import Bounds
from agent.model.capture import HBONE_PORT, Origin
from agent.model.flag import Flag, flag_of
from agent.model.pod import LocalPod
from agent.model.workload import Workload
from agent.tunnel.access import Ledger
from agent.tunnel.connection import Role
from agent.tunnel.contexts import Contexts
from agent.tunnel.mesh import Mesh
from agent.tunnel.outbound import Outbound
from agent.tunnel.pool import VAIN_DIALS, Pool
from agent.tunnel.reactor import READ, Reactor
from agent.tunnel.served import ServedPod
from agent.tunnel.sockets import PodSockets
from agent.tunnel.trust import Trust
from tests.support.loop import run_until
from tests.support.tunnel import (
    CLIENT,
    SERVER,
    TRUST_DOMAIN,
    Authority,
    Witness,
    end_sessions,
    make_session,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from agent.model.pod import Address
    from agent.tunnel.session import Session

ADDRESS = ip_address("127.15.0.8")  # nobody else's
WORKLOAD = Workload("uid-server", "shop", "server-0", "node-2", "server", (ADDRESS,), is_hbone=True)
HERE = -2  # a namespace descriptor that is none


class SocketsHere(PodSockets):
    """Opens the sockets of a pod in the namespace of this process."""

    def open(self, netns_fd: int, family: int) -> socket.socket:
        if netns_fd != HERE:
            return super().open(netns_fd, family)
        return socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)


class Scene:
    """A pool, what it has answered, and a peer that does with each new tunnel what `greet` says."""

    def __init__(self, authority: Authority, stack: ExitStack) -> None:
        self.reactor = Reactor()
        self._authority = authority
        self._stack = stack
        self.contexts = Contexts(self.reactor, lambda _identity: None)
        self.contexts.put(authority.certificate(CLIENT))
        self.sockets = SocketsHere(lambda _own: None)
        trust = Trust(self.reactor, TRUST_DOMAIN)
        self.pool = Pool(self.reactor, self.sockets, trust, self.contexts, lambda *_line: True)
        pod = LocalPod("uid-client", "shop", "client-0", "client", (ip_address("127.15.0.2"),))
        self.served = ServedPod(pod, CLIENT, HERE, 1)
        self.greet: Callable[[Session, int], None] = lambda _session, _number: None
        self.peer_bounds = Bounds()
        self.tunnels: list[Witness] = []
        self.answers: list[tuple[Session | None, str]] = []
        self._listener = stack.enter_context(socket.create_server((str(ADDRESS), HBONE_PORT)))
        self._server_context = authority.context(SERVER, Role.SERVER)
        self.reactor.watch(self._listener.fileno(), READ, lambda _ready: self._accept())

    def _accept(self) -> None:
        accepted, _address = self._listener.accept()
        session = make_session(
            self.reactor, accepted, self._server_context, Role.SERVER, self.peer_bounds
        )
        self._stack.callback(end_sessions, self.reactor, [session])
        self.tunnels.append(Witness(session))
        self.greet(session, len(self.tunnels))

    def ask(self, count: int) -> None:
        """Ask for tunnels; each that gets one opens a stream at once."""
        context = self._authority.context(CLIENT, Role.CLIENT)

        def on_session(session: Session | None, reason: str) -> None:
            self.answers.append((session, reason))
            if session is not None:
                self._stack.callback(end_sessions, self.reactor, [session])
                session.open_stream(f"{ADDRESS}:80", {})

        for _ in range(count):
            self.pool.acquire(self.served, context, WORKLOAD, ADDRESS, on_session)
        run_until(self.reactor, lambda: len(self.answers) == count)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def scene(authority: Authority) -> Iterator[Scene]:
    with ExitStack() as stack:
        yield Scene(authority, stack)


def say_goodbye(session: Session, _number: int) -> None:
    """GOAWAY right behind the settings: both are in the first record that the client gets."""
    session.connection.drain()


def test_peer_that_says_goodbye_with_its_settings_is_dialed_a_few_times_only(scene: Scene) -> None:
    scene.greet = say_goodbye
    scene.ask(5)
    assert len(scene.tunnels) == VAIN_DIALS == 3
    for session, reason in scene.answers:
        assert session is None
        assert reason == "the peer took no stream on 3 tunnels in a row"
        assert flag_of(reason, Flag.CONNECT) is Flag.HTTP2


def test_peer_that_is_replaced_costs_nobody_a_connection(scene: Scene) -> None:
    def greet(session: Session, number: int) -> None:
        if number < VAIN_DIALS:
            say_goodbye(session, number)

    scene.greet = greet
    scene.ask(5)
    assert len(scene.tunnels) == VAIN_DIALS
    assert all(session is not None for session, _reason in scene.answers)


def test_tunnels_that_take_a_few_streams_each_are_not_in_vain(scene: Scene) -> None:
    scene.peer_bounds = Bounds(streams_per_tunnel=1)
    scene.ask(10)
    assert all(session is not None for session, _reason in scene.answers)
    assert len(scene.tunnels) == 5


class Asked:
    """All connections wanted to go to the server pod, and none may go direct."""

    def lookup(self, _netns_cookie: int, _address: Address, _port: int) -> Origin:
        return Origin(ADDRESS, 80, None)

    def candidate(
        self, _source: ServedPod, _destination_uid: str, _address: Address, _port: int
    ) -> None:
        return None


def test_connection_that_waits_for_a_certificate_while_its_pod_leaves_says_so(
    scene: Scene, authority: Authority, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh = Mesh()
    mesh.put_workload(WORKLOAD)
    outbound = Outbound(
        scene.reactor,
        scene.sockets,
        Asked(),
        mesh,
        scene.pool,
        scene.contexts,
        Asked(),
        Ledger(scene.reactor, mesh),
    )
    scene.contexts.remove(str(CLIENT))
    own, accepted = socket.socketpair()
    with own:
        outbound.serve(scene.served, accepted, ("127.15.0.2", 40000))
        assert scene.served.connections == 1
        scene.pool.close_pod(scene.served.pod.uid)
        scene.served.netns_fd = -1  # as a worker leaves it
        scene.contexts.put(authority.certificate(CLIENT))
        run_until(scene.reactor, lambda: not scene.served.connections)
        assert own.recv(1) == b""
    (line,) = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert line["error"] == "no socket for a tunnel: the pod has left"
    assert scene.tunnels == []
