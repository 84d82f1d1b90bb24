"""The inbound side of a pod at its limits: real tunnels, real plaintext, and the application."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from agent import netlink, netns
from agent.model.bounds import DEFAULT_BOUNDS, Bounds
from agent.model.pod import LocalPod
from agent.model.service import Service
from agent.model.workload import Workload
from agent.tunnel import buffers as buffers_module
from agent.tunnel import inbound as inbound_module
from agent.tunnel import tcp
from agent.tunnel.access import Ledger
from agent.tunnel.buffers import FULL, PARTS
from agent.tunnel.connection import Role
from agent.tunnel.contexts import Contexts
from agent.tunnel.gate import Gate
from agent.tunnel.inbound import Inbound
from agent.tunnel.mesh import Mesh
from agent.tunnel.reactor import Reactor
from agent.tunnel.served import TOO_MANY, ServedPod
from agent.tunnel.session import Session
from agent.tunnel.sockets import PodSockets
from agent.tunnel.trust import Trust
from tests.support.garbage import no_cyclic_garbage
from tests.support.loop import run_rounds, run_until
from tests.support.stalled import Stalled
from tests.support.tunnel import CLIENT, SERVER, TRUST_DOMAIN, Authority, Witness, make_session
from tests.support.wire import buffer_limit, tcp_pair

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.root

ADDRESS = ip_address("127.0.0.1")
PORT = 8080
WORKLOAD = Workload("uid-server", "shop", "server-0", "node-2", "server", (ADDRESS,), is_hbone=True)
LOGGED = 2  # times: a line of the log has a reason as its result, and as its error


class Scene:
    """A pod in a namespace of its own, whose application listens and never answers."""

    def __init__(
        self, netns_fd: int, authority: Authority, stack: ExitStack, bounds: Bounds
    ) -> None:
        self._stack = stack
        self._authority = authority
        self.reactor = Reactor()
        self.mesh = mesh = Mesh()
        mesh.put_workload(WORKLOAD)
        self.gate = gate = Gate(mesh)
        gate.enforce()
        contexts = Contexts(self.reactor, lambda _identity: None)
        contexts.put(authority.certificate(SERVER))
        self.ledger = ledger = Ledger(self.reactor, mesh)
        self.inbound = Inbound(
            self.reactor,
            PodSockets(lambda _own: None),
            Trust(self.reactor, TRUST_DOMAIN),
            contexts,
            gate,
            ledger,
            bounds,
        )
        pod = LocalPod("uid-server", "shop", "server-0", "server", (ADDRESS,))
        self.served = ServedPod(pod, SERVER, netns_fd, 1)
        self.application = stack.enter_context(netns.run_in(netns_fd, socket.socket))
        netns.run_in(netns_fd, lambda: self.application.bind((str(ADDRESS), PORT)))
        self.application.listen()
        self.sessions_before = before = Session.open_count
        # What was closed in order lingers until the other side has hung up.
        stack.callback(run_until, self.reactor, lambda: Session.open_count == before)

    def tunnel(self) -> Witness:
        """Return a client's tunnel to the pod."""
        ours, theirs = tcp_pair()
        self.inbound.serve_tunnel(self.served, theirs, (str(ADDRESS), 40000))
        context = self._authority.context(CLIENT, Role.CLIENT)
        made = Witness(make_session(self.reactor, ours, context, Role.CLIENT))
        self._stack.callback(self.end, made)
        run_until(self.reactor, lambda: made.is_ready)
        return made

    def end(self, tunnel: Witness) -> None:
        """Hang up, and wait until the other side has noticed."""
        before = self.inbound.tunnels
        if not tunnel.session.is_closed:
            tunnel.session.fail("the test is over")
            run_until(self.reactor, lambda: self.inbound.tunnels < before)

    def ask(self, tunnel: Witness, headers: dict[str, str] | None = None) -> list[int]:
        """Open a stream; the list has its answer, once there is one."""
        answers: list[int] = []
        stream_id = tunnel.session.open_stream(f"{ADDRESS}:{PORT}", headers or {})
        tunnel.session.channels[stream_id].on_response = answers.append
        return answers

    def wait_some(self, answers: list[int]) -> list[int]:
        """Wait for an answer, for a quarter of a second."""
        timer = self.reactor.call_later(0.25, lambda: None)
        run_until(self.reactor, lambda: answers or timer.callback is None)
        timer.cancel()
        return answers

    def wait(self, answers: list[int]) -> int:
        run_until(self.reactor, lambda: answers)
        return answers[0]

    def plaintext(self) -> socket.socket:
        """Return the client's end of a captured connection, as after capture at PORT."""
        with socket.create_server((str(ADDRESS), 0)) as listener:
            client = self._stack.enter_context(socket.create_connection(listener.getsockname()))
            accepted, peer = listener.accept()
        accepted.setblocking(False)
        client.setblocking(False)
        self.inbound.serve_plaintext(self.served, accepted, peer)
        return client


def is_reset(client: socket.socket) -> bool:
    try:
        client.recv(1)
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True
    raise AssertionError("the connection ended in order")


@pytest.fixture
def scene(authority: Authority) -> Iterator[Callable[..., Scene]]:
    with ExitStack() as stack:

        def make(**limits: float) -> Scene:
            netns_fd = netns.create()
            stack.callback(os.close, netns_fd)
            netns.run_in(netns_fd, lambda: netlink.set_up("lo"))
            bounds = Bounds(**limits)  # type: ignore[arg-type]  # each of its own type
            return Scene(netns_fd, authority, stack, bounds)

        yield make


def test_tunnel_that_carries_nothing_is_closed_in_time(scene: Callable[..., Scene]) -> None:
    stage = scene(idle_seconds=0.05)
    unused, used = stage.tunnel(), stage.tunnel()
    assert stage.wait(stage.ask(used)) == 200
    run_until(stage.reactor, lambda: unused.reasons)
    stage.reactor.call_later(0.2, stage.reactor.stop)
    stage.reactor.run()
    assert used.reasons == []
    for channel in list(used.session.channels.values()):
        channel.abort()
    run_until(stage.reactor, lambda: used.reasons)
    assert stage.inbound._idle_timers == {}


def test_tunnel_that_has_ended_is_no_cyclic_garbage(scene: Callable[..., Scene]) -> None:
    stage = scene(idle_seconds=0.05, handshake_seconds=0.05)
    with no_cyclic_garbage():
        tunnel = stage.tunnel()
        ours, theirs = tcp_pair()
        with ours:  # silent in the handshake
            stage.inbound.serve_tunnel(stage.served, theirs, (str(ADDRESS), 40000))
            run_until(stage.reactor, lambda: stage.inbound.tunnels == 0)
        run_until(stage.reactor, lambda: tunnel.reasons)
        run_until(stage.reactor, lambda: Session.open_count == stage.sessions_before)


def test_pod_gets_no_more_connections_than_it_may_have(
    scene: Callable[..., Scene], capsys: pytest.CaptureFixture[str]
) -> None:
    stage = scene(connections_per_pod=1)
    tunnel = stage.tunnel()
    assert stage.wait(stage.ask(tunnel)) == 200
    assert stage.wait(stage.ask(tunnel)) == 503
    assert is_reset(stage.plaintext())
    assert capsys.readouterr().err.count(TOO_MANY) == 2 * LOGGED
    next(iter(tunnel.session.channels.values())).abort()
    run_until(stage.reactor, lambda: not stage.served.connections)
    assert stage.wait(stage.ask(tunnel)) == 200


def test_pod_gets_no_more_tunnels_than_connections(
    scene: Callable[..., Scene], capsys: pytest.CaptureFixture[str]
) -> None:
    stage = scene(connections_per_pod=1)
    only = stage.tunnel()
    ours, theirs = tcp_pair()
    with ours:
        stage.inbound.serve_tunnel(stage.served, theirs, (str(ADDRESS), 40000))
        assert is_reset(ours)
    assert TOO_MANY in capsys.readouterr().err
    stage.end(only)
    assert stage.wait(stage.ask(stage.tunnel())) == 200


def test_pod_that_buffers_all_it_may_refuses_both_kinds(
    scene: Callable[..., Scene], capsys: pytest.CaptureFixture[str]
) -> None:
    stage = scene()
    tunnel = stage.tunnel()
    with buffer_limit(stage.reactor, PARTS << 20):
        stalled = Stalled(stage.served.share)
        stalled.keep(1 << 20)
        assert stage.wait(stage.ask(tunnel)) == 503
        assert is_reset(stage.plaintext())
        stalled.keep(-1 << 20)
    assert capsys.readouterr().err.count(FULL) == 2 * LOGGED
    assert not is_full(stage)
    assert stage.wait(stage.ask(tunnel)) == 200


def test_bytes_for_an_application_that_does_not_accept_cost_the_stream_once_there_is_no_room(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(buffers_module, "FULL_SECONDS", 0.1)
    stage = scene()
    stage.application.listen(0)
    stage.application.setblocking(False)
    tunnel = stage.tunnel()
    count = 1
    while stage.wait_some(answers := stage.ask(tunnel)):
        count += 1  # until its queue is full
    with buffer_limit(stage.reactor, PARTS << 20):
        *_, waiting = tunnel.session.channels.values()
        waiting.write(bytes(1 << 20))
        run_until(stage.reactor, lambda: is_full(stage))
        assert stage.wait(answers) == 503
        assert not is_full(stage)
    assert f"503: {FULL}" in capsys.readouterr().err
    accepted: list[socket.socket] = []

    def accept() -> bool:
        with suppress(BlockingIOError):
            accepted.append(stage.application.accept()[0])
        return len(accepted) == count

    stage.wait_some([])
    assert not accept()  # the last one is dialed no more
    assert len(accepted) == count - 1
    for each in accepted:
        each.close()


def test_request_that_is_reset_leaves_no_dial_behind(scene: Callable[..., Scene]) -> None:
    stage = scene()
    stage.application.listen(0)
    tunnel = stage.tunnel()
    while stage.wait_some(stage.ask(tunnel)):
        pass  # until its queue is full
    before = count_descriptors()
    *_, waiting = tunnel.session.channels.values()
    waiting.abort()
    run_rounds(stage.reactor, 10)
    assert count_descriptors() == before - 1


def count_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_tunnels_of_nobody_are_bounded(
    scene: Callable[..., Scene],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(inbound_module, "MOST_HANDSHAKES_OF_POD", 2)
    stage = scene(handshake_seconds=0.5)
    stage.tunnel()  # does not count: it has proved who it is
    silent = [tcp_pair() for _ in range(3)]
    with ExitStack() as stack:
        for ours, theirs in silent:
            stack.enter_context(ours)
            stage.inbound.serve_tunnel(stage.served, theirs, (str(ADDRESS), 40000))
        assert stage.inbound.tunnels == 3
        assert is_reset(silent[-1][0])
        assert inbound_module.TOO_MANY_HANDSHAKES in capsys.readouterr().err
        run_until(stage.reactor, lambda: stage.inbound.tunnels == 1)
    stage.tunnel()  # there is room again


def is_full(stage: Scene) -> bool:
    return stage.served.share.is_full


def test_bytes_before_the_answer_are_bounded_like_those_after_it(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = tcp.connect

    def late(reactor: Reactor, own: socket.socket, *rest: Any) -> Callable[[], None]:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)

        def connect_now() -> None:
            connect(reactor, own, *rest)

        return reactor.call_later(0.05, connect_now).cancel

    monkeypatch.setattr(tcp, "connect", late)
    stage = scene()
    stage.application.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    tunnel = stage.tunnel()
    channel = tunnel.session.channels[tunnel.session.open_stream(f"{ADDRESS}:{PORT}", {})]
    answers: list[int] = []
    channel.on_response = answers.append

    def fill() -> None:
        while channel.buffered < 1 << 20:
            channel.write(bytes(1 << 18))

    channel.on_drained = fill
    fill()
    assert stage.wait(answers) == 200
    stage.wait_some([])  # the application reads nothing
    assert 0 < stage.served.share.held <= 2 * DEFAULT_BOUNDS.stream_buffer_bytes


def test_peer_that_is_silent_is_hung_up_in_time(scene: Callable[..., Scene]) -> None:
    stage = scene(handshake_seconds=0.05)
    ours, theirs = tcp_pair()
    with ours:
        stage.inbound.serve_tunnel(stage.served, theirs, (str(ADDRESS), 40000))
        run_until(stage.reactor, lambda: stage.inbound.tunnels == 0)
        assert is_reset(ours)


def test_peer_names_no_service_that_there_is_not(scene: Callable[..., Scene]) -> None:
    """Each would be a series of metrics, for as long as the pod lives."""
    stage = scene()
    stage.mesh.put_service(Service("shop", "web", (), (), ()))
    tunnel = stage.tunnel()
    hosts = (
        "web.shop.svc.cluster.local",
        "web.shop.svc.elsewhere",
        "made-up.shop.svc.cluster.local",
    )
    for host in hosts:
        stage.wait(stage.ask(tunnel, {"forwarded": f'for="10.0.0.1";host={host}'}))
    found, _last = stage.ledger.list(0, 10, None, None)
    known = "web.shop.svc.cluster.local"
    assert [each.service for each in found] == [known, known, None]


@pytest.mark.parametrize(
    ("target", "headers"),
    [
        ("a" * 10_000, {}),
        (f"[fe80::1%{'a' * 10_000}]:{PORT}", {}),
        (f"{ADDRESS}:{PORT}", {"A" * 10_000: "a"}),
    ],
    ids=["no address", "a long scope", "no name of a field"],
)
def test_little_is_logged_of_what_a_peer_says(
    scene: Callable[..., Scene],
    capsys: pytest.CaptureFixture[str],
    target: str,
    headers: dict[str, str],
) -> None:
    stage = scene()
    tunnel = stage.tunnel()
    answers: list[int] = []
    stream_id = tunnel.session.open_stream(target, headers)
    tunnel.session.channels[stream_id].on_response = answers.append
    assert stage.wait(answers) == 400
    logged = capsys.readouterr().err
    assert "400: " in logged
    assert len(logged) < 2500


def test_headers_beyond_their_size_cost_the_tunnel(scene: Callable[..., Scene]) -> None:
    stage = scene(header_bytes=1024)
    small, large = stage.tunnel(), stage.tunnel()
    assert stage.wait(stage.ask(small, {"baggage": "b" * 700})) == 200
    answers = stage.ask(large, {"baggage": "b" * 2000})
    run_until(stage.reactor, lambda: large.reasons)
    assert answers == []
    run_rounds(stage.reactor, 3)
    assert small.reasons == []


def test_streams_beyond_twice_our_own_number_are_refused_alone(
    scene: Callable[..., Scene],
) -> None:
    stage = scene(streams_per_tunnel=1)
    tunnel = stage.tunnel()
    assert [stage.wait(stage.ask(tunnel)) for _ in range(2)] == [200, 200]
    tunnel.session.connection.peer_concurrent_streams = 3  # a peer that does not care
    stage.ask(tunnel)
    run_until(stage.reactor, lambda: len(tunnel.session.channels) == 2)
    assert tunnel.reasons == []


def end(tunnel: Witness, stage: Scene, application: socket.socket) -> None:
    """Both sides end in order."""
    for channel in tunnel.session.channels.values():
        channel.on_end = channel.close
        channel.finish()
    application.shutdown(socket.SHUT_WR)
    run_until(stage.reactor, lambda: not tunnel.session.channels)


def reset(tunnel: Witness, _stage: Scene, _application: socket.socket) -> None:
    """The client resets."""
    for channel in list(tunnel.session.channels.values()):
        channel.abort()


def revoke(tunnel: Witness, stage: Scene, _application: socket.socket) -> None:
    """Policy ends it."""
    stage.mesh.remove_workload(WORKLOAD.uid)
    stage.gate.enforce()
    run_until(stage.reactor, lambda: not tunnel.session.channels)
    stage.mesh.put_workload(WORKLOAD)


@pytest.mark.parametrize("finish", [end, reset, revoke])
def test_connection_that_has_ended_is_no_cyclic_garbage(
    scene: Callable[..., Scene], finish: Callable[[Witness, Scene, socket.socket], None]
) -> None:
    stage = scene()
    tunnel = stage.tunnel()
    with no_cyclic_garbage():
        for _ in range(3):
            assert stage.wait(stage.ask(tunnel)) == 200
            with stage.application.accept()[0] as application:
                finish(tunnel, stage, application)
                run_until(stage.reactor, lambda: not stage.served.connections)


def test_request_that_is_refused_is_no_cyclic_garbage(scene: Callable[..., Scene]) -> None:
    stage = scene()
    tunnel = stage.tunnel()
    stage.application.close()
    with no_cyclic_garbage():
        for _ in range(3):
            assert stage.wait(stage.ask(tunnel)) == 503
            run_until(stage.reactor, lambda: not tunnel.session.channels)


def test_plaintext_that_has_ended_is_no_cyclic_garbage(scene: Callable[..., Scene]) -> None:
    stage = scene()
    stage.application.close()
    with no_cyclic_garbage():
        for _ in range(3):
            client = stage.plaintext()
            run_until(stage.reactor, lambda: not stage.served.connections)
            assert is_reset(client)
