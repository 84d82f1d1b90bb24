"""Processes that can open nothing more."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

FILES = resource.RLIMIT_NOFILE


@contextlib.contextmanager
def none_left(pids: Iterable[int]) -> Iterator[None]:
    """Make the limit of some processes what they have open."""
    before = {pid: resource.prlimit(pid, FILES) for pid in pids}
    try:
        for pid, (_soft, hard) in before.items():
            resource.prlimit(pid, FILES, (_lowest_free(pid), hard))
        yield
    finally:
        for pid, limits in before.items():
            resource.prlimit(pid, FILES, limits)


def _lowest_free(pid: int) -> int:
    used = {int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir()}
    return min(set(range(len(used) + 1)) - used)
