"""An HTTP/2 peer that sends what it is told to, right or wrong, and says what came back."""

from __future__ import annotations

import contextlib
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING

import hpack

from agent.tunnel import frames
from agent.tunnel.frames import FrameType

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable

PROBE = b"are you?"  # a PING that says: what was sent before has been judged


def frame(frame_type: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    return frames.build_head(len(payload), frame_type, flags, stream_id) + payload


def block(*fields: tuple[str, str]) -> bytes:
    """Return a header block that leaves nothing in the table (RFC 7541 §6.2.3)."""
    return hpack.Encoder().encode([(name, value, True) for name, value in fields])


def headers(stream_id: int, *fields: tuple[str, str], ends: bool = False) -> bytes:
    flags = frames.END_HEADERS | (frames.END_STREAM if ends else 0)
    return frame(FrameType.HEADERS, flags, stream_id, block(*fields))


@dataclass(frozen=True)
class Frame:
    """A frame that came."""

    kind: int
    flags: int
    stream_id: int
    payload: bytes

    @property
    def is_pong(self) -> bool:
        return self.kind == FrameType.PING and self.flags == frames.ACK and self.payload == PROBE

    @property
    def code(self) -> int:
        """The error code of a RST_STREAM or a GOAWAY."""
        at = 4 if self.kind == FrameType.GOAWAY else 0
        return int.from_bytes(self.payload[at : at + 4], "big")


class RawPeer:
    """One TLS socket on which frames are written and read."""

    def __init__(self, tls: ssl.SSLSocket) -> None:
        self._tls = tls
        self._unread = b""
        self.seen: list[Frame] = []
        self._hpack = hpack.Decoder()

    def send(self, data: bytes) -> None:
        self._tls.sendall(data)

    def take(self, size: int) -> bytes:
        """Return the next bytes of what came, fewer at the end."""
        while len(self._unread) < size:
            try:
                data = self._tls.recv(1 << 16)
            except (ConnectionResetError, ssl.SSLEOFError):
                data = b""
            if not data:
                break
            self._unread += data
        taken, self._unread = self._unread[:size], self._unread[size:]
        return taken

    def next_frame(self) -> Frame | None:
        """Return the next frame, None at the end."""
        head = self.take(frames.HEADER_BYTES)
        if len(head) < frames.HEADER_BYTES:
            return None
        length, kind, flags, stream_id = frames.parse_head(memoryview(head))
        found = Frame(kind, flags, stream_id, self.take(length))
        self.seen.append(found)
        return found

    def read_until(self, is_it: Callable[[Frame], bool]) -> Frame:
        """Return the first frame that is it (EOFError if the end comes before)."""
        while (found := self.next_frame()) is not None:
            if is_it(found):
                return found
        raise EOFError(self.seen)

    def read_headers(self, stream_id: int) -> dict[str, str]:
        """Return the fields of the next HEADERS of a stream."""
        found = self.read_until(
            lambda each: each.kind == FrameType.HEADERS and each.stream_id == stream_id
        )
        return {str(name): str(value) for name, value in self._hpack.decode(found.payload)}

    def settle(self) -> None:
        """Wait until the other side has judged what was sent; it goes on or says goodbye."""
        with contextlib.suppress(OSError):  # it is gone, and what it said before can still be read
            self._tls.sendall(frames.build_ping(PROBE, is_ack=False))
        while (found := self.next_frame()) is not None:
            if found.is_pong:
                return

    def close(self) -> None:
        self._tls.close()


def handshake(context: ssl.SSLContext, raw: socket.socket, *, is_server: bool) -> RawPeer:
    return RawPeer(context.wrap_socket(raw, server_side=is_server))


@dataclass(frozen=True)
class Broken:
    """The connection ends with this code."""

    code: int

    def check(self, seen: Iterable[Frame], *, has_ended: bool) -> None:
        goodbyes = [each.code for each in seen if each.kind == FrameType.GOAWAY]
        assert (goodbyes, has_ended) == ([self.code], True)


@dataclass(frozen=True)
class Reset:
    """One stream ends with this code, the connection goes on."""

    code: int
    stream_id: int = 1

    def check(self, seen: Iterable[Frame], *, has_ended: bool) -> None:
        found = list(seen)
        ends = [(each.stream_id, each.code) for each in found if each.kind == FrameType.RST_STREAM]
        assert ends == [(self.stream_id, self.code)]
        assert not [each for each in found if each.kind == FrameType.GOAWAY]
        assert not has_ended


@dataclass(frozen=True)
class Fine:
    """Nothing ends. `answer` is a frame that has to be among what came."""

    answer: Frame | None = None

    def check(self, seen: Iterable[Frame], *, has_ended: bool) -> None:
        found = list(seen)
        assert not [each for each in found if each.kind in (FrameType.RST_STREAM, FrameType.GOAWAY)]
        assert not has_ended
        assert self.answer is None or self.answer in found


Outcome = Broken | Reset | Fine
