"""Close somebody else's TCP socket: sock_diag(7), SOCK_DESTROY of Linux 4.5.

    nlmsghdr:        u32 length | u16 type | u16 flags | u32 sequence | u32 port id
    inet_diag_req_v2: u8 family | u8 protocol | u8 ext | u8 pad | u32 states |
                     be16 source port | be16 destination port | 16 source | 16 destination |
                     u32 interface | u64 cookie

Spoken by hand, since pyroute2's DiagSocket cannot tell an error from an answer. Works on the
namespace of the calling thread: use it inside `agent.netns.run_in`.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import TYPE_CHECKING

from agent.errors import NetlinkError

if TYPE_CHECKING:
    from agent.model.pod import Address

NETLINK_SOCK_DIAG = 4  # linux/netlink.h
SOCK_DESTROY = 21  # linux/sock_diag.h
NLM_F_REQUEST, NLM_F_ACK = 1, 4
ANY_STATE = 0xFFFFFFFF
_HEAD = struct.Struct("=IHHII")
_ADDRESSES = struct.Struct(">HH16s16s")


def destroy_tcp(
    source: tuple[Address, int], destination: tuple[Address, int], socket_cookie: int
) -> bool:
    """Abort the socket with that cookie, connected from `source` to `destination`.

    Its program gets ECONNABORTED, its peer a RST. False if the socket is not there any more.

    The cookie is needed: the kernel looks a connection up as it does for a packet, through
    sk_lookup, and would else find, and abort, the listener that captures the pod's traffic.

    Raises:
        NetlinkError: the kernel has no CONFIG_INET_DIAG_DESTROY, or CAP_NET_ADMIN is missing.
    """
    family = socket.AF_INET if source[0].version == 4 else socket.AF_INET6
    request = (
        struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 0, 0, ANY_STATE)
        + _ADDRESSES.pack(source[1], destination[1], source[0].packed, destination[0].packed)
        + struct.pack("=IQ", 0, socket_cookie)
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
