"""Looks for plaintext on the link of a node."""

from __future__ import annotations

import os
import socket
import threading
from typing import TYPE_CHECKING

from agent import netns
from tests.support.load import BULK_PORT, ECHO_PORT

if TYPE_CHECKING:
    from contextlib import ExitStack

    from agent.lab.cluster import LabNode
    from agent.lab.lab import Lab

ETH_P_ALL, ETHERNET_BYTES = 3, 14


class Sniffer:
    """Counts packets of the applications' ports on the link of a node."""

    def __init__(self, lab: Lab, node: LabNode, stack: ExitStack) -> None:
        fd = netns.open_netns(lab.node_netns(node))
        try:
            self._socket = netns.run_in(fd, self._open)
        finally:
            os.close(fd)
        self.seen = self.plaintext = 0
        self._is_over = threading.Event()
        thread = threading.Thread(target=self._run)
        thread.start()
        stack.callback(self._socket.close)
        stack.callback(thread.join)
        stack.callback(self._is_over.set)

    @staticmethod
    def _open() -> socket.socket:
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        made.bind(("eth0", ETH_P_ALL))
        made.settimeout(0.1)
        return made

    def _run(self) -> None:
        while not self._is_over.is_set():
            try:
                packet = self._socket.recv(128)
            except (TimeoutError, OSError):
                continue  # none for a while, or the link is down
            self.seen += 1
            head = packet[ETHERNET_BYTES:]
            if len(head) > 40 and head[0] >> 4 == 4 and head[9] == socket.IPPROTO_TCP:
                start = (head[0] & 15) * 4
                ports = {
                    int.from_bytes(head[start : start + 2], "big"),
                    int.from_bytes(head[start + 2 : start + 4], "big"),
                }
                self.plaintext += bool(ports & {ECHO_PORT, BULK_PORT})
