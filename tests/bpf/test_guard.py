"""The guard on real links: what slipped past the hooks is dropped, and nothing else.

A node with two pods, routed as a CNI plugin would. The node itself plays the rest of the world.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pyroute2.iproute.linux import IPRoute

from agent import enroll, netlink, netns
from agent.datapath import counters, direct, features, links
from agent.datapath.exemption import exempt
from agent.datapath.services import ServiceMaps
from agent.kubelet import Probers
from agent.lab.machine import allow_forwarding
from agent.model.capture import HBONE_PORT
from agent.model.pod import Exclusions, LocalPod
from agent.tunnel.sockets import LINGER_RESET, borrow_source
from tests.support.namespaces import Namespace
from tests.support.packets import ACK, PUSH, SYN, tcp_packet, with_checksum
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from agent.datapath.pins import Pins
    from agent.enroll import Enrollment

pytestmark = pytest.mark.root

PORT = 9000
SILENCE_SECONDS = 0.3  # far longer than a packet takes here
NODE4, NODE6 = "10.78.0.1", "fd78::1"
PODS = {"a": ("10.78.0.2", "fd78::2"), "b": ("10.78.0.3", "fd78::3")}
TCP_FASTOPEN_CONNECT = 30  # linux/tcp.h
FASTOPEN_SYSCTL = Path("/proc/sys/net/ipv4/tcp_fastopen")
FASTOPEN_NO_COOKIE = "5"  # clients, and data in the SYN without a cookie
BRIDGED_STRANGER = "10.78.0.4"
ETH_P_IP, ETH_P_ARP = 0x0800, 0x0806  # linux/if_ether.h
PORTS = 40000, PORT
SYS_MEMBARRIER = {"x86_64": 324, "aarch64": 283}  # asm/unistd.h
MEMBARRIER_GLOBAL = 1  # linux/membarrier.h


@dataclass
class Node:
    """A node and its pods; `enroll` takes one into the mesh until the end of the test."""

    pins: Pins
    node: Namespace
    pods: dict[str, Namespace]
    stack: ExitStack

    def enroll(
        self, name: str = "a", *, is_strict: bool = True, **exclusions: object
    ) -> Enrollment:
        addresses = tuple(map(ip_address, PODS.get(name, (BRIDGED_STRANGER,))))
        pod = LocalPod(
            f"uid-{name}", "default", name, name, addresses,
            exclusions=Exclusions(**exclusions),  # type: ignore[arg-type]  # a test's shorthand
        )  # fmt: skip
        netns_fd = self.pods[name].fd
        made = netns.run_in(self.node.fd, lambda: enroll.enroll(self.pins, pod, netns_fd))
        self.stack.callback(netns.run_in, self.node.fd, partial(enroll.unenroll, made))
        enroll.set_strict(self.pins, made, is_strict=is_strict, but=frozenset())
        return made

    def allow(self, source: Enrollment, destination: Enrollment) -> None:
        """Give the verdict that lets one pod connect to the other on the direct path."""
        verdicts = direct.Verdicts(self.pins.maps["ss_verdicts"], self.pins.maps["ss_generation"])
        verdicts.allow(source.netns_cookie, destination.netns_cookie, PORT, verdicts.generation)

    def counted(self, made: Enrollment) -> dict[tuple[str, str], int]:
        """Return packets by direction and outcome, without those that passed."""
        names = {0: "outbound", 1: "inbound"}
        outcomes = {1: "plaintext", 2: "spoofed", 3: "fragment"}
        maps = self.pins.maps
        return {
            (names[count.direction], outcomes[count.outcome]): count.packets
            for count in counters.read_counts(maps["ss_guards"], maps["ss_counters"])
            if count.netns_cookie == made.netns_cookie and count.outcome
        }


@pytest.fixture(params=[True, False], ids=["tcx", "clsact"])
def node(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, loaded: Pins
) -> Iterator[Node]:
    monkeypatch.setattr(features, "has_tcx", lambda: request.param)
    with ExitStack() as stack:
        here = _namespace(stack)
        netns.run_in(here.fd, allow_forwarding)
        pods = {}
        for name, addresses in PODS.items():
            pods[name] = _namespace(stack)
            netns.run_in(here.fd, partial(_link_node, name, pods[name].fd, addresses))
            netns.run_in(pods[name].fd, partial(_link_pod, addresses))
        yield Node(loaded, here, pods, stack)


def _namespace(stack: ExitStack) -> Namespace:
    fd = netns.create()
    stack.callback(os.close, fd)
    netns.run_in(fd, lambda: netlink.set_up("lo"))
    return Namespace(fd, stack.enter_context(ExitStack()))


def _link_node(name: str, pod_fd: int, addresses: tuple[str, str]) -> None:
    link = f"pod-{name}"
    netlink.add_veth(link, "eth0", pod_fd)
    netlink.set_up(link)
    for own, address in zip((NODE4, NODE6), addresses, strict=True):
        netlink.add_address(link, ip_interface(own))
        netlink.add_route(ip_network(address), link)


def _link_pod(addresses: tuple[str, str]) -> None:
    netlink.set_up("eth0")
    for own, gateway in zip(addresses, (NODE4, NODE6), strict=True):
        netlink.add_address("eth0", ip_interface(own))
        netlink.add_route(ip_network(gateway), "eth0")
        everything = "::/0" if ":" in gateway else "0.0.0.0/0"
        netlink.add_route(ip_network(everything), "eth0", gateway)


def join(client: Namespace, server: Namespace, host: str) -> tuple[socket.socket, socket.socket]:
    """Connect two namespaces as plain TCP."""
    listener = server.listen(host, PORT)
    dialed = client.connect(host, PORT)
    accepted, _address = listener.accept()
    accepted.settimeout(5)
    server.cleanup.enter_context(accepted)
    return dialed, accepted


def hears(receiver: socket.socket) -> bool:
    return bool(select.select([receiver], [], [], SILENCE_SECONDS)[0])


def send_raw(sender: Namespace, packet: bytes) -> None:
    raw = sender.open_socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    raw.sendto(packet, (NODE4, 0))


@pytest.fixture
def tap(node: Node) -> socket.socket:
    """Return a socket on the node that sees every TCP packet that the node accepts."""
    return node.node.open_socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)


@pytest.mark.parametrize("family", [0, 1], ids=["ipv4", "ipv6"])
def test_connection_from_before_enrollment_goes_on_unless_strict(node: Node, family: int) -> None:
    client, server = join(node.pods["a"], node.node, (NODE4, NODE6)[family])
    made = node.enroll(is_strict=False)
    client.sendall(b"still here")
    assert server.recv(100) == b"still here"
    enroll.set_strict(node.pins, made, is_strict=True, but=frozenset())
    client.sendall(b"a secret")
    assert not hears(server)
    assert node.counted(made)["outbound", "plaintext"] >= 1


def test_plaintext_from_outside_does_not_reach_a_socket_from_before(node: Node) -> None:
    client, server = join(node.node, node.pods["a"], PODS["a"][0])
    made = node.enroll()
    client.sendall(b"do as I say")
    assert not hears(server)
    assert node.counted(made)["inbound", "plaintext"] >= 1


def test_raw_plaintext_does_not_leave_a_strict_pod(node: Node, tap: socket.socket) -> None:
    made = node.enroll()
    for packet in (
        tcp_packet(PODS["a"][0], NODE4, SYN, PORTS),
        tcp_packet(PODS["a"][0], NODE4, ACK | PUSH, PORTS, b"a secret"),
    ):
        send_raw(node.pods["a"], packet)
    assert not hears(tap)
    assert node.counted(made) == {("outbound", "plaintext"): 2}


@pytest.mark.parametrize("is_strict", [True, False])
def test_connection_past_the_hooks_is_not_opened(
    node: Node, tap: socket.socket, is_strict: bool
) -> None:
    """What connect() did not capture, by a raw socket or since its link was detached."""
    made = node.enroll(is_strict=is_strict)
    send_raw(node.pods["a"], tcp_packet(PODS["a"][0], NODE4, SYN, PORTS))
    assert not hears(tap)
    assert node.counted(made) == {("outbound", "plaintext"): 1}


def test_connection_to_an_excluded_port_is_opened(node: Node) -> None:
    made = node.enroll(is_strict=False, outbound_ports=frozenset({PORT}))
    client, server = join(node.pods["a"], node.node, NODE4)
    client.sendall(b"as agreed")
    assert server.recv(100) == b"as agreed"
    assert node.counted(made) == {}


def test_fragments_do_not_hide_plaintext(node: Node, tap: socket.socket) -> None:
    made = node.enroll()
    more, second = 0x2000, 1
    for fragment in (more, second):
        packet = tcp_packet(PODS["a"][0], NODE4, ACK, PORTS, b"a secret", fragment=fragment)
        send_raw(node.pods["a"], packet)
    assert not hears(tap)
    assert node.counted(made) == {("outbound", "fragment"): 2}


@pytest.mark.parametrize("count", [1, 4, 5, 8])
def test_extension_headers_do_not_hide_plaintext(node: Node, count: int) -> None:
    tap = node.node.open_socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_TCP)
    raw = node.pods["a"].open_socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW)
    packet = hidden_packet(PODS["a"][1], NODE6, count)
    raw.sendto(packet, (NODE6, 0))
    assert hears(tap)  # the kernel itself follows that many
    tap.recv(100)
    made = node.enroll()
    raw.sendto(packet, (NODE6, 0))
    assert not hears(tap)
    outcome = "plaintext" if count <= 4 else "fragment"
    assert node.counted(made) == {("outbound", outcome): 1}


def hidden_packet(source: str, destination: str, count: int) -> bytes:
    """Return an IPv6 packet with TCP behind a number of destination options."""
    segment = struct.pack(">HHIIBBHHH", 40000, PORT, 1, 1, 5 << 4, ACK | PUSH, 1024, 0, 0)
    padding = b"\1\4\0\0\0\0"  # PadN of six bytes
    following = [socket.IPPROTO_DSTOPTS] * (count - 1) + [socket.IPPROTO_TCP]
    body = b"".join(bytes([after, 0]) + padding for after in following) + segment + b"a secret"
    head = struct.pack(">IHBB", 6 << 28, len(body), socket.IPPROTO_DSTOPTS, 64)
    return head + ip_address(source).packed + ip_address(destination).packed + body


# 802.1Q and 802.1ad. The node takes off as many tags of VLAN 0 as there are.
TAGS = {"one": [0x8100], "two": [0x8100, 0x8100], "mixed": [0x88A8, 0x8100], "three": [0x8100] * 3}


@pytest.mark.parametrize("tags", TAGS.values(), ids=TAGS)
@pytest.mark.parametrize("is_strict", [True, False])
def test_tags_do_not_hide_what_leaves_the_pod(
    node: Node, tap: socket.socket, tags: list[int], is_strict: bool
) -> None:
    made = node.enroll(is_strict=is_strict)
    source = PODS["a" if is_strict else "b"][0]
    target = netns.run_in(node.node.fd, partial(_mac, "pod-a"))
    frame = tagged(tags, target, source, NODE4)
    send_frame(node.pods["a"], "eth0", frame)
    assert not hears(tap)
    ((direction, _outcome),) = node.counted(made)
    assert direction == "outbound"


@pytest.mark.parametrize("tags", TAGS.values(), ids=TAGS)
def test_tags_do_not_hide_what_goes_to_the_pod(node: Node, tags: list[int]) -> None:
    made = node.enroll()
    tap = node.pods["a"].open_socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
    target = netns.run_in(node.pods["a"].fd, partial(_mac, "eth0"))
    frame = tagged(tags, target, NODE4, PODS["a"][0])
    send_frame(node.node, "pod-a", frame)
    assert not hears(tap)
    ((direction, _outcome),) = node.counted(made)
    assert direction == "inbound"


def _mac(link: str) -> bytes:
    text = subprocess.run(
        ["ip", "-o", "link", "show", link], check=True, capture_output=True, text=True
    ).stdout
    return bytes.fromhex(text.split("link/ether ")[1].split()[0].replace(":", ""))


def tagged(tags: list[int], target: bytes, source: str, destination: str) -> bytes:
    """Return a frame with plaintext TCP behind tags of VLAN 0."""
    packet = with_checksum(tcp_packet(source, destination, ACK | PUSH, PORTS, b"a secret"))
    types = b"".join(struct.pack(">HH", kind, 0) for kind in tags) + b"\x08\x00"
    return target + bytes.fromhex("020000000001") + types + packet


def send_frame(sender: Namespace, link: str, frame: bytes, claimed: int = 0) -> None:
    """Send a frame as it is; `claimed` is the type that the sender tells its own kernel."""
    raw = sender.open_socket(socket.AF_PACKET, socket.SOCK_RAW)
    netns.run_in(sender.fd, lambda: raw.bind((link, claimed)))
    with suppress(OSError):  # a sender on the node's side hears of the drop
        raw.send(frame)


@pytest.mark.parametrize("is_strict", [True, False])
def test_what_the_agent_carries_stays_off_the_link(
    node: Node, tap: socket.socket, is_strict: bool
) -> None:
    """A pod, or a clumsy program in it, deletes the rule that brings answers to the agent."""
    made = node.enroll(is_strict=is_strict)
    dialed, accepted = carried(node, made)
    accepted.sendall(b"answer")
    assert dialed.recv(100) == b"answer"
    netns.run_in(node.pods["a"].fd, lambda: netlink.delete_reply_route(socket.AF_INET))
    accepted.sendall(b"a secret")
    assert not hears(dialed)
    assert not hears(tap)
    assert node.counted(made)["outbound", "plaintext"] >= 1


def test_nobody_slips_words_into_what_the_agent_carries(node: Node) -> None:
    made = node.enroll()
    dialed, accepted = carried(node, made)
    host, port = dialed.getsockname()
    segment = struct.pack(">HHIIBBHHH", port, PORT, 1, 1, 5 << 4, ACK | PUSH, 1024, 0, 0)
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(segment) + 4, 1, 0, 64, 6, 0)
    packet = head + socket.inet_aton(host) + socket.inet_aton(PODS["a"][0]) + segment + b"evil"
    raw = node.node.open_socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    raw.sendto(packet, (PODS["a"][0], 0))
    assert not hears(accepted)
    assert node.counted(made) == {("inbound", "plaintext"): 1}


def carried(node: Node, made: Enrollment) -> tuple[socket.socket, socket.socket]:
    """Connect to an application of pod a as its agent does, from a client's address."""
    listener = node.pods["a"].listen(PODS["a"][0], PORT)
    dialed = node.pods["a"].open_socket()
    exempt(node.pins.maps["ss_exempt"], dialed)
    borrow_source(dialed, ip_address(NODE4))
    dialed.connect((PODS["a"][0], PORT))
    accepted, _address = listener.accept()
    accepted.settimeout(5)
    node.pods["a"].cleanup.enter_context(accepted)
    assert node.counted(made) == {}
    return dialed, accepted


@pytest.mark.parametrize("flags", [SYN, ACK | PUSH])
def test_nobody_outside_speaks_as_the_pod_itself(node: Node, flags: int) -> None:
    """Over IPv6, whose kernel takes a packet from the own address; lookup passes such a flow."""
    made = node.enroll()
    own = PODS["a"][1]
    segment = struct.pack(">HHIIBBHHH", 40000, PORT, 1, 1, 5 << 4, flags, 1024, 0, 0)
    head = struct.pack(">IHBB", 6 << 28, len(segment), socket.IPPROTO_TCP, 64)
    packet = head + ip_address(own).packed * 2 + segment
    node.node.connect(own, HBONE_PORT)  # they know each other's link address from here on
    raw = node.node.open_socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW)
    raw.sendto(packet, (own, 0))
    assert node.counted(made) == {("inbound", "spoofed"): 1}


def test_type_of_a_frame_is_what_the_pod_reads(node: Node) -> None:
    """Who sends by AF_PACKET from the node tells its kernel any type, and the guard sees that."""
    made, (own, _) = node.enroll(), PODS["a"]
    head = netns.run_in(node.pods["a"].fd, partial(_mac, "eth0")) + bytes.fromhex("020000000001")
    words = with_checksum(tcp_packet(NODE4, own, ACK | PUSH, PORTS, b"evil"))
    send_frame(node.node, "pod-a", head + b"\x08\x00" + words, claimed=ETH_P_ARP)
    assert node.counted(made) == {("inbound", "plaintext"): 1}


def test_no_datagram_from_outside_is_the_pods_own(node: Node) -> None:
    """The kernel does not look at that any more, since enrollment said accept_local."""
    made, own = node.enroll(), PODS["a"][0]
    server = node.pods["a"].open_socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind((own, PORT))
    datagram = struct.pack(">HHHH", PORT, PORT, 8 + 4, 0) + b"evil"
    addresses = ip_address(own).packed * 2
    head = struct.pack(">BxHxxxxBBxx", 0x45, 20 + len(datagram), 64, socket.IPPROTO_UDP)
    raw = node.node.open_socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    raw.sendto(head + addresses + datagram, (own, 0))
    wait_until(lambda: node.counted(made))
    assert node.counted(made) == {("inbound", "spoofed"): 1}
    assert not hears(server)


def test_nobody_outside_speaks_by_an_address_of_the_pod_that_nobody_told(node: Node) -> None:
    """Lookup takes it for the pod itself; by Fast Open even the first segment has words."""
    made, own = node.enroll(is_strict=False), "10.78.9.9"
    _run(node.pods["a"], f"ip address add {own}/32 dev lo")
    _run(node.node, f"ip route add {own}/32 via {PODS['a'][0]}")
    raw = node.node.open_socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    raw.sendto(tcp_packet(own, own, SYN, PORTS, b"evil"), (own, 0))
    wait_until(lambda: node.counted(made))
    assert node.counted(made) == {("inbound", "spoofed"): 1}


ACCEPT_LOCAL = Path("/proc/sys/net/ipv4/conf/eth0/accept_local")


@pytest.mark.parametrize("before", ["0", "1"])
def test_sysctl_of_a_guarded_link_is_as_before_when_the_guard_has_gone(
    node: Node, before: str
) -> None:
    pod = node.pods["a"].fd
    netns.run_in(pod, partial(ACCEPT_LOCAL.write_text, before))
    with ExitStack() as stack:
        made = replace(node, stack=stack).enroll()
        assert netns.run_in(pod, ACCEPT_LOCAL.read_text) == "1\n"
        enroll.release(made)
        assert netns.run_in(pod, ACCEPT_LOCAL.read_text) == f"{before}\n"


def test_pod_with_an_address_that_nobody_told_keeps_the_kernels_check(node: Node) -> None:
    _run(node.pods["a"], "ip address add 10.78.9.9/32 dev lo")
    made = node.enroll()
    assert netns.run_in(node.pods["a"].fd, ACCEPT_LOCAL.read_text) == "0\n"
    assert made.accepting == []


def test_sysctl_is_taken_back_from_an_interface_that_was_renamed(node: Node) -> None:
    pod = node.pods["a"]
    with ExitStack() as stack:
        made = replace(node, stack=stack).enroll()
        for command in ("down", "name other", "up"):
            _run(pod, f"ip link set {'other' if command == 'up' else 'eth0'} {command}")
        enroll.release(made)
    renamed = Path("/proc/sys/net/ipv4/conf/other/accept_local")
    assert netns.run_in(pod.fd, renamed.read_text) == "0\n"


@pytest.mark.parametrize("is_strict", [True, False])
def test_pod_cannot_borrow_another_address(node: Node, tap: socket.socket, is_strict: bool) -> None:
    made = node.enroll(is_strict=is_strict)
    send_raw(node.pods["a"], tcp_packet(PODS["b"][0], NODE4, SYN, PORTS))
    assert not hears(tap)
    assert node.counted(made) == {("outbound", "spoofed"): 1}


def test_agent_passes_through_a_strict_pod(node: Node) -> None:
    made = node.enroll()
    listener = node.node.listen(NODE4, PORT)
    dialed = node.pods["a"].open_socket()
    exempt(node.pins.maps["ss_exempt"], dialed)
    dialed.connect((NODE4, PORT))
    accepted, _address = listener.accept()
    with accepted:
        dialed.sendall(b"question")
        assert accepted.recv(100) == b"question"
        accepted.sendall(b"answer")
        assert dialed.recv(100) == b"answer"
        dialed.close()
        accepted.sendall(b"to a socket that is gone")
        assert hears(accepted)  # the RST: not a silence until the last retransmission
    assert node.counted(made) == {}


@pytest.mark.parametrize("host", PODS["a"])
def test_tunnel_port_of_a_strict_pod_is_open(node: Node, host: str) -> None:
    made = node.enroll()
    peer = node.node.connect(host, HBONE_PORT)
    (listener,) = made.hbone
    listener.settimeout(5)
    accepted, _address = listener.accept()
    with accepted:
        peer.sendall(b"hello")
        assert accepted.recv(100) == b"hello"
        accepted.sendall(b"hello back")
        assert peer.recv(100) == b"hello back"
    assert node.counted(made) == {}


def test_plaintext_client_of_a_strict_pod_reaches_the_agent(node: Node) -> None:
    """So that it is refused and logged, rather than left to wait."""
    made = node.enroll()
    client = node.node.connect(PODS["a"][0], PORT)
    (listener,) = made.inbound
    listener.settimeout(5)
    listener.accept()[0].close()
    assert client.recv(1) == b""


def test_direct_path_of_strict_pods_passes(node: Node) -> None:
    first, second = node.enroll("a"), node.enroll("b")
    node.allow(first, second)
    client, server = join(node.pods["a"], node.pods["b"], PODS["b"][0])
    client.sendall(b"question")
    assert server.recv(100) == b"question"
    server.sendall(b"answer")
    assert client.recv(100) == b"answer"
    client.close()
    server.sendall(b"to a socket that is gone")
    assert hears(server)
    server.close()
    assert node.counted(first) == node.counted(second) == {}


def grace_period() -> float:
    """Return how long the kernel waits until all processors have forgotten what they read."""
    began = time.monotonic()
    assert (
        ctypes.CDLL(None).syscall(SYS_MEMBARRIER[os.uname().machine], MEMBARRIER_GLOBAL, 0, 0) == 0
    )
    return time.monotonic() - began


def test_running_pod_is_enrolled_within_fifty_milliseconds(
    node: Node, measured: Callable[[str], None]
) -> None:
    """Listeners, maps, lookup and guard: all that a label waits for here.

    To attach by tcx, the kernel waits for a grace period for each direction, 3 to 15 ms and more on
    processors at rest. That is not our time.
    """
    node.enroll("b")  # the first pod of all has the kernel patch itself
    took, waited = [], []
    for _ in range(9):
        with ExitStack() as stack:
            once = replace(node, stack=stack)
            began = time.monotonic()
            once.enroll()
            took.append(time.monotonic() - began)
        waited.append(2 * grace_period() if features.has_tcx() else 0.0)
    text = f"{statistics.median(took) * 1000:.1f} ms, {statistics.median(waited) * 1000:.1f} of it"
    measured(f"enrolling a running pod: {text} the kernel's grace periods")
    assert statistics.median(took) - statistics.median(waited) < 0.05


def late(node: Node, client: socket.socket) -> dict[object, object]:
    """Return the interface by which late segments may come to each end, by netns cookie."""
    ports = {client.getsockname()[1], PORT}
    return {
        key["netns_cookie"]: value["value"]
        for key, value in node.pins.maps["ss_guard_flows"].items()
        if {key["local_port_be"], key["remote_port_be"]} == ports
    }


def test_nothing_is_late_after_an_end_in_order(node: Node) -> None:
    node.allow(node.enroll("a"), node.enroll("b"))
    client, server = join(node.pods["a"], node.pods["b"], PODS["b"][0])
    server.close()
    assert client.recv(1) == b""
    client.shutdown(socket.SHUT_WR)
    wait_until(lambda: not list(direct.live_flows(node.pins)))
    assert late(node, client) == {}


def test_segments_may_be_late_after_a_reset(node: Node) -> None:
    """What the other end sent before it heard of it."""
    first, second = node.enroll("a"), node.enroll("b")
    node.allow(first, second)
    client, server = join(node.pods["a"], node.pods["b"], PODS["b"][0])
    (flow,) = direct.live_flows(node.pins)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
    server.close()
    wait_until(lambda: not list(direct.live_flows(node.pins)))
    links = {
        name: netns.run_in(node.node.fd, partial(socket.if_nametoindex, f"pod-{name}"))
        for name in PODS
    }
    assert late(node, client) == {
        first.netns_cookie: links["b"],
        second.netns_cookie: links["a"],
    }
    direct.Flows(node.pins).forget(flow)
    assert late(node, client) == {}


@pytest.fixture(params=[True, False], ids=["tcx", "clsact"])
def bridged(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, loaded: Pins
) -> Iterator[Node]:
    """Yield a node whose pods share a bridge: a and b, and c, which stays outside the mesh."""
    monkeypatch.setattr(features, "has_tcx", lambda: request.param)
    with ExitStack() as stack:
        here = _namespace(stack)
        _run(here, "ip link add cni0 type bridge")
        _run(here, "ip link set cni0 up")
        pods = {}
        for name, address in (*((name, PODS[name][0]) for name in PODS), ("c", BRIDGED_STRANGER)):
            pods[name] = _namespace(stack)
            netns.run_in(here.fd, partial(netlink.add_veth, f"pod-{name}", "eth0", pods[name].fd))
            _run(here, f"ip link set pod-{name} master cni0 up")
            _run(pods[name], "ip link set eth0 up")
            _run(pods[name], f"ip address add {address}/24 dev eth0")
        yield Node(loaded, here, pods, stack)


def _run(where: Namespace, command: str) -> None:
    netns.run_in(where.fd, partial(subprocess.run, command.split(), check=True))


def _lead_astray(node: Node) -> None:
    """Do to pod a what a forged ARP answer of pod c does: b's address is at c."""
    there = netns.run_in(node.pods["c"].fd, partial(_mac, "eth0")).hex(":")
    _run(node.pods["a"], f"ip neigh replace {PODS['b'][0]} lladdr {there} dev eth0 nud permanent")


def test_neighbor_on_the_bridge_does_not_answer_a_direct_connection(bridged: Node) -> None:
    """Pod c has b's address as well: a's connections neither end nor pass there."""
    first, second = bridged.enroll("a"), bridged.enroll("b")
    pods, target = bridged.pods, PODS["b"][0]
    bridged.allow(first, second)
    client, server = join(pods["a"], pods["b"], target)
    client.sendall(b"question")
    assert server.recv(100) == b"question"
    _run(pods["c"], f"ip address add {target}/32 dev eth0")
    false = pods["c"].listen(target, PORT)
    _lead_astray(bridged)
    asked = pods["a"].open_socket()
    asked.setblocking(False)
    asked.connect_ex((target, PORT))
    assert not hears(false)
    assert bridged.counted(first) == {("inbound", "spoofed"): 1}  # the answer of c
    syn = tcp_packet(PODS["a"][0], target, SYN, (asked.getsockname()[1], PORT))
    frame = netns.run_in(pods["b"].fd, partial(_mac, "eth0")) + bytes.fromhex("020000000001")
    send_frame(pods["c"], "eth0", frame + b"\x08\x00" + with_checksum(syn))
    assert bridged.counted(second) == {("inbound", "spoofed"): 1}  # passed on by c
    words = tcp_packet(target, PODS["a"][0], ACK | PUSH, (PORT, client.getsockname()[1]), b"evil")
    frame = netns.run_in(pods["a"].fd, partial(_mac, "eth0")) + bytes.fromhex("020000000001")
    before = bridged.counted(first)["inbound", "spoofed"]
    send_frame(pods["c"], "eth0", frame + b"\x08\x00" + with_checksum(words))
    assert bridged.counted(first)["inbound", "spoofed"] == before + 1  # into what was open before


def test_end_whose_link_is_not_known_is_not_the_node(node: Node) -> None:
    """A pod with several links sends by one that guard has not seen yet, and the node by none."""
    first, second = node.enroll("a"), node.enroll("b")
    node.allow(first, second)
    client, _server = join(node.pods["a"], node.pods["b"], PODS["b"][0])
    flows = node.pins.maps["ss_direct_flows"]
    for key, flow in list(flows.items()):
        flows.put(key, flow | {"source_link": 0})
    ports = client.getsockname()[1], PORT
    words = tcp_packet(PODS["a"][0], PODS["b"][0], ACK | PUSH, ports, b"evil")
    head = netns.run_in(node.pods["b"].fd, partial(_mac, "eth0")) + bytes.fromhex("020000000001")
    send_frame(node.node, "pod-b", head + b"\x08\x00" + with_checksum(words))
    assert node.counted(second) == {("inbound", "spoofed"): 1}


def test_neighbor_on_the_bridge_does_not_hear_a_direct_connection(bridged: Node) -> None:
    """Pod c is in the mesh as well: what a says to b does not reach it, whomever a asks for b."""
    first, second, third = (bridged.enroll(name) for name in "abc")
    bridged.allow(first, second)
    client, server = join(bridged.pods["a"], bridged.pods["b"], PODS["b"][0])
    client.sendall(b"question")
    assert server.recv(100) == b"question"
    tap = bridged.pods["c"].open_socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_IP))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)  # nobody acknowledges
    _lead_astray(bridged)
    client.sendall(b"secret")
    wait_until(lambda: bridged.counted(third))
    assert set(bridged.counted(third)) == {("inbound", "plaintext")}
    while hears(tap):  # segments that carry nothing
        assert b"secret" not in tap.recv(2000)


def test_change_of_policy_between_connect_and_syn_costs_a_second(node: Node) -> None:
    """TCP_FASTOPEN_CONNECT makes that moment as long as a test wants it."""
    first, second = node.enroll("a"), node.enroll("b")
    node.allow(first, second)
    verdicts = direct.Verdicts(node.pins.maps["ss_verdicts"], node.pins.maps["ss_generation"])
    netns.run_in(node.pods["a"].fd, lambda: FASTOPEN_SYSCTL.write_text(FASTOPEN_NO_COOKIE))
    listener = node.pods["b"].listen(PODS["b"][0], PORT)
    client = node.pods["a"].open_socket()
    client.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
    client.connect((PODS["b"][0], PORT))
    verdicts.renew()
    client.setblocking(False)
    client.send(b"question")
    assert node.counted(first) == {("outbound", "plaintext"): 1}
    assert not hears(listener)
    node.allow(first, second)
    server, _address = listener.accept()
    with server:
        server.settimeout(5)
        assert server.recv(100) == b"question"
    (flow,) = direct.live_flows(node.pins)
    assert flow.source_port == client.getsockname()[1]


def test_verdict_does_not_lead_past_an_exclusion(node: Node) -> None:
    """The verdict is about another way to there: a service whose port is not excluded."""
    first = node.enroll("a", outbound_ports=frozenset({PORT}))
    second = node.enroll("b")
    node.allow(first, second)
    node.pods["a"].connect(PODS["b"][0], PORT)  # b's agent gets it, as from any plaintext client
    assert list(direct.live_flows(node.pins)) == []


def test_end_of_a_connection_to_a_service_leaves_others_from_its_port_alone(node: Node) -> None:
    """It was not published, and the name of the service is on its socket all the same."""
    first, second = node.enroll("a"), node.enroll("b")
    maps, service = node.pins.maps, ip_address("10.96.0.10")
    verdicts = direct.Verdicts(maps["ss_verdicts"], maps["ss_generation"])
    services = ServiceMaps(node.pins)
    services.apply({(service, 80): ((ip_address(PODS["b"][0]), PORT),)})
    netns.run_in(node.pods["a"].fd, lambda: FASTOPEN_SYSCTL.write_text(FASTOPEN_NO_COOKIE))
    captured, other = (node.pods["a"].open_socket() for _ in range(2))
    for each in (captured, other):
        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        each.bind((PODS["a"][0], PORTS[0]))
    captured.connect(("10.98.0.1", 443))
    (key, _origin) = next(iter(maps["ss_origin_flow"].items()))
    node.allow(first, second)
    other.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
    other.connect((str(service), 80))
    verdicts.renew()
    other.setblocking(False)
    other.send(b"question")
    assert node.counted(first) == {("outbound", "plaintext"): 1}
    other.close()
    assert maps["ss_origin_flow"].get(key) is not None
    services.apply({})


def test_pod_that_leaves_the_mesh_before_it_answers_still_answers(node: Node) -> None:
    with ExitStack() as stack:
        first, second = node.enroll("a"), replace(node, stack=stack).enroll("b")
        node.allow(first, second)
        listener = node.pods["b"].listen(PODS["b"][0], PORT)
        _run(node.pods["b"], f"ip route add blackhole {PODS['a'][0]}/32")
        client = node.pods["a"].open_socket()
        client.setblocking(False)
        client.connect_ex((PODS["b"][0], PORT))
        wait_until(lambda: list(direct.live_flows(node.pins)))
    _run(node.pods["b"], f"ip route delete blackhole {PODS['a'][0]}/32")
    server, _address = listener.accept()
    with server:
        client.setblocking(True)
        client.settimeout(5)
        client.sendall(b"question")
        server.settimeout(5)
        assert server.recv(100) == b"question"


def test_replayed_flow_is_not_let_in(node: Node) -> None:
    """SYN and data with the addresses of a direct flow that ended."""
    first, second = node.enroll("a"), node.enroll("b")
    node.allow(first, second)
    listener = node.pods["b"].listen(PODS["b"][0], PORT)
    client = node.pods["a"].open_socket()
    client.bind((PODS["a"][0], 40000))
    client.connect((PODS["b"][0], PORT))
    listener.accept()[0].close()
    client.close()
    send_raw(node.pods["a"], tcp_packet(PODS["a"][0], PODS["b"][0], SYN, PORTS))
    assert not hears(listener)
    assert node.counted(first) == {("outbound", "plaintext"): 1}


@pytest.mark.parametrize("kind", ["excluded", "permissive"])
def test_port_that_is_not_strict_passes(node: Node, kind: str) -> None:
    client, server = join(node.node, node.pods["a"], PODS["a"][0])
    if kind == "excluded":
        made = node.enroll(inbound_ports=frozenset({PORT}))
    else:
        made = node.enroll()
        enroll.set_strict(node.pins, made, is_strict=True, but=frozenset({PORT}))
    client.sendall(b"question")
    assert server.recv(100) == b"question"
    server.sendall(b"answer")
    assert client.recv(100) == b"answer"
    if kind == "permissive":
        enroll.set_strict(node.pins, made, is_strict=True, but=frozenset())
        client.sendall(b"more")
        assert not hears(server)


def test_udp_is_counted_and_passes(node: Node) -> None:
    made = node.enroll()
    server = node.node.open_socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind((NODE4, PORT))
    client = node.pods["a"].open_socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.sendto(b"ping", (NODE4, PORT))
    assert server.recv(100) == b"ping"
    assert node.counted(made) == {}


def _show(node: Node, *what: str) -> str:
    def run() -> str:
        command = ["tc", *what, "dev", "pod-a"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    return netns.run_in(node.node.fd, run)


def test_guard_leaves_no_trace_and_filters_of_others_alone(node: Node, loaded: Pins) -> None:
    before = _show(node, "qdisc", "show"), _show(node, "filter", "show", "ingress")
    made = node.enroll()
    netns.run_in(node.node.fd, partial(enroll.unenroll, made))
    assert (_show(node, "qdisc", "show"), _show(node, "filter", "show", "ingress")) == before
    assert list(loaded.maps["ss_guards"].items()) == []
    assert not list((loaded.directory / "links").glob("guard_*"))
    assert node.counted(made) == {}

    def add_foreign() -> None:
        with IPRoute() as ipr:
            (link,) = ipr.link_lookup(ifname="pod-a")
            ipr.tc("add", "clsact", link)
            ipr.tc(
                "add-filter", "bpf", link, 7, parent=netlink.INGRESS, prio=1, fd=program_fd,
                name="foreign", direct_action=True,
            )  # fmt: skip

    program_fd = loaded.program("ss_guard_in")
    node.stack.callback(os.close, program_fd)
    netns.run_in(node.node.fd, add_foreign)
    with_foreign = _show(node, "filter", "show", "ingress")
    assert "foreign" in with_foreign
    made = node.enroll()
    assert "foreign" in _show(node, "filter", "show", "ingress")
    netns.run_in(node.node.fd, partial(enroll.unenroll, made))
    assert _show(node, "filter", "show", "ingress") == with_foreign


@pytest.fixture
def cgroups() -> Iterator[tuple[Path, Path]]:
    """Return the cgroup of a kubelet, and one of another service of the node."""
    parent = links.cgroup_root() / f"sidestep-test-{os.getpid()}"
    made = (parent / "kubelet.service", parent / "other.service")
    for path in made:
        path.mkdir(parents=True)
    yield made
    for path in [*made, parent]:
        if path.is_dir():
            path.rmdir()


def probe(node: Node, cgroup: Path) -> int:
    """Let a program of the node, in that cgroup, fetch from the pod; return curl's exit code."""
    namespace = f"/proc/{os.getpid()}/fd/{node.node.fd}"
    url = f"http://{PODS['a'][0]}:{PORT}/"
    curl = ["curl", "-s", "-m", "2", "-o", "/dev/null", "--http0.9", url]
    command = [sys.executable, "-m", "agent.lab.launch", namespace, str(cgroup), *curl]
    return subprocess.run(command, check=False).returncode


def test_only_the_kubelet_may_probe_a_strict_pod(node: Node, cgroups: tuple[Path, Path]) -> None:
    kubelet, other = cgroups
    made = node.enroll()
    listener = node.pods["a"].listen(PODS["a"][0], PORT)
    answering = threading.Thread(target=_answer, args=(listener, 2))
    answering.start()
    probers = Probers(node.pins.maps["ss_probers"], kubelet)
    probers.refresh()
    assert probe(node, kubelet) == 0
    assert probe(node, other) != 0
    made.inbound[0].settimeout(5)
    made.inbound[0].accept()[0].close()  # it got to the agent, as any plaintext client does
    kubelet.rmdir()  # the service restarts: its cgroup is another one under the same name
    kubelet.mkdir()
    probers.refresh()
    assert probe(node, kubelet) == 0
    answering.join()
    outcomes = node.counted(made)
    assert outcomes.keys() == {("inbound", "plaintext")}  # of the other one's request


def _answer(listener: socket.socket, count: int) -> None:
    for _ in range(count):
        with listener.accept()[0] as accepted:
            accepted.settimeout(5)
            accepted.recv(4096)
            accepted.sendall(b"well")
