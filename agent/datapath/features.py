"""What Sidestep needs of a node, and whether it is there: `sidestep check`.

Each check reads a file or asks the kernel one harmless question; nothing is loaded, mounted or
changed, and bcc is looked for without being imported. `root` stands before every path, so that a
node's file system can be examined where it is mounted into a container.

Called by `agent.commands.check`, and by whoever wants the answer before starting.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path

from agent.errors import FeatureMissing

MINIMUM_KERNEL = (5, 15)
TCX_KERNEL = (6, 6)
SO_NETNS_COOKIE = 71  # asm-generic/socket.h, Linux 5.14
# What deploy/chart gives the agent, and why. CAP_SYS_ADMIN includes CAP_BPF and CAP_PERFMON.
CAPABILITIES = {
    "CAP_NET_ADMIN": 12,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
}  # linux/capability.h


@dataclass(frozen=True, slots=True)
class Check:
    """One answer; `remedy` says what to do and is empty where all is well."""

    name: str
    is_ok: bool
    detail: str
    remedy: str = ""
    is_required: bool = True


def run_checks(root: Path = Path("/")) -> list[Check]:
    """Return all checks, in the order in which one would repair them."""
    return [
        _check_privilege(root),
        _check_kernel(os.uname().release),
        _check_cgroup(root),
        _check_mount(root, "bpf", "/sys/fs/bpf", "mount -t bpf bpf /sys/fs/bpf"),
        _check_file(
            root,
            "BTF",
            "sys/kernel/btf/vmlinux",
            "boot a kernel that was built with CONFIG_DEBUG_INFO_BTF=y",
        ),
        _check_libbpf(),
        _check_bcc(),
        _check_file(
            root,
            "kernel headers",
            "usr/include/linux/bpf.h",
            "install the package linux-libc-dev",
        ),
        _check_netns_cookie(),
        _check_mptcp(root),
    ]


def _version(release: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


@functools.cache
def has_tcx(release: str | None = None) -> bool:
    """Say whether programs can be attached to an interface by a link; before, by a tc filter."""
    return _version(release or os.uname().release) >= TCX_KERNEL


def require(root: Path = Path("/")) -> None:
    """Go on only if nothing is missing (FeatureMissing says what, and what to do)."""
    for found in run_checks(root):
        if found.is_required and not found.is_ok:
            raise FeatureMissing(f"{found.name} is missing, {found.detail}: {found.remedy}")


def require_root() -> None:
    """Go on only as root, for what needs nothing else (FeatureMissing)."""
    if os.geteuid() != 0:
        raise FeatureMissing(f"root is missing, the user id is {os.geteuid()}: run as root")


def _check_privilege(root: Path) -> Check:
    remedy = f"run as root, in a container with {', '.join(CAPABILITIES)} added"
    if os.geteuid() != 0:
        return Check("root", False, f"the user id is {os.geteuid()}", remedy)
    status = (root / "proc/self/status").read_text()
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    held = int(found[1], 16) if found else 0
    missing = [name for name, bit in CAPABILITIES.items() if not held >> bit & 1]
    if missing:
        return Check("root", False, f"{', '.join(missing)} not held", remedy)
    return Check("root", True, f"{', '.join(CAPABILITIES)} held")


def _check_kernel(release: str) -> Check:
    needed = ".".join(str(part) for part in MINIMUM_KERNEL)
    if _version(release) >= MINIMUM_KERNEL:
        return Check("kernel", True, release)
    return Check("kernel", False, release, f"boot Linux {needed} or later")


def _check_mount(root: Path, kind: str, place: str | None, command: str) -> Check:
    name = {"cgroup2": "cgroup v2", "bpf": "bpffs"}[kind]
    mounts = [line.split(" ") for line in (root / "proc/self/mounts").read_text().splitlines()]
    places = [mount[1] for mount in mounts if mount[2] == kind and place in (None, mount[1])]
    if places:
        return Check(name, True, f"mounted at {places[0]}")
    where = f" at {place}" if place else ""
    return Check(name, False, f"not mounted{where}", command)


def _check_cgroup(root: Path) -> Check:
    found = _check_mount(root, "cgroup2", None, "mount -t cgroup2 none /sys/fs/cgroup/unified")
    place = found.detail.removeprefix("mounted at ")
    # Every cgroup has this file but the root. Programs attached elsewhere would see few processes.
    if found.is_ok and (root / place.lstrip("/") / "cgroup.events").exists():
        detail = f"{place} is a part of the hierarchy, not its root"
        remedy = "mount the node's /sys/fs/cgroup into the container, at the same place"
        return Check(found.name, False, detail, remedy)
    return found


def _check_file(root: Path, name: str, path: str, remedy: str) -> Check:
    if (root / path).is_file():
        return Check(name, True, f"/{path}")
    return Check(name, False, f"/{path} is not there", remedy)


def _check_libbpf() -> Check:
    try:
        ctypes.CDLL("libbpf.so.1")
    except OSError as error:
        return Check("libbpf", False, str(error), "install the package libbpf1")
    return Check("libbpf", True, "libbpf.so.1")


def _check_bcc() -> Check:
    found = importlib.util.find_spec("bcc")
    if found is None or found.origin is None:
        return Check(
            "bcc",
            False,
            "python finds no module bcc",
            "install the package python3-bpfcc and run `make setup`",
        )
    return Check("bcc", True, str(Path(found.origin).parent))


def _check_netns_cookie() -> Check:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            raw = probe.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)
    except OSError as error:
        return Check("netns cookie", False, f"SO_NETNS_COOKIE: {error}", "boot Linux 5.15 or later")
    cookie = int.from_bytes(raw, "little")
    return Check("netns cookie", True, f"this namespace has cookie {cookie}")


def _check_mptcp(root: Path) -> Check:
    enabled = root / "proc/sys/net/mptcp/enabled"
    is_on = enabled.is_file() and enabled.read_text().strip() == "1"
    return Check(
        "MPTCP",
        is_on,
        "enabled" if is_on else "not enabled, so pods use plain TCP",
        "" if is_on else "nothing to do, unless pods need MPTCP: sysctl net.mptcp.enabled=1",
        is_required=False,
    )
