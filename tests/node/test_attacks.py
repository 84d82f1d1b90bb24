"""Attacks from pods that may do all in their own namespace: none gets in, none borrows an identity.

STRICT, and a policy that lets `client` in and nobody else. Attackers are sockets and commands with
every capability inside a pod's namespace. The vault tells what it heard; its secret is what they
are after. docs/security.md says which attack is about which claim.
"""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import threading
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from agent import netns
from agent.datapath import listing
from agent.identity.local import LocalAuthority
from agent.lab import machine
from agent.lab.lab import Lab
from agent.model.capture import HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT, REPLY_MARK
from agent.model.identity import SpiffeId
from agent.tunnel.sockets import LINGER_RESET
from tests.node.test_identity import wait_revoked, write_revoked
from tests.support.labs import entries, wait_for_entry
from tests.support.packets import ACK, PUSH, SYN, tcp_packet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

PORT, SECRET = 8080, b"the secret"
DNS_PORT = 15053
LISTENERS = [OUTBOUND_PORT, INBOUND_PORT, HBONE_PORT]
IP_TRANSPARENT, IPPROTO_MPTCP = 19, 262  # linux/in.h
FLOOD = 3000  # SYNs: three times the queue of a listener
PODS = {  # name: node, namespace
    "client": ("east", "shop"),
    "intruder": ("east", "shop"),
    "saboteur": ("east", "shop"),
    "vault": ("east", "shop"),
    "far-vault": ("west", "shop"),
    "stranger": ("east", "outside"),
    "far-stranger": ("west", "outside"),
}
VAULTS = ["vault", "far-vault"]
STRANGERS = ["stranger", "far-stranger"]


def policy(account: str) -> dict[str, Any]:
    rule = {
        "from": [{"source": {"serviceAccounts": [f"shop/{account}"]}}],
        "to": [{"operation": {"ports": [str(PORT)]}}],
    }
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "vaults", "namespace": "shop"},
        "spec": {"action": "ALLOW", "rules": [rule]},
    }


def describe() -> list[dict[str, Any]]:
    def body(kind: str, name: str, **more: Any) -> dict[str, Any]:
        return {"apiVersion": "v1", "kind": kind, "metadata": {"name": name}, **more}

    found = [body("Node", "east"), body("Node", "west"), body("Namespace", "outside")]
    found.append(body("Namespace", "shop"))
    found[-1]["metadata"]["labels"] = {"istio.io/dataplane-mode": "ambient"}
    for name, (node, namespace) in PODS.items():
        found.append(body("Pod", name, spec={"nodeName": node, "serviceAccountName": name}))
        found[-1]["metadata"]["namespace"] = namespace
    strict = body("PeerAuthentication", "strict", spec={"mtls": {"mode": "STRICT"}})
    strict["apiVersion"] = "security.istio.io/v1"
    strict["metadata"]["namespace"] = "shop"
    return [*found, strict, policy("client")]


class Vault:
    """A server that tells its secret to whoever asks, and remembers all that it heard."""

    def __init__(self, ground: Ground, name: str) -> None:
        self.address = ground.address(name)
        self.heard: list[bytes] = []
        self._listener = ground.open_socket(name)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("", PORT))
        self._listener.listen(128)
        self._listener.settimeout(None)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with suppress(OSError):  # closed
            while True:
                threading.Thread(target=self._answer, args=self._listener.accept()[:1]).start()

    def _answer(self, accepted: socket.socket) -> None:
        with accepted, suppress(ConnectionError):
            while data := accepted.recv(65536):
                self.heard.append(data)
                accepted.sendall(SECRET)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()


class Ground:
    """The lab, its vaults, and sockets and commands inside its pods."""

    def __init__(self, lab: Lab, stack: ExitStack) -> None:
        self.lab = lab
        self.stack = stack
        self._fds = {}
        for name in PODS:
            self._fds[name] = netns.open_netns(lab.pod_netns(lab.find_pod(name)))
            stack.callback(os.close, self._fds[name])
        self.vaults = {name: Vault(self, name) for name in VAULTS}
        for vault in self.vaults.values():
            stack.callback(vault.close)

    def address(self, name: str) -> str:
        return str(self.lab.find_pod(name).address4)

    def inside(self, name: str, function: Callable[[], Any]) -> Any:
        return netns.run_in(self._fds[name], function)

    def open_socket(self, name: str, *kind: int) -> socket.socket:
        made: socket.socket = self.inside(name, lambda: socket.socket(*kind))
        made.settimeout(3)
        self.stack.callback(made.close)
        return made

    def command(self, name: str, *words: str) -> int:
        run = partial(subprocess.run, words, capture_output=True, check=False)
        return int(self.inside(name, run).returncode)

    def send_raw(
        self, name: str, source: str, target: str, flags: int, ports: tuple[int, int], data: bytes
    ) -> None:
        packet = tcp_packet(source, target, flags, ports, data)
        with self.inside(name, RAW) as raw:
            raw.sendto(packet, (target, 0))

    def dropped(self, name: str, reason: str) -> int:
        """Return the packets from a pod that the guard dropped."""
        found = 0
        for directory in listing.find_directories((self.lab.pins,)):
            for row in listing.dump_map(directory, "ss_counters"):
                if row["pod"] == f"shop/{name}" and (row["direction"], row["outcome"]) == (
                    "outbound", reason,
                ):  # fmt: skip
                    assert isinstance(row["packets"], int)
                    found += row["packets"]
        return found


RAW = partial(socket.socket, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)


def ask(made: socket.socket, target: tuple[str, int]) -> bytes:
    """Connect and ask for the secret; return what comes, nothing if it ends or is silent."""
    try:
        made.connect(target)
        made.sendall(b"open")
        return made.recv(100)
    except OSError:
        return b""


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    description = tmp_path_factory.mktemp("attacks") / "cluster.yaml"
    description.write_text(yaml.safe_dump_all(describe()))
    with ExitStack() as stack:
        lab = Lab(f"a{os.getpid()}")
        stack.callback(lab.down)
        lab.up(description, print)
        for node in lab.cluster().nodes:
            for state in lab.agent_states(node):
                states = [pod["state"] for pod in state["pods"]]
                certificates = state["identity"]["certificates"]
                if set(states) == {"enrolled"} and all(
                    row["state"] == "Available" for row in certificates
                ):
                    break
        made = Ground(lab, stack)
        for name in VAULTS:
            wait_served(made, name)
        yield made


def wait_served(ground: Ground, vault: str) -> None:
    """Wait until the client's agent knows that the vault answers tunnels."""
    for _ in range(1000):
        if ask(ground.open_socket("client"), (ground.address(vault), PORT)) == SECRET:
            return
    raise AssertionError(f"{vault} does not answer")


@pytest.fixture
def vaults(ground: Ground) -> Iterator[dict[str, Vault]]:
    """The vaults, which must hear nothing during the test and serve the client after it."""
    for vault in ground.vaults.values():
        vault.heard.clear()
    yield ground.vaults
    for vault in ground.vaults.values():
        assert vault.heard == []
        assert ask(ground.open_socket("client"), (vault.address, PORT)) == SECRET


both_vaults = pytest.mark.parametrize("vault", VAULTS)


@both_vaults
@pytest.mark.parametrize("name", ["intruder", *STRANGERS])
@pytest.mark.parametrize("kind", ["plain", "mptcp", "fast open"])
def test_nobody_else_is_let_in(
    ground: Ground, vaults: dict[str, Vault], vault: str, name: str, kind: str
) -> None:
    protocol = IPPROTO_MPTCP if kind == "mptcp" else 0
    made = ground.open_socket(name, socket.AF_INET, socket.SOCK_STREAM, protocol)
    target = (vaults[vault].address, PORT)
    if kind == "fast open":
        with suppress(OSError):
            made.sendto(b"open", socket.MSG_FASTOPEN, target)
            assert made.recv(100) == b""
    else:
        assert ask(made, target) == b""


@both_vaults
def test_address_of_the_allowed_pod_on_the_own_link(
    ground: Ground, vaults: dict[str, Vault], vault: str
) -> None:
    address = ground.address("client")
    assert ground.command("intruder", "ip", "address", "add", f"{address}/32", "dev", "eth0") == 0
    try:
        made = ground.open_socket("intruder")
        made.bind((address, 0))
        assert ask(made, (vaults[vault].address, PORT)) == b""
    finally:
        ground.command("intruder", "ip", "address", "del", f"{address}/32", "dev", "eth0")


@both_vaults
def test_mark_of_the_agent_and_the_address_of_the_allowed_pod(
    ground: Ground, vaults: dict[str, Vault], vault: str
) -> None:
    made = ground.open_socket("intruder")
    made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, REPLY_MARK)
    made.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
    made.bind((ground.address("client"), 0))
    assert ask(made, (vaults[vault].address, PORT)) == b""


@pytest.mark.parametrize("flags", [SYN, ACK | PUSH])
def test_raw_packets_in_the_name_of_the_allowed_pod(
    ground: Ground, vaults: dict[str, Vault], flags: int
) -> None:
    """From a pod that is guarded, and from one that is not: there the answer goes to the client."""
    source, target = ground.address("client"), vaults["vault"].address
    before = ground.dropped("intruder", "spoofed")
    for name in ("intruder", "stranger"):
        data = b"open" if flags & PUSH else b""
        ground.send_raw(name, source, target, flags, (40000, PORT), data)
    assert ground.dropped("intruder", "spoofed") == before + 1


def test_raw_plaintext_in_the_own_name(ground: Ground, vaults: dict[str, Vault]) -> None:
    before = ground.dropped("intruder", "plaintext")
    source, target = ground.address("intruder"), vaults["vault"].address
    ground.send_raw("intruder", source, target, SYN, (40001, PORT), b"")
    ground.send_raw("intruder", source, target, ACK | PUSH, (40001, PORT), b"open")
    assert ground.dropped("intruder", "plaintext") == before + 2


@pytest.mark.parametrize("port", [*LISTENERS, DNS_PORT])
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_ports_of_the_agent_cannot_be_bound(ground: Ground, port: int, family: int) -> None:
    made = ground.open_socket("intruder", family)
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        made.setsockopt(socket.SOL_SOCKET, option, 1)
    with pytest.raises(PermissionError):
        made.bind(("", port))


@pytest.mark.parametrize("port", LISTENERS)
def test_listening_port_is_not_given_by_a_narrow_range(ground: Ground, port: int) -> None:
    """bind() to port 0 takes one from a range that the pod sets: not one that the agent has."""
    set_range = f"echo {port} {port} > /proc/sys/net/ipv4/ip_local_port_range"
    assert ground.command("intruder", "sh", "-c", set_range) == 0
    try:
        made = ground.open_socket("intruder")
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match="Address already in use"):
            made.bind(("", 0))
    finally:
        ground.command("intruder", "sh", "-c", set_range.replace(f"{port} {port}", "32768 60999"))


@pytest.mark.parametrize("port", LISTENERS)
@pytest.mark.parametrize("name", ["intruder", *STRANGERS])
def test_listeners_speak_to_nobody_who_dials_them(
    ground: Ground, vaults: dict[str, Vault], name: str, port: int
) -> None:
    own = ["127.0.0.1", ground.address("intruder")] if name == "intruder" else []
    for host in (*own, *(vault.address for vault in vaults.values())):
        assert ask(ground.open_socket(name), (host, port)) == b""


@both_vaults
@pytest.mark.parametrize("name", STRANGERS)
@pytest.mark.parametrize("has_certificate", [False, True])
def test_tunnel_needs_a_certificate_of_the_mesh(
    ground: Ground,
    vaults: dict[str, Vault],
    vault: str,
    name: str,
    has_certificate: bool,
    tmp_path: Path,
) -> None:
    """Also not one with the right name that another authority has signed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if has_certificate:
        authority = LocalAuthority.create(tmp_path, "cluster.local")
        issued = authority.issue(SpiffeId("cluster.local", "shop", "client"))
        pem = tmp_path / "client.pem"
        pem.write_bytes(issued.chain + issued.key)
        context.load_cert_chain(pem)
    made = ground.open_socket(name)
    made.connect((vaults[vault].address, HBONE_PORT))
    with (
        context.wrap_socket(made, do_handshake_on_connect=False) as tls,
        pytest.raises((ssl.SSLError, ConnectionResetError)),
    ):
        greet(tls)


def greet(tls: ssl.SSLSocket) -> None:
    tls.do_handshake()
    tls.recv(1)  # TLS 1.3: the server's refusal comes after our Finished


def test_pod_that_takes_its_own_namespace_apart(ground: Ground, vaults: dict[str, Vault]) -> None:
    """The guard is on the node's side, and everything else is about the namespace, not in it."""
    ground.command("intruder", "ip", "rule", "del", "pref", "32764")
    ground.command("intruder", "ip", "route", "flush", "table", "100")
    ground.command("intruder", "sysctl", "-w", "net.ipv4.tcp_fwmark_accept=0")
    for hook in ("ingress", "egress"):
        ground.command("intruder", "tc", "filter", "del", "dev", "eth0", hook)
    ground.command("intruder", "tc", "qdisc", "del", "dev", "eth0", "clsact")
    for vault in vaults.values():
        assert ask(ground.open_socket("intruder"), (vault.address, PORT)) == b""
    before = ground.dropped("intruder", "spoofed")
    ground.send_raw(
        "intruder", ground.address("client"), vaults["vault"].address, SYN, (40002, PORT), b""
    )
    assert ground.dropped("intruder", "spoofed") == before + 1


def test_interface_of_its_own_does_not_pass_the_guard(
    ground: Ground, vaults: dict[str, Vault]
) -> None:
    """A macvlan has an address of its own on the link, and leaves by the same link."""
    add = "ip link add mine link eth0 type macvlan mode bridge"
    assert ground.command("intruder", *add.split()) == 0
    try:
        ground.command("intruder", "ip", "link", "set", "mine", "up")
        made = ground.open_socket("intruder")
        made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"mine")
        assert ask(made, (vaults["vault"].address, PORT)) == b""
    finally:
        ground.command("intruder", "ip", "link", "del", "mine")


@pytest.mark.parametrize("port", [0, HBONE_PORT])
def test_namespace_that_took_the_link_is_a_stranger(
    ground: Ground, vaults: dict[str, Vault], port: int
) -> None:
    """A namespace that the pod makes, which no hook knows, with eth0 in it.

    There even 15008 can be bound, whose segments pass the guard as the tunnel's answers.
    """
    pod = ground.lab.find_pod("intruder")
    here, there = ground.lab.pod_netns(pod), netns.create()
    inner = Path(f"/proc/{os.getpid()}/fd/{there}")
    try:
        assert ground.command("intruder", "ip", "link", "set", "eth0", "netns", str(inner)) == 0
        machine.connect_pod(ground.lab.node_netns(pod.node), pod, inner)
        before = ground.dropped("intruder", "plaintext")
        with netns.run_in(there, socket.socket) as made:
            made.settimeout(2)
            made.bind((ground.address("intruder"), port))
            assert ask(made, (vaults["vault"].address, PORT)) == b""
        assert (ground.dropped("intruder", "plaintext") == before) == (port == HBONE_PORT)
    finally:
        back = ["ip", "link", "set", "eth0", "netns", str(here)]
        netns.run_in(there, partial(subprocess.run, back, check=True))
        machine.connect_pod(ground.lab.node_netns(pod.node), pod, here)
        os.close(there)


def test_pod_that_closes_the_listeners_in_it_harms_itself(
    ground: Ground, vaults: dict[str, Vault]
) -> None:
    """SOCK_DESTROY, which CAP_NET_ADMIN allows: a worker must not turn in circles over it."""
    pod = ground.lab.find_pod("saboteur")
    assert ground.command("saboteur", "ss", "-K", "-l", "-t") == 0
    wait_for_entry(ground.lab, pod.node, "accept failed", lambda row: row["pod"] == pod.key)
    vault = vaults["vault"]
    for _ in range(20):
        assert ask(ground.open_socket("client"), (vault.address, PORT)) == SECRET
    vault.heard.clear()
    assert ask(ground.open_socket("saboteur"), (vault.address, PORT)) == b""
    told = entries(ground.lab, pod.node, "accept failed")
    assert len(told) < 20  # some listeners, some workers


def test_flood_of_connections_leaves_others_alone(ground: Ground, vaults: dict[str, Vault]) -> None:
    """SYNs from addresses that never answer; a bounded number of them."""
    vault = vaults["far-vault"]
    lasting = ground.open_socket("client")
    assert ask(lasting, (vault.address, PORT)) == SECRET
    with ground.inside("far-stranger", RAW) as raw:
        for number in range(FLOOD):
            source = f"10.99.{number >> 8}.{number & 255}"
            for port in (PORT, HBONE_PORT):
                packet = tcp_packet(source, vault.address, SYN, (40000, port))
                raw.sendto(packet, (vault.address, 0))
            if number % (FLOOD // 10) == 0:
                lasting.sendall(b"open")
                assert lasting.recv(100) == SECRET
                assert ask(ground.open_socket("client"), (vault.address, PORT)) == SECRET
    lasting.close()
    vault.heard.clear()


def test_agents_socket_is_closed_to_others_and_stands_garbage(ground: Ground) -> None:
    (east, _west) = ground.lab.cluster().nodes
    path = str(ground.lab.admin_socket(east))
    code = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    command = ["setpriv", "--reuid=65534", "--clear-groups", "/usr/bin/python3", "-c", code, path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "PermissionError" in done.stderr
    before = next(ground.lab.agent_states(east, "state"))
    for garbage in (
        b"\0" * 100_000,
        b'{"command": "unenroll"}\n',
        b"\xff\n",
        b"{" * 10_000 + b"\n",
    ):
        with socket.socket(socket.AF_UNIX) as made, suppress(OSError):
            made.settimeout(3)
            made.connect(path)
            made.sendall(garbage)
            made.shutdown(socket.SHUT_WR)
            assert b'"ok"' not in made.recv(65536)
    assert next(ground.lab.agent_states(east, "state"))["pods"] == before["pods"]


def test_direct_flow_that_ended_is_no_way_in(ground: Ground, vaults: dict[str, Vault]) -> None:
    """The allowed pod's own ports, once it is not allowed any more."""
    target = (vaults["vault"].address, PORT)
    first = ground.open_socket("client")
    assert ask(first, target) == SECRET
    name = first.getsockname()
    first.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)  # no TIME_WAIT
    first.close()
    with other_policy(ground, "intruder"):
        vaults["vault"].heard.clear()
        again = ground.open_socket("client")
        again.bind(name)
        assert ask(again, target) == b""
        assert ask(ground.open_socket("client"), target) == b""


def test_direct_connection_bound_to_a_device_is_closed_by_policy(
    ground: Ground, vaults: dict[str, Vault]
) -> None:
    vault = vaults["vault"]
    made = ground.open_socket("client")
    made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
    assert ask(made, (vault.address, PORT)) == SECRET
    with other_policy(ground, "intruder"):
        with pytest.raises((ConnectionAbortedError, ConnectionResetError)):
            made.recv(1)
        vault.heard.clear()


def test_revoked_identity_is_taken_off_the_direct_path(
    ground: Ground, vaults: dict[str, Vault]
) -> None:
    vault = vaults["vault"]
    made = ground.open_socket("client")
    assert ask(made, (vault.address, PORT)) == SECRET
    state = next(ground.lab.agent_states(ground.lab.cluster().nodes[0], "state"))
    (serial,) = (
        row["serial"]
        for row in state["identity"]["certificates"]
        if row["identity"].endswith("/sa/client")
    )
    write_revoked(ground.lab, int(serial, 16))
    try:
        with pytest.raises((ConnectionAbortedError, ConnectionResetError)):
            made.recv(1)
        vault.heard.clear()
        assert ask(ground.open_socket("client"), (vault.address, PORT)) == b""
    finally:
        (ground.lab.authority / "revoked.pem").unlink()
        wait_revoked(ground.lab, 0)


@contextmanager
def other_policy(ground: Ground, account: str) -> Iterator[None]:
    """Let another account in instead of the client, for a while."""
    put_policy(ground, account)
    try:
        yield
    finally:
        put_policy(ground, "client")


def put_policy(ground: Ground, account: str) -> None:
    nodes = ground.lab.cluster().nodes
    logs = [ground.lab.agent_log(node) for node in nodes]
    before = [log.read_text().count("policies in force") for log in logs]
    ground.lab.write_object(policy(account))
    for node, log, count in zip(nodes, logs, before, strict=True):
        for _state in ground.lab.agent_states(node):  # wakes us after each change
            if log.read_text().count("policies in force") > count:
                break
