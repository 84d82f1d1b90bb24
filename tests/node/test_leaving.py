"""A pod that leaves the mesh, and one that comes back: its open connections go on."""

from __future__ import annotations

import os
import socket
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from agent import netlink, netns
from agent.datapath.exemption import exempt
from agent.enroll import REPLY_SYSCTLS
from agent.tunnel import messages
from agent.tunnel.events import ResponseReceived
from tests.node.conftest import listener_message
from tests.node.test_hostile_peers import HandMadePeer, good_context
from tests.support.labs import PodEnd, entries, is_alive, wait_for_entry
from tests.support.namespaces import PEER4

if TYPE_CHECKING:
    from agent.lab.lab import Lab
    from tests.node.conftest import MeshPair

pytestmark = pytest.mark.root
PORT = 9000


def mode_of(lab: Lab, name: str, mode: str) -> None:
    """Let one pod leave or come back, and wait until its agent has followed."""
    pod = lab.find_pod(name)
    manifest = pod.manifest()
    watch = lab.agent_states(pod.node)
    next(watch)
    labels = {"istio.io/dataplane-mode": mode}
    lab.write_object(manifest | {"metadata": manifest["metadata"] | {"labels": labels}})
    for state in watch:
        if any(found["uid"] == pod.uid for found in state["pods"]) == (mode == "ambient"):
            return


def has_reply_route(lab: Lab, name: str) -> bool:
    def look() -> bool:
        values = {path.read_text().strip() for path in REPLY_SYSCTLS}
        assert values == ({"1"} if netlink.has_reply_route() else {"0"})
        return values == {"1"}

    fd = netns.open_netns(lab.pod_netns(lab.find_pod(name)))
    try:
        return netns.run_in(fd, look)
    finally:
        os.close(fd)


def tunneled(lab: Lab, stack: ExitStack) -> tuple[PodEnd, PodEnd]:
    """Return client and server once the client's node reaches the server by tunnel."""
    client, server = PodEnd(lab, "client", stack), PodEnd(lab, "server", stack)
    server.echo(PORT)
    node = client.pod.node
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with client.connect(server.address, PORT) as probe:
            assert is_alive(probe)
        if any(entry["path"] == "hbone" for entry in entries(lab, node, "connection complete")):
            return client, server
    raise AssertionError("the server is not reached by tunnel")


@pytest.mark.parametrize("leaver", ["server", "client"])
def test_open_connections_outlive_the_pods_leave(lab: Lab, leaver: str) -> None:
    with ExitStack() as stack:
        client, server = tunneled(lab, stack)
        kept = client.connect(server.address, PORT)
        assert is_alive(kept)
        mode_of(lab, leaver, "none")
        assert is_alive(kept, b"x" * 100_000)
        with client.connect(server.address, PORT) as fresh:  # whatever its peer has heard yet
            assert is_alive(fresh)
        kept.close()
        wait_for_entry(
            lab, client.pod.node, "connection complete", lambda entry: entry["bytes_sent"] > 100_000
        )
    wait_until_gone(lab, leaver)


def wait_until_gone(lab: Lab, name: str) -> None:
    """The agent takes the last of a pod away when its workers have nothing left to do for it."""
    node = lab.find_pod(name).node
    wait_for_entry(lab, node, "pod has nothing of ours any more", lambda _entry: True)
    assert not has_reply_route(lab, name)


def test_pod_that_comes_back_at_once_keeps_its_connections(lab: Lab) -> None:
    with ExitStack() as stack:
        client, server = tunneled(lab, stack)
        kept = client.connect(server.address, PORT)
        assert is_alive(kept)
        for _ in range(3):
            mode_of(lab, "server", "none")
            assert is_alive(kept, b"x" * 10_000)
            mode_of(lab, "server", "ambient")
            assert is_alive(kept, b"x" * 10_000)
            with client.connect(server.address, PORT) as fresh:
                assert is_alive(fresh)
    assert has_reply_route(lab, "server")


@pytest.mark.parametrize("leaver", ["client", "server"])
def test_what_was_captured_before_the_leave_is_served(mesh: MeshPair, leaver: str) -> None:
    """Capture has ended when a worker hears of it, but connections are on the way to a listener."""
    member = mesh.client if leaver == "client" else mesh.server
    listener = mesh.server.namespace.listen(PEER4, PORT)
    member.worker.tell(messages.DrainPod(member.workload.uid))
    member.worker.settle()
    if leaver == "client":
        connection = mesh.client.namespace.connect(PEER4, PORT)  # by 15001
    else:
        connection = mesh.client.namespace.open_socket(socket.AF_INET)
        exempt(mesh.exempt_map, connection)
        connection.connect((PEER4, PORT))  # in plain text, by 15006
    connection.sendall(b"word")
    with listener.accept()[0] as accepted:
        assert accepted.recv(4) == b"word"


def test_tunnel_of_a_pod_that_comes_back_is_of_use_all_the_time(mesh: MeshPair) -> None:
    """Its peer may not have heard of either: what it asks must not meet a closed namespace."""
    mesh.server.namespace.listen(PEER4, PORT)
    peer = HandMadePeer(mesh, good_context(mesh))
    worker, uid = mesh.server.worker, mesh.server.workload.uid
    assert ResponseReceived(1, 200) in peer.request(f"{PEER4}:{PORT}")
    worker.tell(messages.DrainPod(uid), messages.RemovePod(uid, comes_back=True))
    worker.settle()
    assert ResponseReceived(3, 200) in peer.request(f"{PEER4}:{PORT}")
    message, fds = listener_message(mesh.server.enrollment)
    messages.Outbox(worker.channel).put(message, fds)
    worker.settle()
    assert ResponseReceived(5, 200) in peer.request(f"{PEER4}:{PORT}")
    worker.tell(messages.RemovePod(uid))
    worker.settle()
    assert ResponseReceived(7, 503) in peer.request(f"{PEER4}:{PORT}")
