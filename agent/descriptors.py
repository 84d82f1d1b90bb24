"""The limit of open files: as many as the kernel lets a process have.

Most systems give 1,024 (the soft limit), which programs that call select() rely on. Ours use epoll.
Called first thing by the agent, whose pods each take several, and by the workers, whose connections
each take two.
"""

from __future__ import annotations

import resource
from contextlib import suppress


def raise_limit() -> int:
    """Raise the soft limit to the hard one where the kernel lets us; return what holds now."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError):  # it is above fs.nr_open, which was lowered since
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
