"""Two connections in memory, client and server, and the bytes between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agent.tunnel.connection import Connection, Limits, Role
from agent.tunnel.events import ConnectRequested, DataReceived, ResponseReceived

if TYPE_CHECKING:
    from agent.tunnel.events import Event


@dataclass
class Pair:
    """`settle` moves bytes both ways until both are silent and collects the events."""

    client_limits: Limits = field(default_factory=Limits)
    server_limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self.client = Connection(Role.CLIENT, self.client_limits)
        self.server = Connection(Role.SERVER, self.server_limits)
        self.client_events: list[Event] = []
        self.server_events: list[Event] = []

    def settle(self) -> None:
        for _ in range(1000):
            if not self.client.has_output and not self.server.has_output:
                return
            self.server_events += self.server.receive(self.client.take_output())
            self.client_events += self.client.receive(self.server.take_output())
        raise AssertionError("the two never fall silent")

    def open(self) -> int:
        """Open a stream that the server accepted."""
        self.settle()
        stream_id = self.client.open_stream("10.0.0.1:80", {})
        self.settle()
        assert isinstance(self.server_events[-1], ConnectRequested)
        self.server.respond(stream_id, 200)
        self.settle()
        assert self.client_events[-1] == ResponseReceived(stream_id, 200)
        return stream_id


def data_of(found: list[Event], stream_id: int) -> bytes:
    """Join what arrived on one stream."""
    return b"".join(
        event.data
        for event in found
        if isinstance(event, DataReceived) and event.stream_id == stream_id
    )
