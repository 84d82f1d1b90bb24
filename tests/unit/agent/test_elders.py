"""What an agent before this one still has is heard and asked for, until it ends."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from typing import TYPE_CHECKING

import pytest

from agent import elders as tested
from agent.admin import Admin
from agent.elders import Elders, parse_counts, socket_name

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from agent.tunnel.counts import Counted

COUNTS: Counted = (("connections", (("path", "hbone"),), 3),)


def with_elder(
    tmp_path: Path,
    check: Callable[[Elders, socket.socket, asyncio.Queue[Counted]], Awaitable[None]],
) -> None:
    """Run a check with one elder, which is this process; all must be heard to its end."""

    async def run() -> None:
        gone = asyncio.Event()
        heard: asyncio.Queue[Counted] = asyncio.Queue()
        elders = Elders(tmp_path, heard.put_nowait, gone.set)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        elders.add(ours)
        assert elders.fds == [ours.fileno()]
        assert elders.pids == [os.getpid()]
        await check(elders, theirs, heard)
        theirs.close()
        async with asyncio.timeout(5):
            await gone.wait()
        assert elders.fds == []
        assert await elders.ask("connections") == []

    asyncio.run(run())


def test_elder_is_heard_until_its_end_and_leaves_no_socket(tmp_path: Path) -> None:
    left = tmp_path / socket_name(os.getpid())

    async def check(_elders: Elders, theirs: socket.socket, heard: asyncio.Queue[Counted]) -> None:
        left.touch()
        theirs.send(json.dumps({"counts": COUNTS}).encode())
        theirs.send(b"something of another version")
        theirs.send(json.dumps({"counts": [["too", "short"]]}).encode())
        async with asyncio.timeout(5):
            assert [await heard.get() for _ in range(3)] == [COUNTS, (), ()]

    with_elder(tmp_path, check)
    assert not left.exists()


def test_elder_answers_questions_at_a_socket_of_its_own(tmp_path: Path) -> None:
    async def check(elders: Elders, _theirs: socket.socket, _heard: asyncio.Queue[Counted]) -> None:
        assert await elders.ask("connections") == []  # nobody listens there yet

        async def answer(arguments: dict[str, object]) -> object:
            return [arguments]

        path = tmp_path / "agent.sock"
        admin = Admin(path, dict, {"connections": answer, "diff": answer})
        await admin.start()
        admin.step_aside(tmp_path / socket_name(os.getpid()), {"connections": answer})
        assert not path.exists()
        assert await elders.ask("connections", pod="cart") == [[{"pod": "cart"}]]
        (refused,) = await elders.ask("diff")
        assert refused["reason"] == "request_refused"
        admin.stop()

    with_elder(tmp_path, check)


def test_elder_that_says_nothing_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tested, "ANSWER_SECONDS", 0.05)

    async def check(elders: Elders, _theirs: socket.socket, _heard: asyncio.Queue[Counted]) -> None:
        with socket.socket(socket.AF_UNIX) as silent:
            silent.bind(str(tmp_path / socket_name(os.getpid())))
            silent.listen()
            assert await elders.ask("connections") == []

    with_elder(tmp_path, check)
    assert "an agent before this one does not answer" in caplog.text


@pytest.mark.parametrize("data", [b"", b"[]", b'{"counts": 3}', b'{"counts": [[1, [[2]], 3]]}'])
def test_what_is_not_understood_counts_nothing(data: bytes) -> None:
    assert parse_counts(data) == ()
