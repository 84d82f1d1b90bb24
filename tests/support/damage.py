"""What another tool, or a person, may do to what an agent keeps in the kernel."""

from __future__ import annotations

import ctypes
import os
import subprocess
from typing import TYPE_CHECKING

from agent.datapath import libbpf
from agent.errors import MapError

if TYPE_CHECKING:
    from pathlib import Path

_library = ctypes.CDLL("libbpf.so.1", use_errno=True)


def detach(pin: Path) -> None:
    """Detach a link and leave its pin, as `bpftool link detach pinned` does."""
    with libbpf.closing(libbpf.open_pin(pin)) as fd:
        result = _library.bpf_link_detach(fd)
    assert result == 0, os.strerror(-result)


def is_attached(pin: Path) -> bool:
    """Whether there is a link at `pin`, and it is attached."""
    try:
        with libbpf.closing(libbpf.open_pin(pin)) as fd:
            return libbpf.link_facts(fd).target != 0
    except MapError:
        return False


def mount_bpffs(place: Path) -> None:
    """Mount a BPF file system of one's own."""
    subprocess.run(["mount", "-t", "bpf", "bpf", place], check=True)


def unmount(place: Path) -> None:
    """Take a file system out of sight; who has something open there keeps it (umount -l)."""
    subprocess.run(["umount", "-l", place], check=True)
