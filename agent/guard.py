"""Put the guard on the node's side of a pod's links, and take it off.

By tcx where the kernel has it, since a link there ends with its interface and can be replaced
without a gap; else by a tc filter with a fixed priority and handle. Filters of others on the same
hook are not touched.

Called by enroll. Works from the node's namespace, which must be the agent's own.
"""

from __future__ import annotations

import contextlib
import os
from functools import partial
from typing import TYPE_CHECKING

from agent import netlink, netns
from agent.datapath import features, links

if TYPE_CHECKING:
    from agent.datapath.pins import Pins

# The node sees what leaves the pod as it enters by the link, and the other way round.
PARENTS = {"ss_guard_out": netlink.INGRESS, "ss_guard_in": netlink.EGRESS}


def node_links(netns_fd: int) -> list[int]:
    """Return the interfaces of the current namespace that lead to the one behind `netns_fd`."""
    there = netns.run_in(netns_fd, netlink.veth_peers)
    # Not all interfaces of the node: with hundreds of pods that list is long.
    return [peer for own, peer in there if netns.run_aside(partial(netlink.peer_of, peer)) == own]


def attach(
    pins: Pins,
    netns_cookie: int,
    ifindex: int,
    undo: contextlib.ExitStack,
    *,
    has_tcx: bool | None = None,
) -> None:
    """Guard one link (AttachError, NetlinkError); `undo` gets what takes it off again."""
    if features.has_tcx() if has_tcx is None else has_tcx:
        undo.callback(links.detach_guard, pins, netns_cookie, ifindex)
        links.attach_guard(pins, netns_cookie, ifindex)
        return
    for name, parent in PARENTS.items():
        program_fd = pins.program(name)
        try:
            add = partial(netlink.add_filter, ifindex, parent, program_fd, name)
            if netns.run_aside(add):
                undo.callback(netns.run_aside, partial(netlink.delete_unused_clsact, ifindex))
            undo.callback(netns.run_aside, partial(netlink.delete_filter, ifindex, parent))
        finally:
            os.close(program_fd)


def renew(pins: Pins, netns_cookie: int, ifindex: int) -> None:
    """Attach what is not attached; what enrollment noted to take it off again stays good.

    A link that is there is kept: the kernel takes one away a moment after its pin, and refuses the
    same program at the same place until then.
    """
    with contextlib.ExitStack() as undo:
        attach(pins, netns_cookie, ifindex, undo)
        undo.pop_all()


def detach(pins: Pins, netns_cookie: int, ifindex: int) -> None:
    """Take off what an agent before us attached, in whichever way."""
    links.detach_guard(pins, netns_cookie, ifindex)
    for parent in PARENTS.values():
        netns.run_aside(partial(netlink.delete_filter, ifindex, parent))
    netns.run_aside(partial(netlink.delete_unused_clsact, ifindex))
