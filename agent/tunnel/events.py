"""What a Connection reports, in the past tense. Plain values; pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class SettingsReceived:
    """The peer's first or a later SETTINGS is in force: streams may be opened."""


@dataclass(slots=True)
class ConnectRequested:
    """A client asks for a stream; answer with `respond`.

    `fault` is None, or why the request is not a CONNECT that we serve: answer 400.
    """

    stream_id: int
    authority: str
    headers: dict[str, str]
    fault: str | None


@dataclass(slots=True)
class ResponseReceived:
    """The answer to our CONNECT."""

    stream_id: int
    status: int


@dataclass(slots=True)
class DataReceived:
    """Bytes of a stream; `acknowledge` them when the application has taken them."""

    stream_id: int
    data: memoryview


@dataclass(slots=True)
class StreamEnded:
    """The peer sends no more on this stream (FIN)."""

    stream_id: int


@dataclass(slots=True)
class StreamReset:
    """The stream is gone, with an HTTP/2 error code (RFC 9113 §7)."""

    stream_id: int
    code: int


@dataclass(slots=True)
class WindowOpened:
    """More may be sent: on one stream, or (0) on all."""

    stream_id: int


@dataclass(slots=True)
class GoAwayReceived:
    """The peer takes no new streams; those above `last_stream_id` were reset in events before."""

    last_stream_id: int
    code: int


@dataclass(slots=True)
class PongReceived:
    """The peer answered a PING."""

    payload: bytes


@dataclass(slots=True)
class ConnectionTerminated:
    """The peer broke the protocol; a GOAWAY is in the output, nothing more is read."""

    code: int
    reason: str


Event = (
    SettingsReceived
    | ConnectRequested
    | ResponseReceived
    | DataReceived
    | StreamEnded
    | StreamReset
    | WindowOpened
    | GoAwayReceived
    | PongReceived
    | ConnectionTerminated
)
