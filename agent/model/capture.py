"""The numbers of capture, which ambient mesh uses as well. Pure.

bpf/include/capture.h has the ports too, and tests/bpf compares the two.
"""

from __future__ import annotations

OUTBOUND_PORT = 15001
INBOUND_PORT = 15006
HBONE_PORT = 15008
DNS_PORT = 15053
LISTENER_PORTS = frozenset({OUTBOUND_PORT, INBOUND_PORT, HBONE_PORT, DNS_PORT})

# Packets with this mark are delivered locally: an application's answers to a client's address that
# the agent borrowed for its own socket.
REPLY_MARK = 0x111
