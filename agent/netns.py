"""The only setns(): run a function inside another network namespace.

setns() changes the calling thread, so the function runs in a thread made for it, which ends
afterwards: no thread of the agent is ever left in a pod's namespace, whatever goes wrong. Sockets
made there stay in that namespace for good and can be used from any thread.

Called by enroll (listeners, rules), the lab and tests. Python 3.11 has no os.setns.
"""

from __future__ import annotations

import ctypes
import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from agent.errors import KernelError

if TYPE_CHECKING:
    from collections.abc import Callable

CLONE_NEWNET = 0x40000000  # linux/sched.h
SO_NETNS_COOKIE = 71  # asm-generic/socket.h, Linux 5.14
SO_COOKIE = 57

Result = TypeVar("Result")
_libc = ctypes.CDLL(None, use_errno=True)


class _Call(Generic[Result]):
    """One function call, its result or its error, carried between threads."""

    def __init__(self, netns_fd: int, function: Callable[[], Result]) -> None:
        self.netns_fd = netns_fd
        self.function = function
        self.result: list[Result] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            enter(self.netns_fd)
            self.result.append(self.function())
        except BaseException as error:  # raised again in the caller's thread
            self.error = error


def run_in(netns_fd: int, function: Callable[[], Result]) -> Result:
    """Return `function()`, run inside the namespace behind `netns_fd`."""
    call = _Call(netns_fd, function)
    thread = threading.Thread(target=call.run, name="netns")
    thread.start()
    thread.join()
    if call.error is not None:
        raise call.error
    return call.result[0]


def run_aside(function: Callable[[], Result]) -> Result:
    """Return `function()`, run in a thread of its own in this namespace.

    For pyroute2, which starts an event loop of its own and refuses where one is running.
    """
    own = open_netns(Path("/proc/thread-self/ns/net"))
    try:
        return run_in(own, function)
    finally:
        os.close(own)


def enter(netns_fd: int) -> None:
    """Move the calling thread to another namespace; `leave` must follow in the same call.

    Only for a process with one thread (a worker), which cannot afford a thread for each socket.
    """
    if _libc.setns(netns_fd, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise KernelError(f"a network namespace cannot be entered: {os.strerror(number)}")


def leave(own_netns_fd: int) -> None:
    """Move back; a process that cannot ends on the spot."""
    if _libc.setns(own_netns_fd, CLONE_NEWNET) != 0:
        os._exit(70)  # EX_SOFTWARE


def create() -> int:
    """Make a network namespace with its loopback down; it lives as long as the descriptor."""

    def unshare() -> int:
        if _libc.unshare(CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise KernelError(f"a network namespace cannot be made: {os.strerror(number)}")
        return open_netns(Path("/proc/thread-self/ns/net"))

    own = open_netns(Path("/proc/self/ns/net"))
    try:
        return run_in(own, unshare)
    finally:
        os.close(own)


def open_netns(path: Path) -> int:
    """Open a namespace file such as /proc/PID/ns/net; the caller closes the descriptor."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def netns_cookie(netns_fd: int) -> int:
    """Return the cookie of a namespace: never reused while the machine is up."""

    def read() -> int:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            raw = probe.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)
        return int.from_bytes(raw, "little")

    return run_in(netns_fd, read)


def has_ipv6() -> bool:
    """Say whether the current namespace has IPv6; call it inside `run_in`."""
    try:
        return Path("/proc/thread-self/net/if_inet6").exists() and (
            Path("/proc/sys/net/ipv6/conf/lo/disable_ipv6").read_text().strip() == "0"
        )
    except OSError:
        return False
