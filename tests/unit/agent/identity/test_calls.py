"""The process that asks the CA: it comes with a call, goes when idle, and its death is no more."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path

import pytest

from agent.errors import AuthorityUnavailable
from agent.identity.caller import Target
from agent.identity.calls import Calls
from agent.identity.local import LocalAuthority
from agent.model.identity import SpiffeId
from tests.support.descriptors import none_left

ROOTS = b"-----BEGIN CERTIFICATE-----\nnone\n-----END CERTIFICATE-----\n"


def children() -> set[int]:
    own = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {int(pid) for pid in own}


async def wait_until_gone(pid: int) -> None:
    fd = os.pidfd_open(pid)
    gone = asyncio.Event()
    asyncio.get_running_loop().add_reader(fd, gone.set)
    try:
        async with asyncio.timeout(10):
            await gone.wait()
    finally:
        asyncio.get_running_loop().remove_reader(fd)
        os.close(fd)


def test_one_process_serves_calls_and_ends_when_there_are_none() -> None:
    async def run() -> None:
        before = children()
        calls = Calls()
        # Nobody listens there, and with roots like these nobody could be trusted.
        target = Target("127.0.0.1:9", "", ROOTS)
        answers = await asyncio.gather(*(calls.call(target, "t", b"") for _ in range(3)))
        assert {status for status, _details in answers} == {"UNAVAILABLE"}
        (pid,) = children() - before
        await wait_until_gone(pid)
        assert (await calls.call(target, "t", b""))[0] == "UNAVAILABLE"
        await calls.close()
        assert children() - before == set()

    asyncio.run(run())


def test_death_of_the_process_fails_its_calls_and_the_next_starts_another(tmp_path: Path) -> None:
    # Roots that can be read: with others gRPC gives up at once, before the process is killed.
    authority = LocalAuthority.create(tmp_path, "cluster.local")
    roots = authority.issue(SpiffeId("cluster.local", "shop", "cart")).roots

    async def run() -> None:
        before = children()
        with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and says nothing
            silent.setblocking(False)
            calls = Calls()
            target = Target(f"127.0.0.1:{silent.getsockname()[1]}", "", roots)
            for _ in range(2):
                async with asyncio.TaskGroup() as tasks:
                    asking = tasks.create_task(_fails(calls, target))
                    accepted, _peer = await asyncio.get_running_loop().sock_accept(silent)
                    (pid,) = children() - before
                    os.kill(pid, signal.SIGKILL)
                    assert await asking
                    accepted.close()
            await calls.close()

    asyncio.run(run())


async def _fails(calls: Calls, target: Target) -> bool:
    with pytest.raises(AuthorityUnavailable, match="ended"):
        await calls.call(target, "t", b"")
    return True


def test_process_that_cannot_be_started_is_an_authority_that_is_not_there() -> None:
    async def run() -> None:
        calls = Calls()
        target = Target("127.0.0.1:9", "", ROOTS)
        with none_left([os.getpid()]), pytest.raises(AuthorityUnavailable, match="cannot be start"):
            await calls.call(target, "t", b"")
        assert (await calls.call(target, "t", b""))[0] == "UNAVAILABLE"
        await calls.close()

    asyncio.run(run())
