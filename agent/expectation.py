"""The entries that the maps of the data path ought to have, for what is enrolled and known.

They are made by the functions that enrollment writes with (`agent.datapath.records`), and laid out
as the kernel's type information says, so that they can be compared with what is read. Nothing is
written here. Called by `agent.inspection`.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from agent import netns
from agent.datapath import listing, records
from agent.enroll import exclusion_entries, resident_of

if TYPE_CHECKING:
    from agent.datapath.btf import Value
    from agent.datapath.maps import Record
    from agent.datapath.pins import Pins
    from agent.datapath.records import ServicePorts
    from agent.enroll import Enrollment

Packed = tuple[tuple[str, "Value"], ...]
# Maps whose entries follow from the enrolled pods, and where a pod's cookie stands: in the key, or
# the value.
COOKIE_PLACES = {
    "ss_pods": ("key", "value"),
    "ss_pod_names": ("key", "value"),
    "ss_local": ("value", "netns_cookie"),
    "ss_bypass": ("key", "netns_cookie"),
    "ss_ports": ("key", "netns_cookie"),
    "ss_listeners": ("key", "value"),
    "ss_guards": ("value", "netns_cookie"),
}
COMPARED = (*COOKIE_PLACES, "ss_services", "ss_endpoints")  # maps


class Expected:
    """The entries that one map ought to have."""

    def __init__(self, pins: Pins, name: str) -> None:
        self._map, self._name = pins.maps[name], name
        self.entries: dict[Packed, Packed] = {}
        # What to write where that is not what is read: a sockhash takes a descriptor.
        self.writes: dict[Packed, Record] = {}

    def add_pod(self, enrollment: Enrollment, *, is_strict: bool) -> None:
        pod, cookie = enrollment.pod, enrollment.netns_cookie
        own: Record = {"value": cookie}
        match self._name:
            case "ss_pods":
                self._add(own, records.pod_record(pod, is_strict=is_strict))
            case "ss_pod_names":
                self._add(own, records.pod_name_record(pod))
            case "ss_local":
                for address in pod.addresses:
                    self._add({"address": records.pack_address(address)}, resident_of(enrollment))
            case "ss_guards":
                for ifindex, row in enrollment.guarded_links.items():
                    self._add({"value": ifindex}, records.guarded_record(pod, cookie, row))
            case "ss_listeners":
                for listener in enrollment.inbound:
                    raw = listener.getsockopt(socket.SOL_SOCKET, netns.SO_COOKIE, 8)
                    key = self._add(own, {"value": int.from_bytes(raw, "little")})
                    self.writes[key] = {"value": listener.fileno()}
            case "ss_bypass" | "ss_ports":
                for name, exception in exclusion_entries(enrollment):
                    if name == self._name:
                        self._add(exception, {"value": 1})
        if self._name == "ss_ports":
            for port in enrollment.plaintext_ports:
                self._add(records.port_key(cookie, port, records.PLAINTEXT), {"value": 1})

    def add_services(self, services: ServicePorts) -> None:
        for (address, port), endpoints in services.items():
            if self._name == "ss_services":
                key = records.service_port_key(address, port)
                self._add(key, {"value": len(endpoints)})
            elif self._name == "ss_endpoints":
                for index, (host, target) in enumerate(endpoints):
                    key = records.service_port_key(address, port, index)
                    self._add(key, {"address": records.pack_address(host), "port_be": target})

    def _add(self, key: Record, value: Record) -> Packed:
        key_layout, value_layout = self._map.key, self._map.value
        entry = packed(key_layout.decode(key_layout.encode(**key)))
        self.entries[entry] = packed(value_layout.decode(value_layout.encode(**value)))
        return entry


def packed(record: Record) -> Packed:
    """Return what can be a key, and be compared."""
    return tuple(record.items())


def owner(name: str, key: Packed, value: Packed) -> int | None:
    """Return the cookie of the pod that an entry of map `name` is about, if it is about one."""
    place = COOKIE_PLACES.get(name)
    if place is None:
        return None
    found = dict(key if place[0] == "key" else value)[place[1]]
    assert isinstance(found, int)
    return found


def describe(name: str, key: Packed, value: Packed, names: listing.PodNames) -> str:
    """Name an entry, as `sidestep maps dump` shows it, but for the pod and what follows from it."""
    skipped = ("pod", "netns_cookie", "socket_cookie", "endpoints", "endpoint", "endpoint_port")
    row = listing.describe_entry(name, dict(key), dict(value), names)
    return " ".join(f"{each}={row[each]}" for each in row if each not in skipped and row[each])


def describe_value(
    name: str, key: Packed, value: Packed | None, names: listing.PodNames
) -> str | None:
    """Name all that is in an entry; None if there is none."""
    if value is None:
        return None
    row = listing.describe_entry(name, dict(key), dict(value), names) | {
        member: found for member, found in value if member == "is_strict"
    }
    return " ".join(f"{member}={found}" for member, found in row.items() if found is not None)
