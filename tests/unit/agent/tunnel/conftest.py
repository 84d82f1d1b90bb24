"""Tunnels between two sessions, for those who look at one of their parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from agent.tunnel.connection import Role
from tests.support.joined import Join, Tunnel
from tests.support.tunnel import CLIENT, SERVER, Authority, end_sessions

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def join(authority: Authority) -> Iterator[Join]:
    """Make a tunnel; what is still open at the end of the test is closed."""
    made: list[Tunnel] = []

    def start(client: ssl.SSLContext | None = None, server: ssl.SSLContext | None = None) -> Tunnel:
        client = client or authority.context(CLIENT, Role.CLIENT)
        server = server or authority.context(SERVER, Role.SERVER)
        made.append(Tunnel(client, server))
        return made[-1]

    yield start
    for tunnel in made:
        end_sessions(tunnel.reactor, (tunnel.client.session, tunnel.server.session))


@pytest.fixture
def tunnel(join: Join) -> Tunnel:
    return join().wait_ready()
