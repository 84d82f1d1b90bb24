"""Sockets of the agent inside pods: exempt from capture, some with a client's address.

A worker has one thread, so it changes its namespace itself and back, in a few microseconds. If it
cannot come back it ends: a worker left in a pod's namespace would dial from the wrong place.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import random
import socket
import struct
import sys
import termios
from typing import TYPE_CHECKING

from agent import netns
from agent.errors import OutOfDescriptors, PodGone
from agent.model.capture import LISTENER_PORTS, REPLY_MARK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from agent.model.pod import Address

IP_TRANSPARENT, IPV6_TRANSPARENT, IP_BIND_ADDRESS_NO_PORT = 19, 75, 24  # linux/in.h, in6.h
# Below what Linux gives to clients (net.ipv4.ip_local_port_range), above what needs a privilege.
BORROWED_PORTS = range(1024, 32768)
MOST_PORTS = 16  # a pod that listens on so many in a row leaves the choice to the kernel
# A peer that went without a word is noticed after half an hour, as by ztunnel.
KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 180),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 180),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 9),
)
# struct linger {on or off, seconds}: with no time to linger, close() sends RST.
LINGER_RESET, LINGER_NOT = b"\1\0\0\0\0\0\0\0", b"\0\0\0\0\0\0\0\0"
# struct tcp_info: tcpi_bytes_acked and tcpi_bytes_received (linux/tcp.h, since 4.2).
PROGRESS = struct.Struct("=120xQQ")


def borrow_source(own: socket.socket, source: Address, ports: Iterable[int] = ()) -> None:
    """Make a socket inside the pod connect from a client's address, which the pod has not.

    The mark comes back with the application's answers (tcp_fwmark_accept) and finds the reply
    route. The first port of `ports` that nobody listens on is taken; without any it is chosen at
    connect, so that one address serves more than 28,000 connections.
    """
    is_v4 = source.version == 4
    level = socket.IPPROTO_IP if is_v4 else socket.IPPROTO_IPV6
    own.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, REPLY_MARK)
    own.setsockopt(level, IP_TRANSPARENT if is_v4 else IPV6_TRANSPARENT, 1)
    # Only connect() asks whether somebody has the port towards the same destination.
    own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    for port in ports:
        with contextlib.suppress(OSError):
            own.bind((str(source), port))
            return
    own.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
    own.bind((str(source), 0))


def _borrowed_ports() -> Iterator[int]:
    """Yield ports for ever; from a place of its own, since workers share the clients."""
    ports = [port for port in BORROWED_PORTS if port not in LISTENER_PORTS]
    start = random.randrange(len(ports))
    return itertools.cycle(ports[start:] + ports[:start])


class PodSockets:
    """Opens sockets in the namespaces of pods, for a process with one thread.

    `exempt` marks a socket as the agent's own, which capture then leaves alone. Descriptors from
    `first_spare` on are not given to connections.
    """

    def __init__(
        self, exempt: Callable[[socket.socket], None], first_spare: int | None = None
    ) -> None:
        self._first_spare = self._limit = first_spare
        self._exempt = exempt
        self._ports = _borrowed_ports()
        self._own_netns = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    def open(self, netns_fd: int, family: int) -> socket.socket:
        """Return a non-blocking, exempt TCP socket in the namespace behind `netns_fd`.

        PodGone if that is negative: the pod has left while a connection waited for something.
        """
        if netns_fd < 0:
            raise PodGone("the pod has left")
        netns.enter(netns_fd)
        try:
            made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        finally:
            netns.leave(self._own_netns)
        try:
            self.require_room(made)
            self._exempt(made)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except BaseException:
            made.close()
            raise
        return made

    def borrow_source(self, own: socket.socket, source: Address) -> None:
        """Connect from a client's address, and a port that the client hardly uses itself.

        The client's own connections to the pod end in the pod, too: captured ones here, others at
        the application. From the port of one of those our SYN would be taken for a part of it, and
        never answered. connect() then may say EADDRNOTAVAIL: the port was used a moment ago.
        """
        borrow_source(own, source, itertools.islice(self._ports, MOST_PORTS))

    def keep_spare(self, lasting: Iterable[int]) -> None:
        """Give connections fewer where some of the spare descriptors are taken for long."""
        if self._first_spare is not None:
            taken = sum(fd >= self._first_spare for fd in lasting)
            self._limit = self._first_spare - taken

    def require_room(self, made: socket.socket) -> None:
        """Raise OutOfDescriptors if a new socket took one of the spare descriptors.

        The kernel gives the lowest free number, so a high one says that all below are in use.
        """
        if self._limit is not None and made.fileno() >= self._limit:
            raise OutOfDescriptors(
                f"{self._limit} descriptors are in use: raise the hard limit of open files"
            )


def keep_alive(own: socket.socket) -> None:
    """Have the kernel ask a peer that says nothing whether it is there, and reset who is not.

    An application that does so itself asks us, who are there.
    """
    for option in KEEPALIVE:
        own.setsockopt(*option)


def prepare_listener(own: socket.socket) -> None:
    """Set what each connection is to have that it accepts: Linux passes it on, without a call."""
    own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    keep_alive(own)


def reset_on_close(own: socket.socket, *, is_reset: bool) -> None:
    """Say what closing a socket means to its peer: RST, or the FIN that it may have had already."""
    own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET if is_reset else LINGER_NOT)


def progress(own: socket.socket) -> tuple[int, int]:
    """Return how many bytes the peer of a TCP socket has acknowledged and sent so far.

    What our kernel only keeps for it does not count. The peer's kernel acknowledges what it has
    room for, whether or not a process reads it.
    """
    info = own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, PROGRESS.size)
    acknowledged, received = PROGRESS.unpack(info)
    return acknowledged, received


def unacknowledged(own: socket.socket) -> int:
    """Return how many bytes a TCP socket has taken that the peer has not acknowledged (tcp(7))."""
    count = fcntl.ioctl(own, termios.TIOCOUTQ, bytes(4))
    return int.from_bytes(count, sys.byteorder)


def abort(own: socket.socket) -> None:
    """Close a socket with RST, where there is somebody to send it to."""
    reset_on_close(own, is_reset=True)
    own.close()
