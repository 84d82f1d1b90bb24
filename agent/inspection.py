"""Desired state against what is really there: maps, pins, links, listeners, rules, routes, sysctls.

Each thing that a pod of this node needs is looked at where the kernel keeps it, not where we noted
that we put it. A difference is named with what ought to be and what is, and knows how it is mended:
by doing again what enrollment does. Mending changes nothing that is right, so open connections go
on; only a listener that is gone needs the pod enrolled anew.

Called by `agent.upkeep` all the time, and by the composition root for `sidestep diff` and `sidestep
check --repair`. What another agent on this kernel owns is in other pins and is not looked at.
"""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from agent import accept_local, guard, netlink, netns, sock_diag
from agent.datapath import features, libbpf, links, listing
from agent.datapath.source import CGROUP_PROGRAMS, PROGRAMS
from agent.enroll import REPLY_SYSCTLS, guard_link
from agent.errors import KernelError, SidestepError
from agent.expectation import COMPARED, Expected, describe, describe_value, owner, packed
from agent.model.capture import REPLY_MARK
from agent.model.endpoint import endpoint
from agent.state.drift import Drift, compare

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Set
    from pathlib import Path

    from agent.datapath.btf import Value
    from agent.datapath.maps import Map, Record
    from agent.datapath.pins import Pins
    from agent.datapath.records import ServicePorts
    from agent.enroll import Enrollment
    from agent.expectation import Packed
    from agent.roster import Roster

AGAIN = "it is so again"
FAMILIES: dict[int, str] = {socket.AF_INET: "ipv4", socket.AF_INET6: "ipv6"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One difference; `mend` does again what ought to have been done."""

    pod: str | None
    kind: str  # map, pin, link, filter, listener, rule, route, sysctl or pod
    name: str
    expected: str | None
    found: str | None
    mend: Callable[[], Awaitable[None]] = field(repr=False)

    @property
    def key(self) -> tuple[str | None, str, str]:
        """What differs, whatever it is and ought to be."""
        return self.pod, self.kind, self.name


class Inspection:
    """Looks at one node."""

    def __init__(
        self,
        pins: Pins,
        roster: Roster,
        services: Callable[[], ServicePorts],
        cgroup_root: Path,
        *,
        wanted: Callable[[], set[str]],
    ) -> None:
        """Look at nothing yet.

        `services()` are those that the kernel ought to know, `wanted()` the uids of all pods that
        are to be in the mesh, enrolled or not.
        """
        self._pins = pins
        self._roster = roster
        self._services = services
        self._cgroup_root = cgroup_root
        self._wanted = wanted
        self._programs = _Programs(pins)

    async def find(self) -> list[Finding]:
        """List every difference (KernelError if something cannot be looked at)."""
        found: list[Finding] = []
        for part in self.parts():
            found += part
            await asyncio.sleep(0)  # others of this process want their turn
        found += [
            Finding(
                f"{status.pod.namespace}/{status.pod.name}",
                "pod",
                "enrollment",
                "enrolled",
                f"{status.state}: {status.detail}",
                partial(self._roster.try_now, status.pod.uid),
            )
            for status in self._roster.statuses.values()
            if status.state != "enrolled"
        ]
        return found

    def parts(self) -> Iterator[list[Finding]]:
        """Yield the differences part by part; between two parts anything may happen to pods."""
        if self._pins.is_elsewhere():  # nothing is found at its path
            yield self.find_lost()
            return
        yield [*self._pinned(), *self._cgroup_links(self._look_at_links())]
        for name in COMPARED:
            yield list(self._map(name))
        for enrollment in self._roster.enrollments():
            if self._roster.cookie(enrollment.pod.uid) == enrollment.netns_cookie:
                yield list(self._pod(enrollment))
        yield list(self._stray_links())

    @property
    def part_count(self) -> int:
        """How many parts there are at the moment."""
        return len(COMPARED) + len(self._roster.enrollments()) + 2

    def find_lost(self, touched: Set[int] = frozenset()) -> list[Finding]:
        """List what capture rests on and is not there: pins and links.

        It costs a call into the kernel for each link. Filters of tc are looked at only for the
        interfaces `touched`, since listing those is dear.
        """
        if self._pins.is_elsewhere():
            directory = self._pins.directory
            mend = partial(_call, self._pins.rebuild)
            return [Finding(None, "pin", "directory", str(directory), None, mend)]
        attached = self._look_at_links()
        found = [*self._pinned(), *self._cgroup_links(attached)]
        has_tcx = features.has_tcx()
        for enrollment in self._roster.enrollments():
            named = _named(enrollment)
            found += self._lookup(named, enrollment, attached)
            guarded = enrollment.guarded_links
            looked_at = guarded if has_tcx else touched & {*guarded}
            found += self._guards(named, enrollment, looked_at, attached)
        return found

    async def repair(self) -> list[tuple[Finding, str | None]]:
        """Mend every difference; return each with why it could not be mended, None if it was."""
        results: list[tuple[Finding, str | None]] = []
        for finding in await self.find():
            try:
                await finding.mend()
            except (SidestepError, OSError) as error:
                text = str(error)
                is_said = finding.found is not None and text in finding.found
                results.append((finding, AGAIN if is_said else text))
            else:
                results.append((finding, None))
        left = {each.key for each in await self.find()}
        return [
            (each, problem or (AGAIN if each.key in left else None)) for each, problem in results
        ]

    # -- maps ---------------------------------------------------------------------------------

    def _map(self, name: str) -> Iterator[Finding]:
        expected = Expected(self._pins, name)
        for enrollment in self._roster.enrollments():
            expected.add_pod(enrollment, is_strict=self._roster.is_strict(enrollment.pod))
        expected.add_services(self._services())
        kept = self._kept()
        opened = self._pins.maps[name]
        observed = {
            key: packed(value)
            for key, value in ((packed(key), value) for key, value in opened.items())
            if owner(name, key, packed(value)) not in kept
        }
        drifts = compare(expected.entries, observed)
        names = self._names() if drifts else {}  # dear, and mostly nothing differs
        for drift in drifts:
            shown = drift.expected if drift.expected is not None else drift.found
            assert shown is not None
            cookie = owner(name, drift.key, shown)
            yield Finding(
                names.get(cookie, f"netns cookie {cookie}") if cookie is not None else None,
                "map",
                f"{name} {describe(name, drift.key, shown, names)}",
                describe_value(name, drift.key, drift.expected, names),
                describe_value(name, drift.key, drift.found, names),
                partial(_mend_entry, opened, drift, expected.writes.get(drift.key)),
            )

    def _names(self) -> listing.PodNames:
        own = (*self._roster.enrollments(), *self._roster.draining())
        named = {each.netns_cookie: _named(each) for each in own}
        return listing.pod_names(self._pins.directory) | named

    def _kept(self) -> set[Value]:
        """Return the cookies of pods that are not enrolled, and of which something has to stay.

        Of those that drain, and of those that an agent before us had captured and that could not
        be enrolled yet, or whose addresses nobody has told yet: what it left keeps them closed.
        """
        kept: set[Value] = {each.netns_cookie for each in self._roster.draining()}
        waiting = {uid.encode() for uid in self._wanted() - self._roster.captured()}
        for key, value in self._pins.maps["ss_pod_names"].items() if waiting else ():
            uid = value["uid"]
            assert isinstance(uid, bytes)
            if uid.rstrip(b"\0") in waiting:
                kept.add(key["value"])
        return kept

    # -- pins and links -----------------------------------------------------------------------

    def _pinned(self) -> Iterator[Finding]:
        for path in self._pins.missing():
            mend = partial(_call, partial(self._pins.restore, path))
            where = str(self._pins.directory / path)
            yield Finding(None, "pin", path.rpartition("/")[2], where, None, mend)

    def _look_at_links(self) -> _Attached:
        return _Attached(self._pins, self._programs.read())

    def _cgroup_links(self, attached: _Attached) -> Iterator[Finding]:
        root = self._cgroup_root.stat().st_ino
        mend = partial(_call, partial(links.attach_cgroup, self._pins, self._cgroup_root))
        for name in CGROUP_PROGRAMS:
            problem = attached.problem(name, root, name)
            if problem is not None:
                expected = f"{name} at {self._cgroup_root}"
                yield Finding(None, "link", name, expected, problem or None, mend)

    def _stray_links(self) -> Iterator[Finding]:
        known = {each.netns_cookie for each in self._roster.enrollments()} | self._kept()
        for cookie in links.looked_up_cookies(self._pins) - known:
            mend = partial(_call, partial(links.detach_lookup, self._pins, cookie))
            name = links.lookup_link_name(cookie)
            yield Finding(None, "link", name, None, "a link of no pod", mend)

    # -- one pod ------------------------------------------------------------------------------

    def _pod(self, enrollment: Enrollment) -> Iterator[Finding]:
        named = _named(enrollment)
        attached = self._look_at_links()
        yield from self._lookup(named, enrollment, attached)
        if enrollment.is_complete:  # a pod that has just come is so a moment later
            there = guard.node_links(enrollment.netns_fd)
            yield from self._guards(named, enrollment, there, attached)
        try:
            look = partial(_look_inside, enrollment)
            inside = netns.run_in(enrollment.netns_fd, look)
        except OSError as error:
            raise KernelError(f"the namespace of {named} cannot be looked at: {error}") from error
        again = partial(self._roster.redo, enrollment.pod.uid)
        for listener in (*enrollment.outbound, *enrollment.inbound, *enrollment.hbone):
            inode, (host, port) = os.fstat(listener.fileno()).st_ino, listener.getsockname()[:2]
            if inode not in inside.listening:
                name = endpoint(host, port)
                yield Finding(named, "listener", name, "listening", None, again)
        for family in inside.families:
            label = FAMILIES[family]
            add = partial(_call, partial(_add_reply_route, enrollment.netns_fd, family))
            has_rule, has_route = inside.reply_routes[family]
            mark, table = f"fwmark {REPLY_MARK:#x}", f"table {netlink.REPLY_TABLE}"
            if not has_rule:
                yield Finding(
                    named, "rule", label, f"{mark} lookup {netlink.REPLY_TABLE}", None, add
                )
            if not has_route:
                yield Finding(named, "route", label, f"local default in {table}", None, add)
        for path, text in inside.sysctls.items():
            if text != "1":
                write = partial(_call, partial(_write_sysctl, enrollment.netns_fd, path))
                yield Finding(named, "sysctl", str(path), "1", text, write)
        for index in inside.too_trustful:
            take_back = partial(accept_local.take_back, index)
            mend = partial(_call, partial(netns.run_in, enrollment.netns_fd, take_back))
            what = f"accept_local of interface {index}, beside an address that nobody told"
            yield Finding(named, "sysctl", what, "0", "1", mend)

    def _lookup(self, named: str, enrollment: Enrollment, attached: _Attached) -> Iterator[Finding]:
        cookie = enrollment.netns_cookie
        name = links.lookup_link_name(cookie)
        if enrollment.pod.bypasses_inbound:
            if self._pins.link_path(name).exists():
                mend = partial(_call, partial(links.detach_lookup, self._pins, cookie))
                yield Finding(named, "link", name, None, "attached", mend)
            return
        problem = attached.problem(name, os.fstat(enrollment.netns_fd).st_ino)
        if problem is not None:
            attach = partial(links.attach_lookup, self._pins, enrollment.netns_fd, cookie)
            yield Finding(named, "link", name, "attached", problem or None, partial(_call, attach))

    def _guards(
        self, named: str, enrollment: Enrollment, ifindexes: Iterable[int], attached: _Attached
    ) -> Iterator[Finding]:
        cookie, has_tcx = enrollment.netns_cookie, features.has_tcx()
        for ifindex in ifindexes:
            mend = partial(_call, partial(guard_link, self._pins, enrollment, ifindex))
            for program, parent in guard.PARENTS.items():
                if has_tcx:
                    name = links.guard_link_name(program, cookie, ifindex)
                    problem = attached.problem(name, ifindex, program)
                    if problem is not None and _has_interface(ifindex):
                        yield Finding(named, "link", name, "attached", problem or None, mend)
                    continue
                found = netns.run_aside(partial(netlink.filter_program, ifindex, parent))
                expected = attached.programs[program]
                if found != expected:
                    text = None if found is None else f"program id {found}"
                    label = f"{program} at interface {ifindex}"
                    yield Finding(named, "filter", label, f"program id {expected}", text, mend)


class _Attached:
    """Which links are pinned and what is behind them, read as little as can be."""

    def __init__(self, pins: Pins, programs: dict[str, int | None]) -> None:
        self._links = pins.links
        self._pinned = pins.inodes("links")
        self.programs = programs

    def problem(self, name: str, target: int, program: str | None = None) -> str | None:
        """Say what is wrong with a link; an empty text means that it is not there."""
        fd = self._links.get(name)
        if fd is None or name not in self._pinned:
            return ""
        facts = libbpf.link_facts(fd)
        if facts.target == 0:
            return "detached"
        if facts.target != target:
            return f"attached elsewhere: {facts.target}"
        if program is not None and self.programs[program] not in (None, facts.program_id):
            return f"another program: id {facts.program_id}"
        return None


class _Programs:
    """The ids of the pinned programs: the kernel is asked only where there is another pin."""

    def __init__(self, pins: Pins) -> None:
        self._pins = pins
        self._known: dict[tuple[str, int], int | None] = {}

    def read(self) -> dict[str, int | None]:
        """Return the id of each program, None if the pin is gone, which is told by itself."""
        there, before = self._pins.inodes("programs"), self._known
        self._known = {
            pin: before.get(pin) or _program_id(self._pins, pin[0])
            for pin in there.items()
            if pin[0] in PROGRAMS
        }
        return dict.fromkeys(PROGRAMS) | {name: found for (name, _), found in self._known.items()}


def _program_id(pins: Pins, name: str) -> int | None:
    try:
        with libbpf.closing(pins.program(name)) as fd:
            return libbpf.program_facts(fd).id
    except KernelError:
        return None


@dataclass(slots=True)
class _Inside:
    """What is in a pod's namespace."""

    listening: set[int]  # inodes
    families: list[int]
    reply_routes: dict[int, tuple[bool, bool]]
    sysctls: dict[Path, str]
    too_trustful: list[int]  # interfaces with accept_local that ought to have it no more


def _look_inside(enrollment: Enrollment) -> _Inside:
    families: list[int] = [socket.AF_INET, *([socket.AF_INET6] if netns.has_ipv6() else [])]
    return _Inside(
        {found.inode for found in sock_diag.list_tcp(sock_diag.LISTENING_STATE)},
        families,
        {family: netlink.reply_route(family) for family in families},
        {path: path.read_text().strip() for path in REPLY_SYSCTLS if path.exists()},
        [
            index
            for index in enrollment.accepting
            if accept_local.is_set(index) and accept_local.has_others(enrollment.pod.addresses)
        ],
    )


def _named(enrollment: Enrollment) -> str:
    return f"{enrollment.pod.namespace}/{enrollment.pod.name}"


def _has_interface(ifindex: int) -> bool:
    try:
        socket.if_indextoname(ifindex)
    except OSError:
        return False
    return True


async def _call(function: Callable[[], object]) -> None:
    function()


async def _mend_entry(opened: Map, drift: Drift[Packed, Packed], write: Record | None) -> None:
    if drift.expected is None:
        opened.delete(dict(drift.key))
    else:
        opened.put(dict(drift.key), write or dict(drift.expected))


def _add_reply_route(netns_fd: int, family: int) -> None:
    netns.run_in(netns_fd, partial(netlink.add_reply_route, family))


def _write_sysctl(netns_fd: int, path: Path) -> None:
    netns.run_in(netns_fd, partial(path.write_text, "1"))


def rows(findings: Iterable[tuple[Finding, str | None]], node: str) -> list[dict[str, object]]:
    """Return findings as the command line lists them, with what mending met."""
    return [
        {
            "node": node,
            "pod": finding.pod,
            "kind": finding.kind,
            "name": finding.name,
            "expected": finding.expected,
            "found": finding.found,
            "problem": problem,
        }
        for finding, problem in findings
    ]
