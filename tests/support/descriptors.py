"""Processes that can open nothing more."""

from __future__ import annotations

import contextlib
import resource
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

STANDARD = 3  # input, output and errors, which all have


@contextlib.contextmanager
def none_left(pids: Iterable[int]) -> Iterator[None]:
    """Leave some processes no number for what they open; what is open stays so."""
    before = {pid: resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in pids}
    try:
        for pid, (_soft, hard) in before.items():
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (STANDARD, hard))
        yield
    finally:
        for pid, limits in before.items():
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
