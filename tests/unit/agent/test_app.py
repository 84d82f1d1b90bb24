"""The control process follows the state: what it waits for, and what not."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from ipaddress import ip_address
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from agent.app import Agent, Departure
from agent.arrivals import Arrivals
from agent.inheritance import Inheritance
from agent.model.pod import Exclusions, LocalPod
from agent.model.starting import StartingPod
from agent.model.workload import Workload
from agent.state.store import Snapshot

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from agent.model.identity import SpiffeId

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


def ignore(*_arguments: object) -> None:
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


@pytest.mark.usefixtures("_alone")
def test_newer_state_waits_until_workers_have_taken_what_they_were_told() -> None:
    """What is kept for a slow worker would become more and more."""
    applied: list[Snapshot] = []

    def complete(told: Snapshot) -> Snapshot:
        applied.append(told)
        return told

    async def check() -> None:
        agent = following(
            source=States(3),
            roster=SimpleNamespace(next_retry=lambda: None),
            arrivals=SimpleNamespace(complete=complete),
            direct=SimpleNamespace(name_workloads=ignore),
            enforcement=SimpleNamespace(change=lambda _snapshot: ()),
            fleet=SimpleNamespace(tell=ignore, wait_taken=for_ever),
            predecessor=None,
            snapshot=Snapshot(),
        )
        agent._settings = SimpleNamespace(  # type: ignore[assignment]  # a part of them
            node="east", kubelet_cgroup=None
        )
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await agent._follow()

    asyncio.run(check())
    assert len(applied) == 1


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("known", ["to the API server", "without an address", "to nobody"])
def test_pod_that_the_agent_before_brought_stays_though_the_state_has_it_not_yet(
    known: str,
) -> None:
    brought = LocalPod("uid-1", "shop", "web", "web", (ip_address("10.0.0.7"),))
    workload = Workload("uid-1", "shop", "web", "east", "web", (), is_hbone=False)
    starting = StartingPod(workload, replace(brought, addresses=()))
    told = Snapshot(starting=(starting,)) if known == "without an address" else Snapshot()
    wanted: set[SpiffeId] = set()
    inherited: dict[str, LocalPod] = {}

    async def ask_for_pod(_namespace: str, _name: str) -> StartingPod | None:
        return starting if known == "to the API server" else None

    async def begin() -> tuple[int, list[int], list[tuple[Inheritance, list[int]]]]:
        gone = replace(brought, uid="uid-2", name="gone")
        pods = [Inheritance(brought, 1, ()), Inheritance(gone, 2, (), is_draining=True)]
        return 3, [], [(pod, []) for pod in pods]

    async def check() -> None:
        source = SimpleNamespace(ask_for_pod=ask_for_pod)
        agent = following(
            source=source,
            credentials=SimpleNamespace(wait_complete=nothing, want=wanted.update),
            fleet=SimpleNamespace(tell=ignore, wait_in_force=nothing),
            enforcement=SimpleNamespace(learn=ignore),
            pins=SimpleNamespace(hold=ignore),
            elders=SimpleNamespace(add=ignore, fds=[]),
            roster=SimpleNamespace(
                wait_for_elders=ignore,
                inherit=lambda _heritage, desired: inherited.update(desired),
            ),
            predecessor=SimpleNamespace(
                wait_gone=for_ever, begin=begin, commit=nothing, close=ignore,
                connection=None, pid=1,
            ),
            snapshot=told,
            desired={},
        )  # fmt: skip
        agent._settings = SimpleNamespace(  # type: ignore[assignment]  # a part of them
            node="east", trust_domain="cluster.local", exclusions=Exclusions(), has_direct_path=True
        )
        agent._arrivals = Arrivals(
            "east", source, agent._roster, agent._on_arrived, agent._on_left, ignore,
        )  # fmt: skip
        agent._arrivals.on_enforced(told)
        assert agent._predecessor is not None
        async with asyncio.TaskGroup() as tasks:
            assert await agent._succeed(agent._predecessor, set(), tasks)
        is_known = known != "to nobody"
        state = agent._arrivals.complete(told)
        assert state.local_pods.get("east", ()) == ((brought,) if is_known else ())
        assert inherited == ({"uid-1": brought} if is_known else {})
        assert [str(each) for each in wanted] == (
            ["spiffe://cluster.local/ns/shop/sa/web"] if is_known else []
        )

    asyncio.run(check())


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
