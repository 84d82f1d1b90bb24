"""The direct path on real sockets: who gets on it, what it leaves, how it is closed."""

from __future__ import annotations

import asyncio
import select
import socket
import struct
import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agent import enroll, netns, sock_diag
from agent.datapath import direct, records
from agent.datapath.origins import OriginFlows
from agent.datapath.ring import Batch
from agent.datapath.services import ServiceMaps
from agent.direct import DirectPath
from agent.errors import MapError
from agent.model.pod import LocalPod
from agent.tunnel.sockets import LINGER_RESET
from tests.bpf.conftest import PEER4, PEER6, POD4, POD6, Network
from tests.support.packets import ACK, PUSH, SYN, tcp_packet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agent.datapath.pins import Pins
    from agent.enroll import Enrollment
    from agent.model.pod import Address

pytestmark = pytest.mark.root
PORT = 9000
BORROWED4 = "10.77.0.99"
RING_BYTES = 256 * 4096  # ss_flow_ends
RING_ROUND_CONNECTIONS = 9500
SILENCE = ["ip", "route", "replace", "blackhole", f"{PEER4}/32"]
TCP_FASTOPEN_CONNECT = 30  # linux/tcp.h
ETHERTYPE_IPV4 = 0x0800
FASTOPEN_SYSCTL = Path("/proc/sys/net/ipv4/tcp_fastopen")
FASTOPEN_NO_COOKIE = "5"  # clients, and data in the SYN without a cookie


@dataclass
class Neighbors:
    """Two enrolled pods of one node, a server in one of them, and the direct path's maps."""

    network: Network
    client: Enrollment
    server: Enrollment
    verdicts: direct.Verdicts
    ends: direct.FlowEnds
    pins: Pins

    def allow(self, port: int = PORT, *families: int) -> None:
        source, destination = self.client.netns_cookie, self.server.netns_cookie
        for family in families or (4, 6):
            self.verdicts.allow(
                source, destination, port, self.verdicts.generation, is_v6=family == 6
            )

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
        batch = self.ends.read()
        assert len(batch) == 1
        (sample,) = batch.samples(2)
        end = self.ends.parse(sample)
        assert self.ends.totals(Batch(b"", batch.stride)) == {}
        totals = direct.Totals(2, 2 * end.was_reset, 2 * end.sent, 2 * end.received)
        pair = (end.flow.source_cookie, end.flow.destination_cookie)
        assert self.ends.totals(Batch(batch.records * 2, batch.stride)) == {pair: totals}
        return end

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


@pytest.mark.parametrize(("family", "other"), [(4, PEER6), (6, PEER4)])
def test_verdict_is_for_one_family(neighbors: Neighbors, family: int, other: str) -> None:
    """A policy that names addresses may let the pod in by one of its own and not by the other."""
    neighbors.allow(PORT, family)
    assert neighbors.is_captured(other)


def test_connect_that_waits_for_its_data_does_not_outlive_the_verdict(neighbors: Neighbors) -> None:
    """TCP_FASTOPEN_CONNECT: connect() was allowed, and the SYN leaves after the change."""
    neighbors.allow()
    listener = neighbors.network.peer.listen(PEER4, PORT)
    netns.run_in(neighbors.network.pod.fd, lambda: FASTOPEN_SYSCTL.write_text(FASTOPEN_NO_COOKIE))
    for is_void in (False, True):
        client = neighbors.network.pod.open_socket()
        client.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
        client.connect((PEER4, PORT))
        assert list(direct.live_flows(neighbors.pins)) == []  # no SYN yet
        if is_void:
            neighbors.verdicts.renew()
        client.sendall(b"a secret")
        (found,) = select.select([listener, *neighbors.server.inbound], [], [], 5)[0]
        assert (found is listener) != is_void
        with found.accept()[0]:
            client.close()
        if not is_void:
            neighbors.next_end()


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
    assert not neighbors.ends.read()  # a connection that never was is none that ended


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


class Shop:
    """The control side with both pods, which judges as a test says."""

    def __init__(self, neighbors: Neighbors) -> None:
        self.control = DirectPath(neighbors.pins, "cluster.local", lambda _counts: None)
        for made in (neighbors.client, neighbors.server):
            self.control.add_pod(made.netns_cookie, made.pod, made.netns_fd)

    def close_all(self) -> int:
        return self.control.close_unless(lambda *_flow: False)


@pytest.fixture
def shop(neighbors: Neighbors) -> Iterator[Shop]:
    made = Shop(neighbors)
    yield made
    made.control.close()


@pytest.mark.parametrize("host", [PEER4, PEER6, f"::ffff:{PEER4}"])
@pytest.mark.parametrize("is_bound", [False, True])
def test_policy_closes_a_flow_however_its_socket_was_made(
    neighbors: Neighbors, shop: Shop, host: str, is_bound: bool
) -> None:
    """A socket that is bound to an interface is not found by its addresses alone."""
    neighbors.allow()
    listener = neighbors.network.peer.listen("::", PORT)
    client = neighbors.network.pod.open_socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    if is_bound:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
    client.connect((host, PORT))
    served, _address = listener.accept()
    with served:
        served.settimeout(5)
        assert shop.close_all() == 1
        with pytest.raises((ConnectionAbortedError, ConnectionResetError)):
            client.recv(1)
        with pytest.raises((ConnectionAbortedError, ConnectionResetError)):
            served.recv(1)
    assert list(direct.live_flows(neighbors.pins)) == []
    neighbors.ends.read()


def test_pod_that_holds_back_its_reset_is_closed_at_the_server(
    neighbors: Neighbors, shop: Shop
) -> None:
    """Without a way back from the client's pod, its RST does not arrive."""
    neighbors.allow()
    client, served = neighbors.join(PEER4)
    port = client.getsockname()[1]
    client.sendall(b"x")
    assert served.recv(1) == b"x"
    netns.run_in(neighbors.network.pod.fd, partial(subprocess.run, SILENCE, check=True))
    assert shop.close_all() == 1
    with pytest.raises(ConnectionAbortedError):
        served.recv(1)
    remembered = [key for key, _value in neighbors.pins.maps["ss_guard_flows"].items()]
    assert [key for key in remembered if key["remote_port_be"] == port] == []
    neighbors.ends.read()


def test_borrowed_address_makes_no_flow(neighbors: Neighbors) -> None:
    """Or a pod could put its own in the place of a neighbor's, and end it."""
    neighbors.allow()
    pod = neighbors.network.pod
    add = ["ip", "address", "add", f"{BORROWED4}/32", "dev", "lo"]
    netns.run_in(pod.fd, partial(subprocess.run, add, check=True))
    client = pod.open_socket()
    client.bind((BORROWED4, 0))
    client.setblocking(False)
    client.connect_ex((PEER4, PORT))
    assert list(direct.live_flows(neighbors.pins)) == []


def test_handshake_that_is_held_back_is_not_finished_after_the_change(
    neighbors: Neighbors, shop: Shop
) -> None:
    """The client has its SYN answered, waits for the policy to change, and acknowledges by hand."""
    neighbors.allow()
    network = neighbors.network
    listener = network.peer.listen(PEER4, PORT)
    seen = network.pod.open_socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHERTYPE_IPV4))
    astray = ["ip", "neigh", "replace", POD4, "lladdr", "02:00:00:00:00:09", "dev", "pod0"]
    netns.run_in(network.peer.fd, partial(subprocess.run, astray, check=True))
    client = network.pod.open_socket()
    client.setblocking(False)
    client.connect_ex((PEER4, PORT))
    ports = (client.getsockname()[1], PORT)
    theirs, ours = next(answered(seen))
    neighbors.verdicts.renew()
    assert shop.close_all() == 1
    raw = network.pod.open_socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    for flags, data in ((ACK, b""), (ACK | PUSH, b"late")):
        packet = tcp_packet(POD4, PEER4, flags, ports, data, (ours, theirs + 1))
        raw.sendto(packet, (PEER4, 0))
    assert not select.select([listener], [], [], 0.3)[0]
    neighbors.ends.read()


def answered(seen: socket.socket) -> Iterator[tuple[int, int]]:
    """Yield sequence and acknowledgment of each SYN-ACK of the server."""
    while True:
        segment = seen.recv(2000)[34:]
        port, sequence, acknowledgment, flags = struct.unpack_from(">H2xII1xB", segment)
        if (port, flags) == (PORT, SYN | ACK):
            yield sequence, acknowledgment


def test_ends_are_complete_when_the_ring_has_come_round(neighbors: Neighbors) -> None:
    neighbors.allow()
    listener = neighbors.network.peer.listen(PEER4, PORT)
    listener.listen(64)
    neighbors.ends.read()
    count = number = resets = sent = read_bytes = 0
    while count < RING_ROUND_CONNECTIONS:
        for _ in range(500):
            with neighbors.network.pod.open_socket(socket.AF_INET) as client:
                client.connect((PEER4, PORT))
                client.sendall(bytes(number % 7 + 1))
                sent += number % 7 + 1
                number += 1
                served, _address = listener.accept()
                with served:
                    assert served.recv(64)
                    client.shutdown(socket.SHUT_WR)
                    assert served.recv(64) == b""
        deadline = time.monotonic() + 5
        while count < number:
            assert time.monotonic() < deadline
            batch = neighbors.ends.read()
            count += len(batch)
            for totals in neighbors.ends.totals(batch).values():
                sent -= totals.sent
                resets += totals.resets
            read_bytes += len(batch.records)
    assert read_bytes > RING_BYTES
    assert (count, sent, resets) == (number, 0, 0)


def test_ends_are_read_again_after_an_error(
    neighbors: Neighbors, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[object] = []
    read = direct.FlowEnds.read

    def read_or_fail(ends: direct.FlowEnds) -> Batch:
        if not errors:
            raise MapError("this time only")
        return read(ends)

    async def check() -> None:
        counted = asyncio.Event()
        control = DirectPath(neighbors.pins, "cluster.local", lambda _counts: counted.set())
        asyncio.get_running_loop().set_exception_handler(
            lambda _loop, context: errors.append(context["exception"])
        )
        control.start()
        neighbors.allow()
        for end in neighbors.join(PEER4):
            end.close()
        async with asyncio.timeout(10):
            await counted.wait()
        control.stop()

    monkeypatch.setattr("agent.direct.AFTER_ERROR_SECONDS", 0.0)
    monkeypatch.setattr(direct.FlowEnds, "read", read_or_fail)
    asyncio.run(check())
    assert len(errors) == 1


def test_who_stops_goes_on_without_the_ends_that_cannot_be_read(
    neighbors: Neighbors, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_ends: direct.FlowEnds) -> Batch:
        raise MapError("not this time")

    async def check() -> None:
        control = DirectPath(neighbors.pins, "cluster.local", lambda _counts: None)
        control.start()
        pod = LocalPod("uid-client", "default", "client", "client", (ip_address(POD4),))
        control.add_pod(neighbors.client.netns_cookie, pod, neighbors.network.pod.fd)
        control.stop()
        assert not control._netns_fds

    monkeypatch.setattr(direct.FlowEnds, "read", fail)
    asyncio.run(check())
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [
        "the last direct connections are not logged"
    ]


def test_other_connections_of_the_pods_stay_open(neighbors: Neighbors, shop: Shop) -> None:
    neighbors.allow()
    client, served = neighbors.join(PEER4)
    assert shop.control.close_unless(lambda *_flow: True) == 0
    client.sendall(b"x")
    assert served.recv(1) == b"x"
    client.close()


def test_connections_about_the_same_are_judged_once(neighbors: Neighbors, shop: Shop) -> None:
    neighbors.allow()
    neighbors.network.peer.listen(PEER4, PORT)
    clients = [neighbors.network.pod.connect(PEER4, PORT) for _ in range(5)]
    asked: list[direct.Subject] = []

    def passes(subject: direct.Subject, _source: LocalPod, _destination: LocalPod) -> bool:
        asked.append(subject)
        return False

    assert shop.control.close_unless(passes) == 5
    assert len(asked) == 1
    for client in clients:
        with pytest.raises(ConnectionAbortedError):
            client.recv(1)


def test_verdict_that_still_holds_outlives_the_change(neighbors: Neighbors, shop: Shop) -> None:
    neighbors.allow()
    asked = []

    def passes(subject: direct.Subject, source: LocalPod, destination: LocalPod) -> bool:
        asked.append((source.name, str(subject.source), destination.name, str(subject.destination)))
        assert subject.destination_port == PORT
        return subject.destination.version == 4

    shop.control.renew(passes)
    assert sorted(asked) == [
        ("client", POD4, "server", PEER4),
        ("client", POD6, "server", PEER6),
    ]
    client, _served = neighbors.join(PEER4)
    assert neighbors.is_captured(PEER6)
    client.close()
    neighbors.next_end()
    shop.control.renew()
    assert neighbors.is_captured(PEER4)
    shop.control.renew(lambda *_flow: True)  # what was void stays so
    assert neighbors.is_captured(PEER4)


def test_pod_that_leaves_takes_its_verdicts_along(neighbors: Neighbors, shop: Shop) -> None:
    """Its namespace may come back as another account's."""
    neighbors.allow()
    shop.control.remove_pod(neighbors.client.netns_cookie)
    assert neighbors.is_captured()


def test_address_that_has_a_new_pod_stays_the_new_pods(neighbors: Neighbors) -> None:
    """Its old pod is taken out of the mesh only afterwards."""
    neighbors.allow()
    key: dict[str, int | bytes] = {"address": records.pack_address(ip_address(PEER4))}
    local = neighbors.pins.maps["ss_local"]
    local.put(key, {"netns_cookie": 12345})
    assert neighbors.is_captured()  # a verdict about a namespace is none about an address
    enroll.unenroll(neighbors.server)
    assert local.get(key) == {
        "netns_cookie": 12345,
        "link": 0,
        "row": 0,
        "has_exclusions": 0,
    }
    local.delete(key)


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
