"""Capture semantics: what the programs do with a pod's connections, seen from real sockets."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING

import pytest

from agent import enroll, netns
from agent.datapath import links, records
from agent.datapath.exemption import exempt
from agent.enroll import Enrollment
from agent.model.capture import HBONE_PORT
from agent.tunnel.sockets import KEEPALIVE, borrow_source
from tests.bpf.conftest import PEER4, PEER6, POD4, POD6, Network, blocked

if TYPE_CHECKING:
    from agent.datapath.pins import Pins

pytestmark = pytest.mark.root

Enroll = Callable[..., Enrollment]
IPPROTO_MPTCP = 262
MSG_FASTOPEN = 0x20000000
TCP_FASTOPEN_CONNECT = 30


def origin_of(loaded: Pins, enrollment: Enrollment, accepted: socket.socket) -> tuple[str, int]:
    """Look up where a captured connection wanted to go, as a worker does at accept."""
    host, port = accepted.getpeername()[:2]
    key = records.source_key(enrollment.netns_cookie, ip_address(host), port)
    value = loaded.maps["ss_origin_flow"].get(key)
    assert value is not None
    port_be = value["port_be"]
    assert isinstance(port_be, int)
    return str(records.unpack_address(value["address"])), port_be


@pytest.mark.parametrize(
    ("family", "asked", "listener", "shown"),
    [
        (socket.AF_INET, PEER4, 0, PEER4),
        (socket.AF_INET6, PEER6, 1, PEER6),
        (socket.AF_INET6, f"::ffff:{PEER4}", 0, f"::ffff:{PEER4}"),
    ],
    ids=["v4", "v6", "v4-mapped"],
)
def test_outbound_is_steered_and_shows_what_was_asked(
    loaded: Pins,
    network: Network,
    enrolled: Enroll,
    family: int,
    asked: str,
    listener: int,
    shown: str,
) -> None:
    enrollment = enrolled()
    client = network.pod.open_socket(family)
    client.connect((asked, 8080))
    accepted, _ = enrollment.outbound[listener].accept()
    with accepted:
        assert origin_of(loaded, enrollment, accepted) == (asked.removeprefix("::ffff:"), 8080)
        assert client.getpeername()[:2] == (shown, 8080)
        own = client.getsockname()[0].removeprefix("::ffff:")
        assert own == (POD6 if asked == PEER6 else POD4)


def test_flow_is_deleted_when_the_connection_ends(
    loaded: Pins, network: Network, enrolled: Enroll
) -> None:
    enrollment = enrolled()
    with network.pod.connect(PEER4, 8080) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        accepted, _ = enrollment.outbound[0].accept()
        assert any(
            key["netns_cookie"] == enrollment.netns_cookie
            for key, _ in loaded.maps["ss_origin_flow"].items()
        )
    accepted.close()
    assert not any(
        key["netns_cookie"] == enrollment.netns_cookie
        for key, _ in loaded.maps["ss_origin_flow"].items()
    )


def test_pod_that_is_not_enrolled_is_untouched(loaded: Pins, network: Network) -> None:
    server = network.peer.listen(PEER4)
    client = network.pod.connect(PEER4, server.getsockname()[1])
    accepted, address = server.accept()
    accepted.close()
    assert address[0] == POD4
    assert client.getpeername() == server.getsockname()


@pytest.mark.parametrize("host", [POD4, "127.0.0.1", "127.9.9.9", "0.0.0.0", POD6, "::1", "::"])
def test_pod_to_itself_is_untouched(network: Network, enrolled: Enroll, host: str) -> None:
    enrolled()
    server = network.pod.listen("::" if ":" in host else "0.0.0.0")
    client = network.pod.connect(host, server.getsockname()[1])
    accepted, _ = server.accept()
    with accepted:
        client.sendall(b"self")
        assert accepted.recv(4) == b"self"


def test_mptcp_client_is_steered(loaded: Pins, network: Network, enrolled: Enroll) -> None:
    enrollment = enrolled()
    client = network.pod.open_socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP)
    client.connect((PEER4, 8080))
    accepted, _ = enrollment.outbound[0].accept()
    with accepted:
        assert origin_of(loaded, enrollment, accepted) == (PEER4, 8080)
        assert client.getpeername() == (PEER4, 8080)
        client.sendall(b"mptcp")
        assert accepted.recv(5) == b"mptcp"


@pytest.mark.parametrize("deferred", [False, True], ids=["sendto", "deferred-connect"])
def test_fast_open_client_is_steered(
    loaded: Pins, network: Network, enrolled: Enroll, deferred: bool
) -> None:
    enrollment = enrolled()
    client = network.pod.open_socket()
    if deferred:
        client.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
        client.connect((PEER4, 8080))
        client.sendall(b"early")
    else:
        client.settimeout(None)
        client.sendto(b"early", MSG_FASTOPEN, (PEER4, 8080))
    accepted, _ = enrollment.outbound[0].accept()
    accepted.settimeout(5)
    with accepted:
        assert accepted.recv(5) == b"early"
        assert origin_of(loaded, enrollment, accepted) == (PEER4, 8080)
        assert client.getpeername() == (PEER4, 8080)


def test_non_blocking_connect_is_steered(loaded: Pins, network: Network, enrolled: Enroll) -> None:
    enrollment = enrolled()
    client = network.pod.open_socket()
    client.setblocking(False)
    assert client.connect_ex((PEER4, 8080)) in (0, errno.EINPROGRESS)
    accepted, _ = enrollment.outbound[0].accept()
    with accepted:
        assert origin_of(loaded, enrollment, accepted) == (PEER4, 8080)


@pytest.mark.parametrize(
    "exclusions",
    [
        {"outbound_ports": frozenset({8080})},
        {"outbound_networks": (ip_network("10.77.0.0/24"),)},
    ],
    ids=["port", "network"],
)
def test_outbound_exclusion_bypasses_capture(
    network: Network, enrolled: Enroll, exclusions: dict[str, object]
) -> None:
    enrolled(**exclusions)
    server = network.peer.listen(PEER4, 8080)
    client = network.pod.connect(PEER4, 8080)
    accepted, address = server.accept()
    accepted.close()
    assert address == client.getsockname()


@pytest.mark.parametrize(("pod", "peer"), [(POD4, PEER4), (POD6, PEER6)], ids=["v4", "v6"])
@pytest.mark.parametrize("port", [80, 15001, 15006, 40000])
def test_inbound_plaintext_on_any_port_reaches_the_inbound_listener(
    network: Network, enrolled: Enroll, pod: str, peer: str, port: int
) -> None:
    enrollment = enrolled()
    client = network.peer.connect(pod, port)
    accepted, address = enrollment.inbound[0].accept()
    with accepted:
        assert address[0].removeprefix("::ffff:") == peer
        local = accepted.getsockname()
        assert (local[0].removeprefix("::ffff:"), local[1]) == (pod, port)
        assert client.getpeername()[:2] == (pod, port)


def test_inbound_exclusion_reaches_the_application(network: Network, enrolled: Enroll) -> None:
    enrolled(inbound_ports=frozenset({8081}))
    server = network.pod.listen(POD4, 8081)
    network.peer.connect(POD4, 8081)
    accepted, address = server.accept()
    accepted.close()
    assert address[0] == PEER4


def test_pod_that_bypasses_inbound_gets_plaintext_itself_and_tunnels_still_end_at_us(
    network: Network, enrolled: Enroll
) -> None:
    enrollment = enrolled(bypasses_inbound=True)
    server = network.pod.listen(POD4, 8081)
    network.peer.connect(POD4, 8081)
    accepted, address = server.accept()
    accepted.close()
    assert address[0] == PEER4
    network.peer.connect(POD4, HBONE_PORT)
    enrollment.hbone[0].accept()[0].close()
    network.pod.connect(PEER4, 80)
    enrollment.outbound[0].accept()[0].close()


def test_hbone_port_reaches_its_own_listener(network: Network, enrolled: Enroll) -> None:
    enrollment = enrolled()
    network.peer.connect(POD4, HBONE_PORT)
    accepted, _ = enrollment.hbone[0].accept()
    accepted.close()


@pytest.mark.parametrize("is_inherited", [False, True], ids=["opened", "inherited"])
def test_what_is_accepted_does_not_delay_and_notices_a_peer_that_is_gone(
    loaded: Pins, network: Network, enrolled: Enroll, is_inherited: bool
) -> None:
    enrollment = enrolled()
    if is_inherited:
        for _port, listener in enrollment.listeners:  # as an agent that knows nothing of it
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
        listeners = [(port, listener.dup()) for port, listener in enrollment.listeners]
        inherited = enroll.Inherited(listeners, enrollment.sysctls)
        enrollment = enroll.enroll(loaded, enrollment.pod, network.pod.fd, inherited)
        network.pod.cleanup.callback(enroll.abandon, enrollment)
    network.pod.connect(PEER4, 8080)
    network.pod.connect(PEER6, 8080)
    network.peer.connect(POD4, 8080)
    network.peer.connect(POD4, HBONE_PORT)
    for _port, listener in enrollment.listeners:
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            for level, name, value in KEEPALIVE:
                assert accepted.getsockopt(level, name) == value


def test_no_listener_means_closed(network: Network, enrolled: Enroll) -> None:
    enrollment = enrolled()
    network.pod.listen(POD4, 8081)
    for listener in enrollment.outbound + enrollment.inbound:
        listener.close()
    with blocked():
        network.peer.connect(POD4, 8081)
    with blocked():
        network.pod.connect(PEER4, 8080)


def test_agent_socket_is_not_captured_and_a_mark_gains_nothing(
    loaded: Pins, network: Network, enrolled: Enroll
) -> None:
    enrollment = enrolled()
    server = network.peer.listen(PEER4, 8080)
    own = network.pod.open_socket()
    exempt(loaded.maps["ss_exempt"], own)
    own.connect((PEER4, 8080))
    server.accept()[0].close()

    marked = network.pod.open_socket()
    for mark in (0x539, 0x111, 1337):
        marked.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    marked.connect((PEER4, 8080))
    accepted, _ = enrollment.outbound[0].accept()
    accepted.close()


@pytest.mark.parametrize("port", [15001, 15006, 15008, 15053])
@pytest.mark.parametrize("host", ["0.0.0.0", POD4, "::", "::1"])
def test_pod_cannot_bind_the_ports_of_our_listeners(
    network: Network, enrolled: Enroll, host: str, port: int
) -> None:
    probe = network.pod.open_socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    enrolled()
    with pytest.raises(PermissionError):
        probe.bind((host, port))


@pytest.mark.parametrize(
    ("client", "pod"), [("10.99.0.7", POD4), ("fd99::7", POD6)], ids=["v4", "v6"]
)
def test_application_sees_the_clients_address(
    loaded: Pins, network: Network, enrolled: Enroll, client: str, pod: str
) -> None:
    """The agent dials with an address that is not the pod's; answers come back to it."""
    enrolled()
    server = network.pod.listen(pod, 8081)
    dialed = network.pod.open_socket(socket.AF_INET6 if ":" in pod else socket.AF_INET)
    exempt(loaded.maps["ss_exempt"], dialed)
    borrow_source(dialed, ip_address(client))
    dialed.connect((pod, 8081))
    accepted, address = server.accept()
    with accepted:
        assert address[0] == client
        accepted.sendall(b"x" * 300_000)
        received = 0
        while received < 300_000:
            received += len(dialed.recv(65536))


def test_nothing_is_looked_up_once_lookup_is_detached(
    loaded: Pins, network: Network, enrolled: Enroll
) -> None:
    # The kernel ends a link a moment after its last pin has gone, and no listener is left by then.
    server = network.pod.listen(POD4, 8080)
    enrollment = enrolled()
    loaded.maps["ss_listeners"].delete({"value": enrollment.netns_cookie})
    for _ in range(20):
        links.attach_lookup(loaded, enrollment.netns_fd, enrollment.netns_cookie)
        client = network.peer.open_socket(socket.AF_INET)
        links.detach_lookup(loaded, enrollment.netns_cookie)
        client.connect((POD4, 8080))
        server.accept()[0].close()


def test_unenroll_leaves_the_pod_as_it_was(loaded: Pins, network: Network) -> None:
    def look() -> tuple[str, ...]:
        import subprocess

        commands = (
            ["ip", "rule"],
            ["ip", "-6", "rule"],
            ["ip", "route", "show", "table", "all"],
            ["ip", "-6", "route", "show", "table", "all"],
        )
        outputs = [
            netns.run_in(
                network.pod.fd,
                lambda command=command: (
                    subprocess.run(  # type: ignore[misc]  # bound at once
                        command, capture_output=True, text=True, check=True
                    ).stdout
                ),
            )
            for command in commands
        ]
        sysctls = netns.run_in(
            network.pod.fd, lambda: [path.read_text() for path in enroll.REPLY_SYSCTLS]
        )
        return (*outputs, *sysctls)

    def entries() -> int:
        names = ("ss_pods", "ss_pod_names", "ss_bypass", "ss_ports", "ss_listeners")
        return sum(1 for name in names for _ in loaded.maps[name].items())

    before = look()
    from agent.model.pod import Exclusions, LocalPod

    pod = LocalPod(
        "u",
        "n",
        "p",
        "s",
        (ip_address(POD4), ip_address(POD6)),
        Exclusions(frozenset({1}), (ip_network("10.0.0.0/8"),), frozenset({2})),
    )
    enrollment = enroll.enroll(loaded, pod, network.pod.fd)
    assert look() != before
    assert entries() == 8
    enroll.unenroll(enrollment)
    assert look() == before
    assert entries() == 0
    server = network.pod.listen(POD4, 15006)
    network.peer.connect(POD4, 15006)
    server.accept()[0].close()
