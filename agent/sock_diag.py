"""Close somebody else's TCP socket: sock_diag(7), SOCK_DESTROY of Linux 4.5.

    nlmsghdr:        u32 length | u16 type | u16 flags | u32 sequence | u32 port id
    inet_diag_req_v2: u8 family | u8 protocol | u8 ext | u8 pad | u32 states |
                     be16 source port | be16 destination port | 16 source | 16 destination |
                     u32 interface | u64 cookie

    inet_diag_msg:   u8 family | u8 state | u8 timer | u8 retransmits | then as from `be16 source
                     port` on to the cookie | u32 expires | u32 rqueue | u32 wqueue | u32 uid |
                     u32 inode | attributes, of which INET_DIAG_INFO is a struct tcp_info

Spoken by hand, since pyroute2's DiagSocket cannot tell an error from an answer. Works on the
namespace of the calling thread: use it inside `agent.netns.run_in`.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING

from agent.errors import NetlinkError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agent.model.pod import Address

NETLINK_SOCK_DIAG = 4  # linux/netlink.h
SOCK_DIAG_BY_FAMILY, SOCK_DESTROY = 20, 21  # linux/sock_diag.h
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 1, 4, 0x300
ANY_STATE = 0xFFFFFFFF
CONNECTED_STATES = ANY_STATE & ~(1 << 10 | 1 << 7 | 1 << 6)  # not LISTEN, CLOSE, TIME_WAIT
LISTENING_STATE = 1 << 10
INET_DIAG_INFO = 2  # linux/inet_diag.h
ANSWER_BYTES = 1 << 16
_HEAD = struct.Struct("=IHHII")
_ADDRESSES = struct.Struct(">HH16s16s")
_REST = struct.Struct("=IQ")
_TAIL = struct.Struct("=IIIII")  # the last one is the inode
_ATTRIBUTE = struct.Struct("=HH")
_TCP_BYTES = struct.Struct("=120xQQ")  # tcpi_bytes_acked and tcpi_bytes_received in linux/tcp.h


@dataclass(frozen=True, slots=True)
class TcpSocket:
    """One connected socket, in whatever way it was made."""

    local: tuple[Address, int]
    remote: tuple[Address, int]
    cookie: int
    interface: int  # that it is bound to; 0: none
    family: int
    inode: int
    sent: int | None = None  # bytes that the peer has acknowledged, if they were asked for
    received: int | None = None


def list_tcp(states: int = CONNECTED_STATES, *, with_bytes: bool = False) -> Iterator[TcpSocket]:
    """Yield the TCP sockets of the current namespace in some states (NetlinkError)."""
    wanted = 1 << (INET_DIAG_INFO - 1) if with_bytes else 0
    for family in (socket.AF_INET, socket.AF_INET6):
        request = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, wanted, 0, states)
        request += bytes(_ADDRESSES.size + _REST.size)
        flags = NLM_F_REQUEST | NLM_F_DUMP
        head = _HEAD.pack(_HEAD.size + len(request), SOCK_DIAG_BY_FAMILY, flags, 1, 0)
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as channel:
            channel.send(head + request)
            is_done = False
            while not is_done:
                answer = channel.recv(ANSWER_BYTES)
                while answer:
                    length, kind, *_rest = _HEAD.unpack_from(answer)
                    body, answer = answer[_HEAD.size : length], answer[(length + 3) & ~3 :]
                    if kind == NLMSG_ERROR:
                        number = -struct.unpack_from("=i", body)[0]
                        raise NetlinkError(f"sockets cannot be listed: {os.strerror(number)}")
                    if kind == NLMSG_DONE:
                        is_done = True
                    else:
                        yield _parse(family, body)


def _parse(family: int, body: bytes) -> TcpSocket:
    local_port, remote_port, local, remote = _ADDRESSES.unpack_from(body, 4)
    interface, cookie = _REST.unpack_from(body, 4 + _ADDRESSES.size)
    size = 4 if family == socket.AF_INET else 16
    ends = ((_plain(local[:size]), local_port), (_plain(remote[:size]), remote_port))
    tail = 4 + _ADDRESSES.size + _REST.size
    inode = _TAIL.unpack_from(body, tail)[-1]
    sent, received = _parse_bytes(body[tail + _TAIL.size :])
    return TcpSocket(*ends, cookie, interface, family, inode, sent, received)


def _parse_bytes(attributes: bytes) -> tuple[int | None, int | None]:
    while len(attributes) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(attributes)
        if kind == INET_DIAG_INFO and length >= _ATTRIBUTE.size + _TCP_BYTES.size:
            acked, received = _TCP_BYTES.unpack_from(attributes, _ATTRIBUTE.size)
            return max(0, acked - 1), received  # our SYN counts as a byte
        attributes = attributes[max((length + 3) & ~3, _ATTRIBUTE.size) :]
    return None, None


def _plain(packed: bytes) -> Address:
    address = ip_address(packed)
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


def destroy_found(found: TcpSocket) -> bool:
    """Abort a socket of `list_tcp`; False if it is not there any more (NetlinkError)."""
    return destroy_tcp(found.local, found.remote, found.cookie, found.interface)


def destroy_tcp(
    source: tuple[Address, int],
    destination: tuple[Address, int],
    socket_cookie: int,
    interface: int = 0,
) -> bool:
    """Abort the socket with that cookie, connected from `source` to `destination`.

    Its program gets ECONNABORTED, its peer a RST. False if the socket is not there any more, or is
    bound to another interface: one that is (SO_BINDTODEVICE) is found by that one only.

    The cookie is needed: the kernel looks a connection up as it does for a packet, through
    sk_lookup, and would else find, and abort, the listener that captures the pod's traffic.

    Raises:
        NetlinkError: the kernel has no CONFIG_INET_DIAG_DESTROY, or CAP_NET_ADMIN is missing.
    """
    family = socket.AF_INET if source[0].version == 4 else socket.AF_INET6
    request = (
        struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 0, 0, ANY_STATE)
        + _ADDRESSES.pack(source[1], destination[1], source[0].packed, destination[0].packed)
        + _REST.pack(interface, socket_cookie)
    )
    head = _HEAD.pack(_HEAD.size + len(request), SOCK_DESTROY, NLM_F_REQUEST | NLM_F_ACK, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as channel:
        channel.send(head + request)
        answer = channel.recv(4096)
    number = -struct.unpack_from("=i", answer, _HEAD.size)[0]
    if number in (errno.ENOENT, errno.ESTALE):
        return False
    if number:
        raise NetlinkError(f"a connection cannot be closed: {os.strerror(number)}")
    return True
