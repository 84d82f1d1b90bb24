"""What a machine and its namespaces hold, listed in full, to compare before and after."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from agent import netns
from agent.datapath import libbpf

if TYPE_CHECKING:
    from collections.abc import Iterable

SYS_BPF = {"x86_64": 321, "aarch64": 280}  # asm/unistd.h
# enum bpf_cmd
NEXT_ID = {"program": 11, "map": 12, "link": 31}
FD_BY_ID = {"program": 13, "map": 14, "link": 30}
COMMANDS = (
    ("ip", "-4", "rule"),
    ("ip", "-6", "rule"),
    ("ip", "-4", "route", "show", "table", "all"),
    ("ip", "-6", "route", "show", "table", "all"),
    ("tc", "qdisc", "show"),
    ("nft", "list", "ruleset"),
)
SYSCTLS = Path("/proc/sys/net")


class _IdAttribute(ctypes.Structure):
    """union bpf_attr as the commands that walk ids take it."""

    _fields_ = (("start", ctypes.c_uint32), ("next", ctypes.c_uint32), ("flags", ctypes.c_uint32))


def _bpf(command: int, attribute: _IdAttribute) -> int:
    number = SYS_BPF[os.uname().machine]
    size = ctypes.sizeof(attribute)
    return int(ctypes.CDLL(None).syscall(number, command, ctypes.byref(attribute), size))


def bpf_objects() -> set[tuple[str, int, str]]:
    """Return (kind, id, name) of every program, map and link of the kernel."""
    found = set()
    for kind, command in NEXT_ID.items():
        attribute = _IdAttribute()
        while _bpf(command, attribute) == 0:
            attribute.start = attribute.next
            fd = _bpf(FD_BY_ID[kind], _IdAttribute(start=attribute.next))
            if fd < 0:
                continue  # gone meanwhile
            name = ""
            if kind == "program":
                name = libbpf.program_facts(fd).name
            elif kind == "map":
                name = libbpf.map_facts(fd).name
            os.close(fd)
            found.add((kind, attribute.start, name))
    return found


def _namespace() -> dict[str, str]:
    found = {}
    for command in COMMANDS:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        # A link-local address gets its routes when nobody else claims it, a second after the link.
        own = ("local fe80:", "anycast fe80:")
        lines = [line for line in done.stdout.splitlines() if not line.startswith(own)]
        found[" ".join(command)] = "\n".join(lines)
    names = subprocess.run(("ip", "-br", "link"), check=True, capture_output=True, text=True).stdout
    for line in names.splitlines():
        name = line.split()[0].split("@")[0]
        for hook in ("ingress", "egress"):
            filters = subprocess.run(
                ("tc", "filter", "show", "dev", name, hook),
                check=False,
                capture_output=True,
                text=True,
            )
            found[f"filters {name} {hook}"] = filters.stdout
    for path in sorted(SYSCTLS.rglob("*")):
        if path.is_file():
            try:
                found[str(path)] = path.read_text()
            except OSError:
                continue  # written only
    return found


def namespaces(paths: Iterable[Path]) -> dict[str, dict[str, str]]:
    """Return rules, routes, qdiscs, filters, nftables and sysctls of each namespace."""
    found = {}
    for path in paths:
        fd = netns.open_netns(path)
        try:
            found[path.name] = netns.run_in(fd, _namespace)
        finally:
            os.close(fd)
    return found


def contents(root: Path) -> dict[str, bytes | None]:
    """Return what is below a directory, with the content of each file."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def files(*roots: Path) -> set[str]:
    """Return the path of everything at and below some directories."""
    return {str(path) for root in roots if root.exists() for path in (root, *root.rglob("*"))}
