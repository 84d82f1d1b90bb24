"""One end of an HTTP/2 connection that carries HBONE streams: bytes in, events out.

No I/O, no clock. Feed what was read to `receive`, act on the events, write what `take_output`
returns. A fault of the peer never raises: it queues GOAWAY and yields ConnectionTerminated, or
resets one stream. A fault of ours raises LocalProtocolError.

Theory of operation. Both windows bound what a peer may have in flight. The connection's window is
refilled when bytes arrive, a stream's when its application took them (`acknowledge`). So a reader
that stalls costs one stream window and stops its own stream, never the others (RFC 9113 §5.2.2).

DATA payload is passed on as it arrives, also in the middle of a frame: how the bytes were chunked
changes how DataReceived is split, and nothing else. It is a view of the bytes that `receive` was
given: who wants to keep it copies it.

Floods are counted, not timed: what a peer can make us queue or do for nothing is bounded, from one
of our pings to the next.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, ClassVar

import hpack

from agent.errors import LocalProtocolError, RemoteProtocolError
from agent.tunnel import events, frames
from agent.tunnel.events import DataReceived
from agent.tunnel.frames import ErrorCode, FrameType, Setting
from agent.tunnel.headers import (
    STATUS_200,
    TABLE_SIZE_0,
    build_request,
    build_response,
    find_request_fault,
    find_response_fault,
    read_literals,
)
from agent.tunnel.streams import Stream, StreamInput, StreamState

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.tunnel.events import Event

DATA = int(FrameType.DATA)  # compared for every frame, where an enum is slow
# Frames that cost the peer nothing and us a reply, until the replies have left.
MAX_UNSENT_REPLIES = 1000
# Resets and empty frames beyond the work that the connection did (CVE-2023-44487). The answer to a
# ping of ours, every few seconds, makes all free again: clients that give up on an application that
# accepts nothing reset a few requests a second, for hours.
FREE_NUISANCES = 400


class Role(Enum):
    """Who opens streams."""

    CLIENT = auto()
    SERVER = auto()


@dataclass(frozen=True, slots=True)
class Limits:
    """What we let a peer do, in bytes and counts."""

    stream_window: int = 2 << 20
    connection_window: int = 16 << 20
    frame_bytes: int = 1 << 20
    concurrent_streams: int = 200
    header_list_bytes: int = 16 << 10


class Connection:
    """One end. The preface and our SETTINGS are in the output from the start."""

    def __init__(self, role: Role, limits: Limits | None = None) -> None:
        self.role = role
        self.limits = limits or Limits()
        self.is_terminated = False
        self.is_draining = False  # by either side: no new streams
        self.is_ready = False  # the peer's SETTINGS are known
        self.peer_concurrent_streams = 2**32 - 1
        self._streams: dict[int, Stream] = {}
        self._output: list[bytes | memoryview] = []
        self._unsent_replies = 0
        self._nuisances = FREE_NUISANCES
        self._awaits_pong = False
        self._decoder = hpack.Decoder(max_header_list_size=self.limits.header_list_bytes)
        self._size_update = b""  # owed in the next header block
        self._send_window = frames.DEFAULT_WINDOW
        self._receive_window = self.limits.connection_window
        self._peer_stream_window = frames.DEFAULT_WINDOW
        self._peer_frame_bytes = frames.DEFAULT_FRAME_BYTES
        self._next_stream_id = 1
        self._last_peer_stream_id = 0  # that we acted on
        self._highest_peer_stream_id = 0  # that we heard of
        # By us, so the peer may still speak of them; as many as it can have had open.
        self._were_reset: deque[int] = deque(maxlen=self.limits.concurrent_streams)
        self._pending = b""  # an incomplete frame that is neither DATA nor unknown
        self._data_stream_id = 0  # the DATA frame that is being received
        self._data_left = 0
        self._to_skip = 0  # padding, or an unknown frame
        self._data_ends = False
        self._block: bytearray | None = None  # header block until END_HEADERS
        self._block_stream_id = 0
        self._block_ends = False
        self._preface_left = frames.PREFACE if role is Role.SERVER else b""
        self._open()

    def _open(self) -> None:
        limits = self.limits
        settings = {
            Setting.INITIAL_WINDOW_SIZE: limits.stream_window,
            Setting.MAX_FRAME_SIZE: limits.frame_bytes,
            Setting.MAX_HEADER_LIST_SIZE: limits.header_list_bytes,
        }
        if self.role is Role.CLIENT:
            self._output.append(frames.PREFACE)
            settings[Setting.ENABLE_PUSH] = 0
        else:
            settings[Setting.MAX_CONCURRENT_STREAMS] = limits.concurrent_streams
        self._output.append(frames.build_settings(settings))
        extra = limits.connection_window - frames.DEFAULT_WINDOW
        if extra > 0:
            self._output.append(frames.build_window_update(0, extra))

    # -- what we do ---------------------------------------------------------------------------

    def take_output(self) -> bytes:
        """Return and forget what is to be written."""
        return b"".join(self.take_parts())

    def take_parts(self) -> list[bytes | memoryview]:
        """Like `take_output`, but not joined."""
        parts, self._output = self._output, []
        return parts

    def forgive_replies(self) -> None:
        """Say that output has left: the peer may ask for as many replies again."""
        self._unsent_replies = 0

    @property
    def has_output(self) -> bool:
        return bool(self._output)

    @property
    def stream_count(self) -> int:
        return len(self._streams)

    @property
    def last_peer_stream_id(self) -> int:
        """The last stream that the peer has opened; 0 if none."""
        return self._last_peer_stream_id

    @property
    def may_open(self) -> bool:
        """Whether `open_stream` is allowed now."""
        return (
            self.role is Role.CLIENT
            and not self.is_terminated
            and not self.is_draining
            and len(self._streams) < self.peer_concurrent_streams
            and self._next_stream_id <= frames.MAX_STREAM_ID
        )

    def open_stream(self, authority: str, headers: dict[str, str]) -> int:
        """Send a CONNECT and return its stream id; the answer is a ResponseReceived."""
        if not self.may_open:
            raise LocalProtocolError("a stream was opened on a connection that takes none")
        stream_id = self._next_stream_id
        self._next_stream_id += 2
        self._streams[stream_id] = Stream(self._peer_stream_window, self.limits.stream_window)
        self._send_headers(stream_id, build_request(authority, headers.items()), ends=False)
        return stream_id

    def respond(self, stream_id: int, status: int) -> None:
        """Answer a ConnectRequested; any status but 200 ends the stream."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return  # reset meanwhile
        if stream.has_response:
            raise LocalProtocolError("a stream was answered twice")
        stream.has_response = True
        self._send_headers(stream_id, build_response(status), ends=status != 200)
        if status == 200:
            self._appease()
        else:
            self._advance(stream_id, stream, StreamInput.SEND_END)
            if stream_id in self._streams:  # RFC 9113 §8.1: we need no more of the request
                self.reset(stream_id, ErrorCode.NO_ERROR)

    def send_some(self, stream_id: int, data: bytes | memoryview, limit: int) -> int:
        """Send as much of `data` as the windows and `limit` allow; return how much that is.

        What was sent is in the output as a view of `data` until `take_output`.
        """
        stream = self._streams.get(stream_id)
        if stream is None or not stream.may_send:
            return 0
        size = len(data)
        if size > limit:
            size = limit
        if size > stream.send_window:
            size = stream.send_window
        if size > self._send_window:
            size = self._send_window
        if size <= 0:
            return 0
        if size < len(data):
            data = memoryview(data)[:size]
        stream.send_window -= size
        self._send_window -= size
        if size <= self._peer_frame_bytes:
            self._output.append(frames.build_data_head(size, 0, stream_id))
            self._output.append(data)
        else:
            self._split(stream_id, memoryview(data))
        return size

    def end(self, stream_id: int) -> None:
        """Send FIN: nothing more comes from us on a stream. It costs no window."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return  # reset meanwhile
        self._advance(stream_id, stream, StreamInput.SEND_END)
        self._output.append(frames.build_data_head(0, frames.END_STREAM, stream_id))

    def _split(self, stream_id: int, data: memoryview) -> None:
        limit = self._peer_frame_bytes
        for start in range(0, len(data), limit):
            part = data[start : start + limit]
            self._output.append(frames.build_data_head(len(part), 0, stream_id))
            self._output.append(part)

    def acknowledge(self, stream_id: int, size: int) -> None:
        """Say that the application took `size` bytes of a stream: the peer may send more."""
        stream = self._streams.get(stream_id)
        if stream is None or not stream.may_receive:
            return
        stream.consumed += size
        # Half a window at a time: a frame of 13 bytes for every read would cost more than it gives.
        if stream.consumed * 2 >= self.limits.stream_window:
            self._output.append(frames.build_window_update(stream_id, stream.consumed))
            stream.receive_window += stream.consumed
            stream.consumed = 0

    def reset(self, stream_id: int, code: int) -> None:
        """End a stream at once; nothing happens if it is gone."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._say_reset(stream_id, code)
            self._advance(stream_id, stream, StreamInput.RESET)

    def _say_reset(self, stream_id: int, code: int) -> None:
        self._output.append(frames.build_reset(stream_id, code))
        self._were_reset.append(stream_id)

    def ping(self, payload: bytes) -> None:
        """Send a PING of 8 bytes; PongReceived brings them back."""
        self._awaits_pong = True
        self._output.append(frames.build_ping(payload, is_ack=False))

    def drain(self) -> None:
        """Refuse new streams and tell the peer; open ones go on."""
        if not (self.is_draining or self.is_terminated):
            self.is_draining = True
            self._output.append(frames.build_goaway(self._last_peer_stream_id, ErrorCode.NO_ERROR))

    def warn(self) -> None:
        """Ask for no new streams, and serve those that are on the way (RFC 9113 §6.8)."""
        self._output.append(frames.build_goaway(2**31 - 1, ErrorCode.NO_ERROR))

    def close(self, code: int = ErrorCode.NO_ERROR) -> None:
        """Say goodbye: write the output, then close the socket."""
        if not self.is_terminated:
            self.is_terminated = True
            self._output.append(frames.build_goaway(self._last_peer_stream_id, code))

    def _send_headers(self, stream_id: int, block: bytes, *, ends: bool) -> None:
        block, self._size_update = self._size_update + block, b""
        limit = self._peer_frame_bytes
        for start in range(0, len(block), limit):
            part = block[start : start + limit]
            flags = frames.END_HEADERS if start + limit >= len(block) else 0
            frame_type = FrameType.HEADERS if start == 0 else FrameType.CONTINUATION
            if start == 0 and ends:
                flags |= frames.END_STREAM
            self._output.append(frames.build_head(len(part), frame_type, flags, stream_id))
            self._output.append(part)

    def _advance(self, stream_id: int, stream: Stream, step: StreamInput) -> None:
        try:
            stream.advance(step)
        except KeyError:
            raise LocalProtocolError(f"{step.name} on a stream in {stream.state.name}") from None
        if stream.state is StreamState.CLOSED:
            del self._streams[stream_id]

    # -- what the peer does -------------------------------------------------------------------

    def receive(self, data: bytes | memoryview) -> list[Event]:
        """Take bytes from the peer, any chunking, and return what they mean."""
        found: list[Event] = []
        if self.is_terminated:
            return found
        try:
            self._receive(data, found)
        except RemoteProtocolError as error:
            self.close(error.code)
            found.append(events.ConnectionTerminated(error.code, str(error)))
        return found

    def _receive(self, data: bytes | memoryview, found: list[Event]) -> None:
        if self._preface_left:
            data = self._receive_preface(data)
        if self._pending:
            data = b"".join((self._pending, data))
            self._pending = b""
        view = memoryview(data)
        at, end = 0, len(view)
        while at < end:
            if self._data_left or self._to_skip:
                at = self._receive_data(view, at, found)
                continue
            if end - at < frames.HEADER_BYTES:
                break
            length, frame_type, flags, stream_id = frames.parse_head(view, at)
            if frame_type == DATA and not flags and self._may_take(length, stream_id):
                at += frames.HEADER_BYTES
                size = min(length, end - at)
                if size:
                    found.append(DataReceived(stream_id, view[at : at + size]))
                    at += size
                if size < length:
                    self._data_stream_id = stream_id
                    self._data_left = length - size
                continue
            self._check_frame(length, frame_type, flags, stream_id)
            if frame_type == DATA:
                # Its first byte may be the padding's length, so that one must be here as well.
                needed = frames.HEADER_BYTES + (1 if flags & frames.PADDED and length else 0)
                if end - at < needed:
                    break
                self._begin_data(length, flags, stream_id, view[at + 9 : at + needed], found)
                at += needed
                continue
            handler = self._HANDLERS.get(frame_type)
            if handler is None:  # RFC 9113 §4.1: discarded, and so not kept until it is whole
                self._to_skip = length
                at += frames.HEADER_BYTES
                continue
            if end - at < frames.HEADER_BYTES + length:
                break
            payload = view[at + 9 : at + 9 + length]
            at += frames.HEADER_BYTES + length
            found += handler(self, flags, stream_id, payload)
        if at < end:
            self._pending = bytes(view[at:])

    def _may_take(self, length: int, stream_id: int) -> bool:
        """Account for a DATA frame of the usual kind; False leaves every other to the long way."""
        stream = self._streams.get(stream_id)
        if (
            stream is None
            or not stream.may_receive
            or not stream.has_response
            or not 0 < length <= self.limits.frame_bytes
            or length > stream.receive_window
            or length > self._receive_window
            or self._block is not None
            or not self.is_ready
        ):
            return False
        stream.receive_window -= length
        self._receive_window -= length
        if self._receive_window * 2 <= self.limits.connection_window:
            self._refill()
        return True

    def _refill(self) -> None:
        missing = self.limits.connection_window - self._receive_window
        self._output.append(frames.build_window_update(0, missing))
        self._receive_window += missing

    def _receive_preface(self, data: bytes | memoryview) -> bytes | memoryview:
        size = min(len(data), len(self._preface_left))
        if data[:size] != self._preface_left[:size]:
            raise RemoteProtocolError("the peer does not speak HTTP/2", ErrorCode.PROTOCOL_ERROR)
        self._preface_left = self._preface_left[size:]
        return data[size:]

    def _check_frame(self, length: int, frame_type: int, flags: int, stream_id: int) -> None:
        if length > self.limits.frame_bytes:
            raise RemoteProtocolError("a frame is too long", ErrorCode.FRAME_SIZE_ERROR)
        if not self.is_ready and (frame_type != FrameType.SETTINGS or flags & frames.ACK):
            raise RemoteProtocolError("SETTINGS is not the first frame", ErrorCode.PROTOCOL_ERROR)
        if self._block is not None and (
            frame_type != FrameType.CONTINUATION or stream_id != self._block_stream_id
        ):
            raise RemoteProtocolError("a header block is interrupted", ErrorCode.PROTOCOL_ERROR)
        if frame_type in self._HANDLERS and length > frames.DEFAULT_FRAME_BYTES * 4:
            # DATA is passed on in parts; what has a handler would have to be held whole.
            raise RemoteProtocolError("a control frame is too long", ErrorCode.FRAME_SIZE_ERROR)

    def _annoy(self) -> None:
        self._nuisances -= 1
        if self._nuisances < 0:
            raise RemoteProtocolError("too many frames for nothing", ErrorCode.ENHANCE_YOUR_CALM)

    def _appease(self) -> None:
        # A stream that was answered may be reset: that is how a TCP RST travels.
        self._nuisances = min(FREE_NUISANCES, self._nuisances + 1)

    def _count_reply(self) -> None:
        self._unsent_replies += 1
        if self._unsent_replies > MAX_UNSENT_REPLIES:
            raise RemoteProtocolError("too many replies to write", ErrorCode.ENHANCE_YOUR_CALM)

    def _reply(self, frame: bytes) -> None:
        self._count_reply()
        self._output.append(frame)

    def _is_idle(self, stream_id: int) -> bool:
        """Whether the number was never used; a stream that is gone is not idle."""
        if self.role is Role.CLIENT:
            return stream_id % 2 == 0 or stream_id >= self._next_stream_id
        return stream_id % 2 == 0 or stream_id > self._highest_peer_stream_id

    # DATA

    def _begin_data(
        self, length: int, flags: int, stream_id: int, first: memoryview, found: list[Event]
    ) -> None:
        if self._is_idle(stream_id):
            raise RemoteProtocolError("DATA on an idle stream", ErrorCode.PROTOCOL_ERROR)
        padding = 0
        if flags & frames.PADDED:
            if not length:
                raise RemoteProtocolError("DATA is too short", ErrorCode.FRAME_SIZE_ERROR)
            padding = first[0] + 1
            if padding > length:
                raise RemoteProtocolError("padding is too long", ErrorCode.PROTOCOL_ERROR)
        if length == padding and not flags & frames.END_STREAM:
            self._annoy()
        self._receive_window -= length
        if self._receive_window < 0:
            raise RemoteProtocolError(
                "the connection window is broken", ErrorCode.FLOW_CONTROL_ERROR
            )
        if self._receive_window * 2 <= self.limits.connection_window:
            self._refill()

        stream = self._streams.get(stream_id)
        if stream is not None:
            if not stream.may_receive:
                self._fail_stream(stream_id, ErrorCode.STREAM_CLOSED, found)
            elif self.role is Role.CLIENT and not stream.has_response:
                self._fail_stream(stream_id, ErrorCode.PROTOCOL_ERROR, found)  # RFC 9113 §8.1
            elif length > stream.receive_window:
                self._fail_stream(stream_id, ErrorCode.FLOW_CONTROL_ERROR, found)
            else:
                stream.receive_window -= length
                if padding:
                    self.acknowledge(stream_id, padding)
        self._data_stream_id = stream_id
        self._data_left = length - padding
        self._to_skip = max(0, padding - 1)
        self._data_ends = bool(flags & frames.END_STREAM)
        if not self._data_left and not self._to_skip:
            self._end_data(found)

    def _receive_data(self, view: memoryview, at: int, found: list[Event]) -> int:
        if self._data_left:
            size = min(self._data_left, len(view) - at)
            if self._data_stream_id in self._streams:
                part = view[at : at + size]
                found.append(DataReceived(self._data_stream_id, part))
            self._data_left -= size
        else:
            size = min(self._to_skip, len(view) - at)
            self._to_skip -= size
        if not self._data_left and not self._to_skip:
            self._end_data(found)
        return at + size

    def _end_data(self, found: list[Event]) -> None:
        if self._data_ends:
            self._data_ends = False
            self._end_stream(self._data_stream_id, found)

    def _end_stream(self, stream_id: int, found: list[Event]) -> None:
        stream = self._streams.get(stream_id)
        if stream is not None:
            if stream.has_response:  # else it may be reset next, for nothing (CVE-2023-44487)
                self._appease()
            self._advance(stream_id, stream, StreamInput.RECEIVE_END)
            found.append(events.StreamEnded(stream_id))

    def _fail_stream(self, stream_id: int, code: int, found: list[Event]) -> None:
        self._annoy()  # it costs us what the peer's own reset costs (CVE-2025-8671)
        self.reset(stream_id, code)
        found.append(events.StreamReset(stream_id, code))

    # HEADERS and CONTINUATION

    def _on_headers(self, flags: int, stream_id: int, payload: memoryview) -> list[Event]:
        if stream_id == 0:
            raise RemoteProtocolError("HEADERS on stream 0", ErrorCode.PROTOCOL_ERROR)
        is_padded = bool(flags & frames.PADDED)
        start, end = int(is_padded), len(payload)
        if flags & frames.PRIORITY_FLAG:
            start += frames.PRIORITY_BYTES
        if start > end:
            raise RemoteProtocolError("HEADERS is too short", ErrorCode.FRAME_SIZE_ERROR)
        if is_padded:
            end -= payload[0]
            if start > end:
                raise RemoteProtocolError("padding is too long", ErrorCode.PROTOCOL_ERROR)
        self._block = bytearray(payload[start:end])
        self._block_stream_id = stream_id
        self._block_ends = bool(flags & frames.END_STREAM)
        return self._end_block() if flags & frames.END_HEADERS else []

    def _on_continuation(self, flags: int, _stream_id: int, payload: memoryview) -> list[Event]:
        if self._block is None:
            raise RemoteProtocolError("CONTINUATION of nothing", ErrorCode.PROTOCOL_ERROR)
        if not payload:
            self._annoy()
        self._block += payload
        # A compressed block is no longer than what it expands to, but for its own overhead.
        if len(self._block) > 2 * self.limits.header_list_bytes:
            raise RemoteProtocolError("a header block is too long", ErrorCode.ENHANCE_YOUR_CALM)
        return self._end_block() if flags & frames.END_HEADERS else []

    def _end_block(self) -> list[Event]:
        assert self._block is not None
        block, self._block = bytes(self._block), None
        headers = self._decode(block)
        found: list[Event] = []
        stream = self._streams.get(self._block_stream_id)
        if stream is not None and not stream.may_receive:
            self._fail_stream(self._block_stream_id, ErrorCode.STREAM_CLOSED, found)
            return found
        if self.role is Role.SERVER:
            self._on_request(self._block_stream_id, headers, found)
        else:
            self._on_response(self._block_stream_id, headers, found)
        if self._block_ends:
            self._end_stream(self._block_stream_id, found)
        return found

    def _decode(self, block: bytes) -> list[tuple[str, str]]:
        # What peers like us say to nearly every request; it changes no table, and no literal does.
        if block == STATUS_200:
            return [(":status", "200")]
        fields = read_literals(block, self.limits.header_list_bytes)
        if fields is not None:
            return fields
        try:
            # A name that is not ASCII is malformed, a value may be any bytes (RFC 9113 §8.2.1).
            return [
                (str(name, "latin-1"), str(value, "utf-8", "replace"))
                for name, value in self._decoder.decode(block, raw=True)
            ]
        except hpack.OversizedHeaderListError as error:
            raise RemoteProtocolError(
                "headers are too long", ErrorCode.ENHANCE_YOUR_CALM
            ) from error
        except hpack.HPACKError as error:
            raise RemoteProtocolError(
                "headers cannot be decoded", ErrorCode.COMPRESSION_ERROR
            ) from error

    def _on_request(
        self, stream_id: int, headers: list[tuple[str, str]], found: list[Event]
    ) -> None:
        if stream_id in self._streams:
            # RFC 9113 §8.5: a connected stream has no trailers.
            self._fail_stream(stream_id, ErrorCode.PROTOCOL_ERROR, found)
            return
        if stream_id % 2 == 0 or stream_id <= self._highest_peer_stream_id:
            if stream_id in self._were_reset:
                self._annoy()
                return  # §5.1: it was sent before the peer heard of that
            raise RemoteProtocolError("a stream number is used again", ErrorCode.PROTOCOL_ERROR)
        self._highest_peer_stream_id = stream_id
        if self.is_draining or len(self._streams) >= self.limits.concurrent_streams:
            if not self.is_draining:
                self._last_peer_stream_id = stream_id
                self._annoy()
            self._count_reply()
            self._say_reset(stream_id, ErrorCode.REFUSED_STREAM)
            return
        self._last_peer_stream_id = stream_id
        self._streams[stream_id] = Stream(self._peer_stream_window, self.limits.stream_window)
        named = dict(headers)
        method = named.get(":method")
        fault = find_request_fault(headers)
        if fault is not None:
            # §8.1.1: an error of the stream; an answer may be sent before that.
            self._annoy()
            self._send_headers(stream_id, build_response(400), ends=False)
            self.reset(stream_id, ErrorCode.PROTOCOL_ERROR)
        elif method != "CONNECT":
            fault = f"the method is {method}, not CONNECT"
        authority = named.get(":authority", "")
        found.append(events.ConnectRequested(stream_id, authority, named, fault))

    def _on_response(
        self, stream_id: int, headers: list[tuple[str, str]], found: list[Event]
    ) -> None:
        stream = self._streams.get(stream_id)
        if stream is None:
            if self._is_idle(stream_id):
                raise RemoteProtocolError("an answer to no request", ErrorCode.PROTOCOL_ERROR)
            return
        if stream.has_response or find_response_fault(headers, ends=self._block_ends) is not None:
            self._fail_stream(stream_id, ErrorCode.PROTOCOL_ERROR, found)  # RFC 9113 §8.5, §8.1.1
            return
        status = dict(headers)[":status"]
        if status.startswith("1"):
            self._annoy()
        else:
            stream.has_response = True
            self._appease()
            found.append(events.ResponseReceived(stream_id, int(status)))

    # everything else

    def _on_priority(self, _flags: int, stream_id: int, payload: memoryview) -> list[Event]:
        if stream_id == 0:
            raise RemoteProtocolError("PRIORITY on stream 0", ErrorCode.PROTOCOL_ERROR)
        if len(payload) != frames.PRIORITY_BYTES:
            # Of the stream, which may not exist: RFC 9113 §5.4.1 lets us end the connection.
            raise RemoteProtocolError("PRIORITY has a wrong size", ErrorCode.FRAME_SIZE_ERROR)
        return []

    def _on_reset(self, _flags: int, stream_id: int, payload: memoryview) -> list[Event]:
        if len(payload) != 4:
            raise RemoteProtocolError("RST_STREAM has a wrong size", ErrorCode.FRAME_SIZE_ERROR)
        if self._is_idle(stream_id):
            raise RemoteProtocolError("RST_STREAM on an idle stream", ErrorCode.PROTOCOL_ERROR)
        self._annoy()
        stream = self._streams.get(stream_id)
        if stream is None:
            return []
        self._advance(stream_id, stream, StreamInput.RESET)
        return [events.StreamReset(stream_id, frames.parse_word(payload))]

    def _on_settings(self, flags: int, stream_id: int, payload: memoryview) -> list[Event]:
        if stream_id != 0:
            raise RemoteProtocolError("SETTINGS on a stream", ErrorCode.PROTOCOL_ERROR)
        if flags & frames.ACK:
            if payload:
                raise RemoteProtocolError("SETTINGS ACK has a payload", ErrorCode.FRAME_SIZE_ERROR)
            return []
        if len(payload) % 6:
            raise RemoteProtocolError("SETTINGS has a wrong size", ErrorCode.FRAME_SIZE_ERROR)
        # Of a name that comes again the last value is in force (RFC 9113 §6.5.3). A thousand
        # windows in a frame would cost a thousand walks over all streams.
        for name, value in dict(frames.parse_settings(payload)).items():
            self._apply_setting(name, value)
        self.is_ready = True
        self._reply(frames.SETTINGS_ACK)
        return [events.SettingsReceived()]

    def _apply_setting(self, name: int, value: int) -> None:
        if name == Setting.HEADER_TABLE_SIZE:
            self._size_update = TABLE_SIZE_0
        elif name == Setting.ENABLE_PUSH:
            # RFC 9113 §6.5.2: a server may not ask for it.
            if value > (1 if self.role is Role.SERVER else 0):
                raise RemoteProtocolError("ENABLE_PUSH is not allowed", ErrorCode.PROTOCOL_ERROR)
        elif name == Setting.MAX_CONCURRENT_STREAMS:
            self.peer_concurrent_streams = value
        elif name == Setting.INITIAL_WINDOW_SIZE:
            if value > frames.MAX_WINDOW:
                raise RemoteProtocolError("a window is too large", ErrorCode.FLOW_CONTROL_ERROR)
            for stream in self._streams.values():
                stream.send_window += value - self._peer_stream_window
                if stream.send_window > frames.MAX_WINDOW:  # RFC 9113 §6.9.2
                    raise RemoteProtocolError("a window is too large", ErrorCode.FLOW_CONTROL_ERROR)
            self._peer_stream_window = value
        elif name == Setting.MAX_FRAME_SIZE:
            if not frames.DEFAULT_FRAME_BYTES <= value <= frames.MAX_FRAME_BYTES:
                raise RemoteProtocolError("a frame size is not allowed", ErrorCode.PROTOCOL_ERROR)
            self._peer_frame_bytes = value

    def _on_push_promise(self, _flags: int, _stream_id: int, _payload: memoryview) -> list[Event]:
        raise RemoteProtocolError("PUSH_PROMISE is off", ErrorCode.PROTOCOL_ERROR)

    def _on_ping(self, flags: int, stream_id: int, payload: memoryview) -> list[Event]:
        if stream_id != 0:
            raise RemoteProtocolError("PING on a stream", ErrorCode.PROTOCOL_ERROR)
        if len(payload) != 8:
            raise RemoteProtocolError("PING has a wrong size", ErrorCode.FRAME_SIZE_ERROR)
        if flags & frames.ACK:
            if self._awaits_pong:  # one that nobody asked for forgives nothing
                self._awaits_pong = False
                self._nuisances = FREE_NUISANCES
            return [events.PongReceived(bytes(payload))]
        self._reply(frames.build_ping(bytes(payload), is_ack=True))
        return []

    def _on_goaway(self, _flags: int, stream_id: int, payload: memoryview) -> list[Event]:
        if stream_id != 0:
            raise RemoteProtocolError("GOAWAY on a stream", ErrorCode.PROTOCOL_ERROR)
        if len(payload) < 8:
            raise RemoteProtocolError("GOAWAY has a wrong size", ErrorCode.FRAME_SIZE_ERROR)
        last, code = frames.parse_goaway(payload)
        self.is_draining = True
        found: list[Event] = []
        if self.role is Role.CLIENT:
            for refused in [number for number in self._streams if number > last]:
                del self._streams[refused]
                found.append(events.StreamReset(refused, ErrorCode.REFUSED_STREAM))
        return [*found, events.GoAwayReceived(last, code)]

    def _on_window_update(self, _flags: int, stream_id: int, payload: memoryview) -> list[Event]:
        if len(payload) != 4:
            raise RemoteProtocolError("WINDOW_UPDATE has a wrong size", ErrorCode.FRAME_SIZE_ERROR)
        increment = frames.parse_word(payload) & frames.MAX_WINDOW
        if stream_id == 0:
            if increment == 0:
                raise RemoteProtocolError("a window grows by 0", ErrorCode.PROTOCOL_ERROR)
            was_closed = self._send_window <= 0
            self._send_window += increment
            if self._send_window > frames.MAX_WINDOW:
                raise RemoteProtocolError("a window is too large", ErrorCode.FLOW_CONTROL_ERROR)
            # All streams try again then: not for each of a thousand small steps.
            return [events.WindowOpened(0)] if was_closed else []
        stream = self._streams.get(stream_id)
        if stream is None:
            if self._is_idle(stream_id):
                raise RemoteProtocolError(
                    "WINDOW_UPDATE on an idle stream", ErrorCode.PROTOCOL_ERROR
                )
            return []
        stream.send_window += increment
        if increment and stream.send_window <= frames.MAX_WINDOW:
            return [events.WindowOpened(stream_id)]
        found: list[Event] = []
        code = ErrorCode.FLOW_CONTROL_ERROR if increment else ErrorCode.PROTOCOL_ERROR
        self._fail_stream(stream_id, code, found)
        return found

    # Functions: bound methods would make of every connection cyclic garbage.
    _HANDLERS: ClassVar[dict[int, Callable[[Connection, int, int, memoryview], list[Event]]]] = {
        FrameType.HEADERS: _on_headers,
        FrameType.PRIORITY: _on_priority,
        FrameType.RST_STREAM: _on_reset,
        FrameType.SETTINGS: _on_settings,
        FrameType.PUSH_PROMISE: _on_push_promise,
        FrameType.PING: _on_ping,
        FrameType.GOAWAY: _on_goaway,
        FrameType.WINDOW_UPDATE: _on_window_update,
        FrameType.CONTINUATION: _on_continuation,
    }
