"""Processes that can open nothing more, or only so much, as with thousands of connections."""

from __future__ import annotations

import gc
import os
import resource
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

STANDARD = 3  # input, output and errors, which all have


@contextmanager
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


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """Let this process open `count` more files, and no others, while the block runs."""
    gc.collect()  # sockets of other tests must not make room in between
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = [os.open("/dev/null", os.O_RDONLY) for _ in range(count + 1)]
    for fd in found:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (found[-1], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
