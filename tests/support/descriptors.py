"""Use up this process's descriptors, as thousands of connections would."""

from __future__ import annotations

import os
import resource
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """Let this process open `count` more files, and no others, while the block runs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = [os.open("/dev/null", os.O_RDONLY) for _ in range(count + 1)]
    for fd in found:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (found[-1], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
