"""What another tool, or a person, may do to what an agent keeps in the kernel."""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
from typing import TYPE_CHECKING

from agent.datapath import libbpf
from agent.errors import MapError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CLONE_NEWNS, CLONE_FS = 0x20000, 0x200  # linux/sched.h
_libc = ctypes.CDLL(None, use_errno=True)
_library = ctypes.CDLL("libbpf.so.1", use_errno=True)


def detach(pin: Path) -> None:
    """Detach a link and leave its pin, as `bpftool link detach pinned` does."""
    fd = libbpf.open_pin(pin)
    try:
        result = _library.bpf_link_detach(fd)
    finally:
        os.close(fd)
    assert result == 0, os.strerror(-result)


def is_attached(pin: Path) -> bool:
    """Whether there is a link at `pin`, and it is attached."""
    try:
        fd = libbpf.open_pin(pin)
    except MapError:
        return False
    try:
        return libbpf.link_facts(fd).target != 0
    finally:
        os.close(fd)


def mount_bpffs(place: Path) -> None:
    """Mount a BPF file system of one's own."""
    subprocess.run(["mount", "-t", "bpf", "bpf", place], check=True)


def unmount(place: Path) -> None:
    """Take a file system out of sight; who has something open there keeps it (umount -l)."""
    subprocess.run(["umount", "-l", place], check=True)


def with_own_mounts(function: Callable[[], object]) -> None:
    """Run something whose children see the mounts of now, whatever becomes of them: a container."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            assert _libc.unshare(CLONE_NEWNS | CLONE_FS) == 0, os.strerror(ctypes.get_errno())
            subprocess.run(["mount", "--make-rprivate", "/"], check=True)
            function()
        except BaseException as error:  # raised again in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run)  # the mounts end with what was started in it
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
