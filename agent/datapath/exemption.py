"""Exempt a socket of the agent from capture (ss_exempt).

The mark is a map entry that hangs on the socket itself, written from user space by whoever holds
it with the right to write maps. A pod has neither, so it gains nothing by what it may set on its
own sockets, SO_MARK for one. The kernel frees the entry with the socket.

Called by enroll for listeners, and by the workers for what they dial.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from agent.datapath import libbpf

if TYPE_CHECKING:
    import socket

    from agent.datapath.maps import Map

_EXEMPT = (1).to_bytes(4, sys.byteorder)


def exempt(exempt_map: Map, own: socket.socket) -> None:
    """Mark a socket as the agent's own: do it before bind() or connect()."""
    # The key of socket storage is a descriptor, not a value of ours.
    libbpf.update(exempt_map.fd, own.fileno().to_bytes(4, sys.byteorder), _EXEMPT)
