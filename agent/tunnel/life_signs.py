"""Whether a peer that has not answered a ping may still do so: what moves on its connection.

On a slow link a ping waits behind our bytes, and its answer behind the peer's. So the connection is
looked at every few seconds, and a peer is given up when nothing has moved several times in a row.
What counts:

    bytes acknowledged    until the ping itself is: after that they say that the peer's kernel
                          lives, which takes bytes for a process that hangs as well
    bytes received        always: the answer comes behind them
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent.tunnel import sockets

if TYPE_CHECKING:
    import socket

LOOK_SECONDS = 5.0
MOST_STALLS = 4  # in a row


class LifeSigns:
    """Of the peer at the other end of a TCP socket."""

    def __init__(self, own: socket.socket) -> None:
        self._socket = own
        self._stalls = self._acknowledged = self._received = 0
        self._ping_end = 0  # so much is acknowledged when the last ping is

    def expect_answer(self, unsent: int) -> None:
        """Begin to wait; the ping ends with the last of `unsent` bytes that have yet to be sent."""
        self._stalls = 0
        self._acknowledged, self._received = sockets.progress(self._socket)
        self._ping_end = self._acknowledged + sockets.unacknowledged(self._socket) + unsent

    def is_over(self, *, hears: bool = True) -> bool:
        """Look, and say whether to wait no more.

        Who does not hear answers any more (`hears`) waits until all is taken that is to be sent.
        """
        acknowledged, received = sockets.progress(self._socket)
        has_left = self._acknowledged < self._ping_end or not hears
        moved = has_left and acknowledged != self._acknowledged
        moved = moved or (hears and received != self._received)
        self._acknowledged, self._received = acknowledged, received
        self._stalls = 0 if moved else self._stalls + 1
        return self._stalls == MOST_STALLS
