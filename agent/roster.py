"""The pods of this node: who is captured, how each fares, who drains.

    wanted -> diff with what is captured -> enroll | unenroll -> tell the workers -> publish
    heritage -> the next agent's inherit, then abandon here

One pod's failure is that pod's: it is logged, counted, shown by the admin socket and on the pod
itself, and tried again when the pod changes or some time has passed.

Called by the composition root, one call of `apply` at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from agent import netns, sandbox
from agent.datapath import links
from agent.enroll import (
    NOTHING_INHERITED,
    Inherited,
    abandon,
    attach_guard,
    enroll,
    exceptions,
    hand_over,
    inherit_draining,
    release,
    set_strict,
    unenroll,
)
from agent.errors import (
    Contested,
    EnrollError,
    KernelError,
    MapError,
    SandboxNotFound,
    SidestepError,
    Unguarded,
)
from agent.inheritance import Inheritance
from agent.state.diff import Enroll, Unenroll, diff
from agent.tunnel import messages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from agent.datapath.pins import Pins
    from agent.direct import DirectPath
    from agent.discovery.source import Source
    from agent.enroll import Enrollment
    from agent.fleet import Fleet, Told
    from agent.model.pod import LocalPod

log = logging.getLogger(__name__)
RETRY_SECONDS = 1.0
LONGEST_RETRY_SECONDS = 30.0
PATIENT_TRIES = 10
DNS_NOT_CAPTURED = (
    "the pod asks for ambient.istio.io/dns-capture, and this version has no DNS proxy: its names "
    "are resolved by the cluster's DNS as without the mesh; its TCP connections are captured"
)
UNGUARDED = (
    "the pod has no veth to the node, so no guard sees its packets: what its raw sockets send, and "
    "its plaintext connections from before enrollment, are not dropped; pods of this node are "
    "reached by tunnel instead of the direct path; its TCP connections are captured as any pod's"
)


@dataclass
class PodStatus:
    """How one pod of this node fares."""

    pod: LocalPod
    state: str  # pending, enrolled, failed
    reason: str = ""
    detail: str = ""
    failures: int = 0
    retry_at: float | None = None  # of the event loop's clock


class Roster:
    """The pods of one node that take part, or are to."""

    def __init__(
        self,
        pins: Pins,
        pod_cgroups: Path,
        fleet: Fleet,
        direct: DirectPath,
        source: Source,
        plaintext_ports: Callable[[LocalPod], frozenset[int] | None],
        on_gone: Callable[[], None],
    ) -> None:
        """Know no pod yet.

        `plaintext_ports(pod)` are the only ports at which a STRICT pod takes plaintext, None for a
        pod that is not STRICT. `on_gone()` when the last connection of a pod that left has ended.
        """
        self._pins = pins
        self._pod_cgroups = pod_cgroups
        self._fleet = fleet
        self._direct = direct
        self._source = source
        self._plaintext_ports = plaintext_ports
        self._on_gone = on_gone
        self._enrolled: dict[str, Enrollment] = {}
        self._draining: dict[str, Enrollment] = {}
        # Held for one step of one pod: the runtime brings pods while `apply` goes through others,
        # and a successor wants all of them at once.
        self.turn = asyncio.Lock()
        self._coming: set[str] = set()
        self._is_leaving = False  # nobody is taken in any more
        self._drained: set[str] = set()  # of those that drain, but an elder may still serve them
        self._has_elders = False
        self._let_go_of_one = asyncio.Event()
        self.statuses: dict[str, PodStatus] = {}
        self.failures: Counter[str] = Counter()  # tries that failed, by reason

    def captured(self) -> set[str]:
        """Return the uids of the pods that are captured."""
        return set(self._enrolled)

    def enrollments(self) -> list[Enrollment]:
        """List the pods that are captured, as they are enrolled."""
        return list(self._enrolled.values())

    def unguarded(self) -> set[str]:
        """Return the uids of the captured pods that no guard can see."""
        return {uid for uid, enrollment in self._enrolled.items() if enrollment.is_unguarded}

    def draining(self) -> list[Enrollment]:
        """List the pods that have left and still have connections."""
        return list(self._draining.values())

    def is_strict(self, pod: LocalPod) -> bool:
        """Say whether the kernel is to hold plaintext off a pod."""
        return not pod.bypasses_inbound and self._plaintext_ports(pod) is not None

    async def try_now(self, uid: str) -> None:
        """Try a pod that failed at once (EnrollError says why it fails again)."""
        status = self.statuses[uid]
        await self._enroll(status.pod)
        status = self.statuses[uid]
        if status.state != "enrolled":
            raise EnrollError(status.detail)

    async def redo(self, uid: str) -> None:
        """Take a pod out and in again; its open connections through the agent end."""
        enrollment = self._enrolled.get(uid)
        if enrollment is not None:
            self._unenroll(uid, has_ended=True)
            self.statuses[uid] = PodStatus(enrollment.pod, "pending")
            await self.try_now(uid)

    def contest(self, texts: Mapping[str, str]) -> None:
        """Say of the enrolled pods whose capture does not stay as it is made; by namespace/name."""
        for uid, status in self.statuses.items():
            text = texts.get(f"{status.pod.namespace}/{status.pod.name}", "")
            reason, text = (Contested.reason, text) if text else self._lack(uid)
            if status.state == "enrolled" and text != status.detail:
                status.reason, status.detail = reason, text
                if text:
                    self._source.report(status.pod, reason, text)

    def next_retry(self) -> float | None:
        """Return when a pod that failed is due again, by the event loop's clock."""
        due = [status.retry_at for status in self.statuses.values() if status.retry_at]
        return min(due, default=None)

    async def apply(self, desired: dict[str, LocalPod], alive: set[str]) -> None:
        """Make the captured pods the desired ones, by uid; `alive` are the uids of all that run."""
        for uid in self.statuses.keys() - desired.keys() - self._enrolled.keys():
            self._source.publish(self.statuses.pop(uid).pod, None)
        for uid in self._draining.keys() - alive:
            self._fleet.expect_no_more(uid)
            self._end_drain(uid)
        observed = {uid: enrollment.pod for uid, enrollment in self._enrolled.items()}
        for step in diff(desired, observed):
            match step:
                case Unenroll():
                    async with self.turn:
                        enrollment = self._enrolled.get(step.uid)
                        # If not, the runtime has brought it anew since this was decided.
                        if enrollment is not None and enrollment.pod is observed[step.uid]:
                            self._unenroll(step.uid, has_ended=step.uid not in alive)
                case Enroll() if self._is_due(step.pod):
                    async with self.turn:
                        known = self._enrolled.keys() | self._coming
                        if step.pod.uid not in known and not self._is_leaving:
                            await self._enroll(step.pod)
                case Enroll():
                    pass

    async def bring(self, pod: LocalPod, netns_path: Path) -> None:
        """Enroll a pod whose sandbox the runtime has just made (EnrollError); `settle` follows.

        One that is enrolled in another sandbox, or otherwise, is so no more.
        """
        self._coming.add(pod.uid)
        try:
            async with self.turn:
                await self._bring(pod, netns_path)
        finally:
            self._coming.discard(pod.uid)

    async def _bring(self, pod: LocalPod, netns_path: Path) -> None:
        failed = f"{pod.namespace}/{pod.name} was not enrolled"
        if self._is_leaving:
            raise EnrollError(f"{failed}: this agent is about to end; the next one does it")
        try:
            netns_fd = netns.open_netns(netns_path)
        except OSError as error:
            raise SandboxNotFound(f"{failed}: {netns_path}: {error.strerror}") from error
        with contextlib.ExitStack() as unless_taken:
            unless_taken.callback(os.close, netns_fd)
            try:
                cookie = netns.netns_cookie(netns_fd)
            except KernelError as error:
                raise SandboxNotFound(f"{failed}: {netns_path}: {error}") from error
            before = self._enrolled.get(pod.uid)
            if before is not None:
                if before.netns_cookie == cookie and before.pod == pod:
                    return
                self._unenroll(pod.uid, has_ended=True)
            inherited = await self._take_back(pod.uid)
            self._take(enroll(self._pins, pod, netns_fd, inherited, is_guarded=False))
            unless_taken.pop_all()
        await self._confirm(pod)

    async def settle(self, uid: str) -> None:
        """Guard a pod that was brought: in a thread, since nobody waits for it."""
        async with self.turn:
            enrollment = self._enrolled.get(uid)
            if enrollment is None or enrollment.is_complete:
                return
            try:
                await asyncio.to_thread(attach_guard, self._pins, enrollment)
            except SidestepError as error:
                pod = enrollment.pod
                self._unenroll(uid, has_ended=True)
                self._put_off(pod, error)
                return
            if enrollment.is_unguarded:
                # So far it was one that may go direct; its connections go on.
                self._fleet.tell(messages.RemovePod(uid, comes_back=True))
                self._fleet.tell(*_added(enrollment))
                await self._fleet.wait_in_force()
                self._direct.add_pod(
                    enrollment.netns_cookie, enrollment.served, enrollment.netns_fd
                )
                self._show_enrolled(enrollment.pod)

    async def take_out(self, uid: str) -> None:
        """Unenroll a pod whose sandbox ends, at once: nobody is left whose connections could."""
        async with self.turn:
            if uid in self._enrolled:
                self._unenroll(uid, has_ended=True)

    def cookie(self, uid: str) -> int | None:
        """Return the cookie of the namespace in which a pod is enrolled; None if it is not."""
        enrollment = self._enrolled.get(uid)
        return None if enrollment is None else enrollment.netns_cookie

    def problem(self, uid: str) -> str:
        """Say what is missing of a pod's capture, by the kernel's own word; empty if nothing."""
        enrollment = self._enrolled.get(uid)
        if enrollment is None:
            status = self.statuses.get(uid)
            return f"it is not enrolled: {status.detail if status else 'nobody asked for it'}"
        cookie = enrollment.netns_cookie
        if self._pins.maps["ss_pods"].get({"value": cookie}) is None:
            return "outbound is not captured: ss_pods has no entry for it"
        if not enrollment.pod.bypasses_inbound and cookie not in set(
            links.looked_up_cookies(self._pins)
        ):
            return "inbound is not captured: the link of the lookup program is gone"
        return ""

    def guard(self) -> None:
        """Tell the kernel which pods are STRICT now."""
        for enrollment in self._enrolled.values():
            self._guard(enrollment)

    def introduction(self) -> Iterator[Told]:
        """Yield what a new worker has to be told."""
        for enrollment in self._enrolled.values():
            yield _added(enrollment)

    def exceptions(self) -> set[tuple[str, bytes]]:
        """Return what is not captured of the pods that are; see `enroll.exceptions`."""
        found = (exceptions(self._pins, enrollment) for enrollment in self._enrolled.values())
        return set().union(*found)

    # -- from one agent to the next -----------------------------------------------------------

    def heritage(self) -> Iterator[tuple[Inheritance, list[int]]]:
        """Yield what a successor needs of each pod, and the descriptors, which stay ours."""
        for enrollment in (*self._enrolled.values(), *self._draining.values()):
            inheritance = Inheritance(
                enrollment.pod,
                enrollment.netns_cookie,
                tuple(port for port, _listener in enrollment.listeners),
                enrollment.pod.uid in self._draining,
                {str(path): text for path, text in enrollment.sysctls.items()},
            )
            yield inheritance, _descriptors(enrollment)

    def inherit(
        self, heritage: Iterable[tuple[Inheritance, list[int]]], desired: dict[str, LocalPod]
    ) -> None:
        """Serve what an agent hands over, beside it; its descriptors are ours now.

        A pod is taken as it is desired, so that nothing has to be undone for what changed.
        """
        for inheritance, fds in heritage:
            netns_fd, *listener_fds = fds
            listeners = [socket.socket(fileno=fd) for fd in listener_fds]
            inherited = Inherited(
                list(zip(inheritance.ports, listeners, strict=True)),
                {Path(name): text for name, text in inheritance.sysctls.items()},
            )
            cookie, pod = inheritance.netns_cookie, inheritance.pod
            if inheritance.is_draining:
                enrollment = inherit_draining(pod, netns_fd, cookie, inherited)
                self._fleet.tell(*_added(enrollment))
                self._expect_drained(enrollment)
                continue
            pod = desired.get(pod.uid, pod)
            try:
                self._take(enroll(self._pins, pod, netns_fd, inherited))
            except SidestepError as error:
                os.close(netns_fd)
                self._put_off(pod, error)
                continue
            self._show_enrolled(pod)

    def wait_for_elders(self, has_elders: bool) -> None:
        """Say whether an agent before us still serves connections, which need the reply routes."""
        self._has_elders = has_elders
        if not has_elders:
            for uid in list(self._drained):
                self._end_drain(uid)

    def abandon(self) -> None:
        """Listen no more, and leave every pod captured: closed, or the successor's."""
        self._is_leaving = True
        for uid in self._draining:
            self._fleet.expect_no_more(uid)
        for enrollment in (*self._enrolled.values(), *self._draining.values()):
            abandon(enrollment)
            os.close(enrollment.netns_fd)
        self._enrolled.clear()
        self._draining.clear()
        self._drained.clear()

    def release_all(self) -> None:
        """Take every pod out; what is open goes on until `drop_all`, or until all is drained."""
        self._is_leaving = True
        for uid in list(self._enrolled):
            self._unenroll(uid, has_ended=False)

    async def wait_drained(self) -> None:
        """Wait until no pod drains any more."""
        while self._draining:
            self._let_go_of_one.clear()
            await self._let_go_of_one.wait()

    def drop_all(self) -> None:
        """Undo what is left of pods that drain."""
        for uid in list(self._draining):
            self._fleet.expect_no_more(uid)
            self._end_drain(uid)

    def _is_due(self, pod: LocalPod) -> bool:
        """Whether to try a pod now: it is new or changed, or has waited after a failure."""
        status = self.statuses.get(pod.uid)
        if status is None or status.pod != pod or status.retry_at is None:
            return True
        return status.retry_at <= asyncio.get_running_loop().time()

    async def _enroll(self, pod: LocalPod) -> None:
        try:
            with contextlib.ExitStack() as unless_taken:
                netns_fd = sandbox.open_netns(pod, self._pod_cgroups)
                unless_taken.callback(os.close, netns_fd)
                inherited = await self._take_back(pod.uid)
                self._take(enroll(self._pins, pod, netns_fd, inherited))
                unless_taken.pop_all()
        except SidestepError as error:
            self._put_off(pod, error)
        except OSError as error:  # for want of descriptors
            self._put_off(pod, EnrollError(f"{pod.namespace}/{pod.name} was not enrolled: {error}"))
        else:
            await self._confirm(pod)

    async def _confirm(self, pod: LocalPod) -> None:
        """Say that a pod is in, when the workers serve it."""
        await self._fleet.wait_in_force()
        self._source.publish(pod, "enabled")
        log.info("pod enrolled", extra=_named(pod))
        self._show_enrolled(pod)
        if pod.dns_capture:
            self._source.report(pod, "dns_not_captured", DNS_NOT_CAPTURED)

    def _show_enrolled(self, pod: LocalPod) -> None:
        reason, text = self._lack(pod.uid)
        self.statuses[pod.uid] = PodStatus(pod, "enrolled", reason, text)
        if reason:
            log.warning("pod not guarded", extra=_named(pod) | {"error": text, "reason": reason})
            self._source.report(pod, reason, text)

    def _lack(self, uid: str) -> tuple[str, str]:
        """Say what an enrolled pod has to do without: reason and text, both empty if nothing."""
        enrollment = self._enrolled.get(uid)
        if enrollment is None or not enrollment.is_unguarded:
            return "", ""
        return Unguarded.reason, UNGUARDED

    def _take(self, enrollment: Enrollment) -> None:
        """Have a pod from now on, and its namespace's descriptor (EnrollError: neither)."""
        pod = enrollment.pod
        try:
            self._direct.add_pod(enrollment.netns_cookie, enrollment.served, enrollment.netns_fd)
        except OSError as error:  # for want of descriptors
            unenroll(enrollment)
            raise EnrollError(f"{pod.namespace}/{pod.name} was not enrolled: {error}") from error
        self._enrolled[pod.uid] = enrollment
        self._guard(enrollment)
        self._fleet.tell(*_added(enrollment))

    def _put_off(self, pod: LocalPod, error: SidestepError) -> None:
        state = "pending" if isinstance(error, SandboxNotFound) else "failed"
        before = self.statuses.get(pod.uid)
        failures = before.failures + 1 if before else 1
        # A sandbox is on its way; of anything else each failure makes the next try later.
        wait = min(RETRY_SECONDS * 2 ** (failures - 1), LONGEST_RETRY_SECONDS)
        wait = RETRY_SECONDS if state == "pending" else wait
        retry_at = asyncio.get_running_loop().time() + wait
        self.statuses[pod.uid] = PodStatus(pod, state, error.reason, str(error), failures, retry_at)
        if before is None or before.state == "enrolled":  # else it is said already
            self._source.publish(pod, "pending")
        self.failures[error.reason] += 1
        # A sandbox that is on its way is no problem of the pod, for a while.
        if state == "failed" or failures > PATIENT_TRIES:
            self._source.report(pod, error.reason, str(error))
        if before is None or before.detail != str(error):
            log.warning("pod not enrolled", extra=_named(pod) | {"error": str(error)})

    def _guard(self, enrollment: Enrollment) -> None:
        """Hold plaintext that is not captured off a STRICT pod, too."""
        # None: it is not STRICT, or wants plaintext that nobody looked at.
        pod = enrollment.pod
        ports = None if pod.bypasses_inbound else self._plaintext_ports(pod)
        try:
            set_strict(
                self._pins, enrollment, is_strict=ports is not None, but=ports or frozenset()
            )
        except MapError as error:
            fields = _named(pod) | {"error": str(error)}
            log.error("the guard does not know the pod's mode", extra=fields)

    def _unenroll(self, uid: str, *, has_ended: bool) -> None:
        """Take a pod out: at once if it has ended, else when its connections have."""
        enrollment = self._enrolled.pop(uid)
        pod = enrollment.pod
        self._source.publish(pod, None)
        self._direct.remove_pod(enrollment.netns_cookie)
        self.statuses.pop(uid, None)
        if has_ended:
            self._let_go(enrollment)
        else:
            self._drain(enrollment)
        log.info("pod unenrolled", extra=_named(pod))

    def _drain(self, enrollment: Enrollment) -> None:
        try:
            release(enrollment)
        except (SidestepError, OSError) as error:
            # Its other steps are done, and the other pods are not affected.
            fields = _named(enrollment.pod) | {"error": str(error)}
            log.error("pod not unenrolled cleanly", extra=fields)
        self._expect_drained(enrollment)

    def _expect_drained(self, enrollment: Enrollment) -> None:
        uid = enrollment.pod.uid
        self._draining[uid] = enrollment
        self._fleet.expect_drained(uid, lambda: self._on_drained(uid))
        self._fleet.tell(messages.DrainPod(uid))

    def _on_drained(self, uid: str) -> None:
        self._drained.add(uid)
        if not self._has_elders:
            self._end_drain(uid)

    def _end_drain(self, uid: str) -> None:
        self._drained.discard(uid)
        self._let_go(self._draining.pop(uid))
        self._let_go_of_one.set()
        self._on_gone()

    async def _take_back(self, uid: str) -> Inherited:
        """Free 15008 of a pod that comes back while it drains; its connections go on."""
        enrollment = self._draining.pop(uid, None)
        if enrollment is None:
            return NOTHING_INHERITED
        self._drained.discard(uid)
        self._fleet.expect_no_more(uid)
        self._fleet.tell(messages.RemovePod(uid, comes_back=True))
        await self._fleet.wait_in_force()
        inherited = hand_over(enrollment)
        os.close(enrollment.netns_fd)
        return inherited

    def _let_go(self, enrollment: Enrollment) -> None:
        """Undo all that is left of an enrollment."""
        self._fleet.tell(messages.RemovePod(enrollment.pod.uid))
        fields = _named(enrollment.pod)
        try:
            unenroll(enrollment)
            log.info("pod has nothing of ours any more", extra=fields)
        except (SidestepError, OSError) as error:
            log.error("pod not unenrolled cleanly", extra=fields | {"error": str(error)})
        finally:
            os.close(enrollment.netns_fd)


def _named(pod: LocalPod) -> dict[str, str]:
    return {"pod": f"{pod.namespace}/{pod.name}"}


def _added(enrollment: Enrollment) -> Told:
    ports = tuple(port for port, _listener in enrollment.listeners)
    message = messages.AddPod(enrollment.served, enrollment.netns_cookie, ports)
    return message, _descriptors(enrollment)


def _descriptors(enrollment: Enrollment) -> list[int]:
    return [enrollment.netns_fd, *(each.fileno() for _port, each in enrollment.listeners)]
