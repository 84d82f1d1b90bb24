"""The direct path's maps as values: the generation, the verdicts, the flows and their ends.

Two pods of one node are joined by the kernel alone where ss_verdicts has an entry of the current
generation (bpf/include/direct.h). Nothing here judges: workers write a verdict after the
destination has answered, the control process starts a new generation when anything changes.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from agent.datapath import libbpf, records
from agent.datapath.ring import HEAD_BYTES, RingBuffer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from agent.datapath.btf import Layout, Value
    from agent.datapath.maps import Map, Record
    from agent.datapath.pins import Pins
    from agent.datapath.ring import Batch
    from agent.model.pod import Address

GENERATION_KEY: dict[str, Value] = {"value": 0}


class Subject(NamedTuple):
    """All of a direct connection that a policy may speak of: many connections have the same."""

    source_cookie: int
    source: Address
    destination_cookie: int
    destination: Address
    destination_port: int


@dataclass(frozen=True, slots=True)
class DirectFlow:
    """One connection on the direct path; times are of CLOCK_MONOTONIC."""

    source_cookie: int
    source: Address
    source_port: int
    destination_cookie: int
    destination: Address
    destination_port: int
    socket_cookie: int  # of the client's socket
    began_ns: int

    @property
    def subject(self) -> Subject:
        """What it is judged by."""
        return Subject(
            self.source_cookie,
            self.source,
            self.destination_cookie,
            self.destination,
            self.destination_port,
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verdict is about: two namespaces, a port of the second, and a family."""

    source_cookie: int
    destination_cookie: int
    destination_port: int
    version: int  # of IP


@dataclass(frozen=True, slots=True)
class FlowEnd:
    """How a connection on the direct path ended; `sent` counts the client's bytes."""

    flow: DirectFlow
    seconds: float
    sent: int
    received: int
    was_reset: bool


@dataclass(slots=True)
class Totals:
    """What ended between two pods, in sum."""

    connections: int = 0
    resets: int = 0
    sent: int = 0  # by the clients
    received: int = 0


class Verdicts:
    """Which connections may take the direct path: what a worker needs."""

    def __init__(self, verdicts: Map, generation: Map) -> None:
        self._verdicts = verdicts
        self._generation = generation

    @property
    def generation(self) -> int:
        """The current generation; read it before asking for a verdict, and pass it to `allow`."""
        return _number(self._generation.get(GENERATION_KEY) or {"value": 0}, "value")

    def allow(
        self, source: int, destination: int, port: int, generation: int, *, is_v6: bool = False
    ) -> None:
        """Let later connections between two namespaces pass, while `generation` lasts."""
        key = records.verdict_key(source, destination, port, is_v6=is_v6)
        self._verdicts.put(key, {"value": generation})

    def renew(self) -> None:
        """Start a new generation: every verdict before it is void. For the control process."""
        self._generation.put(GENERATION_KEY, {"value": self.generation + 1})

    def carry_over(self, holds: Callable[[Verdict], bool]) -> None:
        """Give the verdicts that the last generation voided, and that still hold, to this one."""
        generation = self.generation
        for key, value in list(self._verdicts.items()):
            if value["value"] == generation - 1 and holds(_verdict(key)):
                self._verdicts.put(key, {"value": generation})


class FlowEnds:
    """Reads the ends of direct flows; `fd` is readable while there are some."""

    def __init__(self, pins: Pins) -> None:
        self._layout = pins.maps["ss_flow_end"].value
        self._flow_layout = pins.maps["ss_direct_flows"].value
        self._totals = _totals_layout(self._layout, self._flow_layout)
        self._map_fd = libbpf.open_pin(pins.directory / "maps" / "ss_flow_ends")
        self._ring = RingBuffer(self._map_fd, self._layout.size)
        self.fd = self._map_fd

    def read(self) -> Batch:
        """Return the ends since the last call: a flood is cheap to count."""
        return self._ring.read()

    def totals(self, batch: Batch) -> dict[tuple[int, int], Totals]:
        """Sum many ends up, cheaply, by the netns cookies of both pods, the client's first."""
        sums: dict[tuple[int, int], Totals] = {}
        for source, destination, sent, received, was_reset in self._totals.iter_unpack(
            batch.records
        ):
            found = sums.get((source, destination))
            if found is None:
                found = sums[source, destination] = Totals()
            found.connections += 1
            found.resets += was_reset
            found.sent += sent
            found.received += received
        return sums

    def parse(self, sample: bytes) -> FlowEnd:
        """Return what one sample of a batch says."""
        end = self._layout.decode(sample)
        flow = _flow(self._flow_layout.decode(_bytes(end, "flow")))
        return FlowEnd(
            flow,
            seconds=(_number(end, "ended_ns") - flow.began_ns) / 1e9,
            sent=_number(end, "bytes_sent"),
            received=_number(end, "bytes_received"),
            was_reset=bool(end["was_reset"]),
        )

    def close(self) -> None:
        """Give the descriptors back."""
        self._ring.close()
        os.close(self._map_fd)


class Flows:
    """What the kernel remembers of open connections, beside the sockets themselves."""

    def __init__(self, pins: Pins) -> None:
        self._direct = pins.maps["ss_direct_flows"]
        self._guard = pins.maps["ss_guard_flows"]

    def forget(self, flow: DirectFlow) -> None:
        """Let nothing of a connection pass lookup or guard any more."""
        source, destination = map(records.pack_address, (flow.source, flow.destination))
        self._direct.delete(
            records.connection_key((source, flow.source_port), (destination, flow.destination_port))
        )
        client = (flow.source_cookie, source, flow.source_port)
        server = (flow.destination_cookie, destination, flow.destination_port)
        for own, other in ((client, server), (server, client)):
            self._guard.delete(
                {
                    "netns_cookie": own[0],
                    "local": own[1],
                    "remote": other[1],
                    "local_port_be": own[2],
                    "remote_port_be": other[2],
                }
            )


def _totals_layout(end: Layout, flow: Layout) -> struct.Struct:
    """Return how to read what `totals` sums up out of a flow end, at the speed of the kernel's."""

    def offset(layout: Layout, name: str) -> int:
        return next(field.offset for field in layout.fields if field.name == name)

    wanted = (
        (offset(end, "flow") + offset(flow, "source_netns_cookie"), "Q"),
        (offset(end, "flow") + offset(flow, "destination_netns_cookie"), "Q"),
        (offset(end, "bytes_sent"), "Q"),
        (offset(end, "bytes_received"), "Q"),
        (offset(end, "was_reset"), "I"),
    )
    text, position = f"={HEAD_BYTES}x", 0
    for place, code in wanted:
        text += f"{place - position}x{code}"
        position = place + struct.calcsize(f"={code}")
    return struct.Struct(f"{text}{end.size - position}x")


def _verdict(key: Record) -> Verdict:
    return Verdict(
        _number(key, "source_netns_cookie"),
        _number(key, "destination_netns_cookie"),
        _number(key, "port_be"),
        6 if key["is_v6"] else 4,
    )


def live_flows(pins: Pins) -> Iterator[DirectFlow]:
    """Yield the open connections on the direct path."""
    yield from (_flow(value) for _key, value in pins.maps["ss_direct_flows"].items())


def _flow(value: Record) -> DirectFlow:
    return DirectFlow(
        source_cookie=_number(value, "source_netns_cookie"),
        source=records.unpack_address(value["source"]),
        source_port=_number(value, "source_port_be"),
        destination_cookie=_number(value, "destination_netns_cookie"),
        destination=records.unpack_address(value["destination"]),
        destination_port=_number(value, "destination_port_be"),
        socket_cookie=_number(value, "socket_cookie"),
        began_ns=_number(value, "began_ns"),
    )


def _number(record: Mapping[str, Value], name: str) -> int:
    value = record[name]
    assert isinstance(value, int)
    return value


def _bytes(record: Mapping[str, Value], name: str) -> bytes:
    value = record[name]
    assert isinstance(value, bytes)
    return value
