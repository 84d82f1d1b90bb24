"""Workers together: one that dies has a successor that knows everything, and holds nobody up."""

from __future__ import annotations

import asyncio
import os
import signal

from agent.fleet import Fleet, Told
from agent.tunnel import messages


def test_successor_is_introduced_and_a_dead_worker_holds_no_drain_up() -> None:
    async def check() -> None:
        introduced: list[None] = []
        replaced = asyncio.Event()

        def introduction() -> list[Told]:
            introduced.append(None)
            return [(messages.RemoveWorkload("none"), [])]

        fleet = Fleet(introduction, lambda _identity: None, lambda _counts: None, replaced.set)
        fleet.start(2)
        first, second = fleet.pids
        drained = asyncio.Event()
        fleet.expect_drained("pod", drained.set)
        async with asyncio.timeout(20):
            await fleet.wait_in_force()
            os.kill(first, signal.SIGKILL)
            await replaced.wait()
            assert len(introduced) == 3
            assert second in fleet.pids
            assert first not in fleet.pids
            assert not drained.is_set()  # the other may still serve it
            os.kill(second, signal.SIGKILL)
            await drained.wait()
            await fleet.wait_in_force()
        assert len(fleet.pids) == 2
        fleet.stop()

    asyncio.run(check())


def test_drain_that_is_taken_back_is_not_told() -> None:
    async def check() -> None:
        replaced = asyncio.Event()
        fleet = Fleet(list, lambda _identity: None, lambda _counts: None, replaced.set)
        fleet.start(1)
        drained = asyncio.Event()
        fleet.expect_drained("pod", drained.set)
        fleet.expect_no_more("pod")
        async with asyncio.timeout(20):
            await fleet.wait_in_force()
            os.kill(fleet.pids[0], signal.SIGKILL)
            await replaced.wait()
        assert not drained.is_set()
        fleet.stop()

    asyncio.run(check())
