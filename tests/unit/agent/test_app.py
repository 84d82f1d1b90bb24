"""The control process follows the state: what it waits for, and what not."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from agent.app import Agent, Departure
from agent.model.workload import Workload
from agent.state.store import Snapshot

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

TURNS = 100  # of the event loop


class States:
    """A source that tells states, each some turns of the event loop after the one before."""

    def __init__(self, count: int) -> None:
        self._count = count

    async def watch(self, _stop: asyncio.Event) -> AsyncIterator[Snapshot]:
        for _ in range(self._count):
            yield Snapshot()
            for _ in range(TURNS):
                await asyncio.sleep(0)


async def nothing(*_arguments: object) -> None:
    pass


async def for_ever(*_arguments: object) -> None:
    await asyncio.Event().wait()


@pytest.fixture
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have an agent do nothing beside following the state."""
    for name in ("_take_office", "_depart", "_give_counts", "_keep_certificates"):
        monkeypatch.setattr(Agent, name, nothing)


def following(**parts: object) -> Agent:
    """Return an agent with these parts and what it needs to follow the state: it loads nothing."""
    parts |= {
        "settings": SimpleNamespace(kubelet_cgroup=None),
        "handover": SimpleNamespace(close=lambda: None),
        "told": Snapshot(),
        "stop": asyncio.Event(),
        "snapshots": asyncio.Queue(maxsize=1),
        "has_news": asyncio.Event(),
        "passing": asyncio.Lock(),
        "departure": asyncio.get_running_loop().create_future(),
    }
    agent = object.__new__(Agent)
    for name, part in parts.items():
        setattr(agent, f"_{name}", part)
    return agent


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("departure", [None, *Departure])
def test_pod_that_failed_is_tried_again_unless_the_agent_leaves(
    departure: Departure | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = 0

    async def apply(*_arguments: object) -> None:
        nonlocal passes
        passes += 1

    async def check() -> None:
        now = asyncio.get_running_loop().time()
        roster = SimpleNamespace(next_retry=lambda: now)
        agent = following(source=States(1), roster=roster, predecessor=None)
        if departure is not None:
            agent._departure.set_result(departure)
        await agent._follow()

    monkeypatch.setattr(Agent, "_apply", apply)
    asyncio.run(check())
    assert (passes > 1) is (departure is None)


@pytest.mark.usefixtures("_alone")
def test_successor_that_waits_for_certificates_follows_the_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = []

    async def apply(agent: Agent, _told: Snapshot, tasks: asyncio.TaskGroup) -> None:
        assert agent._predecessor is not None
        results.append(await agent._succeed(agent._predecessor, set(), tasks))

    async def check() -> None:
        agent = following(
            source=States(3),
            roster=SimpleNamespace(next_retry=lambda: None),
            credentials=SimpleNamespace(wait_complete=for_ever),
            predecessor=SimpleNamespace(wait_gone=for_ever),
        )
        async with asyncio.timeout(5):
            await agent._follow()

    monkeypatch.setattr(Agent, "_apply", apply)
    asyncio.run(check())
    assert results == [False] * 3


def test_word_on_a_captured_pod_that_somebody_took_away_is_said_again() -> None:
    def workload(uid: str, *, is_hbone: bool, node: str = "east") -> Workload:
        return Workload(uid, "shop", uid, node, "a", (), is_hbone)

    said: list[tuple[str, str | None]] = []
    agent = object.__new__(Agent)
    parts = {
        "settings": SimpleNamespace(node="east"),
        "desired": {},
        "roster": SimpleNamespace(
            captured=lambda: {"robbed", "fine", "late"},
            statuses={
                uid: SimpleNamespace(state=state)
                for uid, state in (
                    ("robbed", "enrolled"),
                    ("fine", "enrolled"),
                    ("late", "pending"),
                )
            },
        ),
        "source": SimpleNamespace(publish=lambda pod, word: said.append((pod.uid, word))),
    }
    for name, part in parts.items():
        setattr(agent, f"_{name}", part)
    workloads = [
        workload("robbed", is_hbone=False),
        workload("fine", is_hbone=True),
        workload("late", is_hbone=False),
        workload("left", is_hbone=True),
        workload("elsewhere", is_hbone=True, node="west"),
    ]
    agent._correct_words(Snapshot(tuple(workloads)))
    assert said == [("robbed", "enabled"), ("left", None)]
