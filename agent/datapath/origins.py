"""Where a captured connection wanted to go (ss_origin_flow).

sockops writes the entry before the SYN leaves and deletes it at the close, so it is there when the
connection is accepted. Used by the workers, as the tunnel's OriginalDestinations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent.datapath import records
from agent.errors import AbiMismatch
from agent.model.capture import Origin

if TYPE_CHECKING:
    from agent.datapath.maps import Map
    from agent.model.pod import Address


class OriginFlows:
    """The original destinations by flow, as sockops wrote them."""

    def __init__(self, origin_flow_map: Map) -> None:
        self._map = origin_flow_map

    def lookup(self, netns_cookie: int, address: Address, port: int) -> Origin | None:
        """Return what the connection from `address`:`port` in a pod asked for; None if unknown."""
        found = self._map.get(records.source_key(netns_cookie, address, port))
        if found is None:
            return None
        asked_port, endpoint_port = found["port_be"], found["endpoint_port_be"]
        if not isinstance(asked_port, int) or not isinstance(endpoint_port, int):
            raise AbiMismatch("ss_origin_flow holds bytes where a port should be")
        endpoint = (records.unpack_address(found["endpoint"]), endpoint_port)
        return Origin(
            records.unpack_address(found["address"]),
            asked_port,
            endpoint if endpoint_port else None,
        )
