"""As many open files as a process may have, for processes that need several for each pod.

The soft limit is low by tradition, for programs that use select(2); none of ours does. A worker
takes two descriptors for a connection, the control process half a dozen for a pod.

Called first thing by both.
"""

from __future__ import annotations

import contextlib
import resource


def allow_all() -> None:
    """Raise the soft limit to the hard one."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError):  # the kernel's own limit was lowered meanwhile
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
