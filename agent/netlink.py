"""The only pyroute2 import: links, addresses, rules and routes of the current namespace.

Each function works on the namespace of the calling thread, so callers use it inside
`agent.netns.run_in`. Repeating a call changes nothing; taking away what is not there is no error.
pyroute2's own errors end here as NetlinkError.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import socket
import struct
import sys
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Any

from agent.errors import NetlinkError
from agent.model.capture import REPLY_MARK

if TYPE_CHECKING:
    from collections.abc import Iterator
    from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network

    from pyroute2.iproute.linux import IPRoute

    Interface = IPv4Interface | IPv6Interface
    Network = IPv4Network | IPv6Network


@contextlib.contextmanager
def _only_the_modules_that_are_named() -> Iterator[None]:
    """Import modules of pyroute2 without the package's own __init__.

    That one imports every protocol that pyroute2 speaks: 5.6 MiB of an agent that speaks rtnetlink.
    """
    if "pyroute2" in sys.modules:
        yield
        return
    spec = importlib.util.find_spec("pyroute2")
    assert spec is not None
    sys.modules["pyroute2"] = importlib.util.module_from_spec(spec)  # with its path, not executed
    try:
        yield
    finally:
        del sys.modules["pyroute2"]


with _only_the_modules_that_are_named():
    from pyroute2.iproute.linux import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError as ForeignNetlinkError

# The numbers that ambient mesh uses for the same purpose.
REPLY_MARK_MASK = 0xFFF
REPLY_TABLE = 100
REPLY_RULE_PRIORITY = 32764
# tc-bpf(8): parents of the clsact qdisc, what enters by an interface and what leaves by it
INGRESS, EGRESS = 0xFFFFFFF2, 0xFFFFFFF3
# After filters of others, which mostly take low numbers; the handle makes `replace` replace.
FILTER_PRIORITY, FILTER_HANDLE = 49000, 1
_RTN_LOCAL = 2
# linux/rtnetlink.h: the group that hears of qdiscs and filters, and what is said when one goes
_RTMGRP_TC = 8
_GOING = (37, 45)  # RTM_DELQDISC, RTM_DELTFILTER
_MESSAGE_HEAD = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, sender
_TC_HEAD = struct.Struct("=B3xi")  # struct tcmsg: family, interface
_EVENT_BYTES = 1 << 16
_SCOPE_HOST = 254
_IFA_F_NODAD = 0x02


@contextlib.contextmanager
def _session(what: str, *ignored: int) -> Iterator[Any]:
    try:
        with IPRoute() as ipr:
            yield ipr
    except ForeignNetlinkError as error:
        if error.code not in ignored:
            raise NetlinkError(f"{what}: {error}") from error


def _index(ipr: Any, name: str) -> int:
    found = ipr.link_lookup(ifname=name)
    if not found:
        raise NetlinkError(f"there is no interface {name}")
    return int(found[0])


def add_veth(name: str, peer: str, peer_netns_fd: int) -> None:
    """Make a veth pair: `name` here, `peer` in another namespace."""
    with _session(f"veth {name} cannot be made") as ipr:
        ipr.link("add", ifname=name, kind="veth", peer={"ifname": peer, "net_ns_fd": peer_netns_fd})


def delete_link(name: str) -> None:
    """Delete an interface, and with a veth its other end."""
    with _session(f"{name} cannot be deleted") as ipr:
        if found := ipr.link_lookup(ifname=name):
            ipr.link("del", index=found[0])


def set_up(name: str) -> None:
    """Bring an interface up."""
    with _session(f"{name} cannot be brought up") as ipr:
        ipr.link("set", index=_index(ipr, name), state="up")


def add_address(name: str, interface: Interface) -> None:
    """Give an interface an address, at once usable (no duplicate address detection)."""
    with _session(f"{interface} cannot be added to {name}", errno.EEXIST) as ipr:
        flags = {"flags": _IFA_F_NODAD} if interface.version == 6 else {}
        ipr.addr(
            "add",
            index=_index(ipr, name),
            address=str(interface.ip),
            prefixlen=interface.network.prefixlen,
            **flags,
        )


def add_route(destination: Network, name: str, gateway: str | None = None) -> None:
    """Route a network over an interface, through `gateway` if one is given."""
    with _session(f"the route to {destination} cannot be added", errno.EEXIST) as ipr:
        through = (
            {"gateway": gateway} if gateway else {"scope": 253 if destination.version == 4 else 0}
        )
        ipr.route(
            "add",
            dst=str(destination),
            oif=_index(ipr, name),
            family=socket.AF_INET if destination.version == 4 else socket.AF_INET6,
            **through,
        )


def add_reply_route(family: int) -> None:
    """Deliver marked packets locally: answers to a client's address that the agent borrowed."""
    everything = "0.0.0.0/0" if family == socket.AF_INET else "::/0"
    with _session("the rule for marked replies cannot be added", errno.EEXIST) as ipr:
        ipr.rule(
            "add",
            family=family,
            priority=REPLY_RULE_PRIORITY,
            fwmark=REPLY_MARK,
            fwmask=REPLY_MARK_MASK,
            table=REPLY_TABLE,
        )
    with _session("the route for marked replies cannot be added", errno.EEXIST) as ipr:
        ipr.route(
            "add",
            family=family,
            dst=everything,
            type=_RTN_LOCAL,
            scope=_SCOPE_HOST,
            oif=_index(ipr, "lo"),
            table=REPLY_TABLE,
        )


def _has_reply_rule(ipr: IPRoute, family: int) -> bool:
    return any(
        rule.get_attr("FRA_PRIORITY") == REPLY_RULE_PRIORITY
        and rule.get_attr("FRA_FWMARK") == REPLY_MARK
        and rule.get_attr("FRA_TABLE") == REPLY_TABLE
        for rule in ipr.get_rules(family=family)
    )


def has_reply_route() -> bool:
    """Say whether `add_reply_route` has been here, for the rule of IPv4."""
    with _session("rules cannot be listed") as ipr:
        return _has_reply_rule(ipr, socket.AF_INET)


def reply_route(family: int) -> tuple[bool, bool]:
    """Say whether the rule of `add_reply_route` is there, and whether its route is."""
    has_rule = has_route = False
    with _session("rules and routes cannot be listed", errno.EAFNOSUPPORT) as ipr:
        has_rule = _has_reply_rule(ipr, family)
        has_route = any(
            route["type"] == _RTN_LOCAL and route["dst_len"] == 0
            for route in ipr.get_routes(family=family, table=REPLY_TABLE)
        )
    return has_rule, has_route


def delete_reply_route(family: int) -> None:
    """Undo `add_reply_route`."""
    gone = (errno.ENOENT, errno.ESRCH, errno.EAFNOSUPPORT)
    with _session("the rule for marked replies cannot be deleted", *gone) as ipr:
        ipr.rule(
            "del",
            family=family,
            priority=REPLY_RULE_PRIORITY,
            fwmark=REPLY_MARK,
            fwmask=REPLY_MARK_MASK,
            table=REPLY_TABLE,
        )
    with _session("the route for marked replies cannot be deleted", *gone) as ipr:
        ipr.flush_routes(table=REPLY_TABLE, family=family)


def veth_peers() -> list[tuple[int, int]]:
    """List (index, index of the other end) of the veth interfaces of the current namespace."""
    with _session("interfaces cannot be listed") as ipr:
        return [
            (link["index"], link.get_attr("IFLA_LINK"))
            for link in ipr.get_links()
            if link.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") == "veth"
            and link.get_attr("IFLA_LINK")
        ]


def ipv4_addresses() -> list[IPv4Address]:
    """List the addresses of the current namespace."""
    with _session("addresses cannot be listed") as ipr:
        listed = ipr.get_addr(family=socket.AF_INET)
        return [IPv4Address(each.get_attr("IFA_LOCAL")) for each in listed]


def peer_of(ifindex: int) -> int | None:
    """Return the index of the other end of a veth; None if there is no such interface here."""
    found: list[Any] = []
    with _session(f"interface {ifindex} cannot be looked at", errno.ENODEV) as ipr:
        found += ipr.get_links(ifindex)
    number = found[0].get_attr("IFLA_LINK") if found else None
    return None if number is None else int(number)


def add_filter(ifindex: int, parent: int, program_fd: int, name: str) -> bool:
    """Attach a BPF program by a tc filter; True if the clsact qdisc had to be made for it."""
    with _session("clsact cannot be added", errno.EEXIST) as ipr:
        has_qdisc = any(
            qdisc.get_attr("TCA_KIND") == "clsact" for qdisc in ipr.get_qdiscs(index=ifindex)
        )
        if not has_qdisc:
            ipr.tc("add", "clsact", ifindex)
    with _session(f"{name} cannot be attached to interface {ifindex}") as ipr:
        ipr.tc(
            "replace-filter",
            "bpf",
            ifindex,
            FILTER_HANDLE,
            parent=parent,
            prio=FILTER_PRIORITY,
            fd=program_fd,
            name=name,
            direct_action=True,
        )
    return not has_qdisc


def filter_program(ifindex: int, parent: int) -> int | None:
    """Return the id of the program that `add_filter` has attached; None if it is not there."""
    numbers = (found.get_nested("TCA_OPTIONS", "TCA_BPF_ID") for found in _filters(ifindex, parent))
    number = next((each for each in numbers if each is not None), None)
    return None if number is None else int(number)


def has_filter(ifindex: int, parent: int, name: str) -> bool:
    """Say whether `add_filter` has been here with a program of that name."""
    names = (found.get_nested("TCA_OPTIONS", "TCA_BPF_NAME") for found in _filters(ifindex, parent))
    return name in names


def _filters(ifindex: int, parent: int) -> list[Any]:
    """List the filters with the priority of `add_filter`; none if the interface is gone."""
    gone = (errno.ENOENT, errno.ENODEV, errno.EINVAL)
    filters: list[Any] = []
    with _session(f"filters of interface {ifindex} cannot be listed", *gone) as ipr:
        filters += ipr.get_filters(index=ifindex, parent=parent)
    # tcm_info holds the priority above the protocol, pkt_sched.h TC_H_MAJ
    return [found for found in filters if found["info"] >> 16 == FILTER_PRIORITY]


def open_filter_events() -> socket.socket:
    """Return a socket that becomes readable when qdiscs or filters of this namespace change.

    A plain one, since it waits in the loop of its owner; pyroute2 would bring a loop of its own.
    """
    events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    events.bind((0, _RTMGRP_TC))
    events.setblocking(False)
    return events


def gone_filters(events: socket.socket) -> set[int]:
    """Return the interfaces that have lost a filter or a qdisc since the last call.

    Raises:
        NetlinkError: some of it was not told, since too much happened at once.
    """
    interfaces = set()
    try:
        while True:
            data = events.recv(_EVENT_BYTES)
            while len(data) >= _MESSAGE_HEAD.size + _TC_HEAD.size:
                length, kind, *_rest = _MESSAGE_HEAD.unpack_from(data)
                if kind in _GOING:
                    interfaces.add(_TC_HEAD.unpack_from(data, _MESSAGE_HEAD.size)[1])
                data = data[-(-length // 4) * 4 :]
    except BlockingIOError:
        return interfaces
    except OSError as error:
        raise NetlinkError(f"changes of filters were missed: {error.strerror}") from error


def delete_filter(ifindex: int, parent: int) -> None:
    """Undo `add_filter`, but for the qdisc; no error if interface or filter are gone."""
    gone = (errno.ENOENT, errno.ENODEV, errno.EINVAL)
    with _session(f"the filter of interface {ifindex} cannot be deleted", *gone) as ipr:
        ipr.tc("del-filter", "bpf", ifindex, FILTER_HANDLE, parent=parent, prio=FILTER_PRIORITY)


def delete_unused_clsact(ifindex: int) -> None:
    """Delete the clsact qdisc if nobody's filters are on it."""
    gone = (errno.ENOENT, errno.ENODEV, errno.EINVAL)
    with _session(f"clsact of interface {ifindex} cannot be deleted", *gone) as ipr:
        if not any(
            list(ipr.get_filters(index=ifindex, parent=parent)) for parent in (INGRESS, EGRESS)
        ):
            ipr.tc("del", "clsact", ifindex)
