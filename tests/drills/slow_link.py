"""A link that is slow and loses packets, by a relay of packets.

A filter of the fabric sends what goes out by a link into a TAP device instead; a thread reads the
frames from there, loses some, and puts the others onto the link after a while, past the filter.
Addresses and routes stay as they are. (netem would do it, and is not in every kernel.)
"""

from __future__ import annotations

import fcntl
import os
import random
import select
import socket
import struct
import subprocess
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from agent import netns

if TYPE_CHECKING:
    from pathlib import Path

# linux/if_tun.h, linux/if_packet.h
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
PACKET_QDISC_BYPASS = 20
SOL_PACKET = 263
FRAME_BYTES = 65536


class SlowLink:
    """What goes out by one link of a namespace is late, or lost."""

    def __init__(self, namespace: Path, link: str, seconds: float, loss: float) -> None:
        """Hold each frame for `seconds`, and lose a share of `loss`, until `close`."""
        self._link, self._tap = link, f"slow-{link}"
        self._seconds, self._loss = seconds, loss
        self._queue: deque[tuple[float, bytes]] = deque()
        self.passed = self.lost = 0
        self._netns = netns.open_netns(namespace)
        self._tap_fd, self._out = netns.run_in(self._netns, self._open)
        self._wake, self._stop = os.pipe()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _open(self) -> tuple[int, socket.socket]:
        tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        request = struct.pack("16sH22x", self._tap.encode(), IFF_TAP | IFF_NO_PI)
        fcntl.ioctl(tap, TUNSETIFF, request)
        out = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        out.bind((self._link, 0))
        out.setsockopt(SOL_PACKET, PACKET_QDISC_BYPASS, 1)  # else our own filter had it again
        for command in (
            f"ip link set {self._tap} up",
            f"tc qdisc add dev {self._link} clsact",
            f"tc filter add dev {self._link} egress protocol all u32 match u32 0 0"
            f" action mirred egress redirect dev {self._tap}",
        ):
            subprocess.run(command.split(), check=True, capture_output=True)
        return tap, out

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._tap_fd, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            wait = (self._queue[0][0] - time.monotonic()) * 1000 if self._queue else None
            ready = poll.poll(None if wait is None else max(0.0, wait))
            if any(fd == self._wake for fd, _events in ready):
                return
            if ready:
                self._take()
            while self._queue and self._queue[0][0] <= time.monotonic():
                self._out.send(self._queue.popleft()[1])
                self.passed += 1

    def _take(self) -> None:
        while True:
            try:
                frame = os.read(self._tap_fd, FRAME_BYTES)
            except BlockingIOError:
                return
            if random.random() < self._loss:
                self.lost += 1
            else:
                self._queue.append((time.monotonic() + self._seconds, frame))

    def close(self) -> None:
        """Make the link as it was; what is held is lost."""
        command = f"tc qdisc del dev {self._link} clsact".split()
        netns.run_in(self._netns, lambda: subprocess.run(command, check=True))
        os.close(self._stop)
        self._thread.join()
        self._out.close()
        for fd in (self._wake, self._tap_fd, self._netns):
            os.close(fd)
