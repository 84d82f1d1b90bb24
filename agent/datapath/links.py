"""Attach programs: once at the root of cgroup v2, and one lookup program for each pod's netns.

Links are pinned, so the data path outlives the agent, and held by descriptor (`Pins.links`), so
that they outlive their pins while the agent lives. A lookup link ends with its netns by itself, and
its pin is then a husk that `detach_lookup` removes.
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
    from agent.datapath.pins import Pins


def cgroup_root(mounts: Path = Path("/proc/self/mounts")) -> Path:
    """Return where cgroup v2 is mounted (FeatureMissing if nowhere)."""
    for line in mounts.read_text().splitlines():
        _device, place, kind, *_rest = line.split(" ")
        if kind == "cgroup2":
            return Path(place)
    raise FeatureMissing("cgroup v2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")


def attach_cgroup(pins: Pins, root: Path) -> None:
    """Attach every cgroup program at `root`; a link that is there gets the program of `pins`."""
    with libbpf.closing(os.open(root, os.O_RDONLY | os.O_DIRECTORY)) as cgroup_fd:
        for name, (_program_type, attach_type) in CGROUP_PROGRAMS.items():
            with libbpf.closing(pins.program(name)) as program_fd:
                _attach(pins, name, program_fd, cgroup_fd, attach_type)


def lookup_link_name(netns_cookie: int) -> str:
    """Name the pin of one pod's lookup link."""
    return f"lookup_{netns_cookie}"


def _attach(pins: Pins, name: str, program_fd: int, target_fd: int, attach_type: int) -> None:
    """Attach, pin and hold; where a link is there already, put the program behind it.

    So nothing passes unseen between the two. A link that is detached, or whose namespace or
    interface is gone, is a husk (ENOLINK) and is replaced.
    """
    path = pins.link_path(name)
    _take_up(pins, name)
    if name not in pins.links or not _has_updated(pins.links[name], program_fd, name):
        _detach(pins, name)
        pins.hold_link(name, libbpf.create_link(program_fd, target_fd, attach_type, name))
    if not path.exists():
        try:
            path.parent.mkdir(exist_ok=True)
            libbpf.pin(pins.links[name], path)
        except (KernelError, OSError):
            _detach(pins, name)
            raise


def _take_up(pins: Pins, name: str) -> None:
    """Hold a link that an agent before us left, if there is one."""
    path = pins.link_path(name)
    if name not in pins.links and path.exists():
        with contextlib.suppress(KernelError):
            pins.hold_link(name, libbpf.open_pin(path))


def _has_updated(link_fd: int, program_fd: int, name: str) -> bool:
    try:
        libbpf.update_link(link_fd, program_fd, name)
    except KernelError:
        return False
    return True


def _detach(pins: Pins, name: str) -> None:
    pins.let_go(name)
    pins.link_path(name).unlink(missing_ok=True)


def attach_lookup(pins: Pins, netns_fd: int, netns_cookie: int) -> None:
    """Load the pod's own copy of the lookup program and attach it to its netns."""
    text = pins.lookup_text()
    stamped = stamped_text(text, netns_cookie, [pins.maps[name].fd for name in MAPS])
    name = lookup_link_name(netns_cookie)
    with libbpf.closing(libbpf.load_sk_lookup(LOOKUP_PROGRAM, stamped)) as program_fd:
        _attach(pins, name, program_fd, netns_fd, libbpf.ATTACH_SK_LOOKUP)


def detach_lookup(pins: Pins, netns_cookie: int) -> None:
    """Remove the pod's lookup link, if it is there.

    Nothing is looked up any more when this returns: the listener that lookup finds goes next, and
    what found none would be refused.
    """
    name = lookup_link_name(netns_cookie)
    _take_up(pins, name)
    if name in pins.links:
        with contextlib.suppress(KernelError):  # a husk
            libbpf.detach_link(pins.links[name], name)
    _detach(pins, name)


def guard_link_name(program: str, netns_cookie: int, ifindex: int) -> str:
    """Name the pin of one direction's guard of an interface."""
    return f"{program.removeprefix('ss_')}_{netns_cookie}_{ifindex}"


def guarded_cookie(pin_name: str) -> int:
    """Return the cookie in the name of a guard's pin."""
    _direction, cookie, _ifindex = pin_name.rsplit("_", 2)
    return int(cookie)


def attach_guard(pins: Pins, netns_cookie: int, ifindex: int) -> None:
    """Attach the guard to an interface of the current namespace, in both directions, by tcx.

    The links end with the interface; pinned, they outlive the agent.
    """
    for name, (_program_type, attach_type) in GUARD_PROGRAMS.items():
        link = guard_link_name(name, netns_cookie, ifindex)
        with libbpf.closing(pins.program(name)) as program_fd:
            _attach(pins, link, program_fd, ifindex, attach_type)


def detach_guard(pins: Pins, netns_cookie: int, ifindex: int) -> None:
    """Remove the guard's links, if they are there."""
    for name in GUARD_PROGRAMS:
        _detach(pins, guard_link_name(name, netns_cookie, ifindex))


def looked_up_cookies(pins: Pins) -> set[int]:
    """Return the netns cookies of the pods that have a lookup link, or the husk of one."""
    prefix = lookup_link_name(0).removesuffix("0")
    names = [path.name.removeprefix(prefix) for path in pins.link_path("").glob(f"{prefix}*")]
    return {int(name) for name in names if name.isdecimal()}
