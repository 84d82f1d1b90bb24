"""Files that are followed need a directory, and whoever names another one is told."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from agent.errors import ConfigError
from agent.identity import files

if TYPE_CHECKING:
    from pathlib import Path


def test_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    async def follow() -> None:
        async for _ in files.changes([tmp_path, tmp_path / "absent"], asyncio.Event()):
            raise AssertionError("nothing can be followed")

    with pytest.raises(ConfigError, match=f"{tmp_path}/absent is no directory"):
        asyncio.run(follow())


def test_change_is_told_once_the_watch_is_armed(tmp_path: Path) -> None:
    async def follow() -> list[bool]:
        stop = asyncio.Event()
        seen = []
        async for _ in files.changes([tmp_path], stop):
            seen.append((tmp_path / "root.pem").exists())
            if seen[-1]:
                stop.set()
            else:
                (tmp_path / "root.pem").write_text("root")
        return seen

    assert asyncio.run(follow()) == [False, True]
