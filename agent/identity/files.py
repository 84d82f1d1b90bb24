"""Wait for changes of files that others replace: roots, revocation lists, keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent.changes import Changes
from agent.errors import ConfigError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator, Iterable
    from pathlib import Path


async def changes(directories: Iterable[Path], stop: asyncio.Event) -> AsyncIterator[None]:
    """Yield once the watch is armed and after each change, until `stop`.

    Raises:
        ConfigError: a directory is not there.
    """
    followed = set(directories)
    for directory in sorted(followed):
        if not directory.is_dir():
            raise ConfigError(
                f"{directory} is no directory, and a file in it is to be followed: make it, or "
                "name another file"
            )
    # A volume that Kubernetes mounts changes by a link beside the file: every change counts.
    with Changes(*followed) as watched:
        yield
        while await watched.wait(stop):
            yield
