"""The ports that agents serve: taken before they are served, and by whom."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import pytest

from agent import web
from agent.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

OPTION = "--some-port"
SECONDS = 5.0


def with_servers(check: Callable[[web.Server, web.Server], Awaitable[None]]) -> None:
    """Check two servers, whose pages say which of them it is."""

    def serving(name: str) -> web.Server:
        async def page(_query: web.Query) -> web.Response:
            return web.text(name)

        return web.Server({("GET", "/"): page})

    async def run() -> None:
        servers = serving("first"), serving("second")
        try:
            async with asyncio.timeout(SECONDS):
                await check(*servers)
        finally:
            for server in servers:
                server.stop()

    asyncio.run(run())


async def ask(port: int | None, host: str = web.HOST) -> str:
    assert port is not None
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(b"GET / HTTP/1.1\r\n\r\n")
    answer = await reader.read()
    writer.close()
    return answer.decode().splitlines()[-1]


@pytest.mark.parametrize("host", [web.HOST, web.EVERYWHERE4, web.EVERYWHERE])
def test_successor_has_the_port_before_it_serves_it(host: str) -> None:
    async def check(first: web.Server, second: web.Server) -> None:
        first.bind(0, OPTION)
        await first.start()
        second.bind(first.port or 0, OPTION, host, is_successor=True)
        for _ in range(20):
            assert await ask(first.port) == "first"
        first.stop()
        # In between it is nobody else's, though nobody listens.
        with pytest.raises(ConfigError, match="in use"):
            web.Server({}).bind(second.port or 0, OPTION)
        with pytest.raises(ConnectionRefusedError):
            await ask(second.port)
        await second.start()
        assert await ask(second.port) == "second"

    with_servers(check)


def test_successor_cannot_have_the_port_of_a_stranger() -> None:
    async def check(first: web.Server, _second: web.Server) -> None:
        with socket.create_server((web.HOST, 0)) as stranger:
            port = stranger.getsockname()[1]
            with pytest.raises(ConfigError, match=f"^{OPTION} {port}: Address already in use$"):
                first.bind(port, OPTION, is_successor=True)

    with_servers(check)


def test_first_one_cannot_have_the_port_of_another_agent() -> None:
    async def check(first: web.Server, second: web.Server) -> None:
        first.bind(0, OPTION)
        await first.start()
        with pytest.raises(ConfigError, match="in use"):
            second.bind(first.port or 0, OPTION)

    with_servers(check)


@pytest.mark.parametrize("is_successor", [False, True])
def test_port_is_had_again_when_connections_of_before_are_left(is_successor: bool) -> None:
    async def check(first: web.Server, second: web.Server) -> None:
        with socket.create_server((web.HOST, 0)) as any_free:
            port = any_free.getsockname()[1]
        first.bind(port, OPTION, is_successor=is_successor)
        await first.start()
        assert await ask(port) == "first"  # closed by the server, which keeps it as TIME_WAIT
        first.stop()
        second.bind(port, OPTION)
        await second.start()
        assert await ask(port) == "second"

    with_servers(check)


@pytest.mark.parametrize("has_ipv6", [True, False])
def test_everywhere_is_both_families(has_ipv6: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.has_dualstack_ipv6", lambda: has_ipv6)

    async def check(first: web.Server, _second: web.Server) -> None:
        first.bind(0, OPTION, web.EVERYWHERE)
        await first.start()
        assert await ask(first.port) == "first"
        if has_ipv6:
            assert await ask(first.port, "::1") == "first"
        else:
            with pytest.raises(ConnectionRefusedError):
                await ask(first.port, "::1")

    with_servers(check)
