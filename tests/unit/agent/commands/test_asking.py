"""Commands ask several agents, and some of them may not answer."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from agent.admin import Admin
from agent.commands.asking import all_is_well, ask_any, ask_each, ask_names, find_sockets
from agent.commands.exits import FINE, PROBLEM
from agent.errors import AgentUnreachable, ConfigError, RequestRefused

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


async def refuse(_arguments: dict[str, Any]) -> object:
    raise RequestRefused("ask again")


def serving(directory: Path, check: Callable[[list[Path]], None]) -> None:
    """Run `check` in a thread, with the sockets of one agent that is dead and two that answer."""
    paths = [directory / "lab" / "mine" / node / "agent.sock" for node in ("dead", "east", "west")]

    async def run() -> None:
        admins = []
        for path in paths:
            path.parent.mkdir(parents=True)
            node = path.parent.name

            async def name(_arguments: dict[str, Any], node: str = node) -> object:
                return node

            async def names(_arguments: dict[str, Any], node: str = node) -> object:
                return {"pods": [{"pod": f"shop/{node}"}], "namespaces": ["shop"], "nodes": [node]}

            questions = {"name": name, "names": names}
            admin = Admin(path, dict, questions | ({"busy": refuse} if node == "east" else {}))
            await admin.start()
            admins.append(admin)
        admins[0].stop()
        paths[0].touch()  # which is left of one that was killed
        try:
            await asyncio.to_thread(check, paths)
        finally:
            for admin in admins[1:]:
                admin.stop()

    asyncio.run(run())


def test_answers_of_others_are_told_beside_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(sockets: list[Path]) -> None:
        assert ask_each(sockets, "name") == (["east", "west"], PROBLEM)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"warning: no agent answers at {sockets[0]}")
        assert ask_each(sockets[1:], "name") == (["east", "west"], FINE)
        assert capsys.readouterr().err == ""

    serving(tmp_path, check)


def test_nobody_that_answers_is_an_error(tmp_path: Path) -> None:
    def check(sockets: list[Path]) -> None:
        for ask in (ask_each, ask_any):
            with pytest.raises(AgentUnreachable):
                ask(sockets[:1], "name")
        with pytest.raises(RequestRefused, match="ask again"):
            ask_each(sockets[1:2], "busy")

    serving(tmp_path, check)


def test_what_every_agent_knows_is_told_by_the_first_that_is_there(tmp_path: Path) -> None:
    def check(sockets: list[Path]) -> None:
        assert ask_any(sockets, "name") == "east"
        with pytest.raises(RequestRefused, match="ask again"):
            ask_any(sockets, "busy")

    serving(tmp_path, check)


def test_names_are_those_of_all_that_answer(tmp_path: Path) -> None:
    def check(sockets: list[Path]) -> None:
        names = ask_names(sockets)
        assert {*names.pods} == {"shop/east", "shop/west"}
        assert (names.namespaces, names.nodes) == ({"shop"}, {"east", "west"})

    serving(tmp_path, check)


def test_all_is_not_well_where_nobody_answers() -> None:
    assert all_is_well(FINE) == "all is as it ought to be"
    assert all_is_well(PROBLEM) == "all is as it ought to be where an agent answers"


def test_sockets_are_the_nodes_or_those_of_one_lab(tmp_path: Path) -> None:
    with pytest.raises(AgentUnreachable, match="and no lab"):
        find_sockets(tmp_path, None)
    places = [tmp_path / "lab" / lab / "east" for lab in ("mine", "yours")]
    for place in places:
        place.mkdir(parents=True)
        (place / "agent.sock").touch()
    (tmp_path / "lab" / "mine" / "objects").mkdir()
    with pytest.raises(ConfigError, match="choose one with --lab: mine, yours"):
        find_sockets(tmp_path, None)
    assert find_sockets(tmp_path, "mine") == [places[0] / "agent.sock"]
    with pytest.raises(AgentUnreachable, match="no lab theirs"):
        find_sockets(tmp_path, "theirs")
    (tmp_path / "agent.sock").touch()
    assert find_sockets(tmp_path, None) == [tmp_path / "agent.sock"]
