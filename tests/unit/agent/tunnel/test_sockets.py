"""Sockets inside a pod that have a client's address, beside the client's own connections."""

from __future__ import annotations

import errno
import itertools
import socket
from ipaddress import ip_address
from pathlib import Path

import pytest

from agent import netlink, netns
from agent.errors import OutOfDescriptors
from agent.model.capture import LISTENER_PORTS
from agent.tunnel.sockets import BORROWED_PORTS, PodSockets, borrow_source
from tests.support.namespaces import PEER4, POD4, Network

pytestmark = pytest.mark.root
RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
PORT = 8080
REPLIES = [f"/proc/sys/net/ipv4/{name}" for name in ("tcp_fwmark_accept", "fwmark_reflect")]


@pytest.fixture
def application(network: Network) -> socket.socket:
    """Return what listens in the pod, whose namespace leads its answers to us."""

    def prepare() -> None:
        for path in REPLIES:
            Path(path).write_text("1")
        netlink.add_reply_route(socket.AF_INET)

    netns.run_in(network.pod.fd, prepare)
    return network.pod.listen("0.0.0.0", PORT)


def dial(network: Network, pod_sockets: PodSockets) -> socket.socket:
    own = network.pod.cleanup.enter_context(pod_sockets.open(network.pod.fd, socket.AF_INET))
    pod_sockets.borrow_source(own, ip_address(PEER4))
    own.settimeout(3)
    own.connect((POD4, PORT))
    return own


def test_port_is_none_that_the_client_has_in_use(
    network: Network, application: socket.socket
) -> None:
    # Two ports are all that either side is given, and the client has them both.
    for space in (network.peer, network.pod):
        netns.run_in(space.fd, lambda: RANGE.write_text("40000 40001"))
    lasting = [network.peer.connect(POD4, PORT) for _ in range(2)]
    served = [application.accept()[0] for _ in lasting]
    pod_sockets = PodSockets(lambda _own: None)
    for _ in range(3):
        own = dial(network, pod_sockets)
        accepted, source = application.accept()
        own.sendall(b"ping")
        assert accepted.recv(4) == b"ping"
        accepted.sendall(b"pong")  # finds its way back to us, not to the client
        assert own.recv(4) == b"pong"
        accepted.close()
        assert source[0] == PEER4
        assert source[1] in BORROWED_PORTS
        assert source[1] not in LISTENER_PORTS
    for client, server in zip(lasting, served, strict=True):
        client.sendall(b"still")
        assert server.recv(5) == b"still"
        server.close()


@pytest.mark.usefixtures("application")
def test_port_on_which_the_pod_listens_is_passed_over(network: Network) -> None:
    own = network.pod.open_socket()
    borrow_source(own, ip_address(PEER4), iter((PORT, PORT + 1)))
    assert own.getsockname() == (PEER4, PORT + 1)


def test_port_that_is_taken_towards_the_same_destination_is_said_at_connect(
    network: Network, application: socket.socket
) -> None:
    found = []
    for _ in range(2):
        own = network.pod.open_socket()
        borrow_source(own, ip_address(PEER4), iter((2000,)))
        found.append(own.connect_ex((POD4, PORT)))
    assert found == [0, errno.EADDRNOTAVAIL]
    application.accept()[0].close()


def test_without_a_port_the_kernel_chooses(network: Network, application: socket.socket) -> None:
    own = network.pod.open_socket()
    borrow_source(own, ip_address(PEER4), itertools.repeat(PORT, 3))
    own.connect((POD4, PORT))
    accepted, source = application.accept()
    accepted.close()
    assert source[0] == PEER4
    assert source[1] not in BORROWED_PORTS


def test_spare_descriptors_that_pods_took_are_made_up_for() -> None:
    with socket.socket() as made:
        own = made.fileno()
        pod_sockets = PodSockets(lambda _own: None, first_spare=own + 2)
        pod_sockets.require_room(made)
        pod_sockets.keep_spare([3, own + 2])  # one of a pod is low, one is where none should be
        pod_sockets.require_room(made)
        pod_sockets.keep_spare([own + 2, own + 3])
        with pytest.raises(OutOfDescriptors, match=f"{own} descriptors are in use"):
            pod_sockets.require_room(made)
        pod_sockets.keep_spare([])
        pod_sockets.require_room(made)
