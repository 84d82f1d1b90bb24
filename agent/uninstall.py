"""Take everything of ours off the node, whoever left it, in whichever version.

    the agent    asked to take its pods out and to end; waited for
    links        unpinned: programs detach, pods are captured no more
    guard        filters of tc by our priority and handle, clsact if we alone used it
    pods         reply rules and routes, sysctls, in every namespace below the pods' cgroups, but
                 for those of labs that run: other agents look after them
    pins         programs and maps
    files        sockets in the run directory, and the directory if it is empty then

Works from names and fixed numbers alone, so that it also works where the layout is another one, or
half of the pins is gone: a map is opened for the names of pods only, and they are not needed. Every
step looks first and can be repeated.

Called by `sidestep uninstall`. Objects in the cluster's API are not touched: an agent that runs
takes its words back itself.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from agent import netlink, netns, sandbox
from agent.datapath import links, listing, pins
from agent.enroll import clean_namespace
from agent.errors import KernelError, PinsInUse
from agent.guard import PARENTS
from agent.handover import SOCKET_NAME, Predecessor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SOCKETS = (SOCKET_NAME, "cni.sock", "agent.sock", "agent-*.sock")


async def ask_agent(run_directory: Path) -> int | None:
    """Let the agent that runs take its pods out; return its process when it has ended."""
    found = Predecessor.find(run_directory / SOCKET_NAME)
    if found is None:
        return None
    await found.leave()
    found.close()
    found.connection.close()
    return found.pid


def refuse_if_held(pin_root: Path) -> None:
    """Raise PinsInUse if an agent runs on pins below `pin_root`."""
    for directory in _directories(pin_root):
        if pins.is_held(directory):
            raise PinsInUse(
                f"an agent runs on {directory} and was not asked: name its --run-dir, or stop it"
            )


def uninstall(pin_root: Path, pod_cgroups: Path, run_directory: Path) -> Iterator[str]:
    """Yield a line for each thing that was taken away (SidestepError, OSError: a step failed)."""
    for directory in _directories(pin_root):
        for link in sorted((directory / "links").glob("*")):
            link.unlink()
            yield f"link {link}"
    yield from _take_filters()
    of_labs = _lab_namespaces(pod_cgroups)
    names = _pod_names(pin_root)
    for fd in sandbox.all_netns(pod_cgroups):
        cookie = netns.netns_cookie(fd)
        if cookie not in of_labs and netns.run_in(fd, _take_from_pod):
            pod = f"pod {names[cookie]}" if cookie in names else f"namespace {os.fstat(fd).st_ino}"
            yield f"rules, routes and sysctls of {pod}"
    for directory in _directories(pin_root):
        shutil.rmtree(directory)
        yield f"pins {directory}"
    if pin_root.is_dir():
        pin_root.rmdir()
    for path in (path for name in SOCKETS for path in sorted(run_directory.glob(name))):
        path.unlink()
        yield f"socket {path}"
    if run_directory.is_dir() and not any(run_directory.iterdir()):
        run_directory.rmdir()


def _directories(pin_root: Path) -> list[Path]:
    return sorted(path for path in pin_root.glob("*") if path.is_dir())


def _lab_namespaces(pod_cgroups: Path) -> set[int]:
    """Return the netns cookies of labs, unless their own pods are meant.

    To leave out their cgroups would not do: those of v1 hold the processes of labs as well.
    """
    labs = links.cgroup_root() / sandbox.LABS
    if pod_cgroups.is_relative_to(labs):
        return set()
    return {netns.netns_cookie(fd) for fd in sandbox.all_netns(labs)}


def _pod_names(pin_root: Path) -> dict[int, str]:
    names: dict[int, str] = {}
    for directory in _directories(pin_root):
        with suppress(KernelError):
            names |= listing.pod_names(directory)
    return names


def _take_filters() -> Iterator[str]:
    """Take off what an agent without tcx has attached; by tcx nothing is left with the links."""
    for ifindex, _peer in netns.run_aside(netlink.veth_peers):
        has_ours = False
        for name, parent in PARENTS.items():
            if netns.run_aside(partial(netlink.has_filter, ifindex, parent, name)):
                netns.run_aside(partial(netlink.delete_filter, ifindex, parent))
                has_ours = True
        if has_ours:
            netns.run_aside(partial(netlink.delete_unused_clsact, ifindex))
            yield f"filters of interface {ifindex}"


def _take_from_pod() -> bool:
    if not netlink.has_reply_route():
        return False
    clean_namespace()
    return True
