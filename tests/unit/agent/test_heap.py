"""What malloc does in processes of the test's own, by their memory."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Threads of which each has taken much in small blocks, and given it back.
THREADS = """
import ctypes, threading
from agent.heap import share_one_arena
{call}
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
def work():
    taken = [libc.malloc(1000) for _ in range(20_000)]
    for each in taken:
        libc.free(each)
    together.wait()
together = threading.Barrier(6)
threads = [threading.Thread(target=work) for _ in range(6)]
for each in threads:
    each.start()
for each in threads:
    each.join()
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
"""
# Two blocks that are taken again and again, and how many pages the kernel had to give for them.
BLOCKS = """
import ctypes, resource
from agent.heap import keep_large_blocks
{call}
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
size = 3 << 19
def work(times):
    for _ in range(times):
        blocks = libc.malloc(size), libc.malloc(size)
        for each in blocks:
            ctypes.memset(each, 1, size)
        for each in blocks:
            libc.free(each)
work(2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work(100)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(code: str, call: str) -> str:
    command = [sys.executable, "-c", code.format(call=call)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.parametrize(("call", "is_one"), [("", False), ("share_one_arena()", True)])
def test_threads_share_an_arena(call: str, is_one: bool) -> None:
    assert (run(THREADS, call).count("<heap nr=") == 1) is is_one


@pytest.mark.parametrize(("call", "is_kept"), [("", False), ("keep_large_blocks()", True)])
def test_large_blocks_are_kept(call: str, is_kept: bool) -> None:
    faults = int(run(BLOCKS, call))
    assert (faults < 100) is is_kept
