"""The admin pages, without a port: what they take, and what they refuse."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

import pytest

import agent.app  # noqa: F401  # every part of the process has its logger then
from agent.errors import RequestRefused
from agent.pages import Pages

if TYPE_CHECKING:
    from agent.fleet import Fleet


def set_levels(**query: str) -> list[str]:
    """Post to /logging; return what the agent is told."""
    told: list[str] = []

    async def config() -> object:
        return None

    async def post() -> None:
        pages = Pages(dict, config, lambda: "info", told.append, cast("Fleet", None))
        await pages.routes()["POST", "/logging"](query)

    asyncio.run(post())
    return told


@pytest.mark.parametrize("level", ["warning", "access=debug", "tunnel=off,agent.roster=debug"])
def test_level_of_what_logs_is_set(level: str) -> None:
    assert set_levels(level=level) == [level]


def test_scope_may_include_those_below_it_and_be_a_librarys() -> None:
    assert set_levels(**{"agent.identity": "debug", "asyncio": "info"}) == [
        "agent.identity=debug,asyncio=info"
    ]


@pytest.mark.parametrize("level", ["nope=debug", "info,access.x=debug", "agent.roster.x=off"])
def test_scope_of_nothing_is_refused_and_those_there_are_are_named(level: str) -> None:
    with pytest.raises(RequestRefused, match=r"nothing logs as .*access, agent, .*tunnel$"):
        set_levels(level=level)
