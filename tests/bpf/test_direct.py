"""The direct path on real sockets: who gets on it, what it leaves, how it is closed."""

from __future__ import annotations

import select
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING

import pytest

from agent import enroll, netns, sock_diag
from agent.datapath import direct
from agent.datapath.origins import OriginFlows
from agent.datapath.services import ServiceMaps
from agent.model.pod import LocalPod
from agent.tunnel.sockets import LINGER_RESET
from tests.bpf.conftest import PEER4, PEER6, POD4, POD6, Network

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agent.datapath.pins import Pins
    from agent.enroll import Enrollment
    from agent.model.pod import Address

pytestmark = pytest.mark.root
PORT = 9000


@dataclass
class Neighbors:
    """Two enrolled pods of one node, a server in one of them, and the direct path's maps."""

    network: Network
    client: Enrollment
    server: Enrollment
    verdicts: direct.Verdicts
    ends: direct.FlowEnds
    pins: Pins

    def allow(self, port: int = PORT) -> None:
        source, destination = self.client.netns_cookie, self.server.netns_cookie
        self.verdicts.allow(source, destination, port, self.verdicts.generation)

    def join(self, host: str) -> tuple[socket.socket, socket.socket]:
        """Connect on the direct path; return the client's and the server's end."""
        listener = self.network.peer.listen(host, PORT)
        client = self.network.pod.connect(host, PORT)
        served, _address = listener.accept()
        served.settimeout(5)
        self.network.peer.cleanup.enter_context(served)
        return client, served

    def next_end(self) -> direct.FlowEnd:
        assert select.select([self.ends.fd], [], [], 5)[0]
        (sample,) = self.ends.read()
        return self.ends.parse(sample)

    def is_captured(self, host: str = PEER4, port: int = PORT) -> bool:
        """Connect, and say whether the agent's listener got it."""
        listeners = self.client.outbound
        client = self.network.pod.open_socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        client.setblocking(False)
        client.connect_ex((host, port))
        found = select.select(listeners, [], [], 0.5)[0]
        for listener in found:
            listener.accept()[0].close()
        return bool(found)


@pytest.fixture
def neighbors(loaded: Pins, network: Network) -> Iterator[Neighbors]:
    with ExitStack() as stack:
        made = []
        for name, namespace, addresses in (
            ("client", network.pod, (POD4, POD6)),
            ("server", network.peer, (PEER4, PEER6)),
        ):
            parsed = tuple(ip_address(address) for address in addresses)
            pod = LocalPod(f"uid-{name}", "default", name, name, parsed)
            enrollment = enroll.enroll(loaded, pod, namespace.fd)
            stack.callback(enroll.unenroll, enrollment)
            made.append(enrollment)
        verdicts = direct.Verdicts(loaded.maps["ss_verdicts"], loaded.maps["ss_generation"])
        ends = direct.FlowEnds(loaded)
        stack.callback(ends.close)
        ends.read()  # of tests before
        yield Neighbors(network, made[0], made[1], verdicts, ends, loaded)
        network.pod.cleanup.close()
        network.peer.cleanup.close()
        while list(direct.live_flows(loaded)):
            assert select.select([ends.fd], [], [], 5)[0]
            ends.read()


def test_without_a_verdict_the_agent_gets_the_connection(neighbors: Neighbors) -> None:
    assert neighbors.is_captured()


@pytest.mark.parametrize("host", [PEER4, PEER6])
def test_with_a_verdict_the_pods_are_joined_by_the_kernel(neighbors: Neighbors, host: str) -> None:
    neighbors.allow()
    client, served = neighbors.join(host)
    source = POD6 if ":" in host else POD4
    assert served.getpeername()[:2] == (source, client.getsockname()[1])
    assert client.getpeername()[:2] == (host, PORT)
    (flow,) = direct.live_flows(neighbors.pins)
    assert (flow.source, flow.source_port) == (ip_address(source), client.getsockname()[1])
    assert (flow.destination, flow.destination_port) == (ip_address(host), PORT)
    assert flow.source_cookie == neighbors.client.netns_cookie
    assert flow.destination_cookie == neighbors.server.netns_cookie
    client.close()


def test_v4_mapped_client_goes_direct(neighbors: Neighbors) -> None:
    neighbors.allow()
    listener = neighbors.network.peer.listen(PEER4, PORT)
    client = neighbors.network.pod.open_socket(socket.AF_INET6)
    client.connect((f"::ffff:{PEER4}", PORT))
    listener.accept()[0].close()
    client.close()


def test_verdict_is_for_one_port_and_one_direction(neighbors: Neighbors) -> None:
    neighbors.allow()
    assert neighbors.is_captured(port=PORT + 1)
    back = neighbors.network.peer.open_socket()
    back.setblocking(False)
    back.connect_ex((POD4, PORT))
    (listener,) = select.select(neighbors.server.outbound, [], [], 5)[0]
    listener.accept()[0].close()


def test_new_generation_voids_the_verdict(neighbors: Neighbors) -> None:
    neighbors.allow()
    neighbors.verdicts.renew()
    assert neighbors.is_captured()
    neighbors.allow()
    client, _served = neighbors.join(PEER4)
    client.close()


def test_verdict_given_before_the_change_is_void(neighbors: Neighbors) -> None:
    """A worker judged by the old policies and writes only after the new ones are in force."""
    generation = neighbors.verdicts.generation
    neighbors.verdicts.renew()
    source, destination = neighbors.client.netns_cookie, neighbors.server.netns_cookie
    neighbors.verdicts.allow(source, destination, PORT, generation)
    assert neighbors.is_captured()


def test_port_without_a_listener_refuses_at_once(neighbors: Neighbors) -> None:
    neighbors.allow()
    client = neighbors.network.pod.open_socket()
    with pytest.raises(ConnectionRefusedError):
        client.connect((PEER4, PORT))
    assert neighbors.ends.read() == []  # a connection that never was is none that ended


@pytest.mark.parametrize(
    "closer", ["client", "server", "half", "reset by client", "reset by server"]
)
def test_end_is_reported_with_exact_bytes(neighbors: Neighbors, closer: str) -> None:
    neighbors.allow()
    client, served = neighbors.join(PEER4)
    port = client.getsockname()[1]
    client.sendall(b"q" * 1000)
    assert len(served.recv(4096)) == 1000
    served.sendall(b"a" * 300)
    assert len(client.recv(4096)) == 300
    match closer:
        case "client":
            client.close()
            assert served.recv(1) == b""
            served.close()
        case "server":
            served.close()
            assert client.recv(1) == b""
            client.close()
        case "half":
            client.shutdown(socket.SHUT_WR)
            assert served.recv(1) == b""
            served.close()
            assert client.recv(1) == b""
            client.close()
        case "reset by client":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
            client.close()
        case "reset by server":
            served.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
            served.close()
    end = neighbors.next_end()
    assert (end.sent, end.received) == (1000, 300)
    assert end.was_reset == closer.startswith("reset")
    assert end.flow.source_port == port
    assert 0 < end.seconds < 5


def test_client_that_closes_long_before_the_server_is_counted_exactly(
    neighbors: Neighbors,
) -> None:
    neighbors.allow()
    client, served = neighbors.join(PEER4)
    served.sendall(b"a" * 300)
    assert len(client.recv(4096)) == 300
    client.close()
    end = neighbors.next_end()  # before the server's FIN
    assert (end.sent, end.received) == (0, 300)
    served.close()


def test_flow_that_no_longer_passes_is_closed_on_both_ends(neighbors: Neighbors) -> None:
    neighbors.allow()
    client, served = neighbors.join(PEER4)
    (flow,) = direct.live_flows(neighbors.pins)

    def destroy() -> bool:
        return sock_diag.destroy_tcp(
            (flow.source, flow.source_port),
            (flow.destination, flow.destination_port),
            flow.socket_cookie,
        )

    assert netns.run_in(neighbors.network.pod.fd, destroy)
    with pytest.raises(ConnectionAbortedError):
        client.recv(1)
    with pytest.raises(ConnectionResetError):
        served.recv(1)
    assert neighbors.next_end().was_reset
    assert not netns.run_in(neighbors.network.pod.fd, destroy)
    assert neighbors.client.inbound[0].getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


def test_finished_flow_lets_nobody_in(neighbors: Neighbors) -> None:
    """A SYN with the addresses and ports of a direct flow that ended, without a verdict."""
    neighbors.allow()
    client, _served = neighbors.join(PEER4)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
    name = client.getsockname()
    client.close()
    neighbors.next_end()
    neighbors.verdicts.renew()
    replay = neighbors.network.pod.open_socket()
    replay.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    replay.bind(name)
    replay.setblocking(False)
    replay.connect_ex((PEER4, PORT))
    (listener,) = select.select(neighbors.client.outbound, [], [], 5)[0]
    listener.accept()[0].close()


VIP4, VIP6 = ip_address("10.96.0.7"), ip_address("fd96::7")
PEERS = {VIP4: ip_address(PEER4), VIP6: ip_address(PEER6)}


@pytest.fixture
def services(loaded: Pins) -> Iterator[ServiceMaps]:
    maps = ServiceMaps(loaded)
    yield maps
    maps.apply({})
    assert list(loaded.maps["ss_services"].items()) == []
    assert list(loaded.maps["ss_endpoints"].items()) == []


@pytest.mark.parametrize("vip", [VIP4, VIP6])
def test_service_with_a_local_endpoint_goes_direct(
    neighbors: Neighbors, services: ServiceMaps, vip: Address
) -> None:
    services.apply({(vip, 80): ((PEERS[vip], PORT),)})
    assert neighbors.is_captured(str(vip), 80)  # no verdict yet
    neighbors.allow()
    listener = neighbors.network.peer.listen(str(PEERS[vip]), PORT)
    client = neighbors.network.pod.connect(str(vip), 80)
    accepted, source = listener.accept()
    with accepted:
        assert client.getpeername()[:2] == (str(vip), 80)
        assert source[1] == client.getsockname()[1]
        (flow,) = direct.live_flows(neighbors.pins)
        assert (flow.destination, flow.destination_port) == (PEERS[vip], PORT)
        client.close()


def test_choice_of_the_kernel_is_left_to_the_agent_to_follow(
    neighbors: Neighbors, services: ServiceMaps, loaded: Pins
) -> None:
    endpoints = tuple((ip_address(f"10.99.0.{number}"), 8000 + number) for number in (1, 2, 3))
    services.apply({(VIP4, 80): endpoints})
    origins = OriginFlows(loaded.maps["ss_origin_flow"])
    chosen = set()
    for _ in range(60):  # one of three is missed with a chance of 3 * (2/3)^60
        client = neighbors.network.pod.connect(str(VIP4), 80)
        accepted, (host, port) = neighbors.client.outbound[0].accept()
        origin = origins.lookup(neighbors.client.netns_cookie, ip_address(host), port)
        assert origin is not None
        assert (origin.address, origin.port) == (VIP4, 80)
        assert client.getpeername() == (str(VIP4), 80)
        chosen.add(origin.endpoint)
        accepted.close()
        client.close()
    assert chosen == set(endpoints)


def test_endpoint_of_the_other_family_is_left_to_the_agent(
    neighbors: Neighbors, services: ServiceMaps
) -> None:
    services.apply({(VIP4, 80): ((ip_address(PEER6), PORT),)})
    neighbors.allow()
    assert neighbors.is_captured(str(VIP4), 80)


def test_endpoints_follow_the_state(neighbors: Neighbors, services: ServiceMaps) -> None:
    def held() -> dict[int, int]:
        return {
            int(key["index"]): int(value["port_be"])
            for key, value in neighbors.pins.maps["ss_endpoints"].items()
        }

    first, second, third = ((ip_address(PEER4), port) for port in (1, 2, 3))
    for endpoints in ((first, second, third), (third,), (second, first), ()):
        services.apply({(VIP4, 80): endpoints} if endpoints else {})
        assert held() == {index: port for index, (_address, port) in enumerate(endpoints)}


def test_unenrolled_destination_is_reached_through_the_agent(neighbors: Neighbors) -> None:
    neighbors.allow()
    enroll.unenroll(neighbors.server)
    assert neighbors.is_captured()
