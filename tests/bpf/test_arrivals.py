"""Pods that come and go while others wait: real enrollment, in namespaces of the test's own."""

from __future__ import annotations

import asyncio
import errno
import os
from contextlib import ExitStack
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agent import netlink, netns
from agent.arrivals import Arrivals
from agent.direct import DirectPath
from agent.enroll import REPLY_SYSCTLS
from agent.fleet import Fleet
from agent.model.pod import LocalPod
from agent.model.starting import StartingPod
from agent.model.workload import Workload
from agent.roster import Roster
from agent.state.store import Snapshot
from agent.tunnel import messages
from cni.protocol import CniError, Request
from tests.support.processes import descriptor_count

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from agent.datapath.pins import Pins

pytestmark = pytest.mark.root

NODE = "n1"
WEB, OTHER = "11111111-0000-4000-8000-000000000001", "11111111-0000-4000-8000-000000000002"


def pod_of(uid: str, name: str, address: str = "10.77.0.2", *, is_member: bool = True) -> Snapshot:
    """Return a state with one pod."""
    addresses = (ip_address(address),)
    workload = Workload(uid, "shop", name, NODE, name, addresses, is_hbone=is_member)
    local = LocalPod(uid, "shop", name, name, addresses)
    return Snapshot(workloads=(workload,), local_pods={NODE: (local,)} if is_member else {})


class Waiting(Fleet):
    """A fleet without workers that takes its time, if it is told to."""

    def __init__(self) -> None:
        super().__init__(list, lambda _identity: None, lambda _counts: None, lambda: None)
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()
        self.is_asked = asyncio.Event()

    async def wait_in_force(self) -> None:
        self.is_asked.set()
        await self.may_go_on.wait()


class Silent:
    """A source that says nothing by itself, and takes what is said to it."""

    def __init__(self) -> None:
        self.asked_for: StartingPod | None = None
        self.reported: list[str] = []

    async def ask_for_pod(self, _namespace: str, _name: str) -> StartingPod | None:
        return self.asked_for

    def publish(self, *_said: object) -> None: ...

    def report(self, _pod: LocalPod, reason: str, _note: str) -> None:
        self.reported.append(reason)


class Node:
    """The roster of a node, what brings pods to it, and what its states make of both."""

    def __init__(self, pins: Pins, stack: ExitStack, tasks: asyncio.TaskGroup) -> None:
        self._stack = stack
        self.tasks = tasks
        self.fleet = Waiting()
        self.source = Silent()
        self.direct = DirectPath(pins, "cluster.local", lambda _counts: None)
        stack.callback(self.direct.close)
        self.roster = Roster(
            pins, Path("/nonexistent"), self.fleet, self.direct,
            self.source, lambda _pod: None, lambda: None,  # type: ignore[arg-type]  # a part of one
        )  # fmt: skip
        stack.callback(self._end)
        self.passes_wanted = 0
        self.arrivals = Arrivals(
            NODE, self.source, self.roster,  # type: ignore[arg-type]  # as above
            self._on_arrived, lambda _uid: None, self._on_outdated,
        )  # fmt: skip

    def _end(self) -> None:
        self.roster.release_all()
        self.roster.drop_all()

    @staticmethod
    def _on_arrived(pod: StartingPod) -> LocalPod:
        assert pod.local is not None
        return pod.local

    def _on_outdated(self) -> None:
        self.passes_wanted += 1

    def sandbox(self) -> str:
        """Make the namespace of a sandbox, and return its path."""
        fd = netns.create()
        self._stack.callback(os.close, fd)
        netns.run_in(fd, lambda: netlink.set_up("lo"))
        return f"/proc/{os.getpid()}/fd/{fd}"

    async def add(
        self, uid: str, name: str, container: str, path: str, address: str = "10.77.0.2"
    ) -> Callable[[], Awaitable[None]] | None:
        request = replace(
            Request("ADD"), uid=uid, namespace="shop", name=name, container_id=container,
            netns=path, addresses=(ip_address(address),),
        )  # fmt: skip
        return await self.arrivals.serve(request)

    async def follow(self, told: Snapshot) -> None:
        """Make a pass by a state, as the composition root does."""
        state = self.arrivals.complete(told)
        self.arrivals.on_enforced(told)
        desired = {pod.uid: pod for pod in state.local_pods.get(NODE, ())}
        await self.roster.apply(desired, {each.uid for each in state.workloads})

    def addresses(self) -> dict[str, str]:
        """Return the address of each pod that is captured."""
        return {each.pod.name: str(each.pod.addresses[0]) for each in self.roster.enrollments()}


@pytest.fixture
def pins(loaded: Pins) -> Pins:
    return loaded


def run(pins: Pins, test: Callable[[Node], Awaitable[None]]) -> None:
    async def with_node() -> None:
        async with asyncio.TaskGroup() as tasks:
            with ExitStack() as stack:
                await test(Node(pins, stack, tasks))

    asyncio.run(with_node())


def test_add_that_fails_late_leaves_the_next_one_of_the_pod_alone(pins: Pins) -> None:
    async def check(node: Node) -> None:
        told = pod_of(WEB, "web")
        await node.follow(replace(told, workloads=(), local_pods={}, starting=(starting(told),)))
        async with node.roster.turn:  # another pod's enrollment
            first = node.tasks.create_task(error_of(node.add(WEB, "web", "c1", "/run/netns/gone")))
            await asyncio.sleep(0)
            second = node.tasks.create_task(error_of(node.add(WEB, "web", "c2", node.sandbox())))
            await asyncio.sleep(0)
        assert "/run/netns/gone" in await first
        assert await second == ""
        for _ in range(2):
            await node.follow(told)
            assert node.addresses() == {"web": "10.77.0.2"}

    run(pins, check)


async def error_of(command: Awaitable[object]) -> str:
    try:
        await command
    except CniError as error:
        return str(error)
    return ""


def starting(told: Snapshot) -> StartingPod:
    (workload,), local = told.workloads, told.local_pods.get(NODE, (None,))[0]
    return StartingPod(workload, local)


def test_pod_that_the_state_never_shows_stays_until_its_sandbox_ends(
    pins: Pins, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(node: Node) -> None:
        node.source.asked_for = starting(pod_of(WEB, "web"))
        other = pod_of(OTHER, "other", is_member=False)
        await node.follow(other)
        path = node.sandbox()
        await node.add(WEB, "web", "c1", path)
        loop = asyncio.get_running_loop()
        began = loop.time()
        for passed in (0, 3600):  # seconds
            monkeypatch.setattr(loop, "time", lambda passed=passed: began + passed)
            await node.follow(other)
            assert node.addresses() == {"web": "10.77.0.2"}
        ended = replace(Request("DEL"), uid=WEB, container_id="c1", netns=path)
        await node.arrivals.serve(ended)
        await node.follow(other)
        assert node.addresses() == {}

    run(pins, check)


def test_pod_that_an_agent_before_brought_stays_until_its_sandbox_ends(pins: Pins) -> None:
    async def check(node: Node) -> None:
        told = pod_of(WEB, "web")
        other = pod_of(OTHER, "other", is_member=False)
        path = node.sandbox()
        node.arrivals.on_enforced(other)
        await node.roster.bring(told.local_pods[NODE][0], Path(path))
        node.source.asked_for = starting(told)
        await node.arrivals.inherit(each.pod for each in node.roster.enrollments())
        for _ in range(2):
            await node.follow(other)
            assert node.addresses() == {"web": "10.77.0.2"}
        await node.arrivals.serve(replace(Request("DEL"), uid=WEB, container_id="c1", netns=path))
        await node.follow(other)
        assert node.addresses() == {}

    run(pins, check)


def test_pod_that_the_state_has_shown_goes_with_it(pins: Pins) -> None:
    async def check(node: Node) -> None:
        node.source.asked_for = starting(pod_of(WEB, "web"))
        await node.follow(Snapshot())
        await node.add(WEB, "web", "c1", node.sandbox())
        await node.follow(pod_of(WEB, "web"))
        assert node.addresses() == {"web": "10.77.0.2"}
        await node.follow(Snapshot())
        assert node.addresses() == {}

    run(pins, check)


def known_uids(node: Node, told: Snapshot) -> set[str]:
    return {each.uid for each in node.arrivals.complete(told).workloads}


def test_pod_whose_next_sandbox_passes_the_plugin_by_is_known_all_the_same(pins: Pins) -> None:
    async def check(node: Node) -> None:
        told = pod_of(WEB, "web")
        await node.follow(told)
        path = node.sandbox()
        await node.add(WEB, "web", "c1", path)
        await node.arrivals.serve(replace(Request("DEL"), uid=WEB, container_id="c1", netns=path))
        assert known_uids(node, told) == set()  # the state has not heard of the end
        assert known_uids(node, pod_of(WEB, "web", "10.77.0.9")) == {WEB}
        assert known_uids(node, told) == {WEB}

    run(pins, check)


def test_pod_whose_sandbox_failed_is_known_when_it_runs(pins: Pins) -> None:
    async def check(node: Node) -> None:
        told = pod_of(WEB, "web")
        begun = replace(told, workloads=(), local_pods={}, starting=(starting(told).at(()),))
        await node.follow(begun)
        assert "/run/netns/gone" in await error_of(node.add(WEB, "web", "c1", "/run/netns/gone"))
        assert known_uids(node, begun) == set()
        assert known_uids(node, told) == {WEB}

    run(pins, check)


def test_sandbox_that_comes_during_a_pass_is_not_taken_for_the_one_before(pins: Pins) -> None:
    async def check(node: Node) -> None:
        told = pod_of(WEB, "web")
        await node.follow(told)
        await node.add(WEB, "web", "c1", node.sandbox())
        (before,) = node.roster.enrollments()
        node.fleet.may_go_on.clear()
        # Another pod comes first, and takes its time.
        pods = {
            "a": replace(before.pod, uid=OTHER, name="a", addresses=(ip_address("10.77.0.3"),)),
            WEB: replace(before.pod, may_go_direct=False),
        }
        bringing = node.tasks.create_task(node.roster.bring(pods["a"], Path(node.sandbox())))
        await node.fleet.is_asked.wait()
        passing = node.tasks.create_task(node.roster.apply({WEB: pods[WEB]}, {WEB}))
        adding = node.tasks.create_task(node.add(WEB, "web", "c2", node.sandbox(), "10.77.0.9"))
        await asyncio.sleep(0)
        node.fleet.may_go_on.set()
        await asyncio.gather(bringing, passing, adding)
        assert node.addresses()["web"] == "10.77.0.9"

    run(pins, check)


def test_label_that_is_taken_off_while_add_waits_counts(pins: Pins) -> None:
    async def check(node: Node) -> None:
        await node.follow(pod_of(WEB, "web"))
        without = pod_of(WEB, "web", is_member=False)
        async with node.roster.turn:
            adding = node.tasks.create_task(node.add(WEB, "web", "c1", node.sandbox()))
            await asyncio.sleep(0)
            await node.follow(without)
        await adding
        assert node.passes_wanted == 1
        await node.follow(without)
        assert node.addresses() == {}
        await node.add(WEB, "web", "c2", node.sandbox())
        assert node.passes_wanted == 1

    run(pins, check)


@pytest.mark.parametrize("how", ["abandon", "release"])
def test_add_that_is_cancelled_leaves_a_pod_that_can_be_let_go(pins: Pins, how: str) -> None:
    async def check(node: Node) -> None:
        node.fleet.may_go_on.clear()
        adding = node.tasks.create_task(
            node.roster.bring(pod_of(WEB, "web").local_pods[NODE][0], Path(node.sandbox()))
        )
        await node.fleet.is_asked.wait()
        adding.cancel()
        await asyncio.gather(adding, return_exceptions=True)
        (enrollment,) = node.roster.enrollments()
        os.fstat(enrollment.netns_fd)
        if how == "abandon":
            left = enrollment.capture.pop_all()  # what the next agent would take over
            node.roster.abandon()
            left.close()
        else:
            node.roster.release_all()
            node.roster.drop_all()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(enrollment.netns_fd)

    run(pins, check)


def test_pod_that_drains_is_nobodys_once_all_are_abandoned(pins: Pins) -> None:
    async def check(node: Node) -> None:
        failed: list[object] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda _loop, context: failed.append(context)
        )
        await node.follow(pod_of(WEB, "web"))
        await node.add(WEB, "web", "c1", node.sandbox())
        node.roster.release_all()
        node.roster.abandon()
        for _ in range(3):  # what the fleet was asked to say about it comes now
            await asyncio.sleep(0)
        assert failed == []

    run(pins, check)


def test_pod_without_a_veth_is_unguarded_and_shown_so_unless_it_is_contested(
    pins: Pins, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(node: Node) -> None:
        may_go_direct = []

        def tell(message: object, _fds: object = None) -> None:
            if isinstance(message, messages.AddPod):
                may_go_direct.append(message.pod.may_go_direct)

        monkeypatch.setattr(node.fleet, "tell", tell)
        await node.follow(pod_of(WEB, "web"))
        settle = await node.add(WEB, "web", "c1", node.sandbox())
        assert settle is not None
        await settle()
        assert may_go_direct == [True, False]
        status = node.roster.statuses[WEB]
        text = status.detail
        for contested, shown in (
            ({}, ("unguarded", text)),
            ({"shop/web": "who?"}, ("contested", "who?")),
            ({}, ("unguarded", text)),
        ):
            node.roster.contest(contested)
            assert (status.state, status.reason, status.detail) == ("enrolled", *shown)
        assert node.source.reported == ["unguarded", "contested", "unguarded"]

    run(pins, check)


def test_pod_that_comes_back_while_it_drains_gets_its_own_sysctls_in_the_end(pins: Pins) -> None:
    async def check(node: Node) -> None:
        path = node.sandbox()
        accept, *reflect = REPLY_SYSCTLS
        own = {accept: "0\n"} | dict.fromkeys(reflect, "1\n")

        def write() -> None:
            for sysctl, text in own.items():
                sysctl.write_text(text)

        def read() -> dict[Path, str]:
            return {sysctl: sysctl.read_text() for sysctl in own}

        fd = int(path.rpartition("/")[2])
        netns.run_in(fd, write)
        await node.follow(pod_of(WEB, "web"))
        await node.add(WEB, "web", "c1", path)
        await node.follow(pod_of(WEB, "web", is_member=False))
        (draining,) = node.roster.draining()
        await node.roster.bring(draining.pod, Path(path))
        assert netns.run_in(fd, read) == dict.fromkeys(own, "1\n")
        node.roster.release_all()
        node.roster.drop_all()
        assert netns.run_in(fd, read) == own

    run(pins, check)


def test_want_of_descriptors_is_a_failure_of_one_pod(
    pins: Pins, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(node: Node) -> None:
        path = node.sandbox()

        def find(*_pod: object) -> int:
            return os.open(path, os.O_RDONLY)

        def refuse(*_pod: object) -> None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        monkeypatch.setattr("agent.sandbox.open_netns", find)
        monkeypatch.setattr(node.direct, "add_pod", refuse)
        before = descriptor_count(os.getpid())
        for place in ("the namespace is there", "the namespace is not there"):
            await node.follow(pod_of(WEB, "web"))
            status = node.roster.statuses.pop(WEB)
            assert (status.state, "Too many open files" in status.detail) == ("failed", True), place
            assert node.addresses() == {}
            assert descriptor_count(os.getpid()) == before
            monkeypatch.setattr("agent.sandbox.open_netns", refuse)

    run(pins, check)
