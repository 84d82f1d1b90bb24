"""Wait for changes of files that others replace: roots, revocation lists, keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import watchfiles

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator, Iterable
    from pathlib import Path


async def changes(directories: Iterable[Path], stop: asyncio.Event) -> AsyncIterator[None]:
    """Yield once the watch is armed and after each change, until `stop`."""
    watch = watchfiles.awatch(
        *set(directories),
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
