"""One tunnel over one TLS socket: handshake, reading, writing, pings, and its streams as channels.

The shell around `connection`: it moves bytes between the socket and the core, and turns the core's
events into calls on stream channels. It knows no pods and no policy; `outbound` and `inbound` do.

TLS works on memory, not on the socket. OpenSSL would write each record of 16 KiB with a system call
of its own, and read its header and its body apart; here one call takes or gives what the socket has
room for, many records and the frames of many streams together (docs/performance.md).

Small messages of one round of the reactor leave in one record at its end; large ones at once, since
they are views of the reader's buffer, which the next reader needs; and header blocks a few at once.

Writing is bounded: while more than a little waits for the socket, no stream gets to send, and when
it has drained the waiting streams take turns.
"""

from __future__ import annotations

import contextlib
import ssl
import time
from typing import TYPE_CHECKING

from agent.errors import PeerCertificateMissing, UntrustedPeer
from agent.identity.verify import explain
from agent.model.bounds import DEFAULT_BOUNDS, Bounds
from agent.tunnel import life_signs, lingering, sockets
from agent.tunnel.connection import Connection, Limits, Role
from agent.tunnel.events import (
    ConnectionTerminated,
    ConnectRequested,
    DataReceived,
    GoAwayReceived,
    PongReceived,
    ResponseReceived,
    SettingsReceived,
    StreamEnded,
    StreamReset,
    WindowOpened,
)
from agent.tunnel.life_signs import LifeSigns
from agent.tunnel.reactor import BROKEN, READ, WRITE
from agent.tunnel.stream_channel import StreamChannel

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from agent.identity.verify import Peer
    from agent.model.identity import SpiffeId
    from agent.tunnel.buffers import Share
    from agent.tunnel.events import Event
    from agent.tunnel.reactor import Reactor, Timer
    from agent.tunnel.trust import Trust

PING_SECONDS = 10.0
READ_BYTES = 512 * 1024  # in one turn, then others get theirs
PLAINTEXT_BYTES = 16 * 1024
RECORD_BYTES = PLAINTEXT_BYTES + 256  # RFC 8446 §5.2: plaintext, padding and all
UNSENT_BYTES = 1024 * 1024
# To open a connection is work at both ends: of many that come together the peer begins with these
# while we go on with the others, instead of waiting for all (docs/performance.md).
HEADERS_TOGETHER = 4
# Of a peer that has not proved who it is: its certificate with a long chain is a quarter of it.
# OpenSSL keeps each byte twice, and none of it is in the account of buffers.
HANDSHAKE_BYTES = 32 * 1024
# A message that is alone in its round costs the head of a frame and a record around it.
OVERHEAD_BYTES = 9 + 22
# What waits for a peer that takes nothing: of streams so much, with all around it, and less of all
# else.
MOST_UNSENT_BYTES = 2 * UNSENT_BYTES
# From "no new streams, please" until they are refused: what was on the way then has come.
WARNING_SECONDS = 5.0

# A worker has one thread, and nobody keeps a view of these beyond a callback.
_raw = memoryview(bytearray(READ_BYTES))
_plain = memoryview(bytearray(READ_BYTES + 2 * RECORD_BYTES))


def _nothing(*_told: object) -> None:
    pass


class Session:
    """One tunnel. Owns the socket from the constructor on.

    Callbacks: `on_ready(session)` once, when streams may be opened (client) or the peer is known
    (server); `on_closed(session, reason)` once, whatever happened; `on_request(session, event)` for
    each CONNECT (server); `on_draining(session)` when the tunnel takes no new streams any more and
    those that are open go on (client). The answer to our own CONNECT goes to `channel.on_response`.
    """

    is_shared = True
    open_count = 0  # of this worker, from the constructor until the socket is closed

    def __init__(
        self,
        reactor: Reactor,
        own: socket.socket,
        context: ssl.SSLContext,
        role: Role,
        trust: Trust,
        share: Share,
        expected: SpiffeId | None = None,
        bounds: Bounds = DEFAULT_BOUNDS,
    ) -> None:
        self.on_ready: Callable[[Session], None] = _nothing
        self.on_closed: Callable[[Session, str], None] = _nothing
        self.on_request: Callable[[Session, ConnectRequested], None] = _nothing
        self.on_idle: Callable[[Session], None] = _nothing
        self.on_draining: Callable[[Session], None] = _nothing
        self.connection = Connection(
            role,
            Limits(
                stream_window=bounds.stream_buffer_bytes,
                concurrent_streams=bounds.accepted_streams,
                header_list_bytes=bounds.header_bytes,
            ),
        )
        self._handshake_seconds = bounds.handshake_seconds
        self.peer: SpiffeId | None = None
        self.proof: Peer | None = None
        self.refusal = ""  # the reason code, if it is the peer's certificate that ended it
        self.handshake_failure = ""  # the reason code, if it ended before TLS was done
        self.channels: dict[int, StreamChannel] = {}
        self.share = share
        self._reactor = reactor
        self._trust = trust
        self._expected = expected
        self._role = role
        self._socket = own
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=role is Role.SERVER
        )
        self._fd = own.fileno()
        self._unsent: bytes | memoryview = b""
        self.buffered = 0  # of what the socket did not take
        self._room = UNSENT_BYTES  # for bytes of streams, until the socket has drained
        self._is_established = self._is_ready = self.is_closed = self._drains = False
        self._is_heard_out = False  # the peer has ended TLS
        self._handshake_bytes = 0  # of the peer's
        self._broken = ""  # why nothing can be written any more; what has arrived is still read
        self._watched = WRITE if role is Role.CLIENT else READ
        self._reads = READ  # or 0 while it waits for room
        self._is_write_due = False
        self._unwritten_headers = 0
        # Of streams: in the output, and in what the socket takes now. What comes after that may be
        # bulk without end, and has nothing to do with them.
        self._unwritten_ends: set[int] = set()
        self._leaving_ends: set[int] = set()
        self._waiting: dict[int, None] = {}  # streams that found the socket full, in turn
        reactor.watch(self._fd, self._watched, self._on_io)
        self._deadline = reactor.call_later(bounds.handshake_seconds, self._on_deadline)
        self._refusal_timer: Timer | None = None
        self._life_signs = LifeSigns(own)
        self._pinged_at = 0.0
        self.heard_at = 0.0  # the peer has read all that was said before this (time.monotonic)
        Session.open_count += 1

    # -- streams ------------------------------------------------------------------------------

    def open_stream(self, authority: str, headers: dict[str, str]) -> int:
        """Send a CONNECT; the answer comes to its channel."""
        stream_id = self.connection.open_stream(authority, headers)
        self.channels[stream_id] = StreamChannel(self, stream_id)
        self._write_headers()
        return stream_id

    def respond(self, stream_id: int, status: int) -> None:
        """Answer a CONNECT."""
        self.connection.respond(stream_id, status)
        if status != 200:
            self.forget_stream(stream_id)
        self._write_headers()

    def _write_headers(self) -> None:
        self._unwritten_headers += 1
        if self._unwritten_headers == HEADERS_TOGETHER:
            self._reactor.call_next(self.write_now)
        self.wants_write()

    def forget_stream(self, stream_id: int) -> None:
        """Deliver no more events of a stream."""
        if self.channels.pop(stream_id, None) is not None:
            self._unwritten_ends.discard(stream_id)
            self._leaving_ends.discard(stream_id)
            self.wants_write()
            if not self.channels:
                self.on_idle(self)

    def send(self, stream_id: int, data: bytes | memoryview) -> int:
        """Put what may go now of `data` into the output and return how much that is.

        Less than all without a closed window puts the stream in the line for the socket. The output
        refers to `data` until the next `write_now`, which has to follow for a view of a buffer.
        """
        if self.share.is_full and self._unsent:
            self._waiting.setdefault(stream_id)
            return 0
        sent = self.connection.send_some(stream_id, data, self._room)
        self._room = max(0, self._room - sent - OVERHEAD_BYTES)
        if not self._room:
            self._waiting.setdefault(stream_id)  # who waits already keeps its place
        return sent

    def end(self, stream_id: int) -> None:
        """Put END_STREAM into the output."""
        self.connection.end(stream_id)
        self._unwritten_ends.add(stream_id)

    # -- input and output ---------------------------------------------------------------------

    def wants_write(self) -> None:
        """Write at the end of this round, all streams' frames together."""
        if not self._is_write_due and not self.is_closed:
            self._is_write_due = True
            self._reactor.call_soon(self._write_due)

    def _write_due(self) -> None:
        self._is_write_due = False
        self.write_now()

    def write_now(self) -> None:
        """Encrypt what is in the output, and write as much as the socket takes."""
        if self._is_established and not self.is_closed:
            self._encrypt()
            if self._unsent:
                self._note(len(self._unsent) + self._outgoing.pending)
            else:
                self._write()

    def _encrypt(self) -> None:
        if not self._is_established or not self.connection.has_output:
            return
        self._unwritten_headers = 0
        parts = self.connection.take_parts()
        last = parts.pop()
        try:
            if len(last) < 2 * PLAINTEXT_BYTES:
                self._tls.write(b"".join((*parts, last)))
                return
            # Copied is only what fills the record that the heads before it are in.
            size = sum(map(len, parts))
            fill = -size % PLAINTEXT_BYTES
            self._tls.write(b"".join((*parts, last[:fill])))
            self._tls.write(last[fill:])
        except ssl.SSLError as error:
            self.fail(f"{type(error).__name__}: {error}")

    def _watch(self, events: int) -> None:
        if events != self._watched and not self.is_closed:
            self._watched = events
            self._reactor.change(self._fd, events)

    def _on_io(self, ready: int) -> None:
        try:
            if ready & ~WRITE:
                # A socket that has ended is reported for ever: it is read in any case.
                if not (self.share.is_full and not ready & BROKEN and self._waits_for_room()):
                    self._read()
            elif not self._is_established:
                self._handshake()
            if ready & WRITE and not self.is_closed:
                self._write()
        except UntrustedPeer as error:
            self.refuse(error)
        except ssl.SSLCertVerificationError as error:
            self.refuse(explain(error.verify_code, error.verify_message))
        except ssl.SSLError as error:
            self.fail(f"{type(error).__name__}: {error}", "handshake_tls")
        except OSError as error:
            self.fail(f"{type(error).__name__}: {error}")
        except Exception as error:
            # A defect of ours costs this tunnel, and not every connection of the worker.
            self.fail(f"a defect of Sidestep: {type(error).__name__}: {error}")

    def _handshake(self) -> bool:
        """Go on with the handshake; whether it is done and the tunnel in use."""
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._write()
            return False
        except ssl.SSLError as error:
            if error.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
                raise PeerCertificateMissing("the peer showed no certificate") from error
            raise
        if self._tls.selected_alpn_protocol() != "h2":
            raise UntrustedPeer("the peer does not offer h2 in ALPN")
        self.proof = self._trust.verify(self._tls.getpeercert(binary_form=True), self._expected)
        self.peer = self.proof.identity
        self._trust.admit(self)
        self._is_established = True
        self._deadline.cancel()
        self._deadline = self._reactor.call_later(self._handshake_seconds, self._on_deadline)
        if self._role is Role.SERVER:
            self.on_ready(self)
        self.write_now()
        return not self.is_closed

    def _go_on_with_handshake(self, size: int) -> bool:
        """Like `_handshake`, with so many bytes more; a peer that goes on for ever is given up."""
        self._handshake_bytes += size
        is_done = self._handshake()
        if not is_done and not self.is_closed and self._handshake_bytes > HANDSHAKE_BYTES:
            self.fail("the peer's part of the handshake is too long", "handshake_too_long")
        return is_done

    def _read(self) -> None:
        try:
            size = self._socket.recv_into(_raw[:RECORD_BYTES] if self.share.is_full else _raw)
        except BlockingIOError:
            return
        if not size:
            is_open = self._is_established
            text = "the peer closed the tunnel" if is_open else "EOF during the handshake"
            code = "handshake_broken" if self._broken else "handshake_eof"
            self.fail(self._broken or text, code)
            return
        self._incoming.write(_raw[:size])
        if not self._is_established and not self._go_on_with_handshake(size):
            return
        for event in self.connection.receive(self._decrypt()):
            if type(event) is DataReceived:
                target = self.channels.get(event.stream_id)
                if target is not None:
                    target.received(event.data)
            else:
                self._dispatch(event)
            if self.is_closed:
                return
        if self._is_heard_out:
            self.fail("the peer closed the tunnel")
        elif self.buffered > MOST_UNSENT_BYTES:
            self.fail("the peer does not take the answers that it asks for")
        elif self.connection.has_output or self._outgoing.pending:
            self.wants_write()

    def _decrypt(self) -> memoryview:
        """Return the plaintext of all whole records that are here."""
        size = 0
        try:
            while self._incoming.pending:
                before = size
                size += self._tls.read(RECORD_BYTES, _plain[size:])  # type: ignore[operator]  # typeshed: with a buffer it is a count
                if size == before:
                    # close_notify: the end of the socket follows, and OpenSSL would only keep
                    # whatever comes before it.
                    self._is_heard_out = True
                    break
        except ssl.SSLWantReadError:
            pass
        return _plain[:size]

    def _write(self) -> None:
        """Write until the socket is full or nothing is left; then the waiting take their turn."""
        if self._broken:
            return
        while not self.is_closed:
            if not self._unsent:
                self._encrypt()
                if not self._outgoing.pending:
                    break
                self._unsent = self._outgoing.read()
                self._leaving_ends |= self._unwritten_ends
                self._unwritten_ends.clear()
            try:
                sent = self._socket.send(self._unsent)
            except BlockingIOError:
                sent = 0
            except (BrokenPipeError, ConnectionResetError) as error:
                # epoll goes on reporting it, so that it is read to its end.
                self._broken = f"{type(error).__name__}: {error}"
                return
            except OSError as error:
                self.fail(f"{type(error).__name__}: {error}")
                return
            if sent < len(self._unsent):
                self._unsent = memoryview(self._unsent)[sent:]
                self._watch(self._reads | WRITE)
                self._note(len(self._unsent) + self._outgoing.pending)
                return
            self._unsent = b""
            self._leaving_ends.clear()
            # All replies before it have left. Not only once there is nothing to write any more,
            # which bulk on a slow link never lets it come to.
            self.connection.forgive_replies()
            self._room = max(0, UNSENT_BYTES - self._outgoing.pending)
            if self._waiting:
                self._serve_waiting()
        self._watch(self._reads)
        if self.buffered:
            self._note(0)
        if self.connection.is_terminated and self._is_established and not self.is_closed:
            self._finish()

    def _note(self, buffered: int) -> None:
        if self.is_closed:
            buffered = 0  # an error of TLS has just ended it
        by, self.buffered = buffered - self.buffered, buffered
        self.share.change(self, by)

    def _waits_for_room(self) -> bool:
        """Stop reading while there is no room and a stream's bytes would have to be kept."""
        if not any(channel.is_paused for channel in self.channels.values()):
            return False
        self._reads = 0
        self._watch(self._watched & ~READ)
        self.share.wait_room(self.read_again)
        return True

    def read_again(self) -> None:
        """Go on reading if that was stopped: there is room, or a stream less that needs it."""
        if not self._reads:
            self._reads = READ
            self._watch(self._watched | READ)

    def _serve_waiting(self) -> None:
        for stream_id in list(self._waiting):
            if not self._room:
                return  # the next turn begins with who is first now
            del self._waiting[stream_id]
            channel = self.channels.get(stream_id)
            if channel is not None:
                channel.flush()

    # -- events -------------------------------------------------------------------------------

    def _dispatch(self, event: Event) -> None:
        """Act on anything but data, which `_read` passes on itself."""
        match event:
            case WindowOpened(stream_id=0):
                self._flush_all()
            case WindowOpened():
                channel = self.channels.get(event.stream_id)
                if channel is not None:
                    channel.flush()
            case StreamEnded():
                channel = self.channels.get(event.stream_id)
                if channel is not None:
                    channel.has_received_end = True
                    channel.on_end()
            case StreamReset():
                channel = self.channels.get(event.stream_id)
                if channel is not None:
                    channel.reset_code = event.code
                    channel.fail()
            case ConnectRequested():
                self.channels[event.stream_id] = StreamChannel(self, event.stream_id)
                self.on_request(self, event)
            case ResponseReceived():
                channel = self.channels.get(event.stream_id)
                if channel is not None:
                    channel.answered(event.status)
            case SettingsReceived():
                self._on_settings()
            case PongReceived():
                self.heard_at = self._pinged_at
                self._deadline.cancel()
                self._schedule_ping()
            case ConnectionTerminated():
                self.fail(f"the peer broke HTTP/2: {event.reason}")
            case GoAwayReceived():
                self.on_draining(self)
                if not self.channels:
                    self.on_idle(self)

    def _on_settings(self) -> None:
        if not self._is_ready:
            self._is_ready = True
            self._deadline.cancel()
            self._schedule_ping()
            if self._role is Role.CLIENT:
                self.on_ready(self)
                if self._drains:
                    self.drain()
        self._flush_all()

    def _flush_all(self) -> None:
        for channel in [each for each in self.channels.values() if each.buffered]:
            channel.flush()

    def _schedule_ping(self) -> None:
        self._deadline = self._reactor.call_later(PING_SECONDS, self._ping)

    def _ping(self) -> None:
        self.connection.ping(b"sidestep")
        self._pinged_at = time.monotonic()
        self.write_now()
        if not self.is_closed:
            self._life_signs.expect_answer(len(self._unsent) + self._outgoing.pending)
            self._look_later()

    def _look_later(self) -> None:
        self._deadline = self._reactor.call_later(life_signs.LOOK_SECONDS, self._look)

    def _look(self) -> None:
        if self._life_signs.is_over(hears=not self.connection.is_terminated):
            self.fail("the peer did not answer a ping in time")
        else:
            self._look_later()

    def _on_deadline(self) -> None:
        self.fail("the peer did not finish the handshake in time", "handshake_timeout")

    # -- end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Say goodbye and close when that is written; open streams are reset."""
        self.connection.close()
        self.wants_write()

    def drain(self) -> None:
        """Take no new streams; those that are open go on, then the client closes."""
        if self.is_closed or self.connection.is_terminated:
            return  # a second GOAWAY may allow no more than the first (RFC 9113 §6.8)
        if self._role is Role.SERVER:
            self.connection.warn()
            self._refusal_timer = self._reactor.call_later(WARNING_SECONDS, self._refuse_streams)
            self.wants_write()
            return
        if not self._is_ready:
            self._drains = True  # when those who wait for it have opened their streams
            return
        self.connection.is_draining = True
        self.on_draining(self)
        if not self.channels:
            self.on_idle(self)

    def _refuse_streams(self) -> None:
        self.connection.drain()
        self.wants_write()

    def close_if_idle(self) -> None:
        """Close if no stream is open; a client's own closes by itself once it drains."""
        if self._role is Role.SERVER and not self.channels and not self.is_closed:
            self.close()

    def refuse(self, error: UntrustedPeer) -> None:
        """Close now, because of what the peer's certificate says."""
        if not self.is_closed:
            self.refusal = error.reason
            self.fail(str(error))

    def give_up(self) -> None:
        """Close now: there is no room for what the peer does not take."""
        self.fail("the peer took nothing while the pod's share of the buffers was full")

    def fail(self, reason: str, code: str = "handshake_broken") -> None:
        """Close now; streams that have not ended both ways are aborted.

        `code` counts if TLS was not done.
        """
        if self.is_closed:
            return
        if not self._is_established:
            self.handshake_failure = self.refusal or code
        # a GOAWAY or an alert with the reason's code, if the socket takes it at once
        with contextlib.suppress(ssl.SSLError, OSError):
            if self._is_established:
                self._tls.write(self.connection.take_output())
            self._socket.send(bytes(self._unsent) + self._outgoing.read())
        self._end()
        if self._is_established:
            self._socket.close()
        else:
            sockets.abort(self._socket)
        self._count_out()
        self._say_closed(reason)

    def _finish(self) -> None:
        """Close in order: all is written, and the peer is heard out."""
        self._end()
        lingering.linger(self._reactor, self._socket, self._count_out)
        self._say_closed("the tunnel was ended")

    def _end(self) -> None:
        self.is_closed = True
        self._trust.leave(self)
        self._deadline.cancel()
        if self._refusal_timer is not None:
            self._refusal_timer.cancel()
        self._note(0)
        self._reactor.forget(self._fd)
        channels, self.channels = self.channels, {}
        unwritten = self._unwritten_ends | self._leaving_ends
        for stream_id, channel in channels.items():
            # What has ended both ways needs no tunnel any more, only an application that reads.
            if not channel.has_ended or stream_id in unwritten:
                channel.fail()

    def _say_closed(self, reason: str) -> None:
        on_closed = self.on_closed
        # They refer to what refers to us: a tunnel that waits for the collector of cyclic garbage
        # keeps what OpenSSL holds of it, 100 KiB that the collector does not see.
        self.on_ready = self.on_closed = self.on_request = _nothing
        self.on_idle = self.on_draining = _nothing
        on_closed(self, reason)

    @staticmethod
    def _count_out() -> None:
        Session.open_count -= 1
