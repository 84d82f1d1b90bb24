"""The handover's two sides, over a real socket: who is the node's agent at each point."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING

import pytest

from agent.elders import Elders
from agent.errors import HandoverFailed
from agent.handover import HandoverServer, Predecessor, PredecessorGone
from agent.inheritance import Inheritance, encode
from agent.model.pod import Exclusions, LocalPod

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from agent.tunnel.counts import Counted

PODS = [Inheritance(LocalPod(f"uid-{n}", "a", f"p{n}", "s", ()), n, (15008,)) for n in range(40)]


def with_server(
    path: Path,
    check: Callable[[HandoverServer, asyncio.Lock, list[str]], Awaitable[None]],
    told: list[Inheritance] = PODS,
) -> None:
    async def run() -> None:
        turn, said = asyncio.Lock(), list[str]()
        lock, one = os.open(path, os.O_RDONLY), os.open(path, os.O_RDONLY)
        server = HandoverServer(
            path / "handover.sock",
            turn,
            lambda: ([lock], [(pod, [one, one]) for pod in told]),
            lambda: said.append("committed"),
            lambda: said.append("leave"),
        )
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            server.start(tasks)
            await check(server, turn, said)
            server.close()
        server.forget()
        os.close(lock)
        os.close(one)

    asyncio.run(run())


def close_all(lock: int, elders: list[int], pods: list[tuple[Inheritance, list[int]]]) -> None:
    for fd in (lock, *elders, *(fd for _pod, fds in pods for fd in fds)):
        os.close(fd)


def test_all_is_handed_over_and_nothing_changes_between_begin_and_commit(tmp_path: Path) -> None:
    inode = tmp_path.stat().st_ino

    async def check(_server: HandoverServer, turn: asyncio.Lock, said: list[str]) -> None:
        found = Predecessor.find(tmp_path / "handover.sock")
        assert found is not None
        assert found.pid == os.getpid()
        lock, elders, pods = await found.begin()
        assert [pod for pod, _fds in pods] == PODS
        assert os.fstat(lock).st_ino == inode
        assert turn.locked()
        assert said == []
        await found.commit()
        assert said == ["committed"]
        assert not (tmp_path / "handover.sock").exists()
        close_all(lock, elders, pods)
        found.close()
        found.connection.close()

    with_server(tmp_path, check)


def test_successor_that_goes_before_the_commit_is_as_if_it_had_not_come(tmp_path: Path) -> None:
    async def check(_server: HandoverServer, turn: asyncio.Lock, said: list[str]) -> None:
        for _ in range(2):
            found = Predecessor.find(tmp_path / "handover.sock")
            assert found is not None
            close_all(*(await found.begin()))
            found.close()
            found.connection.close()
            async with turn:  # it is free again
                assert said == []

    with_server(tmp_path, check)


def test_predecessor_that_ends_it_alone_is_still_the_agent(tmp_path: Path) -> None:
    async def check(server: HandoverServer, _turn: asyncio.Lock, said: list[str]) -> None:
        found = Predecessor.find(tmp_path / "handover.sock")
        assert found is not None
        close_all(*(await found.begin()))
        server.close()
        # Its process, this one, goes on: so it was not ours.
        with pytest.raises(HandoverFailed, match="waits no longer"):
            await found.commit()
        assert said == []
        found.close()
        found.connection.close()

    with_server(tmp_path, check)


def test_predecessor_that_ends_in_a_moment_is_waited_for_beside_other_work() -> None:
    process = subprocess.Popen(["sleep", "60"])

    async def check() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        found = Predecessor(ours)
        found.close()
        found._pidfd = os.pidfd_open(process.pid)
        theirs.close()
        asyncio.get_running_loop().call_later(0.05, process.kill)
        with pytest.raises(PredecessorGone):
            await found.begin()
        found.close()
        ours.close()

    try:
        asyncio.run(check())
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("has_begun", [False, True])
def test_successor_of_an_agent_that_is_told_to_end_waits_for_that(
    has_begun: bool, tmp_path: Path
) -> None:
    async def check(server: HandoverServer, turn: asyncio.Lock, said: list[str]) -> None:
        found = Predecessor.find(tmp_path / "handover.sock")
        assert found is not None
        if has_begun:
            close_all(*(await found.begin()))
        server.withhold()
        async with asyncio.TaskGroup() as tasks:
            asked = tasks.create_task(gone(found.commit if has_begun else found.begin))
            await asyncio.wait([asked], timeout=0.2)
            assert not asked.done()
            assert said == []
            assert not turn.locked()
            found.close()  # this process goes on: as if it had ended
            server.close()
            server.forget()
        found.connection.close()

    async def gone(ask: Callable[[], Awaitable[object]]) -> None:
        with pytest.raises(PredecessorGone):
            await ask()

    with_server(tmp_path, check)


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([b'{"reply": "begin", "pods": 2}', encode(PODS[0])], "waits no longer"),
        ([b'{"reply": "begin", "pods": 2}', b"no pod"], "strange"),
        ([b"nothing"], "no JSON"),
    ],
)
def test_what_came_before_the_predecessor_failed_is_closed(
    messages: list[bytes], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.handover.GONE_SECONDS", 0.0)
    fail_to_begin(messages, error)


def fail_to_begin(messages: list[bytes], error: str) -> None:
    """Begin with an agent that says this and ends; no descriptor that came may stay open."""

    async def check() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        found = Predecessor(ours)
        reader, writer = os.pipe()
        for message in messages:
            socket.send_fds(theirs, [message], [writer, writer])
        theirs.shutdown(socket.SHUT_WR)
        os.close(writer)
        with pytest.raises(HandoverFailed, match=error):
            await found.begin()
        os.set_blocking(reader, False)
        assert os.read(reader, 1) == b""  # nobody could write any more
        os.close(reader)
        found.close()
        ours.close()
        theirs.close()

    asyncio.run(check())


@pytest.mark.parametrize("limit", ["MESSAGE_BYTES", "MAX_FDS"])
def test_message_of_which_a_part_is_lost_is_refused(
    limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"agent.handover.{limit}", 1)
    fail_to_begin([b'{"reply": "begin", "pods": 0}'], "a part of a message is lost")


def test_pod_with_as_many_exclusions_as_there_can_be_is_handed_over(tmp_path: Path) -> None:
    first = int(ip_address("100.100.0.0"))
    networks = tuple(ip_network(first + number) for number in range(16384))
    pod = replace(PODS[0].pod, exclusions=Exclusions(outbound_networks=networks))
    told = [replace(PODS[0], pod=pod), *PODS[1:]]

    async def check(_server: HandoverServer, _turn: asyncio.Lock, _said: list[str]) -> None:
        found = Predecessor.find(tmp_path / "handover.sock")
        assert found is not None
        lock, elders, pods = await found.begin()
        assert [pod for pod, _fds in pods] == told
        close_all(lock, elders, pods)
        found.close()
        found.connection.close()

    with_server(tmp_path, check, told)


def test_nobody_is_found_where_nobody_listens(tmp_path: Path) -> None:
    assert Predecessor.find(tmp_path / "handover.sock") is None

    async def check(server: HandoverServer, _turn: asyncio.Lock, _said: list[str]) -> None:
        server.stop()
        assert Predecessor.find(tmp_path / "handover.sock") is None

    with_server(tmp_path, check)


def test_counts_are_given_to_the_successor_and_to_nobody_else(tmp_path: Path) -> None:
    labels = tuple((f"label_{number}", "v" * 60) for number in range(27))
    counts = tuple((f"name_{number}", labels, number) for number in range(100))

    async def check(server: HandoverServer, _turn: asyncio.Lock, _said: list[str]) -> None:
        assert await server.give(counts) == counts
        found = Predecessor.find(tmp_path / "handover.sock")
        assert found is not None
        close_all(*(await found.begin()))
        await found.commit()
        heard: asyncio.Queue[Counted] = asyncio.Queue()
        elders = Elders(tmp_path, heard.put_nowait, lambda: None)
        elders.add(found.connection)
        found.close()
        assert await server.give(counts) == ()
        arrived: Counted = ()
        async with asyncio.timeout(5):
            while len(arrived) < len(counts):
                arrived += await heard.get()
        assert arrived == counts
        elders.stop()
        assert await server.give(counts) == counts  # nobody is there any more

    with_server(tmp_path, check)
