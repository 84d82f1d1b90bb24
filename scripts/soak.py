"""Let a lab of two nodes carry traffic of every kind for a while, and see that nothing stays.

Cycles of traffic with a silence after each. In a silence two connections of each path are open,
which last from the beginning to the end, and all others have ended: so descriptors, threads,
tunnels, connections and map entries must be those of the first silence, up to the last one. Memory
is compared over all silences: see MOST_GROWTH_KIB. Then the lab goes down and must leave nothing.

What happens meanwhile: new connections, transfers, half-closes, resets from either side, through
the tunnel and on the direct path; policies that close a pod and open it again; certificates renewed
every few seconds; a pod that leaves the mesh and comes back under traffic. A connection that should
have succeeded and did not fails the run, and so does one that a policy should have stopped.

    python -m scripts.soak [SECONDS]      needs root; exit code 1 and the reasons if it failed
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from agent import netns
from agent.datapath import listing
from agent.lab.lab import Lab
from agent.tunnel.sockets import LINGER_RESET
from tests.support.footprint import bpf_objects, files
from tests.support.labs import scrape
from tests.support.processes import descriptor_count, private_bytes, thread_count

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from agent.lab.cluster import LabNode

HOUR_SECONDS = 3600
CYCLE_SECONDS = 12.0
PROGRESS_SECONDS = 10.0
PATIENCE_SECONDS = 10.0
CERTIFICATE_SECONDS = 40  # renewed at half of it
WARM_CYCLES = 2  # what a process allocates once: a table, a codec, an arena of the allocator
# Private memory, from the first third of the silences to the last. A worker's heap has a high-water
# mark: windows of 2 MiB a stream come and go, and it keeps free blocks of up to 4 MiB at its end
# (agent/heap.py), so two of them are no leak; more is. An hour makes some 700,000
# conversations, and so shows what each of them keeps from 12 bytes on; two minutes, from 400.
MOST_GROWTH_KIB = 8192
LOOKS, LOOK_SECONDS = 10, 0.5  # for the first silence; a renewal takes descriptors for a moment
# LRU maps forget when they are full, sockets keep their own, and a counter is there from the first
# event of its kind on; every other map is counted.
UNCOUNTED = {"ss_verdicts", "ss_guard_flows", "ss_counters", "ss_captures"}

ECHO, ASK, RESET = 9000, 9001, 9002
BULK_BYTES = 2 << 20
MODE = "istio.io/dataplane-mode"
PODS = {"client": "east", "near": "east", "far": "west", "guarded": "west", "passing": "west"}
LEFTOVERS = ("/run/netns", "/sys/fs/bpf", "/run/sidestep", "/sys/class/net")


def pod(name: str) -> dict[str, Any]:
    """Return a pod's object."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "shop", "labels": {"app": name, MODE: "ambient"}},
        "spec": {"nodeName": PODS[name], "serviceAccountName": name},
    }


CLOSED = {
    "apiVersion": "security.istio.io/v1",
    "kind": "AuthorizationPolicy",
    "metadata": {"name": "closed", "namespace": "shop"},
    "spec": {"selector": {"matchLabels": {"app": "guarded"}}, "action": "DENY", "rules": [{}]},
}
CLUSTER = [
    *({"apiVersion": "v1", "kind": "Node", "metadata": {"name": n}} for n in ("east", "west")),
    {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}},
    *map(pod, PODS),
]


class Failed(Exception):
    """Something is not as it should be."""


@dataclass
class Tally:
    """What was done, and what failed, in one line each."""

    done: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def fail(self, line: str) -> None:
        self.failures.append(line)
        say(f"FAILED: {line}")

    async def attempt(self, kind: str, work: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await work
        except (OSError, EOFError, TimeoutError, Failed) as error:
            self.fail(f"{kind}: {error!r}")
            await asyncio.sleep(0.1)  # what fails at once must not fail a million times
        else:
            self.done[kind] += 1


Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Pods:
    """The lab's pods: sockets made here are theirs."""

    def __init__(self, lab: Lab, stack: ExitStack) -> None:
        self.address, self._netns = {}, {}
        for each in lab.cluster().pods:
            self.address[each.name] = str(each.address4)
            fd = netns.open_netns(lab.pod_netns(each))
            stack.callback(os.close, fd)
            self._netns[each.name] = fd

    def _socket(self, name: str) -> socket.socket:
        made = netns.run_in(self._netns[name], socket.socket)
        made.setblocking(False)
        return made

    async def dial(self, name: str, port: int = ECHO) -> Ends:
        """Connect as the client's application."""
        made = self._socket("client")
        try:
            await asyncio.get_running_loop().sock_connect(made, (self.address[name], port))
        except BaseException:
            made.close()
            raise
        return await asyncio.open_connection(sock=made)

    async def serve(self, name: str) -> None:
        """Serve all that this traffic asks for."""
        for port, handle in ((ECHO, _echo), (ASK, _answer), (RESET, _reset)):
            made = self._socket(name)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(("0.0.0.0", port))
            await asyncio.start_server(handle, sock=made, backlog=512)


@asynccontextmanager
async def ending(writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    """End a connection in order, or at once if something went wrong with it."""
    try:
        yield
    except BaseException:
        writer.transport.abort()
        raise
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        async with ending(writer):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        async with ending(writer):
            writer.write((await reader.read(-1))[::-1])


async def _reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        async with ending(writer):
            await reader.read(1)
            _reset_at_close(writer)


def _reset_at_close(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)


class Traffic:
    """The kinds of traffic; each is one conversation, and raises if that fails."""

    def __init__(self, pods: Pods) -> None:
        self._pods = pods
        self.by_kind: dict[str, Callable[[str], Awaitable[None]]] = {
            "short": self.short,
            "bulk": self.bulk,
            "half-close": self.half_close,
            "reset by client": self.reset_by_client,
            "reset by server": self.reset_by_server,
        }

    async def short(self, name: str) -> None:
        reader, writer = await self._pods.dial(name)
        async with ending(writer):
            await speak(reader, writer)

    async def bulk(self, name: str) -> None:
        reader, writer = await self._pods.dial(name)
        data = os.urandom(1 << 16) * (BULK_BYTES >> 16)

        async def send() -> None:
            writer.write(data)
            await writer.drain()
            writer.write_eof()

        async with ending(writer):
            _, received = await asyncio.gather(send(), reader.read(-1))
            if received != data:
                raise Failed(f"{len(received)} bytes came back of {len(data)}, or others")

    async def half_close(self, name: str) -> None:
        reader, writer = await self._pods.dial(name, ASK)
        async with ending(writer):
            writer.write(b"question")
            writer.write_eof()
            if (answer := await reader.read(-1)) != b"noitseuq":
                raise Failed(f"the answer is {answer!r}")

    async def reset_by_client(self, name: str) -> None:
        reader, writer = await self._pods.dial(name)
        async with ending(writer):
            await speak(reader, writer)
            _reset_at_close(writer)

    async def reset_by_server(self, name: str) -> None:
        reader, writer = await self._pods.dial(name, RESET)
        async with ending(writer):
            writer.write(b"x")
            try:
                await reader.read(1)
            except ConnectionResetError:
                return
            raise Failed("the reset did not arrive")

    async def stay(self, name: str, tally: Tally, kind: str, stop: asyncio.Event) -> None:
        """Hold one connection open and use it until `stop`."""
        try:
            reader, writer = await self._pods.dial(name)
            async with ending(writer):
                while not stop.is_set():
                    async with asyncio.timeout(PATIENCE_SECONDS):
                        await speak(reader, writer)
                    await asyncio.sleep(0.2)
        except (OSError, EOFError, TimeoutError) as error:
            tally.fail(f"{kind}: {error!r}")
        else:
            tally.done[kind] += 1


async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Say a word and hear it."""
    writer.write(b"word" * 100)
    await reader.readexactly(400)


class Changes:
    """What happens to the mesh while it carries traffic."""

    def __init__(self, lab: Lab, pods: Pods, traffic: Traffic) -> None:
        self._lab, self._pods, self._traffic = lab, pods, traffic
        self._passing = lab.find_pod("passing")

    async def policy(self) -> None:
        """Close a pod by a policy, and open it again."""
        reader, writer = await self._pods.dial("guarded")
        try:
            async with ending(writer):
                await speak(reader, writer)
                self._lab.write_object(CLOSED)
                with suppress(ConnectionResetError):
                    await reader.read(1)  # what was open is closed
            for _ in range(5):
                if await self._is_let_in():
                    raise Failed("a policy did not stop a connection")
        finally:
            self._lab.remove_object(CLOSED)
        while not await self._is_let_in():
            pass
        for _ in range(5):
            await self._traffic.short("guarded")

    async def _is_let_in(self) -> bool:
        try:
            await self._traffic.short("guarded")
        except (OSError, EOFError):
            return False
        return True

    async def membership(self) -> None:
        """Take a pod out of the mesh and back, while it is spoken to."""
        for mode in ("none", "ambient"):
            body = self._passing.manifest()
            labels = body["metadata"]["labels"] | {MODE: mode}
            self._lab.write_object(body | {"metadata": body["metadata"] | {"labels": labels}})
            while await asyncio.to_thread(self._is_enrolled) != (mode == "ambient"):
                await self._traffic.short("passing")
            for _ in range(5):
                await self._traffic.short("passing")

    def _is_enrolled(self) -> bool:
        state = next(self._lab.agent_states(self._passing.node, "state"))
        states = {each["uid"]: each["state"] for each in state["pods"]}
        return states.get(self._passing.uid) == "enrolled"


Holdings = dict[str, int]


class Meter:
    """What the agents hold."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._nodes = lab.cluster().nodes

    def _processes(self) -> Iterator[tuple[str, int]]:
        for node in self._nodes:
            agent = self._lab.agent_pid(node)
            for pid in self._lab.agent_processes(node):
                if pid == agent:
                    yield f"{node.name} control", pid
                elif b"agent.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    yield f"{node.name} worker {pid}", pid

    def memory(self) -> Holdings:
        """Return each process's private memory in KiB."""
        return {name: private_bytes(pid) >> 10 for name, pid in self._processes()}

    def holdings(self) -> Holdings:
        """Return descriptors, threads, tunnels, connections and map entries."""
        found: Holdings = {}
        for name, pid in self._processes():
            found[f"{name} descriptors"] = descriptor_count(pid)
            if "worker" in name:  # asyncio's pool in a control process grows, up to its limit
                found[f"{name} threads"] = thread_count(pid)
        for node in self._nodes:
            found |= self._of_node(node)
        return found

    def _of_node(self, node: LabNode) -> Holdings:
        found = {}
        for (name, labels), value in scrape(self._lab, node).items():
            if name in ("sidestep_connections_open", "sidestep_tunnels"):
                about = " ".join(value for _key, value in sorted(labels))
                found[f"{node.name} {name} {about}"] = int(value)
        for directory in (self._lab.pins / node.name).iterdir():
            for row in listing.list_maps(directory):
                entries = row["entries"]
                if isinstance(entries, int) and row["name"] not in UNCOUNTED:
                    found[f"{node.name} {row['name']}"] = entries
        return {key: value for key, value in found.items() if value}

    def renewals(self) -> int:
        """Return how many certificates were renewed."""
        states = [next(self._lab.agent_states(node, "state")) for node in self._nodes]
        return sum(int(state["identity"]["counters"]["renewed"]) for state in states)


def excess(first: Holdings, lowest: Holdings) -> str:
    """Return what there is more of than in the first silence, empty if nothing."""
    return ", ".join(
        f"{name} {first.get(name, 0)} -> {count}"
        for name, count in sorted(lowest.items())
        if count > first.get(name, 0)
    )


class Soak:
    """One run."""

    def __init__(self, lab: Lab, seconds: float, stack: ExitStack) -> None:
        self.tally = Tally()
        self._began = time.monotonic()
        self._seconds = seconds
        self._meter = Meter(lab)
        self._pods = Pods(lab, stack)
        self._traffic = Traffic(self._pods)
        self._changes = Changes(lab, self._pods, self._traffic)
        self._memory: list[Holdings] = []
        self._first: Holdings = {}
        self._is_over = asyncio.Event()

    async def run(self) -> None:
        """Go through the cycles and judge."""
        for name in PODS:
            if name != "client":
                await self._pods.serve(name)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._report())
            for name in ("near", "far"):
                for _ in range(2):
                    stay = self._traffic.stay(name, self.tally, f"from first to last {name}",
                                              self._is_over)  # fmt: skip
                    group.create_task(stay)
            number = 0
            while time.monotonic() - self._began < self._seconds:
                await self._cycle()
                await self._silence(number)
                number += 1
            self._is_over.set()
        self._judge_memory()
        renewed = await asyncio.to_thread(self._meter.renewals)
        say(f"certificates renewed: {renewed}")
        if not renewed:
            self.tally.fail("no certificate was renewed: run it longer")

    async def _cycle(self) -> None:
        stop = asyncio.Event()

        async def repeat(kind: str, work: Callable[[], Awaitable[None]], pause: float) -> None:
            while not stop.is_set():
                await self.tally.attempt(kind, work())
                await asyncio.sleep(pause)

        async with asyncio.TaskGroup() as group:
            for name in ("near", "far"):
                for kind, work in self._traffic.by_kind.items():
                    pause = 0.2 if kind == "bulk" else 0.01
                    group.create_task(repeat(f"{kind} {name}", lambda w=work, n=name: w(n), pause))  # type: ignore[misc]  # mypy cannot see a lambda's defaults
                for _ in range(4):
                    group.create_task(self._traffic.stay(name, self.tally, f"stay {name}", stop))
            group.create_task(repeat("policy", self._changes.policy, 0.5))
            group.create_task(repeat("membership", self._changes.membership, 0.5))
            await asyncio.sleep(CYCLE_SECONDS)
            stop.set()

    async def _silence(self, number: int) -> None:
        if number < WARM_CYCLES:
            return
        lowest = await asyncio.to_thread(self._meter.holdings)
        looks = 1
        while looks < LOOKS or excess(self._first, lowest):
            if looks > 4 * LOOKS:
                self.tally.fail(f"left behind: {excess(self._first, lowest)}")
                break
            await asyncio.sleep(LOOK_SECONDS)
            found = await asyncio.to_thread(self._meter.holdings)
            lowest = {name: min(count, found.get(name, 0)) for name, count in lowest.items()}
            looks += 1
            if not self._first and looks == LOOKS:
                self._first = lowest
        self._memory.append(await asyncio.to_thread(self._meter.memory))

    def _judge_memory(self) -> None:
        third = max(1, len(self._memory) // 3)
        names = self._memory[0].keys() if self._memory else ()
        for name in names:
            series = [each.get(name, 0) for each in self._memory]
            grown = statistics.median(series[-third:]) - statistics.median(series[:third])
            say(f"{name}: {series[0]} KiB of its own, then {grown:+.0f} KiB")
            if grown > MOST_GROWTH_KIB:
                self.tally.fail(f"{name} grew by {grown:.0f} KiB: {series}")

    async def _report(self) -> None:
        while not self._is_over.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._is_over.wait(), PROGRESS_SECONDS)
            memory = await asyncio.to_thread(self._meter.memory)
            sizes = " ".join(f"{value}" for value in memory.values())
            say(
                f"{time.monotonic() - self._began:5.0f} s  {self.tally.done.total()} conversations"
                f"  {len(self.tally.failures)} failures  KiB {sizes}"
            )


def say(line: str) -> None:
    """Write a line at once."""
    print(line, flush=True)  # noqa: T201  # the terminal is what it is for


def leftovers() -> set[str]:
    """Return what a lab could leave on this machine."""
    kept = {path for path in files(*map(Path, LEFTOVERS[:3])) if path != "/run/sidestep"}
    links = {str(path) for path in Path(LEFTOVERS[3]).iterdir()}
    return kept | links | {f"{kind} {name} {number}" for kind, number, name in bpf_objects()}


def wait_for_leftovers(before: set[str]) -> set[str]:
    """Return what is new after a while; the kernel frees programs a moment after their last use."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (new := leftovers() - before) and time.monotonic() < deadline:
        time.sleep(0.2)
    return new


def main() -> int:
    """Run for as many seconds as the only argument says, or for an hour."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else HOUR_SECONDS
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the lab goes down with it
    before = leftovers()
    lab = Lab(f"soak{os.getpid()}", CERTIFICATE_SECONDS)
    lab.agent_options = ("--tunnel-idle-timeout", "1")
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        description = Path(directory) / "cluster.yaml"
        description.write_text(yaml.safe_dump_all(CLUSTER))
        stack.callback(lab.down)
        lab.up(description, say)
        for node in lab.cluster().nodes:
            for state in lab.agent_states(node):
                if all(each["state"] == "enrolled" for each in state["pods"]) and state["pods"]:
                    break
        soak = Soak(lab, seconds, stack)
        asyncio.run(soak.run())
    failures = soak.tally.failures
    if new := wait_for_leftovers(before):
        soak.tally.fail(f"left on the machine: {', '.join(sorted(new))}")
    for kind, count in sorted(soak.tally.done.items()):
        say(f"{count:8} {kind}")
    say(f"{'failed' if failures else 'passed'} after {seconds:.0f} s, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
