"""Workers together: one that dies has a successor that knows everything, and holds nobody up."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from typing import TYPE_CHECKING

from agent.fleet import FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS, Fleet, Told, wait_before
from agent.tunnel import messages
from tests.support.descriptors import none_left

if TYPE_CHECKING:
    from collections.abc import Iterator


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


class Said(logging.Handler):
    """Knows when a message is logged."""

    def __init__(self, message: str) -> None:
        super().__init__()
        self._message = message
        self.is_said = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() == self._message:
            self.is_said.set()


def test_worker_that_cannot_be_started_is_when_there_is_room() -> None:
    async def check() -> None:
        replaced = asyncio.Event()
        fleet = Fleet(list, lambda _identity: None, lambda _counts: None, replaced.set)
        said = Said("worker cannot be started, and is later")
        logging.getLogger("agent.fleet").addHandler(said)
        async with asyncio.timeout(20):
            fleet.start(1)
            await fleet.wait_in_force()
            with none_left([os.getpid()]):
                os.kill(fleet.pids[0], signal.SIGKILL)
                await said.is_said.wait()
                assert fleet.pids == []
            await replaced.wait()
            await fleet.wait_in_force()
        logging.getLogger("agent.fleet").removeHandler(said)
        assert len(fleet.pids) == 1
        fleet.stop()

    asyncio.run(check())


def test_worker_that_could_be_told_the_half_only_is_replaced() -> None:
    async def check() -> None:
        replaced = asyncio.Event()
        has_failed = False

        def introduction() -> Iterator[Told]:
            nonlocal has_failed
            yield messages.RemoveWorkload("none"), []
            if not has_failed:
                has_failed = True
                raise OSError("no descriptor is left")

        fleet = Fleet(introduction, lambda _identity: None, lambda _counts: None, replaced.set)
        fleet.start(1)
        (half,) = fleet.pids
        async with asyncio.timeout(20):
            await replaced.wait()
            await fleet.wait_in_force()
        assert half not in fleet.pids
        fleet.stop()

    asyncio.run(check())


def test_wait_grows_and_has_an_end() -> None:
    waits = [wait_before(count) for count in range(12)]
    assert waits[:3] == [0.0, FIRST_WAIT_SECONDS, 2 * FIRST_WAIT_SECONDS]
    assert waits == sorted(waits)
    assert waits[-1] == LONGEST_WAIT_SECONDS


def test_pod_is_drained_soon_where_no_worker_is() -> None:
    async def check() -> None:
        fleet = Fleet(list, lambda _identity: None, lambda _counts: None, lambda: None)
        drained, taken_back = asyncio.Event(), asyncio.Event()
        fleet.expect_drained("other", taken_back.set)
        fleet.expect_no_more("other")
        fleet.expect_drained("pod", drained.set)
        assert not drained.is_set()
        async with asyncio.timeout(5):
            await drained.wait()
        assert not taken_back.is_set()

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
