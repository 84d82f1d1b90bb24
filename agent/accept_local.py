"""Spare the kernel to look whether what comes from outside claims to be the pod itself.

Where a namespace has rules, like ours for replies, it looks for that by a second search of the
routes for each packet that it routes (fib_validate_source, Linux 6.18; decision 20). Guard drops
such packets on the link, so the kernel may take them: `accept_local`, of the pod's end. Guard knows
the addresses that the state tells, so a pod with any others keeps the kernel's check.

All functions look at the current namespace; call them inside `agent.netns.run_in`. Used by enroll
and by whoever looks later whether it still holds. It is never needed: what fails here is left.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from agent import netlink, sysctl
from agent.errors import NetlinkError

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from agent.model.pod import Address


def allow(index: int, known: Collection[Address], *, is_ours: bool) -> bool:
    """Set it for an interface, unless the pod has others than the `known` addresses.

    False if it is not set, or by the pod itself, so that nothing is to be taken back. `is_ours`
    says that an agent before us may have set what is there.
    """
    try:
        path = _path(index)
        if path.read_text().strip() == "1" and not is_ours:
            return False
        is_allowed = not has_others(known)
        path.write_text(str(int(is_allowed)))
    except (OSError, NetlinkError):
        return False
    return is_allowed


def is_set(index: int) -> bool:
    """Say whether it is set for an interface; not if that has gone."""
    try:
        return _path(index).read_text().strip() == "1"
    except OSError:
        return False


def take_back(index: int) -> None:
    """Have the kernel look again, if the interface is still there."""
    if is_set(index):
        _path(index).write_text("0")


def take_back_all() -> None:
    """Do so for every link that guard may have been on (NetlinkError)."""
    for index, _peer in netlink.veth_peers():
        take_back(index)


def has_others(known: Collection[Address]) -> bool:
    """Say whether the namespace has an IPv4 address that is not `known` (NetlinkError)."""
    return any(each not in known and not each.is_loopback for each in netlink.ipv4_addresses())


def _path(index: int) -> Path:
    # By index: a pod may give its interface another name.
    return sysctl.NET / f"ipv4/conf/{socket.if_indextoname(index)}/accept_local"
