"""Enroll and unenroll one pod: ordered steps, each with its undo.

The order keeps the pod closed or untouched, never half open:

    1 reply route   marked packets come back to us       undo: delete rule, route; old sysctls
    2 listeners     15001, 15006, 15008 in the pod       undo: close
    3 slot          15006 into ss_listeners              undo: delete
    4 addresses     ss_local; ss_bypass, ss_ports        undo: delete
    5 lookup link   inbound is captured from here on     undo: unpin
                    (left out for a pod that wants plaintext past us)
    6 ss_pods       outbound is captured from here on    undo: delete
    7 guard         on the node's side of each link,     undo: detach; sysctl; ss_captures
                    accept_local on the pod's
                    (a pod without a veth has none, and takes no direct path)

Over what an agent before us left, the same steps replace without a gap: the pod was captured, and
stays so whatever fails here. Where that agent still runs, its listeners come along (`Inherited`)
and are not opened anew, so that no connection in their queues is lost.

Undo runs in reverse order, in two parts. `release` ends capture: all but the reply route and 15008,
which open connections and peers that have not heard yet still need. `unenroll` takes those too. The
workers have listeners of their own and keep them a little longer, for what was captured and is on
the way. No process of the pod is touched. The caller holds the returned Enrollment; its listeners
are what the workers accept on.

Called by the reconciler, and by tests. Does not decide which pod takes part.
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass, field, replace
from functools import partial
from ipaddress import ip_network
from typing import TYPE_CHECKING

from agent import accept_local, guard, netlink, netns, sysctl
from agent.datapath import links, records
from agent.datapath.counters import give_row
from agent.datapath.exemption import exempt
from agent.errors import EnrollError, KernelError
from agent.model.capture import HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT
from agent.tunnel.sockets import prepare_listener

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from agent.datapath.btf import Value
    from agent.datapath.pins import Pins
    from agent.model.pod import LocalPod

BACKLOG = 1024  # what a burst of 500 connects needs, with room
# Of the pod's namespace: answers carry the mark of what they answer, those of an accepted
# connection and those without a socket (the RST of a port on which nobody listens).
REPLY_SYSCTLS = tuple(
    sysctl.NET / name
    for name in ("ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect", "ipv6/fwmark_reflect")
)
SYSCTL_DEFAULT = "0"


@dataclass
class Enrollment:
    """One enrolled pod: its namespace, its listeners, and how to undo it."""

    pod: LocalPod
    netns_fd: int
    netns_cookie: int
    outbound: list[socket.socket] = field(default_factory=list)
    inbound: list[socket.socket] = field(default_factory=list)
    hbone: list[socket.socket] = field(default_factory=list)
    capture: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    ground: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    plaintext_ports: frozenset[int] = frozenset()
    is_complete: bool = False  # else `attach_guard` is to follow
    guarded_links: dict[int, int] = field(default_factory=dict)  # interface of the node -> row
    sysctls: dict[Path, str] = field(default_factory=dict)  # as they were before enrollment
    was_enrolled: bool = False  # by an agent before us, so that sysctls may be ours already
    accepting: list[int] = field(default_factory=list)  # interfaces of the pod (accept_local)

    @property
    def is_unguarded(self) -> bool:
        """Whether the pod has no link that could be guarded."""
        return self.is_complete and not self.guarded_links

    @property
    def served(self) -> LocalPod:
        """The pod as those know it who join it with others of this node.

        What no guard has seen leave one of two pods is spoofed to the guard of the other (guard.h).
        """
        return replace(self.pod, may_go_direct=False) if self.is_unguarded else self.pod

    @property
    def listeners(self) -> list[tuple[int, socket.socket]]:
        """Every open listener with its port."""
        by_port = (
            (OUTBOUND_PORT, self.outbound),
            (INBOUND_PORT, self.inbound),
            (HBONE_PORT, self.hbone),
        )
        return [(port, each) for port, found in by_port for each in found if each.fileno() >= 0]


@dataclass(frozen=True)
class Inherited:
    """What an enrollment hands over to the next one of the pod, beside what is in the kernel."""

    listeners: list[tuple[int, socket.socket]]
    sysctls: dict[Path, str]


NOTHING_INHERITED = Inherited([], {})


def enroll(
    pins: Pins,
    pod: LocalPod,
    netns_fd: int,
    inherited: Inherited = NOTHING_INHERITED,
    *,
    is_guarded: bool = True,
) -> Enrollment:
    """Enroll `pod`, whose network namespace is behind `netns_fd` (stays the caller's).

    Where it is not guarded, `attach_guard` is to follow.

    Raises:
        EnrollError: a step failed; all steps before it are undone. A pod that was captured before
            stays so, with nobody listening: closed.
    """
    enrollment = Enrollment(pod, netns_fd, netns.netns_cookie(netns_fd))
    was_captured = pins.maps["ss_pods"].get({"value": enrollment.netns_cookie}) is not None
    with contextlib.ExitStack() as ground, contextlib.ExitStack() as undo:
        try:
            _add_reply_route(enrollment, ground, inherited)
            if inherited.listeners:
                _take_listeners(enrollment, undo, ground, inherited)
            else:
                _open_listeners(pins, enrollment, undo, ground)
            _fill_slot(pins, enrollment, undo)
            _write_addresses(pins, enrollment, undo)
            if pod.bypasses_inbound:
                links.detach_lookup(pins, enrollment.netns_cookie)  # of an agent before us
            else:
                links.attach_lookup(pins, netns_fd, enrollment.netns_cookie)
                undo.callback(links.detach_lookup, pins, enrollment.netns_cookie)
            _write_pod(pins, enrollment, undo)
            if is_guarded:
                _attach_guard(pins, enrollment, undo)
        except (KernelError, OSError) as error:
            if was_captured:
                abandon(enrollment)
                undo.pop_all()
                ground.pop_all()
            raise EnrollError(f"{pod.namespace}/{pod.name} was not enrolled: {error}") from error
        enrollment.capture, enrollment.ground = undo.pop_all(), ground.pop_all()
    return enrollment


def attach_guard(pins: Pins, enrollment: Enrollment) -> None:
    """Do the last step of an enrollment that is not guarded yet (EnrollError).

    May run in a thread of its own, while nobody else touches this enrollment.
    """
    try:
        _attach_guard(pins, enrollment, enrollment.capture)
    except (KernelError, OSError) as error:
        pod = enrollment.pod
        raise EnrollError(f"{pod.namespace}/{pod.name} is not guarded: {error}") from error


def release(enrollment: Enrollment) -> None:
    """End capture; what is open goes on, and 15008 still takes tunnels."""
    enrollment.capture.close()


def unenroll(enrollment: Enrollment) -> None:
    """Undo every step, last first; of a released pod what is left."""
    with enrollment.ground:
        enrollment.capture.close()


def hand_over(enrollment: Enrollment) -> Inherited:
    """Give 15008 of a released pod to the next enrollment, which finds the reply route there."""
    enrollment.ground.pop_all()
    for listener in enrollment.hbone:
        listener.close()
    return Inherited([], enrollment.sysctls)


def inherit_draining(
    pod: LocalPod, netns_fd: int, netns_cookie: int, inherited: Inherited
) -> Enrollment:
    """Take over a released pod: reply route and 15008 are there, and ours to take away."""
    enrollment = Enrollment(pod, netns_fd, netns_cookie, sysctls=dict(inherited.sysctls))
    with contextlib.ExitStack() as ground:
        ground.callback(
            netns.run_in, netns_fd, lambda: take_reply_route(enrollment.sysctls or None)
        )
        _take_listeners(enrollment, ground, ground, inherited)
        enrollment.ground = ground.pop_all()
    return enrollment


def abandon(enrollment: Enrollment) -> None:
    """Leave everything in the kernel as it is, captured, and listen no more."""
    enrollment.capture.pop_all()
    enrollment.ground.pop_all()
    for _port, listener in enrollment.listeners:
        listener.close()


def exceptions(pins: Pins, enrollment: Enrollment) -> set[tuple[str, bytes]]:
    """Return what is not captured or not STRICT of a pod, as (map, bytes of the key)."""
    entries = [(name, key) for name, key in exclusion_entries(enrollment)]
    entries += [
        ("ss_ports", records.port_key(enrollment.netns_cookie, port, records.PLAINTEXT))
        for port in enrollment.plaintext_ports
    ]
    return {(name, pins.maps[name].key.encode(**key)) for name, key in entries}


def _add_reply_route(
    enrollment: Enrollment, ground: contextlib.ExitStack, inherited: Inherited
) -> None:
    def add() -> None:
        families = [socket.AF_INET] + ([socket.AF_INET6] if netns.has_ipv6() else [])
        # A rule that is there is of an agent that was killed, and so are the sysctls' values.
        is_ours = enrollment.was_enrolled = netlink.has_reply_route()
        before = {
            path: inherited.sysctls.get(path, SYSCTL_DEFAULT) if is_ours else path.read_text()
            for path in REPLY_SYSCTLS
            if path.exists()
        }
        enrollment.sysctls.update(before)
        ground.callback(netns.run_in, enrollment.netns_fd, lambda: take_reply_route(before))
        for path in before:
            path.write_text("1")
        for family in families:
            netlink.add_reply_route(family)

    netns.run_in(enrollment.netns_fd, add)


def take_reply_route(sysctls: Mapping[Path, str] | None = None) -> None:
    """Undo the reply route of the current namespace; call it inside `agent.netns.run_in`."""
    for family in (socket.AF_INET, socket.AF_INET6):
        netlink.delete_reply_route(family)
    if sysctls is None:
        sysctls = {path: SYSCTL_DEFAULT for path in REPLY_SYSCTLS if path.exists()}
    for path, text in sysctls.items():
        path.write_text(text)


def clean_namespace() -> None:
    """Undo in the current namespace what an agent before us left there."""
    take_reply_route()
    accept_local.take_back_all()


def _open_listeners(
    pins: Pins,
    enrollment: Enrollment,
    capture: contextlib.ExitStack,
    ground: contextlib.ExitStack,
) -> None:
    def listen(host: str, port: int, undo: contextlib.ExitStack) -> socket.socket:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        undo.callback(listener.close)
        exempt(pins.maps["ss_exempt"], listener)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(host == "::1"))
        prepare_listener(listener)
        listener.bind((host, port))
        listener.listen(BACKLOG)
        listener.setblocking(False)
        return listener

    def open_all() -> None:
        has_ipv6 = netns.has_ipv6()
        enrollment.outbound += [listen("127.0.0.1", OUTBOUND_PORT, capture)]
        if has_ipv6:
            enrollment.outbound += [listen("::1", OUTBOUND_PORT, capture)]
        wildcard = "::" if has_ipv6 else "0.0.0.0"  # the pod's own namespace
        enrollment.inbound += [listen(wildcard, INBOUND_PORT, capture)]
        enrollment.hbone += [listen(wildcard, HBONE_PORT, ground)]

    netns.run_in(enrollment.netns_fd, open_all)


def _take_listeners(
    enrollment: Enrollment,
    capture: contextlib.ExitStack,
    ground: contextlib.ExitStack,
    inherited: Inherited,
) -> None:
    by_port = {
        OUTBOUND_PORT: (enrollment.outbound, capture),
        INBOUND_PORT: (enrollment.inbound, capture),
        HBONE_PORT: (enrollment.hbone, ground),
    }
    for port, listener in inherited.listeners:
        if port in by_port:
            known, undo = by_port[port]
            prepare_listener(listener)  # another version may not have done it
            known.append(listener)
            undo.callback(listener.close)
        else:
            listener.close()  # of another version, for what we do not do


def _put(
    pins: Pins,
    undo: contextlib.ExitStack,
    name: str,
    key: dict[str, Value],
    value: dict[str, Value],
) -> None:
    pins.maps[name].put(key, value)
    undo.callback(pins.maps[name].delete, key)


def _fill_slot(pins: Pins, enrollment: Enrollment, undo: contextlib.ExitStack) -> None:
    (listener,) = enrollment.inbound
    key: dict[str, Value] = {"value": enrollment.netns_cookie}
    _put(pins, undo, "ss_listeners", key, {"value": listener.fileno()})


def exclusion_entries(enrollment: Enrollment) -> Iterator[tuple[str, dict[str, Value]]]:
    """Yield map and key of everything that bypasses capture for a pod."""
    cookie, exclusions = enrollment.netns_cookie, enrollment.pod.exclusions
    own = tuple(ip_network(address) for address in enrollment.pod.addresses)
    for network in own + exclusions.outbound_networks:
        yield "ss_bypass", records.network_key(cookie, network)
    for port in exclusions.outbound_ports:
        yield "ss_ports", records.port_key(cookie, port, records.OUTBOUND)
    for port in exclusions.inbound_ports:
        yield "ss_ports", records.port_key(cookie, port, records.INBOUND)


def _write_addresses(pins: Pins, enrollment: Enrollment, undo: contextlib.ExitStack) -> None:
    for name, entry in exclusion_entries(enrollment):
        _put(pins, undo, name, entry, {"value": 1})
    local = pins.maps["ss_local"]

    def delete_own(key: dict[str, Value]) -> None:
        if _is_own(pins, enrollment, key):
            local.delete(key)

    for key in _address_keys(enrollment):
        local.put(key, resident_of(enrollment))
        undo.callback(partial(delete_own, key))


def resident_of(enrollment: Enrollment) -> dict[str, Value]:
    """Return the value of ss_local for each address of a pod."""
    exclusions = enrollment.pod.exclusions
    return records.resident_record(
        enrollment.netns_cookie,
        enrollment.guarded_links,
        has_exclusions=bool(exclusions.outbound_ports or exclusions.outbound_networks),
    )


def _address_keys(enrollment: Enrollment) -> list[dict[str, Value]]:
    return [{"address": records.pack_address(each)} for each in enrollment.pod.addresses]


def _is_own(pins: Pins, enrollment: Enrollment, key: dict[str, Value]) -> bool:
    found = pins.maps["ss_local"].get(key)  # else the address has a new pod already
    return found is not None and found["netns_cookie"] == enrollment.netns_cookie


def _write_pod(pins: Pins, enrollment: Enrollment, undo: contextlib.ExitStack) -> None:
    key: dict[str, Value] = {"value": enrollment.netns_cookie}
    _put(pins, undo, "ss_pod_names", key, records.pod_name_record(enrollment.pod))
    before = pins.maps["ss_pods"].get(key) or {}
    # An agent before us may have known that it is STRICT: so it stays, until we know.
    record = records.pod_record(enrollment.pod, is_strict=bool(before.get("is_strict")))
    _put(pins, undo, "ss_pods", key, record)
    undo.callback(_write_plaintext_ports, pins, enrollment, frozenset())


def _attach_guard(pins: Pins, enrollment: Enrollment, undo: contextlib.ExitStack) -> None:
    cookie = enrollment.netns_cookie
    undo.callback(_drop_captures, pins, cookie)
    for ifindex in guard.node_links(enrollment.netns_fd):
        _guard_link(pins, enrollment, ifindex, undo)
    enrollment.is_complete = True


def guard_link(pins: Pins, enrollment: Enrollment, ifindex: int) -> None:
    """Guard one interface of an enrolled pod, whether or not it was before (KernelError)."""
    if ifindex in enrollment.guarded_links:
        guard.renew(pins, enrollment.netns_cookie, ifindex)
    else:
        _guard_link(pins, enrollment, ifindex, enrollment.capture)


def _guard_link(
    pins: Pins, enrollment: Enrollment, ifindex: int, undo: contextlib.ExitStack
) -> None:
    cookie = enrollment.netns_cookie
    guards = pins.maps["ss_guards"]
    row = give_row(guards, pins.maps["ss_counters"], enrollment.pod, cookie, ifindex)
    undo.callback(guards.delete, {"value": ifindex})
    guard.attach(pins, cookie, ifindex, undo)
    enrollment.guarded_links[ifindex] = row
    resident = resident_of(enrollment)
    for key in _address_keys(enrollment):
        if _is_own(pins, enrollment, key):
            pins.maps["ss_local"].put(key, resident)
    _accept_local(enrollment, ifindex, undo)


def _accept_local(enrollment: Enrollment, ifindex: int, undo: contextlib.ExitStack) -> None:
    index = netns.run_aside(partial(netlink.peer_of, ifindex))
    if index is None:
        return  # it has just gone
    known = enrollment.pod.addresses
    allow = partial(accept_local.allow, index, known, is_ours=enrollment.was_enrolled)
    if netns.run_in(enrollment.netns_fd, allow):
        enrollment.accepting.append(index)
        undo.callback(netns.run_in, enrollment.netns_fd, partial(accept_local.take_back, index))


def _drop_captures(pins: Pins, netns_cookie: int) -> None:
    captures = pins.maps["ss_captures"]
    for key in [key for key, _ in captures.items() if key["netns_cookie"] == netns_cookie]:
        captures.delete(key)


def set_strict(pins: Pins, enrollment: Enrollment, *, is_strict: bool, but: frozenset[int]) -> None:
    """Say whether plaintext is held off the pod, but for the ports `but` (MapError)."""
    key: dict[str, Value] = {"value": enrollment.netns_cookie}
    _write_plaintext_ports(pins, enrollment, enrollment.plaintext_ports | but)
    pins.maps["ss_pods"].put(key, records.pod_record(enrollment.pod, is_strict=is_strict))
    _write_plaintext_ports(pins, enrollment, but)


def _write_plaintext_ports(pins: Pins, enrollment: Enrollment, ports: frozenset[int]) -> None:
    for port in ports ^ enrollment.plaintext_ports:
        key = records.port_key(enrollment.netns_cookie, port, records.PLAINTEXT)
        if port in ports:
            pins.maps["ss_ports"].put(key, {"value": 1})
        else:
            pins.maps["ss_ports"].delete(key)
    enrollment.plaintext_ports = ports
