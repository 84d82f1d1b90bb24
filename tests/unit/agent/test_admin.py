"""The agent's socket: lines and pages, and who may have it."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import TYPE_CHECKING, Any

import pytest

from agent import web
from agent.admin import Admin
from agent.errors import AgentRunning, AgentUnreachable, NameUnknown, RequestRefused
from agent.question import ask

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


async def refuse(_arguments: dict[str, Any]) -> object:
    raise NameUnknown("nobody is no pod")


async def echo(arguments: dict[str, Any]) -> object:
    return arguments


async def page(query: web.Query) -> web.Response:
    return web.text(query["say"])


def serving(path: Path, check: Callable[[], None]) -> None:
    """Run `check` in a thread while an agent serves at `path`."""

    async def run() -> None:
        admin = Admin(
            path, lambda: {"ready": True}, {"refuse": refuse, "echo": echo}, {("GET", "/p"): page}
        )
        await admin.start()
        try:
            await asyncio.to_thread(check)
        finally:
            admin.stop()

    asyncio.run(run())


def exchange(path: Path, sent: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(sent)
        with connection.makefile("rb") as answer:
            return answer.read()


def test_questions_are_answered_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"

    def check() -> None:
        assert ask(path, "state") == {"ready": True}
        assert ask(path, "echo", a=1) == {"a": 1}
        with pytest.raises(RequestRefused, match="nobody is no pod"):
            ask(path, "refuse")
        with pytest.raises(RequestRefused, match="the commands are state, watch, refuse, echo"):
            ask(path, "nothing")
        assert json.loads(exchange(path, b"[1]\n"))["reason"] == "request_refused"
        assert path.stat().st_mode & 0o777 == 0o600

    serving(path, check)
    assert not path.exists()
    with pytest.raises(AgentUnreachable, match=f"no agent answers at {path}"):
        ask(path, "state")


@pytest.mark.parametrize(
    ("request_", "status", "body"),
    [
        (b"GET /p?say=hello HTTP/1.1\r\nHost: localhost\r\n\r\n", b"200 OK", b"hello\n"),
        (b"GET /p?say=hello HTTP/1.1\r\n\r\n", b"200 OK", b"hello\n"),
        (b"POST /p HTTP/1.1\r\n\r\n", b"405 Method Not Allowed", b"POST is not for /p\n"),
        (b"GET / HTTP/1.1\r\n\r\n", b"404 Not Found", b"there are /p\n"),
        (b"GET /p?say=1 HTTP/1.1\r\nHost: a.b\r\n\r\n", b"421 Misdirected Request", b"the Host"),
        (b"GET  HTTP/9\r\n\r\n", b"400 Bad Request", b"this is no HTTP/1.1 request\n"),
    ],
)
def test_pages_are_served_as_well(
    tmp_path: Path, request_: bytes, status: bytes, body: bytes
) -> None:
    path = tmp_path / "agent.sock"

    def check() -> None:
        head, _, found = exchange(path, request_).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 " + status)
        assert found.startswith(body)

    serving(path, check)


def test_socket_of_a_live_agent_is_left_to_it(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"

    def check() -> None:
        with pytest.raises(AgentRunning, match=f"an agent listens at {path} already"):
            serving(path, lambda: None)
        assert ask(path, "state") == {"ready": True}

    serving(path, check)


def test_socket_that_a_dead_agent_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
        left.listen()
    assert path.exists()
    serving(path, lambda: None)
