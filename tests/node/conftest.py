"""Two pods in the mesh, each served by a worker process of its own, joined by a link."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from agent.enroll import Enrollment, enroll, unenroll
from agent.identity.local import LocalAuthority
from agent.lab.lab import DEFAULT_CLUSTER, Lab
from agent.model.capture import HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT
from agent.model.identity import SpiffeId
from agent.model.pod import LocalPod
from agent.model.workload import Workload
from agent.tunnel import messages
from tests.support.namespaces import PEER4, PEER6, POD4, POD6, Namespace, Network

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from agent.datapath import pins
    from agent.datapath.maps import Map

TRUST_DOMAIN = "cluster.local"


class RunningWorker:
    """A worker process and the test's end of its message socket."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "agent.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stderr=file,
            )
        self.channel.settimeout(10)
        self._number = 0

    def tell(self, *told: messages.ToWorker) -> None:
        for message in told:
            messages.Outbox(self.channel).put(message)

    def settle(self) -> None:
        """Wait until everything that was told is in force."""
        self._number += 1
        self.tell(messages.Ask(self._number))
        assert messages.Inbox(self.channel).receive() is not None

    def stop(self) -> None:
        self.channel.close()
        assert self.process.wait(10) == 0


@dataclass
class MeshPod:
    """One enrolled pod with its worker."""

    namespace: Namespace
    enrollment: Enrollment
    worker: RunningWorker
    workload: Workload


@dataclass
class MeshPair:
    """`client` and `server` know each other as mesh pods."""

    client: MeshPod
    server: MeshPod
    authority: LocalAuthority
    exempt_map: Map


def certificate_for(authority: LocalAuthority, identity: SpiffeId) -> messages.PutCertificate:
    issued = authority.issue(identity)
    return messages.PutCertificate(str(identity), issued.chain, issued.key, issued.roots)


def listener_message(enrollment: Enrollment) -> tuple[messages.AddPod, list[int]]:
    listeners = [
        (port, listener)
        for port, found in (
            (OUTBOUND_PORT, enrollment.outbound),
            (INBOUND_PORT, enrollment.inbound),
            (HBONE_PORT, enrollment.hbone),
        )
        for listener in found
    ]
    ports = tuple(port for port, _ in listeners)
    fds = [enrollment.netns_fd, *(listener.fileno() for _, listener in listeners)]
    return messages.AddPod(enrollment.pod, enrollment.netns_cookie, ports), fds


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Return a lab whose pods are in the mesh; a module that wants another has its own."""
    built = Lab(f"t{os.getpid()}")
    try:
        built.up(DEFAULT_CLUSTER, print)
        built.label_namespace("shop", "ambient")
        yield built
    finally:
        built.down()


@pytest.fixture
def mesh(loaded: pins.Pins, network: Network, tmp_path: Path) -> Iterator[MeshPair]:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        authority = LocalAuthority.create(directory, TRUST_DOMAIN)
        made = []
        for name, namespace, addresses in (
            ("client", network.pod, (POD4, POD6)),
            ("server", network.peer, (PEER4, PEER6)),
        ):
            parsed = tuple(ip_address(address) for address in addresses)
            pod = LocalPod(f"uid-{name}", "default", name, name, parsed)
            enrollment = enroll(loaded, pod, namespace.fd)
            stack.callback(unenroll, enrollment)
            worker = RunningWorker(tmp_path / f"{name}.log")
            stack.callback(worker.stop)
            workload = Workload(pod.uid, "default", name, name, name, parsed, is_hbone=True)
            made.append(MeshPod(namespace, enrollment, worker, workload))
        for member in made:
            identity = SpiffeId(TRUST_DOMAIN, "default", member.workload.service_account)
            member.worker.tell(
                messages.Configure(str(loaded.directory), TRUST_DOMAIN),
                certificate_for(authority, identity),
                *(messages.PutWorkload(other.workload) for other in made),
            )
            message, fds = listener_message(member.enrollment)
            messages.Outbox(member.worker.channel).put(message, fds)
        for member in made:
            member.worker.settle()
        client, server = made
        yield MeshPair(client, server, authority, loaded.maps["ss_exempt"])
        for member in made:
            print(member.worker.log.read_text())  # noqa: T201  # shown by pytest on failure


@pytest.fixture
def serve() -> Iterator[Callable[..., threading.Thread]]:
    """Run a function for a number of accepted connections in threads; joined at the end."""
    threads: list[threading.Thread] = []

    def start(
        listener: socket.socket, handle: Callable[[socket.socket], Any], count: int = 1
    ) -> threading.Thread:
        def handle_one(accepted: socket.socket) -> None:
            with accepted:
                handle(accepted)

        def run() -> None:
            for _ in range(count):
                accepted, _ = listener.accept()
                accepted.settimeout(20)
                worker = threading.Thread(target=handle_one, args=(accepted,))
                threads.append(worker)
                worker.start()

        thread = threading.Thread(target=run)
        threads.append(thread)
        thread.start()
        return thread

    yield start
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
