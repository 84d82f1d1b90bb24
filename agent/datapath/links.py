"""Attach programs: once at the root of cgroup v2, and one lookup program for each pod's netns.

Links are pinned, so the data path outlives the agent; removing the pin detaches. A lookup link
ends with its netns by itself, and its pin is then a husk that `detach_lookup` removes.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from agent.datapath import libbpf
from agent.datapath.source import (
    CGROUP_PROGRAMS,
    GUARD_PROGRAMS,
    LOOKUP_PROGRAM,
    MAPS,
    stamped_text,
)
from agent.errors import FeatureMissing, KernelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agent.datapath.pins import Pins


def cgroup_root(mounts: Path = Path("/proc/self/mounts")) -> Path:
    """Return where cgroup v2 is mounted (FeatureMissing if nowhere)."""
    for line in mounts.read_text().splitlines():
        _device, place, kind, *_rest = line.split(" ")
        if kind == "cgroup2":
            return Path(place)
    raise FeatureMissing("cgroup v2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def attach_cgroup(pins: Pins, root: Path) -> None:
    """Attach every cgroup program at `root`; a link that is there gets the program of `pins`."""
    with _closing(os.open(root, os.O_RDONLY | os.O_DIRECTORY)) as cgroup_fd:
        for name, (_program_type, attach_type) in CGROUP_PROGRAMS.items():
            with _closing(pins.program(name)) as program_fd:
                _attach(program_fd, cgroup_fd, attach_type, name, pins.link_path(name))


def lookup_link_name(netns_cookie: int) -> str:
    """Name the pin of one pod's lookup link."""
    return f"lookup_{netns_cookie}"


def _attach(program_fd: int, target_fd: int, attach_type: int, name: str, path: Path) -> None:
    """Attach and pin; where an agent before us left the link, put the program behind it.

    So nothing passes unseen between the two. A pin whose namespace or interface is gone is a husk
    (ENOLINK) and is replaced.
    """
    if path.exists():
        with contextlib.suppress(KernelError), _closing(libbpf.open_pin(path)) as link_fd:
            libbpf.update_link(link_fd, program_fd, name)
            return
        path.unlink()
    with _closing(libbpf.create_link(program_fd, target_fd, attach_type, name)) as link_fd:
        libbpf.pin(link_fd, path)


def attach_lookup(pins: Pins, netns_fd: int, netns_cookie: int) -> None:
    """Load the pod's own copy of the lookup program and attach it to its netns."""
    text = pins.lookup_text()
    stamped = stamped_text(text, netns_cookie, [pins.maps[name].fd for name in MAPS])
    path = pins.link_path(lookup_link_name(netns_cookie))
    with _closing(libbpf.load_sk_lookup(LOOKUP_PROGRAM, stamped)) as program_fd:
        _attach(program_fd, netns_fd, libbpf.ATTACH_SK_LOOKUP, LOOKUP_PROGRAM, path)


def detach_lookup(pins: Pins, netns_cookie: int) -> None:
    """Remove the pod's lookup link, if it is there."""
    pins.link_path(lookup_link_name(netns_cookie)).unlink(missing_ok=True)


def guard_path(pins: Pins, name: str, netns_cookie: int, ifindex: int) -> Path:
    """Return where one direction's guard of an interface is, or would be, pinned."""
    return pins.link_path(f"{name.removeprefix('ss_')}_{netns_cookie}_{ifindex}")


def guarded_cookie(pin_name: str) -> int:
    """Return the cookie in the name of a guard's pin."""
    _direction, cookie, _ifindex = pin_name.rsplit("_", 2)
    return int(cookie)


def attach_guard(pins: Pins, netns_cookie: int, ifindex: int) -> None:
    """Attach the guard to an interface of the current namespace, in both directions, by tcx.

    The links end with the interface; pinned, they outlive the agent.
    """
    for name, (_program_type, attach_type) in GUARD_PROGRAMS.items():
        path = guard_path(pins, name, netns_cookie, ifindex)
        with _closing(pins.program(name)) as program_fd:
            _attach(program_fd, ifindex, attach_type, name, path)


def detach_guard(pins: Pins, netns_cookie: int, ifindex: int) -> None:
    """Remove the guard's links, if they are there."""
    for name in GUARD_PROGRAMS:
        guard_path(pins, name, netns_cookie, ifindex).unlink(missing_ok=True)


def looked_up_cookies(pins: Pins) -> set[int]:
    """Return the netns cookies of the pods that have a lookup link, or the husk of one."""
    prefix = lookup_link_name(0).removesuffix("0")
    names = [path.name.removeprefix(prefix) for path in pins.link_path("").glob(f"{prefix}*")]
    return {int(name) for name in names if name.isdecimal()}
