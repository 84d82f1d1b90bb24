"""Tell whoever started this process that it serves, as sd_notify(3) does."""

from __future__ import annotations

import os
import socket
from contextlib import suppress


def notify() -> None:
    """Send READY=1 to $NOTIFY_SOCKET, if there is one and somebody still listens."""
    if path := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel, suppress(OSError):
            channel.sendto(b"READY=1", path)
