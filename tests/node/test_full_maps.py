"""A map of flows that is full: connections that find no room end, at once and once."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.bpf.conftest import PEER4
from tests.node.test_tunnel import echo
from tests.support.full_map import full

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from agent.datapath.pins import Pins
    from tests.node.conftest import MeshPair

pytestmark = pytest.mark.root


def test_connection_to_the_application_without_room_is_refused_once(
    loaded: Pins, mesh: MeshPair, serve: Callable[..., threading.Thread]
) -> None:
    """Lookup does not know it then, and captures what the agent itself has dialed."""
    listener = mesh.server.namespace.listen(PEER4, 8080)
    with full(loaded.maps["ss_agent_flows"]):
        connection = mesh.client.namespace.connect(PEER4, 8080)
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
        mesh.server.worker.settle()
    lines = [json.loads(line) for line in mesh.server.worker.log.read_text().splitlines()]
    ends = [line for line in lines if line["message"] == "connection complete"]
    assert [(line["path"], "ss_agent_flows" in line["result"]) for line in ends] == [
        ("plaintext", True),
        ("hbone", False),
    ]
    serve(listener, echo)
    connection = mesh.client.namespace.connect(PEER4, 8080)
    connection.sendall(b"room again")
    assert connection.recv(10) == b"room again"
    connection.close()
