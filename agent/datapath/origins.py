"""Where a captured connection wanted to go (ss_origin_flow).

sockops writes the entry before the SYN leaves and deletes it at the close, so it is there when the
connection is accepted. Used by the workers, as the tunnel's OriginalDestinations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent.datapath import records
from agent.errors import AbiMismatch

if TYPE_CHECKING:
    from agent.datapath.maps import Map
    from agent.model.pod import Address


class OriginFlows:
    """The original destinations by flow, as sockops wrote them."""

    def __init__(self, origin_flow_map: Map) -> None:
        self._map = origin_flow_map

    def lookup(self, netns_cookie: int, address: Address, port: int) -> tuple[Address, int] | None:
        """Return what the connection from `address`:`port` in a pod asked for; None if unknown."""
        origin = self._map.get(records.source_key(netns_cookie, address, port))
        if origin is None:
            return None
        original_port = origin["port_be"]
        if not isinstance(original_port, int):
            raise AbiMismatch("ss_origin_flow holds bytes where a port should be")
        return records.unpack_address(origin["address"]), original_port
