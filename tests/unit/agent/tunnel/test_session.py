"""A tunnel between two sessions: real TLS over a real pair of sockets."""

from __future__ import annotations

import select
import socket
import ssl
import time
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING

import pytest

from agent.errors import PeerRevoked, PeerUnexpected
from agent.model.bounds import DEFAULT_BOUNDS, Bounds
from agent.model.identity import SpiffeId
from agent.tunnel import life_signs, sockets
from agent.tunnel import session as session_module
from agent.tunnel.connection import Role
from agent.tunnel.frames import ErrorCode, build_ping
from agent.tunnel.reactor import READ, Reactor
from tests.support.joined import Stream, Tunnel
from tests.support.loop import run_rounds, run_until
from tests.support.tunnel import CLIENT, SERVER, Authority, Witness, end_sessions, make_session
from tests.support.wire import tcp_pair

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.joined import Join


SENT = 50_000  # bytes, that both sockets take at once


def test_both_ends_know_each_other_by_their_certificates(tunnel: Tunnel) -> None:
    assert tunnel.client.session.peer == SERVER
    assert tunnel.server.session.peer == CLIENT
    assert tunnel.client.reasons == tunnel.server.reasons == []


@pytest.mark.parametrize(("count", "is_written"), [(3, False), (4, True), (7, True)])
def test_of_many_streams_the_first_leave_before_the_round_ends(
    tunnel: Tunnel, count: int, is_written: bool
) -> None:
    found: list[bool] = []

    def open_all() -> None:
        for _ in range(count):
            tunnel.client.session.open_stream("10.0.0.1:80", {})

    def look() -> None:  # in the same round
        events = select.poll()
        events.register(tunnel.server.session._socket, select.POLLIN)
        found.append(bool(events.poll(0)))

    tunnel.reactor.call_soon(open_all)
    tunnel.reactor.call_soon(look)
    tunnel.until(lambda: len(tunnel.server.requests) == count)
    assert found == [is_written]


def test_refusal_reaches_the_client_and_leaves_no_stream(tunnel: Tunnel) -> None:
    near, _far = tunnel.open(status=503)
    assert tunnel.server.session.channels == {}
    tunnel.until(lambda: near.seen)
    assert near.seen[-1] in ("end", "abort")


def test_streams_share_the_socket_in_turns(tunnel: Tunnel) -> None:
    size = 8 * session_module.UNSENT_BYTES  # many turns
    streams = [tunnel.open() for _ in range(4)]
    for near, _far in streams:
        near.channel.write(b"x" * size)
    progress: list[list[int]] = []

    def one_has_arrived() -> bool:
        progress.append([len(far.received) for _near, far in streams])
        return max(progress[-1]) == size

    tunnel.until(one_has_arrived)
    # None is far behind when the first is through.
    assert min(progress[-1]) > size // 2


def test_goodbye_ends_both_and_aborts_open_streams(tunnel: Tunnel) -> None:
    near, far = tunnel.open()
    tunnel.server.session.close()
    tunnel.until(lambda: tunnel.client.reasons and tunnel.server.reasons)
    assert near.seen == far.seen == ["abort"]
    assert tunnel.server.reasons == ["the tunnel was ended"]
    assert tunnel.client.reasons == ["the peer closed the tunnel"]
    tunnel.client.session.close()  # nothing is left to do
    tunnel.client.session.fail("again")
    assert len(tunnel.client.reasons) == 1


@pytest.fixture
def last_words(tunnel: Tunnel, monkeypatch: pytest.MonkeyPatch) -> Stream:
    """Return the server's end of a stream that is complete, and that the server has yet to read.

    It reads little at a time, and writes in between.
    """
    near, far = tunnel.open()
    far.channel.finish()
    tunnel.until(lambda: near.seen)
    client, server = tunnel.client.session, tunnel.server.session
    monkeypatch.setattr(session_module, "_raw", memoryview(bytearray(1000)))

    def answer(data: bytes | memoryview) -> None:
        far.received.extend(data)
        server.connection.ping(b"sidestep")

    far.channel.on_data = answer
    near.channel.write(bytes(SENT))
    near.channel.finish()
    client.write_now()
    assert client.buffered == 0
    return far


def test_tunnel_that_is_closed_in_order_is_read_to_its_end(
    tunnel: Tunnel, last_words: Stream
) -> None:
    tunnel.client.session.close()
    tunnel.client.session.write_now()
    assert tunnel.client.reasons == ["the tunnel was ended"]
    tunnel.until(lambda: tunnel.server.reasons)
    assert (len(last_words.received), last_words.seen) == (SENT, ["end"])
    assert tunnel.server.reasons == ["the peer closed the tunnel"]


def test_what_came_before_a_reset_is_read(tunnel: Tunnel, last_words: Stream) -> None:
    tunnel.reactor.forget(tunnel.client.session._fd)
    sockets.abort(tunnel.client.session._socket)
    tunnel.until(lambda: tunnel.server.reasons)
    assert (len(last_words.received), last_words.seen) == (SENT, ["end"])
    assert "Error" in tunnel.server.reasons[0]


def test_draining_peer_with_no_stream_makes_the_tunnel_idle(tunnel: Tunnel) -> None:
    tunnel.server.session.connection.drain()
    tunnel.server.session.wants_write()
    tunnel.until(lambda: tunnel.client.idle)
    assert not tunnel.client.session.connection.may_open


def test_peer_that_breaks_http2_is_dropped_with_a_reason(tunnel: Tunnel) -> None:
    tunnel.client.session.connection._output.append(b"\0\0\1\x09\0\0\0\0\1x")
    tunnel.client.session.wants_write()
    tunnel.until(lambda: tunnel.server.reasons)
    assert tunnel.server.reasons == ["the peer broke HTTP/2: CONTINUATION of nothing"]
    tunnel.until(lambda: tunnel.client.reasons)


def test_defect_of_ours_costs_one_tunnel(tunnel: Tunnel, monkeypatch: pytest.MonkeyPatch) -> None:
    near, _far = tunnel.open()

    def fail(_data: bytes | memoryview) -> None:
        raise ValueError("Exceeds the limit of an integer")

    monkeypatch.setattr(tunnel.server.session.connection, "receive", fail)
    near.channel.write(b"anything")
    tunnel.until(lambda: tunnel.server.reasons and tunnel.client.reasons)
    (reason,) = tunnel.server.reasons
    assert reason == "a defect of Sidestep: ValueError: Exceeds the limit of an integer"


# -- handshakes that fail -----------------------------------------------------------------------


def test_peer_of_another_trust_domain_is_refused_by_name(authority: Authority, join: Join) -> None:
    stranger = SpiffeId("example.org", "shop", "client")
    tunnel = join(client=authority.context(stranger, Role.CLIENT))
    tunnel.until(lambda: tunnel.server.reasons and tunnel.client.reasons)
    assert "example.org" in tunnel.server.reasons[0]
    assert not tunnel.server.is_ready


def test_peer_of_another_authority_is_refused(tmp_path: Path, join: Join) -> None:
    stranger = Authority(tmp_path).context(CLIENT, Role.CLIENT)
    stranger.verify_mode = ssl.CERT_NONE  # it would take anybody; it is the server that refuses
    tunnel = join(client=stranger)
    tunnel.until(lambda: tunnel.server.reasons and tunnel.client.reasons)
    assert "certificate" in tunnel.server.reasons[0].lower()
    assert not tunnel.server.is_ready


def test_peer_without_h2_is_refused(authority: Authority, join: Join) -> None:
    context = authority.context(CLIENT, Role.CLIENT)
    context.set_alpn_protocols(["http/1.1"])
    tunnel = join(client=context)
    tunnel.until(lambda: tunnel.server.reasons and tunnel.client.reasons)
    assert tunnel.server.reasons == ["the peer does not offer h2 in ALPN"]
    assert not tunnel.server.is_ready


class RawPeer:
    """A server whose peer is a plain socket."""

    def __init__(self, authority: Authority, bounds: Bounds = DEFAULT_BOUNDS) -> None:
        self.reactor = Reactor()
        self.socket, theirs = tcp_pair()
        context = authority.context(SERVER, Role.SERVER)
        self.server = Witness(make_session(self.reactor, theirs, context, Role.SERVER, bounds))

    def wait_closed(self) -> str:
        run_until(self.reactor, lambda: self.server.reasons)
        self.socket.close()
        (reason,) = self.server.reasons
        return reason


def test_garbage_is_no_handshake(authority: Authority) -> None:
    peer = RawPeer(authority)
    peer.socket.send(b"GET / HTTP/1.1\r\n\r\n")
    assert "SSLError" in peer.wait_closed()


def test_end_before_the_handshake_is_told(authority: Authority) -> None:
    peer = RawPeer(authority)
    peer.socket.shutdown(socket.SHUT_WR)
    assert "EOF" in peer.wait_closed()


def test_handshake_that_has_no_end_is_given_up(authority: Authority) -> None:
    peer = RawPeer(authority)
    peer.socket.setblocking(False)
    # A ClientHello of 100 KiB, in records of 16 KiB.
    peer.socket.send(b"\x16\x03\x01\x40\x00" + b"\x01\x01\x90\x00" + bytes(16380))
    for _ in range(20):
        with suppress(OSError):
            peer.socket.send(b"\x16\x03\x01\x40\x00" + bytes(16384))
        run_rounds(peer.reactor, 2)
    assert peer.wait_closed() == "the peer's part of the handshake is too long"
    assert peer.server.session.handshake_failure == "handshake_too_long"


def test_silence_before_the_handshake_has_a_deadline(authority: Authority) -> None:
    peer = RawPeer(authority, Bounds(handshake_seconds=0.05))
    assert peer.wait_closed() == "the peer did not finish the handshake in time"


# -- peers that take and give nothing -----------------------------------------------------------


@pytest.mark.parametrize("side", ["client", "server"])
def test_peer_that_ends_tls_has_closed_the_tunnel(tunnel: Tunnel, side: str) -> None:
    peer, own = tunnel.client, tunnel.server
    if side == "client":
        peer, own = own, peer
    with suppress(ssl.SSLError):  # it would wait for the same from us
        peer.session._tls.unwrap()
    peer.session._socket.send(peer.session._outgoing.read())  # and no FIN
    run_rounds(tunnel.reactor, 5)
    assert own.reasons == ["the peer closed the tunnel"]


def test_peer_that_asks_and_takes_no_answer_is_given_up(tunnel: Tunnel) -> None:
    client, server = tunnel.client.session, tunnel.server.session
    server._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    tunnel.reactor.forget(client._fd)
    pings = build_ping(b"anything", is_ack=False) * 900
    for _ in range(200):
        client._tls.write(pings)
        with suppress(OSError):
            client._socket.send(client._outgoing.read())
        run_rounds(tunnel.reactor, 2)
        assert server.share.held < session_module.MOST_UNSENT_BYTES
    assert tunnel.server.reasons == ["the peer broke HTTP/2: too many replies to write"]


def test_peer_on_a_full_link_that_reads_may_ask_for_ever(tunnel: Tunnel) -> None:
    client, server = tunnel.client.session, tunnel.server.session
    for own in (client._socket, server._socket):
        own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    streams = [tunnel.open() for _ in range(2)]

    def fill() -> None:  # never is there nothing to write
        for near, _far in streams:
            if near.channel.buffered < 1 << 20:
                near.channel.write(bytes(1 << 20))

    worst = 0
    for _ in range(300):
        fill()
        server.connection.ping(b"sidestep")
        server.wants_write()
        run_rounds(tunnel.reactor, 2)
        worst = max(worst, client.connection._unsent_replies)
    assert worst < 50
    assert tunnel.client.reasons == []


def test_small_messages_to_a_peer_that_stalls_are_bounded_with_all_around_them(
    tunnel: Tunnel,
) -> None:
    near, far = tunnel.open()
    client, server = tunnel.client.session, tunnel.server.session
    client._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    tunnel.reactor.change(server._fd, 0)
    while not near.channel.buffered:
        near.channel.write(b"x")
        client.write_now()  # each in a round of its own
    assert client.buffered <= session_module.UNSENT_BYTES
    far.channel.write(b"the first that it says after that")
    tunnel.reactor.change(server._fd, READ)
    tunnel.until(lambda: near.received)
    assert tunnel.client.reasons == []


def test_answers_of_tls_do_not_wait_for_other_output(tunnel: Tunnel) -> None:
    near, far = tunnel.open()
    server = tunnel.server.session
    server._tls.write(build_ping(b"anything", is_ack=False))  # as OpenSSL answers a KeyUpdate
    near.channel.write(b"data")
    tunnel.until(lambda: far.received)
    run_rounds(tunnel.reactor, 2)
    assert not server._outgoing.pending


# -- life signs ---------------------------------------------------------------------------------


def test_pings_are_answered_and_keep_the_tunnel(
    join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "PING_SECONDS", 0.01)
    tunnel = join().wait_ready()
    monkeypatch.setattr(life_signs, "LOOK_SECONDS", 0.1)
    tunnel.reactor.call_later(1.2, tunnel.reactor.stop)
    tunnel.reactor.run()
    assert tunnel.client.reasons == tunnel.server.reasons == []


def test_peer_that_answers_no_ping_is_given_up(
    tunnel: Tunnel, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, _far = tunnel.open()
    tunnel.reactor.forget(tunnel.server.session._fd)  # it hears nothing any more
    monkeypatch.setattr(life_signs, "LOOK_SECONDS", 0.02)
    tunnel.client.session._ping()  # as its timer does, after ten seconds
    tunnel.until(lambda: tunnel.client.reasons)
    assert tunnel.client.reasons == ["the peer did not answer a ping in time"]
    assert near.seen == ["abort"]


def test_peer_that_hangs_is_given_up_whatever_its_kernel_takes(
    tunnel: Tunnel, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, _far = tunnel.open()
    tunnel.reactor.forget(tunnel.server.session._fd)
    monkeypatch.setattr(life_signs, "LOOK_SECONDS", 0.05)

    def write() -> None:
        near.channel.write(b"a little")
        tunnel.reactor.call_later(0.02, write)

    write()
    tunnel.client.session._ping()
    tunnel.until(lambda: tunnel.client.reasons)
    assert tunnel.client.reasons == ["the peer did not answer a ping in time"]


def test_tunnel_that_is_to_be_closed_does_not_wait_for_a_peer_that_only_speaks(
    tunnel: Tunnel, monkeypatch: pytest.MonkeyPatch
) -> None:
    _near, far = tunnel.open()
    client, server = tunnel.client.session, tunnel.server.session
    server._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    tunnel.reactor.forget(client._fd)  # it takes nothing any more
    far.channel.write(bytes(1 << 20))
    run_rounds(tunnel.reactor, 20)
    far.channel.abort()
    server.close()
    assert server.buffered
    monkeypatch.setattr(life_signs, "LOOK_SECONDS", 0.05)

    def speak() -> None:
        client.connection.ping(b"sidestep")
        client._encrypt()
        with suppress(OSError):
            client._socket.send(client._outgoing.read())
        tunnel.reactor.call_later(0.02, speak)

    speak()
    server._ping()
    tunnel.until(lambda: tunnel.server.reasons)
    assert tunnel.server.reasons == ["the peer did not answer a ping in time"]


class SlowLink:
    """Passes what a socket sends on to another a little at a time; answers come at once."""

    BYTES, SECONDS = 16 << 10, 0.02

    def __init__(self, stack: ExitStack) -> None:
        with socket.socket() as listener:
            # As on a real link: with the segments of loopback the window would open in leaps.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * self.BYTES)
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            self.ours = socket.create_connection(listener.getsockname())
            self._in = stack.enter_context(listener.accept()[0])
        self._out, self.theirs = tcp_pair()
        stack.enter_context(self._out)
        self._in.setblocking(False)

    def join(self, reactor: Reactor) -> None:
        self._reactor = reactor
        reactor.watch(self._out.fileno(), READ, self._bring_back)
        self._pass_on()

    def _bring_back(self, _ready: int) -> None:
        with suppress(OSError):
            self._in.sendall(self._out.recv(1 << 16))

    def _pass_on(self) -> None:
        with suppress(OSError):
            self._out.sendall(self._in.recv(self.BYTES))
        self._reactor.call_later(self.SECONDS, self._pass_on)


def test_peer_on_a_slow_link_is_not_given_up(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as stack:
        link = SlowLink(stack)
        contexts = authority.context(CLIENT, Role.CLIENT), authority.context(SERVER, Role.SERVER)
        tunnel = Tunnel(*contexts, (link.ours, link.theirs))
        link.join(tunnel.reactor)
        client, server = tunnel.wait_ready().client.session, tunnel.server.session
        stack.callback(end_sessions, tunnel.reactor, (client, server))
        near, far = tunnel.open()
        monkeypatch.setattr(life_signs, "LOOK_SECONDS", 0.05)
        answered: list[float] = []
        monkeypatch.setattr(client, "_schedule_ping", lambda: answered.append(time.monotonic()))
        near.channel.write(bytes(1 << 20))
        begun = time.monotonic()
        client._ping()
        tunnel.until(lambda: answered or tunnel.client.reasons)
        assert tunnel.client.reasons == []
        waited = answered[0] - begun  # behind them
        assert waited > 2 * life_signs.MOST_STALLS * life_signs.LOOK_SECONDS
        tunnel.until(lambda: len(far.received) == 1 << 20)


# -- certificates that end ----------------------------------------------------------------------


def test_warned_client_finishes_its_stream_and_then_says_it_is_idle(tunnel: Tunnel) -> None:
    near, far = tunnel.open()
    told: list[bool] = []
    session = tunnel.client.session
    session.on_draining = lambda session: told.append(session.connection.may_open)
    tunnel.server.session.drain()
    tunnel.until(lambda: not session.connection.may_open)
    assert told == [False]
    near.channel.write(b"after the warning")
    tunnel.until(lambda: far.received)
    assert bytes(far.received) == b"after the warning"
    assert tunnel.client.idle == 0
    near.channel.abort()
    assert tunnel.client.idle == 1
    assert tunnel.client.reasons == tunnel.server.reasons == []


def test_client_that_does_not_mind_the_warning_is_refused(
    tunnel: Tunnel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "WARNING_SECONDS", 0.0)
    near, far = tunnel.open()
    client, server = tunnel.client.session, tunnel.server.session
    server.drain()
    tunnel.until(lambda: server.connection.is_draining)
    client.connection.is_draining = False
    late = Stream(client.channels[client.open_stream("10.0.0.1:80", {})])
    tunnel.until(lambda: late.seen)
    assert (late.seen, late.channel.reset_code) == (["abort"], ErrorCode.REFUSED_STREAM)
    assert tunnel.server.requests == []
    near.channel.write(b"open ones go on")
    tunnel.until(lambda: far.received)


@pytest.mark.parametrize("side", ["client", "server"])
def test_tunnel_that_says_goodbye_is_not_drained_as_well(tunnel: Tunnel, side: str) -> None:
    witness: Witness = getattr(tunnel, side)
    witness.session.close()
    output = list(witness.session.connection._output)
    told: list[bool] = []
    witness.session.on_draining = lambda _session: told.append(True)
    witness.session.drain()
    assert witness.session.connection._output == output
    assert told == []


def test_drained_client_is_idle_at_once_if_it_has_no_stream(tunnel: Tunnel) -> None:
    tunnel.client.session.drain()
    assert tunnel.client.idle == 1
    assert not tunnel.client.session.connection.may_open
    tunnel.client.session.fail("closed")
    tunnel.client.session.drain()  # harmless
    assert tunnel.client.idle == 1


def test_stream_that_has_ended_both_ways_outlives_its_tunnel(tunnel: Tunnel) -> None:
    near, far = tunnel.open()
    open_near, _open_far = tunnel.open()
    near.channel.finish()
    far.channel.write(b"all of it")
    far.channel.finish()
    tunnel.until(lambda: near.seen)
    tunnel.server.session.fail("the peer is gone")
    tunnel.until(lambda: tunnel.client.reasons)
    # An application may still have to read it, and gets it whole.
    assert (bytes(near.received), near.seen) == (b"all of it", ["end"])
    assert open_near.seen == ["abort"]


def open_half_ended(tunnel: Tunnel) -> tuple[Stream, Stream]:
    """Open a stream that the server has ended, and the client has not; both ends of it."""
    near, far = tunnel.open()
    far.channel.finish()
    tunnel.until(lambda: near.seen)
    return near, far


def test_end_that_has_not_left_yet_is_lost_with_the_tunnel(tunnel: Tunnel) -> None:
    near, _far = open_half_ended(tunnel)
    near.channel.finish()
    tunnel.client.session.fail("the peer is gone")
    assert near.seen == ["end", "abort"]


def test_end_that_the_socket_has_not_taken_is_lost_with_the_tunnel(tunnel: Tunnel) -> None:
    client = tunnel.client.session
    client._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    near, _far = open_half_ended(tunnel)
    bulk, _sink = tunnel.open()
    bulk.channel.write(bytes(session_module.UNSENT_BYTES))
    near.channel.finish()
    client.write_now()
    assert client.buffered
    client.fail("the peer is gone")
    assert near.seen == ["end", "abort"]


def test_end_that_has_left_does_not_wait_for_the_bulk_of_others(tunnel: Tunnel) -> None:
    client = tunnel.client.session
    client._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    near, far = open_half_ended(tunnel)
    bulk, sink = tunnel.open()

    def feed() -> None:  # more than goes at once, so that it is drained later and fed again
        bulk.channel.write(bytes(2 * session_module.UNSENT_BYTES))

    bulk.channel.on_drained = feed
    feed()
    client.write_now()
    near.channel.finish()
    unsent: list[int] = []

    def has_passed() -> bool:
        unsent.append(client.buffered)
        return len(sink.received) > 8 * session_module.UNSENT_BYTES

    tunnel.until(has_passed)
    assert min(unsent) > 0
    client.fail("the peer is gone")
    assert (near.seen, far.seen, bulk.seen) == (["end"], ["end"], ["abort"])


def test_client_that_drains_in_its_handshake_serves_who_waits_for_it(join: Join) -> None:
    tunnel = join()
    session = tunnel.client.session
    opened: list[int] = []
    session.on_ready = lambda made: opened.append(made.open_stream("10.0.0.1:80", {}))
    session.drain()
    tunnel.until(lambda: tunnel.server.requests)
    assert opened == [1]
    assert session.connection.is_draining


def test_refused_peer_is_named_by_code_and_closed_once(tunnel: Tunnel) -> None:
    near, _far = tunnel.open()
    tunnel.client.session.refuse(PeerRevoked("revoked"))
    tunnel.client.session.refuse(PeerUnexpected("too late"))
    assert tunnel.client.session.refusal == "peer_revoked"
    assert tunnel.client.reasons == ["revoked"]
    assert near.seen == ["abort"]
    tunnel.until(lambda: tunnel.server.reasons)
    assert tunnel.server.session.refusal == ""


def test_refusals_of_the_handshake_have_their_code(
    authority: Authority, tmp_path: Path, join: Join
) -> None:
    stranger = Authority(tmp_path).context(CLIENT, Role.CLIENT)
    stranger.verify_mode = ssl.CERT_NONE
    nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    nobody.check_hostname = False
    nobody.verify_mode = ssl.CERT_NONE
    elsewhere = authority.context(SpiffeId("example.org", "shop", "client"), Role.CLIENT)
    for context, code in (
        (stranger, "peer_authority_unknown"),
        (nobody, "peer_certificate_missing"),
        (elsewhere, "peer_trust_domain"),
    ):
        tunnel = join(client=context)
        run_until(tunnel.reactor, partial(len, tunnel.server.reasons))
        assert tunnel.server.session.refusal == code
    tunnel = join(server=authority.context(CLIENT, Role.SERVER))
    tunnel.until(lambda: tunnel.client.reasons)
    assert tunnel.client.session.refusal == "peer_unexpected"


def test_what_the_peer_may_send_follows_the_bounds(authority: Authority) -> None:
    bounds = Bounds(header_bytes=4096, streams_per_tunnel=3, stream_buffer_bytes=70_000)
    peer = RawPeer(authority, bounds)
    limits = peer.server.session.connection.limits
    assert limits.header_list_bytes == 4096
    assert limits.concurrent_streams == 6
    assert limits.stream_window == 70_000
    peer.socket.close()
    run_until(peer.reactor, lambda: peer.server.reasons)
