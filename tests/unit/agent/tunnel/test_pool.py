"""The pool of tunnels: real dials inside a namespace of the test's own."""

from __future__ import annotations

import json
import os
import socket
from contextlib import ExitStack
from dataclasses import replace
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import pytest

from agent import netlink, netns
from agent.model.bounds import Bounds
from agent.model.capture import HBONE_PORT
from agent.model.identity import SpiffeId
from agent.model.pod import LocalPod
from agent.model.workload import Workload
from agent.tunnel import pool as pool_module
from agent.tunnel.access import Ledger
from agent.tunnel.connection import Role
from agent.tunnel.contexts import Contexts
from agent.tunnel.mesh import Mesh
from agent.tunnel.pool import Pool
from agent.tunnel.reactor import READ, Reactor
from agent.tunnel.served import ServedPod
from agent.tunnel.session import Session
from agent.tunnel.sockets import PodSockets
from agent.tunnel.trust import Trust
from tests.support.garbage import no_cyclic_garbage
from tests.support.loop import run_rounds, run_until
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
    import ssl
    from collections.abc import Callable, Iterator

    from agent.model.pod import Address

pytestmark = pytest.mark.root

EMPTY = {"dialing": 0, "idle": 0, "in_use": 0, "draining": 0}
LOOPBACK, OTHER_LOOPBACK = ip_address("127.0.0.1"), ip_address("127.0.0.2")
WORKLOAD = Workload(
    "uid-server", "shop", "server-0", "node-2", "server", (LOOPBACK,), is_hbone=True
)


class Peer:
    """The node at the other end: accepts tunnels on 15008 and answers every CONNECT."""

    def __init__(self, reactor: Reactor, listener: socket.socket, authority: Authority) -> None:
        self.reactor = reactor
        self.listener = listener
        self.context = authority.context(SERVER, Role.SERVER)
        self.tunnels: list[Witness] = []
        reactor.watch(listener.fileno(), READ, lambda _ready: self._accept())

    def _accept(self) -> None:
        accepted, _address = self.listener.accept()
        self.tunnels.append(
            Witness(make_session(self.reactor, accepted, self.context, Role.SERVER))
        )

    def stop_listening(self) -> None:
        self.reactor.forget(self.listener.fileno())
        self.listener.close()


class Setup:
    """A pool that dials the peer, and the answers to its callers."""

    def __init__(self, netns_fd: int, listener: socket.socket, authority: Authority) -> None:
        self.reactor = Reactor()
        self.peer = Peer(self.reactor, listener, authority)
        self.context = authority.context(CLIENT, Role.CLIENT)
        self.contexts = Contexts(self.reactor, lambda _identity: None)
        self.contexts.put(authority.certificate(CLIENT))
        self.ledger = Ledger(self.reactor, Mesh())
        # Nothing captures in this namespace, so nothing must be exempt.
        self.bound()
        pod = LocalPod("uid-client", "shop", "client-0", "client", (OTHER_LOOPBACK,))
        self.served = ServedPod(pod, CLIENT, netns_fd, 1)
        self.answers: list[tuple[Session | None, str]] = []

    def bound(self, first_spare: int | None = None, **limits: Any) -> None:
        """Begin with a new pool that has these limits."""
        self.pool = Pool(
            self.reactor,
            PodSockets(lambda _own: None, first_spare),
            Trust(self.reactor, TRUST_DOMAIN),
            self.contexts,
            self.ledger.may_log,
            Bounds(**limits),
        )

    def ask(
        self,
        count: int = 1,
        served: ServedPod | None = None,
        workload: Workload = WORKLOAD,
        address: Address = LOOPBACK,
        context: ssl.SSLContext | None = None,
    ) -> None:
        """Ask for a tunnel `count` times; each that gets one opens a stream at once."""

        def on_session(session: Session | None, reason: str) -> None:
            self.answers.append((session, reason))
            if session is not None:
                session.open_stream("127.0.0.1:80", {})

        for _ in range(count):
            self.pool.acquire(
                served or self.served, context or self.context, workload, address, on_session
            )

    def until(self, condition: Callable[[], object]) -> None:
        run_until(self.reactor, condition)

    def wait_answers(self, count: int) -> list[Session | None]:
        self.until(lambda: len(self.answers) == count)
        return [session for session, _reason in self.answers]

    def end_streams(self, session: Session) -> None:
        for channel in list(session.channels.values()):
            channel.abort()


@pytest.fixture
def setup(authority: Authority) -> Iterator[Setup]:
    with ExitStack() as stack:
        netns_fd = netns.create()
        stack.callback(os.close, netns_fd)
        netns.run_in(netns_fd, lambda: netlink.set_up("lo"))
        listener = netns.run_in(netns_fd, socket.socket)
        stack.enter_context(listener)
        netns.run_in(netns_fd, lambda: listener.bind(("0.0.0.0", HBONE_PORT)))
        listener.listen()
        before = Session.open_count
        made = Setup(netns_fd, listener, authority)
        yield made
        asked = [session for session, _reason in made.answers]
        unasked = [each.session for entries in made.pool._entries.values() for each in entries]
        of_peer = [tunnel.session for tunnel in made.peer.tunnels]
        every = {each for each in (*asked, *unasked, *of_peer) if each is not None}
        end_sessions(made.reactor, every)
        run_until(made.reactor, lambda: Session.open_count == before)  # nobody asked for some


def test_those_who_ask_while_it_is_dialed_share_the_tunnel(setup: Setup) -> None:
    setup.ask(5)
    assert setup.answers == []
    sessions = setup.wait_answers(5)
    assert sessions[0] is not None
    assert set(sessions) == {sessions[0]}
    assert sessions[0].peer == SERVER
    setup.ask()
    assert setup.answers[-1] == (sessions[0], "")  # at once: it stands
    setup.until(lambda: len(setup.peer.tunnels[0].requests) == 6)
    assert len(setup.peer.tunnels) == 1
    assert setup.peer.tunnels[0].session.peer == CLIENT


def test_tunnel_is_not_shared_beyond_what_it_is_for(setup: Setup) -> None:
    """Source pod and identity, destination, network and address."""
    twin = replace(setup.served.pod, uid="uid-twin")
    other_pod = ServedPod(twin, CLIENT, setup.served.netns_fd, 1)
    setup.ask()
    setup.ask(served=other_pod)
    setup.ask(workload=replace(WORKLOAD, uid="uid-server-2"))
    setup.ask(address=OTHER_LOOPBACK)
    setup.ask(workload=replace(WORKLOAD, network="west"))
    other_self = replace(setup.served, identity=SpiffeId(TRUST_DOMAIN, "shop", "other"))
    setup.ask(served=other_self)
    assert len(set(setup.wait_answers(6))) == 6


def test_tunnels_are_dialed_beside_one_another_and_one_for_each_key(setup: Setup) -> None:
    for number in range(5):
        setup.ask(3, workload=replace(WORKLOAD, uid=f"uid-server-{number}"))
    assert setup.pool.count()["dialing"] == 5
    assert len(set(setup.wait_answers(15))) == 5
    assert len(setup.peer.tunnels) == 5


def test_full_tunnel_gets_a_second_beside_it(setup: Setup) -> None:
    setup.bound(streams_per_tunnel=2)
    setup.ask(3)
    first, second, third = setup.wait_answers(3)
    assert first is second
    assert third is not first
    setup.ask()
    assert setup.answers[-1][0] is third
    setup.ask()
    assert len(set(setup.wait_answers(5))) == 3


def test_stream_beyond_the_last_tunnel_is_refused_and_fits_again_later(setup: Setup) -> None:
    setup.bound(streams_per_tunnel=1, tunnels_per_peer=2)
    setup.ask(3)
    assert setup.answers == [(None, "all 2 tunnels to shop/server-0 are full (--tunnels-per-peer)")]
    first, second = setup.wait_answers(3)[1:]
    assert first is not second
    assert first is not None
    setup.end_streams(first)
    setup.ask()
    assert setup.answers[-1] == (first, "")


def test_tunnel_that_would_take_a_spare_descriptor_is_not_dialed(setup: Setup) -> None:
    setup.bound(first_spare=3)
    setup.ask()
    ((session, reason),) = setup.answers
    assert session is None
    assert "raise the hard limit of open files" in reason
    setup.bound()
    setup.ask()
    assert setup.wait_answers(2)[1] is not None


def test_peer_that_is_silent_in_the_handshake_is_given_up_in_time(setup: Setup) -> None:
    setup.bound(handshake_seconds=0.05)
    setup.reactor.forget(setup.peer.listener.fileno())  # nobody accepts
    setup.ask()
    assert setup.wait_answers(1) == [None]
    assert setup.answers[0][1] == "the peer did not finish the handshake in time"


def test_peer_that_allows_fewer_streams_gets_no_more_of_them(setup: Setup) -> None:
    setup.ask()
    (first,) = setup.wait_answers(1)
    assert first is not None
    first.connection.peer_concurrent_streams = 1
    setup.ask()
    assert setup.wait_answers(2)[1] is not first


def test_peer_with_another_identity_gets_no_stream(setup: Setup) -> None:
    setup.ask(2, workload=replace(WORKLOAD, service_account="admin"))
    assert setup.wait_answers(2) == [None, None]
    for _session, reason in setup.answers:
        assert str(SERVER) in reason
        assert "sa/admin" in reason
    setup.until(lambda: setup.peer.tunnels[0].reasons)
    assert setup.peer.tunnels[0].requests == []


def test_peer_that_does_not_listen_is_named_to_all_that_wait(setup: Setup) -> None:
    setup.peer.stop_listening()
    setup.ask(2)
    assert setup.wait_answers(2) == [None, None]
    assert setup.answers[0][1].startswith("127.0.0.1:15008 cannot be reached: ")


def test_peer_that_hangs_up_is_dialed_anew(setup: Setup) -> None:
    setup.ask()
    (first,) = setup.wait_answers(1)
    assert first is not None
    setup.peer.tunnels[0].session.fail("going away")
    setup.until(lambda: first.is_closed)
    setup.ask()
    assert setup.wait_answers(2)[1] is not first


def test_draining_peer_is_left_for_a_new_tunnel(setup: Setup) -> None:
    setup.ask()
    (first,) = setup.wait_answers(1)
    assert first is not None
    setup.until(lambda: setup.peer.tunnels[0].requests)  # else the goodbye would refuse it
    setup.peer.tunnels[0].session.connection.drain()
    setup.peer.tunnels[0].session.wants_write()
    setup.until(lambda: first.connection.is_draining)
    setup.ask()
    assert setup.wait_answers(2)[1] is not first
    assert not first.is_closed  # its stream goes on
    setup.end_streams(first)
    setup.until(lambda: first.is_closed)


def test_idle_tunnel_is_closed_and_a_used_one_is_not(setup: Setup) -> None:
    setup.bound(idle_seconds=0.05)
    setup.ask()
    (session,) = setup.wait_answers(1)
    assert session is not None
    setup.end_streams(session)
    setup.ask()  # in time
    setup.reactor.call_later(0.1, setup.reactor.stop)
    setup.reactor.run()
    assert not session.is_closed
    setup.end_streams(session)
    setup.until(lambda: session.is_closed)
    setup.until(lambda: setup.peer.tunnels[0].reasons)


@pytest.mark.parametrize("account", ["server", "admin"], ids=["idle", "refused"])
def test_tunnel_that_has_ended_is_no_cyclic_garbage(setup: Setup, account: str) -> None:
    setup.bound(idle_seconds=0.01)
    before = Session.open_count
    with no_cyclic_garbage():
        setup.ask(workload=replace(WORKLOAD, service_account=account))
        for session in setup.wait_answers(1):
            if session is not None:
                setup.end_streams(session)
                del session
        setup.until(lambda: setup.pool.count() == EMPTY)
        setup.until(lambda: Session.open_count == before)
        setup.answers.clear()
        setup.peer.tunnels.clear()


def test_pod_that_leaves_closes_its_tunnels_when_they_are_idle(setup: Setup) -> None:
    twin = ServedPod(replace(setup.served.pod, uid="uid-twin"), CLIENT, setup.served.netns_fd, 1)
    setup.ask()
    setup.ask(address=OTHER_LOOPBACK)
    setup.ask(served=twin)
    busy, unused, of_twin = setup.wait_answers(3)
    assert busy is not None
    assert unused is not None
    assert of_twin is not None
    setup.end_streams(unused)
    setup.end_streams(of_twin)
    setup.pool.close_pod("uid-client")
    setup.until(lambda: unused.is_closed)
    run_rounds(setup.reactor, 5)
    assert not busy.is_closed
    setup.end_streams(busy)
    setup.until(lambda: busy.is_closed)
    assert not of_twin.is_closed


def test_renewed_certificate_gets_new_tunnels_and_open_streams_go_on(setup: Setup) -> None:
    setup.ask(2)
    old, _same = setup.wait_answers(2)
    assert old is not None
    setup.pool.renew("spiffe://cluster.local/ns/shop/sa/other")
    setup.ask()
    assert setup.answers[-1][0] is old
    setup.pool.renew(str(CLIENT))
    setup.ask()
    assert setup.wait_answers(4)[3] is not old
    setup.until(lambda: len(setup.peer.tunnels[0].requests) == 3)
    assert not old.is_closed
    setup.end_streams(old)
    setup.until(lambda: old.is_closed)
    assert setup.answers[3][0] is not None
    assert not setup.answers[3][0].is_closed


def test_renewed_certificate_closes_a_tunnel_that_nobody_uses(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "IN_USE_SECONDS", 0.0)
    setup.ask()
    (session,) = setup.wait_answers(1)
    assert session is not None
    setup.end_streams(session)
    setup.pool.renew(str(CLIENT))
    setup.until(lambda: session.is_closed)
    assert setup.pool.count() == EMPTY


def goodbye(tunnel: Witness) -> None:
    """Say GOAWAY as an agent does that ends: streams on the way are served."""
    tunnel.session.drain()


def use(setup: Setup) -> Session:
    """Return a tunnel whose peer has heard of its stream."""
    setup.ask()
    (session,) = setup.wait_answers(1)
    assert session is not None
    setup.until(lambda: setup.peer.tunnels[0].requests)
    return session


@pytest.mark.parametrize("has_stream", [True, False])
def test_tunnel_in_use_that_ends_has_the_next_one_ready_before_anybody_asks(
    setup: Setup, has_stream: bool
) -> None:
    first = use(setup)
    if not has_stream:  # as between two short connections
        setup.end_streams(first)
    goodbye(setup.peer.tunnels[0])
    setup.until(lambda: not first.connection.may_open and setup.pool.count()["idle"])
    setup.ask()
    second, _reason = setup.answers[1]  # at once
    assert second is not None
    assert second is not first
    assert first.is_closed == (not has_stream)
    setup.until(lambda: len(setup.peer.tunnels[1].requests) == 1)


def test_next_tunnel_after_a_renewal_has_the_new_certificate(
    setup: Setup, authority: Authority
) -> None:
    use(setup)
    setup.contexts.put(authority.certificate(CLIENT))
    setup.pool.renew(str(CLIENT))
    setup.until(lambda: setup.pool.count()["idle"])
    proofs = [tunnel.session.proof for tunnel in setup.peer.tunnels]
    assert proofs[0] is not None
    assert proofs[1] is not None
    assert proofs[0].fingerprint != proofs[1].fingerprint


def test_who_waits_for_a_certificate_gets_a_tunnel_that_stays(
    setup: Setup, authority: Authority
) -> None:
    setup.contexts.remove(str(CLIENT))
    setup.contexts.client(str(CLIENT), lambda context, _reason: setup.ask(context=context))
    # In this order, as a worker does.
    setup.contexts.put(authority.certificate(CLIENT))
    setup.pool.renew(str(CLIENT))
    setup.wait_answers(1)
    run_rounds(setup.reactor, 5)
    assert setup.pool.count() == EMPTY | {"in_use": 1}
    setup.contexts.put(authority.certificate(CLIENT))
    setup.pool.renew(str(CLIENT))
    setup.until(lambda: setup.pool.count() == EMPTY | {"draining": 1, "idle": 1})


def test_tunnel_that_drains_leaves_its_place_to_the_next_one(setup: Setup) -> None:
    setup.bound(tunnels_per_peer=1)
    first = use(setup)
    setup.pool.is_retiring = True  # so that nothing is dialed before it is asked for
    first.drain()
    setup.ask()
    second = setup.wait_answers(2)[1]
    assert second is not None
    assert second is not first
    assert not first.is_closed


def test_several_tunnels_that_end_have_one_next_one(setup: Setup) -> None:
    setup.bound(streams_per_tunnel=1)
    setup.ask(3)
    setup.wait_answers(3)
    setup.until(lambda: all(tunnel.requests for tunnel in setup.peer.tunnels))
    for tunnel in setup.peer.tunnels[:3]:
        goodbye(tunnel)
    setup.until(lambda: setup.pool.count()["idle"])
    run_rounds(setup.reactor, 10)
    assert setup.pool.count() == EMPTY | {"draining": 3, "idle": 1}


def test_peer_that_says_goodbye_to_every_tunnel_is_not_dialed_for_ever(setup: Setup) -> None:
    use(setup)
    goodbye(setup.peer.tunnels[0])
    setup.until(lambda: setup.pool.count()["idle"])
    setup.until(lambda: setup.peer.tunnels[1].is_ready)
    goodbye(setup.peer.tunnels[1])  # nobody has used it
    setup.until(lambda: not setup.pool.count()["idle"])
    run_rounds(setup.reactor, 10)
    assert setup.pool.count() == EMPTY | {"draining": 1}


@pytest.mark.parametrize("how", ["pod left", "retiring"])
def test_nothing_is_dialed_for_who_ends(setup: Setup, how: str) -> None:
    use(setup)
    if how == "pod left":
        setup.pool.close_pod("uid-client")
    else:
        setup.pool.is_retiring = True
    goodbye(setup.peer.tunnels[0])
    setup.until(lambda: setup.pool.count()["draining"])
    run_rounds(setup.reactor, 10)
    assert setup.pool.count() == EMPTY | {"draining": 1}


def test_tunnel_that_is_dialed_while_its_pod_leaves_is_closed(setup: Setup) -> None:
    use(setup)
    goodbye(setup.peer.tunnels[0])
    setup.until(lambda: setup.pool.count()["dialing"])
    setup.pool.close_pod("uid-client")
    setup.until(lambda: setup.pool.count() == EMPTY | {"draining": 1})
    setup.until(lambda: setup.peer.tunnels[1].reasons)


def test_tunnel_that_waits_for_a_certificate_while_its_pod_leaves_is_not_dialed(
    setup: Setup, authority: Authority
) -> None:
    use(setup)
    setup.contexts.remove(str(CLIENT))
    goodbye(setup.peer.tunnels[0])
    setup.until(lambda: setup.pool.count()["dialing"])
    setup.pool.close_pod("uid-client")
    setup.contexts.put(authority.certificate(CLIENT))
    assert setup.pool.count() == EMPTY | {"draining": 1}


def test_tunnel_that_was_dialed_with_the_old_certificate_serves_who_waited_only(
    setup: Setup,
) -> None:
    setup.ask(2)
    setup.pool.renew(str(CLIENT))
    first, second = setup.wait_answers(2)
    assert first is second
    setup.ask()
    assert setup.wait_answers(3)[2] is not first


def test_refused_peer_is_logged_with_its_code(
    setup: Setup, capfd: pytest.CaptureFixture[str]
) -> None:
    setup.ask(workload=replace(WORKLOAD, service_account="admin"))
    setup.wait_answers(1)
    (line,) = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert (line["message"], line["code"]) == ("tunnel refused", "peer_unexpected")


def test_peers_that_are_refused_one_after_the_other_are_logged_up_to_the_limit(
    setup: Setup, capfd: pytest.CaptureFixture[str]
) -> None:
    setup.ledger.set_limit(2)
    for count in range(1, 6):
        setup.ask(workload=replace(WORKLOAD, service_account="admin"))
        setup.wait_answers(count)
    assert capfd.readouterr().err.count("tunnel refused") == 2
