"""The numbers of capture, which ambient mesh uses as well. Pure.

bpf/include/capture.h has the ports too, and tests/bpf compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent.model.pod import Address

OUTBOUND_PORT = 15001
INBOUND_PORT = 15006
HBONE_PORT = 15008
DNS_PORT = 15053
LISTENER_PORTS = frozenset({OUTBOUND_PORT, INBOUND_PORT, HBONE_PORT, DNS_PORT})

# Packets with this mark are delivered locally: an application's answers to a client's address that
# the agent borrowed for its own socket.
REPLY_MARK = 0x111


@dataclass(frozen=True, slots=True)
class Origin:
    """What a captured connection asked for, and the endpoint that the kernel chose for it.

    `endpoint` is None where the address is not that of a service that the kernel knows.
    """

    address: Address
    port: int
    endpoint: tuple[Address, int] | None = None
