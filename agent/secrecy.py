"""Keep a process's memory to itself: it holds private keys.

A core file would put them on a disk, and a debugger of another user in front of him. Called first
thing by every process that holds a key.
"""

from __future__ import annotations

import ctypes
import os
import resource

from agent.errors import KernelError

PR_SET_DUMPABLE = 4  # linux/prctl.h


def keep_memory_private() -> None:
    """Write no core file from now on, and let nobody but root attach (KernelError)."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        error = os.strerror(ctypes.get_errno())
        raise KernelError(f"this process cannot be made undumpable: {error}")
