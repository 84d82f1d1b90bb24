"""What a lab makes on the machine: named namespaces, their links, cgroups.

    /run/netns/ss-<lab>-<name>                          one for each node and pod, and the fabric
    <cgroup2>/sidestep-lab/<lab>/<node>/agent           the node's agent
    <cgroup2>/sidestep-lab/<lab>/<node>/kubepods/pod..  a pod's processes

Every step looks first, so a half-made lab can be completed or taken down.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import time
from ipaddress import ip_interface, ip_network
from pathlib import Path
from typing import TYPE_CHECKING

from agent import netlink, netns
from agent.errors import LabError

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.lab.cluster import LabNode, LabPod

NETNS_DIRECTORY = Path("/run/netns")
CA_ADDRESS = "10.243.0.1"
MS_BIND = 4096  # linux/mount.h
MNT_DETACH = 2
KILL_SECONDS = 10.0
_libc = ctypes.CDLL(None, use_errno=True)


def add_namespace(name: str) -> Path:
    """Return the path of a namespace, made if it is not there."""
    path = NETNS_DIRECTORY / name
    NETNS_DIRECTORY.mkdir(exist_ok=True)
    # Mounted: it is on nsfs then. Path.is_mount() of Python 3.11 knows directories only.
    if path.exists() and path.stat().st_dev != NETNS_DIRECTORY.stat().st_dev:
        return path
    path.touch()
    fd = netns.create()
    try:
        source = f"/proc/self/fd/{fd}"
        if _libc.mount(source.encode(), os.fsencode(path), b"none", MS_BIND, None) != 0:
            raise LabError(f"{path} cannot be mounted: {os.strerror(ctypes.get_errno())}")
        netns.run_in(fd, lambda: netlink.set_up("lo"))
    finally:
        os.close(fd)
    return path


def delete_namespace(path: Path) -> None:
    """Unmount and remove a namespace; it ends with its last process."""
    _libc.umount2(os.fsencode(path), MNT_DETACH)
    path.unlink(missing_ok=True)


def within(path: Path, function: Callable[[], None]) -> None:
    """Run a function inside a named namespace."""
    fd = netns.open_netns(path)
    try:
        netns.run_in(fd, function)
    finally:
        os.close(fd)


def _has_link(name: str) -> bool:
    return Path(f"/proc/thread-self/net/dev_snmp6/{name}").exists()


def _join(here: Path, name: str, there: Path, peer: str) -> None:
    """Make a veth pair between two namespaces, if it is not there."""
    there_fd = netns.open_netns(there)
    try:

        def add() -> None:
            if not _has_link(name):
                netlink.add_veth(name, peer, there_fd)

        within(here, add)
    finally:
        os.close(there_fd)


def allow_forwarding() -> None:
    """Let the current namespace route."""
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    Path("/proc/sys/net/ipv6/conf/all/forwarding").write_text("1")


def connect_node(fabric: Path, node: LabNode, node_netns: Path) -> None:
    """Link a node to the fabric, routed both ways."""
    link = f"node{node.number}"
    _join(fabric, link, node_netns, "eth0")

    def on_fabric() -> None:
        allow_forwarding()
        netlink.add_address(link, ip_interface(f"{node.link4(1)}/30"))
        netlink.add_address(link, ip_interface(f"{node.link6(1)}/64"))
        netlink.set_up(link)
        pods4, pods6 = f"{node.gateway4}/24", f"{node.gateway6}/64"
        netlink.add_route(ip_network(pods4, strict=False), link, str(node.link4(2)))
        netlink.add_route(ip_network(pods6, strict=False), link, str(node.link6(2)))

    def on_node() -> None:
        allow_forwarding()
        netlink.add_address("eth0", ip_interface(f"{node.link4(2)}/30"))
        netlink.add_address("eth0", ip_interface(f"{node.link6(2)}/64"))
        netlink.set_up("eth0")

    within(fabric, on_fabric)
    within(node_netns, on_node)

    def route() -> None:
        netlink.add_route(ip_network("0.0.0.0/0"), "eth0", str(node.link4(1)))
        netlink.add_route(ip_network("::/0"), "eth0", str(node.link6(1)))

    within(node_netns, route)


def address_ca(fabric: Path) -> None:
    """Give the fabric the address on which the CA listens, reachable from every node."""
    within(fabric, lambda: netlink.add_address("lo", ip_interface(CA_ADDRESS)))


def connect_pod(node_netns: Path, pod: LabPod, pod_netns: Path) -> None:
    """Link a pod to its node, as a CNI plugin would."""
    link = f"pod{pod.number}"
    node = pod.node
    _join(node_netns, link, pod_netns, "eth0")

    def on_node() -> None:
        netlink.add_address(link, ip_interface(node.gateway4))
        netlink.add_address(link, ip_interface(node.gateway6))
        netlink.set_up(link)
        netlink.add_route(ip_network(pod.address4), link)
        netlink.add_route(ip_network(pod.address6), link)

    def on_pod() -> None:
        netlink.add_address("eth0", ip_interface(pod.address4))
        netlink.add_address("eth0", ip_interface(pod.address6))
        netlink.set_up("eth0")
        netlink.add_route(ip_network(node.gateway4), "eth0")
        netlink.add_route(ip_network(node.gateway6), "eth0")
        netlink.add_route(ip_network("0.0.0.0/0"), "eth0", str(node.gateway4))
        netlink.add_route(ip_network("::/0"), "eth0", str(node.gateway6))

    within(node_netns, on_node)
    within(pod_netns, on_pod)


def processes_of(cgroup: Path) -> list[int]:
    """List the processes directly in a cgroup; none if it is not there."""
    try:
        return [int(pid) for pid in (cgroup / "cgroup.procs").read_text().split()]
    except FileNotFoundError:
        return []


def command_of(pid: int) -> list[str]:
    """Return a process's command line; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def parent_of(pid: int) -> int | None:
    """Return the parent of a process, by /proc/PID/status (proc(5)); None if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(next(line for line in lines if line.startswith("PPid:")).split()[1])


def started_at(pid: int) -> int:
    """Return when a process began, in ticks since boot; 0 if it is gone (proc(5))."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(text.rpartition(")")[2].split()[19])


def kill_cgroup(cgroup: Path) -> None:
    """Kill everything below a cgroup, wait until it is gone, and remove the cgroup."""
    if not cgroup.is_dir():
        return
    (cgroup / "cgroup.kill").write_text("1")
    deadline = time.monotonic() + KILL_SECONDS
    poll = select.poll()
    with (cgroup / "cgroup.events").open() as events:
        poll.register(events, select.POLLPRI)
        while "populated 1" in events.read():
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise LabError(f"processes in {cgroup} do not end: {processes_of(cgroup)}")
            events.seek(0)
    below = [path for path in cgroup.rglob("*") if path.is_dir()]
    for directory in [*sorted(below, reverse=True), cgroup]:
        directory.rmdir()


def wait_for_exit(pid: int, seconds: float) -> bool:
    """Wait until a process is gone; False if it is not after `seconds`."""
    try:
        fd = os.pidfd_open(pid)
    except OSError as error:
        if error.errno == errno.ESRCH:
            return True
        raise
    try:
        return bool(select.select([fd], [], [], seconds)[0])
    finally:
        os.close(fd)
