"""Wait in the event loop until something in a directory changes.

Between two changes nothing runs: the kernel wakes the loop. watchfiles, which is usual for this,
looks every few milliseconds in a thread of its own whether it is to stop: half a percent of a
processor for each watch, all the time.

Called by whoever follows files. What changed is not said: it is a reason to look, and whoever is
told looks at all of it. Who writes where it looks names its drafts, which are no reason. Also told
is the end of the directory itself; one that is made anew under the old name is another one, for
`Changes.follow`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING

from agent.errors import FeatureMissing
from cni.inotify import CONTENTS, DirectoryWatch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Self

# Who writes several files writes them at once. So the end of it is waited for, and not for ever.
QUIET_SECONDS = 0.01
LONGEST_SECONDS = 0.05


class Changes:
    """Watches directories while it is entered."""

    def __init__(
        self, *directories: Path, events: int = CONTENTS, ignored_suffix: str | None = None
    ) -> None:
        """Watch from now on, but for files whose names end in `ignored_suffix`.

        Raises:
            FileNotFoundError: a directory is not there.
            FeatureMissing: this machine lets nobody watch any more.
        """
        with _refused():
            self._watch = DirectoryWatch(*directories, events=events)
        self._ignored_suffix = None if ignored_suffix is None else os.fsencode(ignored_suffix)
        self._loop = asyncio.get_running_loop()
        self._has_changed = asyncio.Event()

    def __enter__(self) -> Self:
        self._loop.add_reader(self._watch, self._on_readable)
        return self

    def __exit__(self, *_exception: object) -> None:
        self._loop.remove_reader(self._watch)
        self._watch.close()

    def follow(self, directory: Path) -> None:
        """Watch the directory that has this name now as well, if there is one (FeatureMissing)."""
        with contextlib.suppress(FileNotFoundError), _refused():
            self._watch.add(directory)

    def wake(self) -> None:
        """Have whoever waits look, as after a change."""
        self._has_changed.set()

    async def wait(self, stop: asyncio.Event, seconds: float | None = None) -> bool:
        """Wait for changes since the last call; False if there are none in time, or at `stop`."""
        async with asyncio.TaskGroup() as tasks:
            either = [tasks.create_task(each.wait()) for each in (self._has_changed, stop)]
            await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            for each in either:
                each.cancel()
        if stop.is_set() or not self._has_changed.is_set():
            return False
        with contextlib.suppress(TimeoutError):
            await self._settle()
        self._has_changed.clear()
        return True

    async def _settle(self) -> None:
        latest = self._loop.time() + LONGEST_SECONDS
        while self._loop.time() < latest:
            self._has_changed.clear()
            async with asyncio.timeout(QUIET_SECONDS):
                await self._has_changed.wait()

    def _on_readable(self) -> None:
        names, suffix = self._watch.drain(), self._ignored_suffix
        if suffix is None or not all(name.endswith(suffix) for name in names):
            self._has_changed.set()


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise FeatureMissing(
            f"files cannot be followed: {error.filename}: {error.strerror}; look at the sysctls "
            "fs.inotify.max_user_instances and fs.inotify.max_user_watches"
        ) from error
