"""The services in the kernel's maps: written from the state, step by step.

The kernel reads while we write, so an index below the count always has an endpoint, or the one that
it had before: endpoints are written before the count grows, and deleted after it has shrunk.
Called by the composition root at each change of the state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent.datapath import records

if TYPE_CHECKING:
    from agent.datapath.pins import Pins
    from agent.datapath.records import ServicePorts
    from agent.model.pod import Address


class ServiceMaps:
    """ss_services and ss_endpoints, and what they hold."""

    def __init__(self, pins: Pins) -> None:
        """Begin anew: what an agent before us left may not hold any more."""
        self._services, self._endpoints = pins.maps["ss_services"], pins.maps["ss_endpoints"]
        self._held: ServicePorts = {}
        for opened in (self._services, self._endpoints):
            for key in [key for key, _value in opened.items()]:
                opened.delete(key)

    def apply(self, wanted: ServicePorts) -> None:
        """Make the maps hold `wanted` (MapError, for one if a map is full)."""
        for address, port in self._held.keys() - wanted.keys():
            self._write(address, port, ())
        for (address, port), endpoints in wanted.items():
            if self._held.get((address, port)) != endpoints:
                self._write(address, port, endpoints)

    def _write(
        self,
        address: Address,
        port: int,
        endpoints: tuple[tuple[Address, int], ...],
    ) -> None:
        before = self._held.get((address, port), ())
        for index, (endpoint, endpoint_port) in enumerate(endpoints):
            self._endpoints.put(
                records.service_port_key(address, port, index),
                {"address": records.pack_address(endpoint), "port_be": endpoint_port},
            )
        key = records.service_port_key(address, port)
        if endpoints:
            self._services.put(key, {"value": len(endpoints)})
            self._held[address, port] = endpoints
        else:
            self._services.delete(key)
            self._held.pop((address, port), None)
        for index in range(len(endpoints), len(before)):
            self._endpoints.delete(records.service_port_key(address, port, index))
