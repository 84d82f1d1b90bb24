"""Desired state against what is really there: maps, pins, links, listeners, rules, routes, sysctls.

Each thing that a pod of this node needs is looked at where the kernel keeps it, not where we noted
that we put it. A difference is named with what ought to be and what is, and knows how it is mended:
by doing again what enrollment does. Mending changes nothing that is right, so open connections go
on; only a listener that is gone needs the pod enrolled anew.

Called by the composition root for `sidestep diff` and `sidestep check --repair`. What another agent
on this kernel owns is in other pins and is not looked at.
"""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from agent import guard, netlink, netns, sock_diag
from agent.datapath import features, libbpf, links, listing, records
from agent.datapath.source import CGROUP_PROGRAMS, GUARD_PROGRAMS, PROGRAMS
from agent.enroll import REPLY_SYSCTLS, exclusion_entries
from agent.errors import KernelError, SidestepError
from agent.model.capture import REPLY_MARK
from agent.model.endpoint import endpoint
from agent.state.drift import Drift, compare

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator
    from pathlib import Path

    from agent.datapath.btf import Value
    from agent.datapath.maps import Map, Record
    from agent.datapath.pins import Pins
    from agent.datapath.records import ServicePorts
    from agent.enroll import Enrollment
    from agent.roster import Roster

Packed = tuple[tuple[str, "Value"], ...]
# Maps whose entries follow from the enrolled pods, and where a pod's cookie stands: in the key, or
# the value.
COOKIE_PLACES = {
    "ss_pods": ("key", "value"),
    "ss_pod_names": ("key", "value"),
    "ss_local": ("value", "value"),
    "ss_bypass": ("key", "netns_cookie"),
    "ss_ports": ("key", "netns_cookie"),
    "ss_listeners": ("key", "value"),
    "ss_guards": ("value", "value"),
}
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


class Inspection:
    """Looks at one node."""

    def __init__(
        self, pins: Pins, roster: Roster, services: Callable[[], ServicePorts], cgroup_root: Path
    ) -> None:
        """Look at nothing yet; `services()` are those that the kernel ought to know."""
        self._pins = pins
        self._roster = roster
        self._services = services
        self._cgroup_root = cgroup_root

    async def find(self) -> list[Finding]:
        """List every difference (KernelError if something cannot be looked at)."""
        found = [*self._pinned(), *self._cgroup_links(), *self._maps()]
        for enrollment in self._roster.enrollments():
            found += self._pod(enrollment)
            await asyncio.sleep(0)  # others of this process want their turn
        found += self._stray_links()
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

    async def repair(self) -> list[tuple[Finding, str | None]]:
        """Mend every difference; return each with why it could not be mended, None if it was."""
        results: list[tuple[Finding, str | None]] = []
        for finding in await self.find():
            try:
                await finding.mend()
            except (SidestepError, OSError) as error:
                results.append((finding, str(error)))
            else:
                results.append((finding, None))
        left = {(each.pod, each.kind, each.name) for each in await self.find()}
        return [
            (each, problem or ("it is so again" if _key(each) in left else None))
            for each, problem in results
        ]

    # -- maps ---------------------------------------------------------------------------------

    def _maps(self) -> Iterator[Finding]:
        expected = _Expected(self._pins)
        for enrollment in self._roster.enrollments():
            expected.add_pod(enrollment, is_strict=self._roster.is_strict(enrollment.pod))
        expected.add_services(self._services())
        draining = {each.netns_cookie for each in self._roster.draining()}
        names = listing.pod_names(self._pins.directory)
        names |= {
            each.netns_cookie: f"{each.pod.namespace}/{each.pod.name}"
            for each in (*self._roster.enrollments(), *self._roster.draining())
        }
        for name, entries in expected.entries.items():
            opened = self._pins.maps[name]
            observed = {
                key: _packed(value)
                for key, value in ((_packed(key), value) for key, value in opened.items())
                if _owner(name, key, _packed(value)) not in draining
            }
            for drift in compare(entries, observed):
                shown = drift.expected if drift.expected is not None else drift.found
                assert shown is not None
                owner = _owner(name, drift.key, shown)
                yield Finding(
                    names.get(owner, f"netns cookie {owner}") if owner is not None else None,
                    "map",
                    f"{name} {_text(_entry(name, drift.key, shown, names))}",
                    _value_text(name, drift.key, drift.expected, names),
                    _value_text(name, drift.key, drift.found, names),
                    partial(_mend_entry, opened, drift, expected.writes.get((name, drift.key))),
                )

    # -- pins and links -----------------------------------------------------------------------

    def _pinned(self) -> Iterator[Finding]:
        for name, opened in self._pins.maps.items():
            path = self._pins.directory / "maps" / name
            if not path.exists():
                mend = partial(_call, partial(libbpf.pin, opened.fd, path))
                yield Finding(None, "pin", name, str(path), None, mend)
        for name in PROGRAMS:
            path = self._pins.directory / "programs" / name
            if not path.exists():
                yield Finding(None, "pin", name, str(path), None, partial(_call, _give_up))

    def _cgroup_links(self) -> Iterator[Finding]:
        root = self._cgroup_root.stat().st_ino
        for name in CGROUP_PROGRAMS:
            path = self._pins.link_path(name)
            expected = f"{name} at {self._cgroup_root}"
            problem = self._link_problem(path, root, self._program_id(name))
            if problem is not None:
                yield Finding(
                    None,
                    "link",
                    name,
                    expected,
                    problem or None,
                    partial(_call, partial(self._attach, path)),
                )

    def _program_id(self, name: str) -> int | None:
        """Return the id of a pinned program; None if the pin is gone, which is told by itself."""
        try:
            fd = self._pins.program(name)
        except KernelError:
            return None
        try:
            return libbpf.program_facts(fd).id
        finally:
            os.close(fd)

    @staticmethod
    def _link_problem(path: Path, target: int, program_id: int | None) -> str | None:
        """Say what is wrong with a link; an empty text means that it is not there."""
        if not path.exists():
            return ""
        fd = libbpf.open_pin(path)
        try:
            facts = libbpf.link_facts(fd)
        finally:
            os.close(fd)
        if facts.target == 0:
            return "detached"
        if facts.target != target:
            return f"attached elsewhere: {facts.target}"
        if program_id is not None and facts.program_id != program_id:
            return f"another program: id {facts.program_id}"
        return None

    def _attach(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        links.attach_cgroup(self._pins, self._cgroup_root)

    def _stray_links(self) -> Iterator[Finding]:
        own = (*self._roster.enrollments(), *self._roster.draining())
        known = {each.netns_cookie for each in own}
        for cookie in links.looked_up_cookies(self._pins) - known:
            mend = partial(_call, partial(links.detach_lookup, self._pins, cookie))
            name = links.lookup_link_name(cookie)
            yield Finding(None, "link", name, None, "a link of no pod", mend)

    # -- one pod ------------------------------------------------------------------------------

    def _pod(self, enrollment: Enrollment) -> Iterator[Finding]:
        named = f"{enrollment.pod.namespace}/{enrollment.pod.name}"
        yield from self._lookup(named, enrollment)
        yield from self._guards(named, enrollment)
        try:
            inside = netns.run_in(enrollment.netns_fd, _look_inside)
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

    def _lookup(self, named: str, enrollment: Enrollment) -> Iterator[Finding]:
        cookie = enrollment.netns_cookie
        path = self._pins.link_path(links.lookup_link_name(cookie))
        if enrollment.pod.bypasses_inbound:
            if path.exists():
                mend = partial(_call, partial(links.detach_lookup, self._pins, cookie))
                yield Finding(named, "link", path.name, None, "attached", mend)
            return
        problem = self._link_problem(path, os.fstat(enrollment.netns_fd).st_ino, None)
        if problem is not None:

            async def attach() -> None:
                links.detach_lookup(self._pins, cookie)
                links.attach_lookup(self._pins, enrollment.netns_fd, cookie)

            yield Finding(named, "link", path.name, "attached", problem or None, attach)

    def _guards(self, named: str, enrollment: Enrollment) -> Iterator[Finding]:
        cookie = enrollment.netns_cookie
        for ifindex in guard.node_links(enrollment.netns_fd):
            mend = partial(_call, partial(guard.renew, self._pins, cookie, ifindex))
            if features.has_tcx():
                for name in GUARD_PROGRAMS:
                    path = links.guard_path(self._pins, name, cookie, ifindex)
                    problem = self._link_problem(path, ifindex, self._program_id(name))
                    if problem is not None:
                        yield Finding(named, "link", path.name, "attached", problem or None, mend)
                continue
            for name, parent in guard.PARENTS.items():
                found = netns.run_aside(partial(netlink.filter_program, ifindex, parent))
                expected = self._program_id(name)
                if found != expected:
                    text = None if found is None else f"program id {found}"
                    label = f"{name} at interface {ifindex}"
                    yield Finding(named, "filter", label, f"program id {expected}", text, mend)


@dataclass(slots=True)
class _Inside:
    """What is in a pod's namespace."""

    listening: set[int]  # inodes
    families: list[int]
    reply_routes: dict[int, tuple[bool, bool]]
    sysctls: dict[Path, str]


def _look_inside() -> _Inside:
    families: list[int] = [socket.AF_INET, *([socket.AF_INET6] if netns.has_ipv6() else [])]
    return _Inside(
        {found.inode for found in sock_diag.list_tcp(sock_diag.LISTENING_STATE)},
        families,
        {family: netlink.reply_route(family) for family in families},
        {path: path.read_text().strip() for path in REPLY_SYSCTLS if path.exists()},
    )


class _Expected:
    """The entries that each map ought to have."""

    def __init__(self, pins: Pins) -> None:
        self._pins = pins
        names = (*COOKIE_PLACES, "ss_services", "ss_endpoints")
        self.entries: dict[str, dict[Packed, Packed]] = {name: {} for name in names}
        # What to write where that is not what is read: a sockhash takes a descriptor.
        self.writes: dict[tuple[str, Packed], Record] = {}

    def add_pod(self, enrollment: Enrollment, *, is_strict: bool) -> None:
        pod, cookie = enrollment.pod, enrollment.netns_cookie
        own: Record = {"value": cookie}
        self._add("ss_pods", own, records.pod_record(pod, is_strict=is_strict))
        self._add("ss_pod_names", own, records.pod_name_record(pod))
        for name, key in exclusion_entries(enrollment):
            self._add(name, key, {"value": 1})
        for port in enrollment.plaintext_ports:
            key = records.port_key(cookie, port, records.PLAINTEXT)
            self._add("ss_ports", key, {"value": 1})
        for address in pod.addresses:
            self._add("ss_local", {"address": records.pack_address(address)}, own)
        for ifindex in guard.node_links(enrollment.netns_fd):
            self._add("ss_guards", {"value": ifindex}, own)
        for listener in enrollment.inbound:
            raw = listener.getsockopt(socket.SOL_SOCKET, netns.SO_COOKIE, 8)
            self._add("ss_listeners", own, {"value": int.from_bytes(raw, "little")})
            write: Record = {"value": listener.fileno()}
            self.writes["ss_listeners", self._key("ss_listeners", own)] = write

    def add_services(self, services: ServicePorts) -> None:
        for (address, port), endpoints in services.items():
            key = records.service_port_key(address, port)
            self._add("ss_services", key, {"value": len(endpoints)})
            for index, (host, target) in enumerate(endpoints):
                key = records.service_port_key(address, port, index)
                value: Record = {"address": records.pack_address(host), "port_be": target}
                self._add("ss_endpoints", key, value)

    def _key(self, name: str, key: Record) -> Packed:
        layout = self._pins.maps[name].key
        return _packed(layout.decode(layout.encode(**key)))

    def _add(self, name: str, key: Record, value: Record) -> None:
        layout = self._pins.maps[name].value
        self.entries[name][self._key(name, key)] = _packed(layout.decode(layout.encode(**value)))


def _packed(record: Record) -> Packed:
    return tuple(record.items())


def _owner(name: str, key: Packed, value: Packed) -> int | None:
    place = COOKIE_PLACES.get(name)
    if place is None:
        return None
    found = dict(key if place[0] == "key" else value)[place[1]]
    assert isinstance(found, int)
    return found


def _entry(name: str, key: Packed, value: Packed, names: listing.PodNames) -> listing.Row:
    return listing.describe_entry(name, dict(key), dict(value), names)


def _text(row: listing.Row) -> str:
    skipped = ("pod", "netns_cookie", "socket_cookie", "endpoints", "endpoint", "endpoint_port")
    return " ".join(f"{name}={row[name]}" for name in row if name not in skipped and row[name])


def _value_text(
    name: str, key: Packed, value: Packed | None, names: listing.PodNames
) -> str | None:
    if value is None:
        return None
    row = _entry(name, key, value, names) | {
        member: found for member, found in value if member == "is_strict"
    }
    return " ".join(f"{member}={found}" for member, found in row.items() if found is not None)


def _key(finding: Finding) -> tuple[str | None, str, str]:
    return finding.pod, finding.kind, finding.name


async def _call(function: Callable[[], object]) -> None:
    function()


def _give_up() -> None:
    raise KernelError(
        "a program's pin cannot be made again while others run: stop the agent, remove its pin "
        "directory and start it"
    )


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
