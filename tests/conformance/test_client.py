"""Our worker as the client of a 15008, beside the rules that it has to hold a server to.

A name begins with the section of RFC 9113. Each rule has a tunnel of its own, on which stream 1 has
been asked for; an application waits for its answer.
"""

from __future__ import annotations

import contextlib
import socket
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from agent.model.capture import HBONE_PORT
from agent.tunnel import frames, tls
from agent.tunnel.frames import ErrorCode, FrameType, Setting
from tests.conformance.test_server import (
    CLOSED,
    FLOW,
    MOST,
    PADDED,
    PING,
    PONG,
    PROTOCOL,
    SIZE,
    data,
    settings,
    updates,
    word,
)
from tests.interop.conftest import Neighbors, identity
from tests.node.conftest import certificate_for
from tests.support.namespaces import PEER4
from tests.support.raw_peer import (
    Broken,
    Fine,
    Frame,
    Outcome,
    RawPeer,
    Reset,
    frame,
    handshake,
    headers,
)

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator

pytestmark = pytest.mark.root

APP_PORT = 8080
START = frames.build_settings({})
OK = (":status", "200")
ANSWER = headers(1, OK)

RULES: dict[str, tuple[bytes, Outcome]] = {
    "5.1 DATA on an idle stream": (data(3), Broken(PROTOCOL)),
    "5.1 HEADERS on an idle stream": (headers(3, OK), Broken(PROTOCOL)),
    "5.1 RST_STREAM on an idle stream": (frames.build_reset(3, 8), Broken(PROTOCOL)),
    "5.1 WINDOW_UPDATE on an idle stream": (updates(3, 1), Broken(PROTOCOL)),
    "5.1 DATA after END_STREAM": (headers(1, OK, ends=True) + data(1), Reset(CLOSED)),
    "5.1 an answer after END_STREAM": (headers(1, OK, ends=True) + ANSWER, Reset(CLOSED)),
    "5.1.1 a stream of the server's own": (headers(2, OK), Broken(PROTOCOL)),
    "6.1 padding": (ANSWER + data(1, b"\x02hi\0\0", PADDED), Fine()),
    "6.1 padding as long as the payload": (ANSWER + data(1, b"\x02x", PADDED), Broken(PROTOCOL)),
    "6.5.2 ENABLE_PUSH of 1": (settings(Setting.ENABLE_PUSH, 1), Broken(PROTOCOL)),
    "6.5.2 ENABLE_PUSH of 0": (settings(Setting.ENABLE_PUSH, 0), Fine()),
    "6.5.2 a window of 2^31": (settings(Setting.INITIAL_WINDOW_SIZE, 2**31), Broken(FLOW)),
    "6.5.3 SETTINGS are acknowledged": (
        settings(0xABCD, 7), Fine(Frame(FrameType.SETTINGS, 1, 0, b"")),
    ),
    "6.6 PUSH_PROMISE": (frame(FrameType.PUSH_PROMISE, 4, 1, word(2)), Broken(PROTOCOL)),
    "6.7 PING is answered": (PING, Fine(PONG)),
    "6.8 GOAWAY of 7 bytes": (frame(FrameType.GOAWAY, 0, 0, bytes(7)), Broken(SIZE)),
    "6.8 GOAWAY leaves what it names": (
        ANSWER + frames.build_goaway(1, 0) + data(1), Fine(),
    ),
    "6.9 the connection's window grows by 0": (updates(0, 0), Broken(PROTOCOL)),
    "6.9 a stream's window grows by 0": (ANSWER + updates(1, 0), Reset(PROTOCOL)),
    "6.9.1 a stream's window beyond 2^31": (ANSWER + updates(1, MOST), Reset(FLOW)),
    "6.9.2 SETTINGS take a window beyond 2^31": (
        ANSWER + updates(1, MOST - 65535) + settings(Setting.INITIAL_WINDOW_SIZE, 65536),
        Broken(FLOW),
    ),
    "8.1 DATA before the answer": (data(1), Reset(PROTOCOL)),
    "8.1 an interim answer": (headers(1, (":status", "103")) + ANSWER, Fine()),
    "8.1 an interim answer that ends the stream": (
        headers(1, (":status", "103"), ends=True), Reset(PROTOCOL),
    ),
    "8.2.1 a name with upper case": (headers(1, OK, ("Server", "x")), Reset(PROTOCOL)),
    "8.2.2 connection": (headers(1, OK, ("connection", "close")), Reset(PROTOCOL)),
    "8.3 a pseudo-header after other fields": (headers(1, ("a", "b"), OK), Reset(PROTOCOL)),
    "8.3 a pseudo-header of requests": (headers(1, OK, (":path", "/")), Reset(PROTOCOL)),
    "8.3.2 no :status": (headers(1, ("server", "x")), Reset(PROTOCOL)),
    "8.3.2 a :status of words": (headers(1, (":status", "fine")), Reset(PROTOCOL)),
    "8.5 trailers": (ANSWER + headers(1, ("x", "y"), ends=True), Reset(PROTOCOL)),
}  # fmt: skip


@dataclass
class Server:
    """A 15008 that the test has made."""

    listener: socket.socket
    context: ssl.SSLContext

    def accept(self) -> RawPeer:
        """Take the next tunnel up to its first frames."""
        raw, _ = self.listener.accept()
        raw.settimeout(5)
        peer = handshake(self.context, raw, is_server=True)
        assert peer.take(len(frames.PREFACE)) == frames.PREFACE
        return peer


@contextmanager
def serving(client: Neighbors) -> Iterator[Server]:
    """Have a server until it is told that nobody asks any more."""
    certificate = certificate_for(client.authority, identity("server"))
    listener = client.theirs.listen(PEER4, HBONE_PORT)
    listener.settimeout(5)
    with listener:
        yield Server(listener, tls.build_context(certificate, is_server=True))


@contextmanager
def dialing(client: Neighbors) -> Iterator[socket.socket]:
    """Have an application's connection; it is over when this ends."""
    with client.ours.namespace.connect(PEER4, APP_PORT) as connection:
        yield connection
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass


def is_data(found: Frame) -> bool:
    return found.kind == FrameType.DATA


def is_request(found: Frame) -> bool:
    return found.kind == FrameType.HEADERS


@pytest.mark.parametrize("rule", RULES)
def test_rule(client: Neighbors, rule: str) -> None:
    sent, outcome = RULES[rule]
    with serving(client) as server, dialing(client) as application:
        peer = server.accept()
        peer.send(START)
        assert peer.read_until(is_request).stream_id == 1
        peer.send(sent)
        peer.settle()
        has_ended = not peer.seen[-1].is_pong
        outcome.check(peer.seen, has_ended=has_ended)
        server.listener.close()  # so that what was not answered is not asked for again
        peer.close()
        if not isinstance(outcome, Fine):
            assert ends_without_data(application)


def ends_without_data(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_3_4_our_preface_is_settings_that_want_no_push(client: Neighbors) -> None:
    with serving(client) as server, dialing(client):
        peer = server.accept()
        first = peer.next_frame()
        assert first is not None
        assert (first.kind, first.flags, first.stream_id) == (FrameType.SETTINGS, 0, 0)
        named = dict(frames.parse_settings(memoryview(first.payload)))
        assert named[Setting.ENABLE_PUSH] == 0
        server.listener.close()
        peer.close()


@pytest.mark.parametrize("first", [PING, frames.SETTINGS_ACK], ids=["PING", "an ACK"])
def test_3_4_a_server_begins_with_settings(client: Neighbors, first: bytes) -> None:
    with serving(client) as server, dialing(client):
        peer = server.accept()
        server.listener.close()
        peer.send(first)
        peer.settle()
        Broken(PROTOCOL).check(peer.seen, has_ended=not peer.seen[-1].is_pong)
        peer.close()


@pytest.mark.parametrize(
    "refusal",
    [frames.build_goaway(0, 0), frames.build_reset(1, ErrorCode.REFUSED_STREAM)],
    ids=["6.8 GOAWAY", "8.7 REFUSED_STREAM"],
)
def test_what_was_not_processed_is_asked_again(client: Neighbors, refusal: bytes) -> None:
    with serving(client) as server, dialing(client) as application:
        peer = server.accept()
        peer.send(START)
        peer.read_until(is_request)
        peer.send(refusal)
        if refusal == frames.build_goaway(0, 0):
            before, peer = peer, server.accept()
            before.close()
            peer.send(START)
        again = peer.read_until(is_request).stream_id
        peer.send(headers(again, OK) + data(again, b"hello"))
        assert application.recv(5) == b"hello"
        peer.close()


def test_8_7_what_another_reset_ended_is_not_asked_again(client: Neighbors) -> None:
    with serving(client) as server, dialing(client) as application:
        peer = server.accept()
        peer.send(START)
        peer.read_until(is_request)
        peer.send(frames.build_reset(1, ErrorCode.CANCEL))
        assert ends_without_data(application)
        peer.settle()
        assert [each.stream_id for each in peer.seen if is_request(each)] == [1]
        server.listener.close()
        peer.close()


def test_8_5_server_that_ends_first_hears_the_rest(client: Neighbors) -> None:
    """An Envoy resets the stream once its application has ended, so it cannot show this."""
    with serving(client) as server, dialing(client) as application:
        peer = server.accept()
        peer.send(START)
        peer.read_until(is_request)
        peer.send(ANSWER + data(1, b"done", frames.END_STREAM))
        assert application.recv(4, socket.MSG_WAITALL) == b"done"
        assert application.recv(1) == b""
        application.sendall(b"still here")
        assert peer.read_until(is_data) == Frame(FrameType.DATA, 0, 1, b"still here")
        application.shutdown(socket.SHUT_WR)
        assert peer.read_until(is_data) == Frame(FrameType.DATA, frames.END_STREAM, 1, b"")
        server.listener.close()
        peer.close()


def test_6_9_2_window_of_one_byte_and_small_frames_are_kept_to(client: Neighbors) -> None:
    with serving(client) as server, dialing(client) as application:
        peer = server.accept()
        peer.send(settings(Setting.INITIAL_WINDOW_SIZE, 1))
        peer.read_until(is_request)
        application.sendall(b"a" + bytes(50_000))
        peer.send(ANSWER)
        assert peer.read_until(is_data).payload == b"a"
        peer.settle()
        assert len([each for each in peer.seen if is_data(each)]) == 1
        peer.send(updates(1, 50_000))
        left = 50_000
        while left:
            size = len(peer.read_until(is_data).payload)
            assert size <= frames.DEFAULT_FRAME_BYTES
            left -= size
        server.listener.close()
        peer.close()


def test_5_1_2_streams_that_the_server_allows_are_kept_to(client: Neighbors) -> None:
    with serving(client) as server, dialing(client), dialing(client):
        first = server.accept()
        first.send(settings(Setting.MAX_CONCURRENT_STREAMS, 1))
        first.read_until(is_request)
        second = server.accept()  # for the other connection
        second.send(START)
        second.read_until(is_request)
        first.settle()
        assert [each.stream_id for each in first.seen if is_request(each)] == [1]
        server.listener.close()
        first.close()
        second.close()
