"""Workers together: one that dies has a successor that knows everything, and holds nobody up."""

from __future__ import annotations

import asyncio
import os
import signal

from agent.fleet import FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS, Fleet, Told, wait_before
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
            replaced.clear()
            os.kill(second, signal.SIGKILL)
            await drained.wait()
            await replaced.wait()  # the second of a row comes a moment later
            await fleet.wait_in_force()
        assert len(fleet.pids) == 2
        fleet.stop()

    asyncio.run(check())


def test_worker_that_dies_at_its_start_is_replaced_later_and_later() -> None:
    async def check() -> None:
        began = asyncio.get_running_loop().time()
        introduced: list[float] = []
        fourth = asyncio.Event()

        def introduction() -> list[Told]:
            introduced.append(asyncio.get_running_loop().time() - began)
            if len(introduced) == 4:
                fourth.set()
            return [(messages.AddPod(None, 0, ()), [])]  # type: ignore[arg-type]  # it dies of this

        fleet = Fleet(introduction, lambda _identity: None, lambda _counts: None, lambda: None)
        async with asyncio.timeout(20):
            fleet.start(1)
            await fourth.wait()
        fleet.stop()
        _first, second, third, fourth_at = introduced
        assert third - second >= wait_before(1)
        assert fourth_at - third >= wait_before(2)

    asyncio.run(check())


def test_wait_grows_and_has_an_end() -> None:
    waits = [wait_before(count) for count in range(12)]
    assert waits[:3] == [0.0, FIRST_WAIT_SECONDS, 2 * FIRST_WAIT_SECONDS]
    assert waits == sorted(waits)
    assert waits[-1] == LONGEST_WAIT_SECONDS


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
