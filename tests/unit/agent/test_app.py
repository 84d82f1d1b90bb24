"""The control process follows the state: what it waits for, and what not."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from agent.app import Agent, Departure
from agent.state.store import Snapshot

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

TURNS = 100  # of the event loop


def with_parts(**parts: object) -> Agent:
    """Return an agent that has only these parts: it need not load programs."""
    agent = object.__new__(Agent)
    for name, part in parts.items():
        setattr(agent, f"_{name}", part)
    return agent


class OneState:
    """A source that tells one state, and ends some turns of the event loop later."""

    async def watch(self, _stop: asyncio.Event) -> AsyncIterator[Snapshot]:
        yield Snapshot()
        for _ in range(TURNS):
            await asyncio.sleep(0)


@pytest.mark.parametrize("departure", [None, *Departure])
def test_pod_that_failed_is_tried_again_unless_the_agent_leaves(
    departure: Departure | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = 0

    async def apply(*_arguments: object) -> None:
        nonlocal passes
        passes += 1

    async def nothing(*_arguments: object) -> None:
        pass

    async def check() -> None:
        now = asyncio.get_running_loop().time()
        agent = with_parts(
            settings=SimpleNamespace(kubelet_cgroup=None),
            source=OneState(),
            roster=SimpleNamespace(next_retry=lambda: now),
            handover=SimpleNamespace(close=lambda: None),
            predecessor=None,
            told=Snapshot(),
            stop=asyncio.Event(),
            snapshots=asyncio.Queue(maxsize=1),
            passing=asyncio.Lock(),
            departure=asyncio.get_running_loop().create_future(),
        )
        if departure is not None:
            agent._departure.set_result(departure)
        await agent._follow()

    monkeypatch.setattr(Agent, "_apply", apply)
    for name in ("_take_office", "_depart", "_give_counts", "_keep_certificates"):
        monkeypatch.setattr(Agent, name, nothing)
    asyncio.run(check())
    assert (passes > 1) is (departure is None)
