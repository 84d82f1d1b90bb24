"""How glibc's malloc serves our processes (mallopt(3)).

Called first thing by those processes, before there are threads and large blocks.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h
KEPT_BYTES = 4 << 20


def keep_large_blocks() -> None:
    """Keep up to 4 MiB at the end of the heap.

    glibc gives large blocks back to the kernel at once, and takes a page fault for every page of
    the next one. Ciphertext of a bulk flow is such a block, many times a millisecond.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
    libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def share_one_arena() -> None:
    """Let all threads use one heap.

    Each would get its own, and keep what its largest task has taken. Python runs one thread at a
    time, so nobody waits for it.
    """
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
