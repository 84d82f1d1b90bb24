"""What an agent answers about addresses that two pods have, and about policies that are wrong."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from ipaddress import ip_address
from types import SimpleNamespace
from typing import Any

from agent.answers import Answers
from agent.discovery.translate import ObjectProblem
from agent.enforcement import Enforcement
from agent.model.pod import Exclusions
from agent.model.service import Endpoint, Service, ServicePort
from agent.model.workload import Workload
from agent.state.rulebook import Rulebook
from agent.state.store import Snapshot

ADDRESS, VIP = ip_address("10.0.0.1"), ip_address("10.96.0.1")
CLIENT = Workload("u-0", "shop", "client", "east", "a", (ip_address("10.0.0.9"),), is_hbone=True)
LEAVING = Workload("u-1", "shop", "old", "east", "a", (ADDRESS,), is_hbone=True, is_leaving=True)
HEIR = replace(LEAVING, uid="u-2", name="new", is_leaving=False)
SERVICE = Service(
    "shop", "web", (VIP,), (ServicePort("", 80),), (Endpoint(ADDRESS, (("", 80),)),)
)  # fmt: skip


async def ask(answers: Answers, question: str, **arguments: object) -> Any:
    return await answers.table()[question](arguments)


def answering(**parts: object) -> Answers:
    answers = object.__new__(Answers)
    for name, part in parts.items():
        setattr(answers, f"_{name}", part)
    return answers


def test_address_of_two_pods_is_the_same_ones_in_each_answer() -> None:
    settings = SimpleNamespace(
        trust_domain="cluster.local", exclusions=Exclusions(), has_direct_path=False
    )
    for workloads in ((CLIENT, LEAVING, HEIR), (CLIENT, HEIR, LEAVING)):
        answers = answering(
            snapshot=lambda found=workloads: Snapshot(found, (SERVICE,)),
            enforcement=SimpleNamespace(rulebook=Rulebook()),
            roster=SimpleNamespace(statuses={}, unguarded=set),
            settings=settings,
        )
        (service,) = asyncio.run(ask(answers, "services"))
        assert service["pods"] == ["shop/new"]
        (row,) = asyncio.run(
            ask(answers, "explain", source="client", destination=str(ADDRESS), port=80)
        )
        assert row["destination"] == "shop/new 10.0.0.1:80"


def test_policy_that_is_wrong_in_part_is_not_refused() -> None:
    problems = [
        ObjectProblem("f", f"AuthorizationPolicy shop/{name}", "spec", "is wrong", is_partial=part)
        for name, part in (("whole", False), ("part", True))
    ]
    answers = answering(
        snapshot=Snapshot,
        enforcement=Enforcement("east", "cluster.local"),
        settings=SimpleNamespace(node="east"),
        source=SimpleNamespace(problems=problems),
    )
    (row,) = asyncio.run(ask(answers, "policies"))
    assert (row["policy"], row["state"]) == ("AuthorizationPolicy shop/whole", "refused")
