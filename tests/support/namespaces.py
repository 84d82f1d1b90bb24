"""A pod and a peer: two namespaces joined by a veth pair, and the programs loaded and attached."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_interface
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agent import netlink, netns
from agent.datapath import links, pins

if TYPE_CHECKING:
    from collections.abc import Iterator

POD4, PEER4 = "10.77.0.2", "10.77.0.1"
POD6, PEER6 = "fd77::2", "fd77::1"


@pytest.fixture(scope="session")
def loaded() -> Iterator[pins.Pins]:
    root = Path(f"/sys/fs/bpf/sidestep-test-{os.getpid()}")
    opened = pins.load(root)
    links.attach_cgroup(opened, links.cgroup_root())
    yield opened
    opened.close()
    pins.remove(opened.directory)
    root.rmdir()


@dataclass
class Namespace:
    """A namespace and the sockets that a test made in it."""

    fd: int
    cleanup: ExitStack = field(default_factory=ExitStack)

    def open_socket(
        self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, protocol: int = 0
    ) -> socket.socket:
        made = netns.run_in(self.fd, lambda: socket.socket(family, kind, protocol))
        made.settimeout(5)
        self.cleanup.enter_context(made)
        return made

    def listen(self, host: str, port: int = 0, family: int | None = None) -> socket.socket:
        listener = self.open_socket(family or (socket.AF_INET6 if ":" in host else socket.AF_INET))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        netns.run_in(self.fd, lambda: listener.bind((host, port)))
        listener.listen()
        return listener

    def connect(self, host: str, port: int) -> socket.socket:
        client = self.open_socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        client.connect((host, port))
        return client


@dataclass
class Network:
    """A pod, and a peer on the other end of its link."""

    pod: Namespace
    peer: Namespace


@contextmanager
def make_network() -> Iterator[Network]:
    """Make the two, and end them with all that was made in them."""
    with ExitStack() as stack:
        ends = []
        for _ in range(2):
            fd = netns.create()
            stack.callback(os.close, fd)
            ends.append(Namespace(fd, stack.enter_context(ExitStack())))
        pod, peer = ends

        def set_up(name: str, *interfaces: str) -> None:
            netlink.set_up("lo")
            netlink.set_up(name)
            for interface in interfaces:
                netlink.add_address(name, ip_interface(interface))

        netns.run_in(peer.fd, lambda: netlink.add_veth("pod0", "eth0", pod.fd))
        netns.run_in(peer.fd, lambda: set_up("pod0", f"{PEER4}/24", f"{PEER6}/64"))
        netns.run_in(pod.fd, lambda: set_up("eth0", f"{POD4}/24", f"{POD6}/64"))
        yield Network(pod, peer)


@pytest.fixture
def network() -> Iterator[Network]:
    with make_network() as made:
        yield made
