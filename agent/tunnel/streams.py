"""The life of one stream, as a table (RFC 9113 §5.1).

Rules: a stream is made open, by HEADERS, and each side ends its half once. A reset ends both. An
input that the table does not have for a state is a protocol error of whoever caused it. There is no
IDLE and no RESERVED state: idle streams are numbers not yet used, and push is off.
"""

from __future__ import annotations

from enum import Enum, auto


class StreamState(Enum):
    """Which halves are still open."""

    OPEN = auto()
    HALF_CLOSED_LOCAL = auto()
    HALF_CLOSED_REMOTE = auto()
    CLOSED = auto()


class StreamInput(Enum):
    """What ends a half, or both."""

    SEND_END = auto()
    RECEIVE_END = auto()
    RESET = auto()


TRANSITIONS = {
    (StreamState.OPEN, StreamInput.SEND_END): StreamState.HALF_CLOSED_LOCAL,
    (StreamState.OPEN, StreamInput.RECEIVE_END): StreamState.HALF_CLOSED_REMOTE,
    (StreamState.OPEN, StreamInput.RESET): StreamState.CLOSED,
    (StreamState.HALF_CLOSED_LOCAL, StreamInput.RECEIVE_END): StreamState.CLOSED,
    (StreamState.HALF_CLOSED_LOCAL, StreamInput.RESET): StreamState.CLOSED,
    (StreamState.HALF_CLOSED_REMOTE, StreamInput.SEND_END): StreamState.CLOSED,
    (StreamState.HALF_CLOSED_REMOTE, StreamInput.RESET): StreamState.CLOSED,
}

MAY_SEND = frozenset({StreamState.OPEN, StreamState.HALF_CLOSED_REMOTE})
MAY_RECEIVE = frozenset({StreamState.OPEN, StreamState.HALF_CLOSED_LOCAL})


class Stream:
    """One stream and its windows, in bytes.

    `send_window` is what the peer lets us send. `receive_window` is what the peer may still send;
    `consumed` is what the application took and the peer does not know of yet. `may_send` and
    `may_receive` say of the state what every frame asks for.
    """

    __slots__ = (
        "consumed",
        "has_response",
        "may_receive",
        "may_send",
        "receive_window",
        "send_window",
        "state",
    )

    def __init__(self, send_window: int, receive_window: int) -> None:
        self.state = StreamState.OPEN
        self.may_send = self.may_receive = True
        self.send_window = send_window
        self.receive_window = receive_window
        self.consumed = 0
        self.has_response = False

    def advance(self, step: StreamInput) -> None:
        """Go to the next state (KeyError if the table has none)."""
        self.state = TRANSITIONS[self.state, step]
        self.may_send = self.state in MAY_SEND
        self.may_receive = self.state in MAY_RECEIVE
