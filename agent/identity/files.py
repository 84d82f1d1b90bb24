"""Wait for changes of files that others replace: roots, revocation lists, keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import watchfiles

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
    watch = watchfiles.awatch(
        *followed,
        # A volume that Kubernetes mounts changes by a link beside the file: every change counts.
        watch_filter=None,
        debounce=50,
        step=10,
        recursive=False,
        stop_event=stop,
        # Also yields without a change, first when the watch is armed: so nothing is missed.
        yield_on_timeout=True,
        rust_timeout=100,
    )
    is_first = True
    async for change in watch:
        if change or is_first:
            is_first = False
            yield
