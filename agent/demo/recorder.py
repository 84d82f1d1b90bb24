"""Record the packets of one link, as an eavesdropper on it would (packet(7)).

Whoever records something short and small needs no thread: the kernel keeps what passes until
`take` reads it, and says if it had to drop some.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING

from agent import netns
from agent.errors import LabError

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

ETH_P_ALL = 3  # linux/if_ether.h
SOL_PACKET, PACKET_STATISTICS = 263, 6  # linux/if_packet.h
SO_RCVBUFFORCE = 33
BUFFER_BYTES = 64 << 20
FRAME_BYTES = 1 << 17  # more than a segment that the link did not have to split


class Recorder:
    """Records from the constructor on; a context manager that stops at its end."""

    def __init__(self, netns_path: Path, link: str) -> None:
        """Record `link` of a namespace."""
        fd = netns.open_netns(netns_path)
        try:
            self._socket = netns.run_in(fd, lambda: _open(link))
        finally:
            os.close(fd)

    def take(self) -> list[bytes]:
        """Return the frames since the last call (LabError if some were lost)."""
        frames = []
        while True:
            try:
                frames.append(self._socket.recv(FRAME_BYTES))
            except BlockingIOError:
                break
        _seen, dropped = struct.unpack(
            "II", self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8)
        )
        if dropped:
            raise LabError(f"the recording of the link lost {dropped} packets")
        return frames

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()


def _open(link: str) -> socket.socket:
    # Protocol 0 at first: else it would record every link until bind() names one.
    recording = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
    recording.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
    recording.bind((link, ETH_P_ALL))
    return recording
