"""What somebody changed behind the agent's back is named by `diff`, and mended on request."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from agent import netlink, netns, sock_diag
from agent.datapath import pins, records
from agent.enroll import REPLY_SYSCTLS
from agent.lab.lab import DEFAULT_CLUSTER, Lab
from agent.model.capture import HBONE_PORT
from tests.support.damage import detach
from tests.support.labs import PodEnd, is_alive
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from agent.datapath.maps import Record

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]
GAP_SECONDS = 0.7


class Node:
    """The first node of a lab, and ways to damage it."""

    def __init__(self, lab: Lab, stack: ExitStack) -> None:
        self.lab = lab
        self.node = lab.cluster().nodes[0]
        self.client = PodEnd(lab, "client", stack)
        self.server = PodEnd(lab, "server", stack)
        (directory,) = (lab.pins / self.node.name).iterdir()
        self.pins = pins.Pins(directory)
        stack.callback(self.pins.close)
        fd = netns.open_netns(lab.pod_netns(self.client.pod))
        stack.callback(os.close, fd)
        self.netns_fd = fd
        self.cookie = netns.netns_cookie(fd)

    def inside(self, function: Any) -> Any:
        return netns.run_in(self.netns_fd, function)

    def link(self, prefix: str, pod: str = "client") -> Path:
        fd = netns.open_netns(self.lab.pod_netns(self.lab.find_pod(pod)))
        try:
            cookie = netns.netns_cookie(fd)
        finally:
            os.close(fd)
        (path,) = self.pins.link_path("").glob(f"{prefix}_{cookie}*")
        return path

    def command(self, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
        line = [sys.executable, "-m", "agent.cli", *arguments, "--lab", self.lab.name]
        done = subprocess.run([*line, "-o", "json"], capture_output=True, text=True, check=False)
        assert done.returncode in (0, 1), done.stderr
        return done.returncode, list(json.loads(done.stdout))


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with ExitStack() as stack:
        lab = Lab(f"t{os.getpid()}")
        lab.agent_options = ("--upkeep-seconds", "0")  # what is damaged stays so until asked
        stack.callback(lab.down)
        lab.up(DEFAULT_CLUSTER, print)
        lab.label_namespace("shop", "ambient")
        made = Node(lab, stack)
        made.server.echo(9000)
        yield made


def delete_pod(node: Node) -> None:
    node.pins.maps["ss_pods"].delete({"value": node.cookie})


def add_exception(node: Node) -> None:
    key = records.port_key(node.cookie, 9000, records.OUTBOUND)
    node.pins.maps["ss_ports"].put(key, {"value": 1})


def make_strict(node: Node) -> None:
    maps = node.pins.maps
    record = maps["ss_pods"].get({"value": node.cookie})
    assert record is not None
    maps["ss_pods"].put({"value": node.cookie}, record | {"is_strict": 1})


def steal_address(node: Node) -> None:
    key: Record = {"address": records.pack_address(node.client.pod.address4)}
    node.pins.maps["ss_local"].put(key, {"value": 1})


def clear_slot(node: Node) -> None:
    node.pins.maps["ss_listeners"].delete({"value": node.cookie})


def add_service(node: Node) -> None:
    key = records.service_port_key(node.client.pod.address4, 1)
    node.pins.maps["ss_services"].put(key, {"value": 3})


def remove_lookup(node: Node) -> None:
    node.link("lookup").unlink()


def remove_guard(node: Node) -> None:
    node.link("guard_out").unlink()


def remove_connect(node: Node) -> None:
    node.pins.link_path("ss_connect4").unlink()


def remove_map_pin(node: Node) -> None:
    (node.pins.directory / "maps" / "ss_pods").unlink()


def remove_reply_route(node: Node) -> None:
    node.inside(partial(netlink.delete_reply_route, socket.AF_INET))


def reset_sysctl(node: Node) -> None:
    node.inside(lambda: REPLY_SYSCTLS[0].write_text("0"))


def destroy_listener(node: Node) -> None:
    def destroy() -> None:
        for found in list(sock_diag.list_tcp(sock_diag.LISTENING_STATE)):
            if found.local[1] == HBONE_PORT:
                assert sock_diag.destroy_found(found)

    node.inside(destroy)


@pytest.mark.parametrize(
    ("damage", "kind", "named", "is_expected", "is_found"),
    [
        (delete_pod, "map", "ss_pods", True, False),
        (add_exception, "map", "ss_ports", False, True),
        (make_strict, "map", "ss_pods", True, True),
        (steal_address, "map", "ss_local", True, True),
        (clear_slot, "map", "ss_listeners", True, False),
        (add_service, "map", "ss_services", False, True),
        (remove_lookup, "link", "lookup_", True, False),
        (remove_guard, "link", "guard_out_", True, False),
        (remove_connect, "link", "ss_connect4", True, False),
        (remove_map_pin, "pin", "ss_pods", True, False),
        (remove_reply_route, "rule", "ipv4", True, False),
        (reset_sysctl, "sysctl", "/proc/sys/net/ipv4/tcp_fwmark_accept", True, True),
        (destroy_listener, "listener", f"[::]:{HBONE_PORT}", True, False),
    ],
)
def test_damage_is_named_and_mended(
    node: Node, damage: Any, kind: str, named: str, is_expected: bool, is_found: bool
) -> None:
    assert node.command("diff") == (0, [])
    damage(node)
    code, rows = node.command("diff")
    assert code == 1
    row = next(row for row in rows if row["kind"] == kind)
    assert row["name"].startswith(named)
    assert row["pod"] in (None, "shop/client") or named in ("ss_local", "ss_services")
    assert (row["expected"] is not None, row["found"] is not None) == (is_expected, is_found)
    code, repaired = node.command("check", "--repair")
    assert (code, [each["problem"] for each in repaired]) == (0, [None] * len(rows))
    assert node.command("diff") == (0, [])
    with node.client.connect(node.server.address, 9000) as connection:
        assert is_alive(connection)


def test_mending_breaks_no_open_connection(node: Node) -> None:
    with node.client.connect(node.server.address, 9000) as connection:
        assert is_alive(connection)
        for damage in (delete_pod, clear_slot, remove_lookup, remove_connect, remove_reply_route):
            damage(node)
        assert node.command("check", "--repair")[0] == 0
        assert is_alive(connection, b"x" * 100_000)


def test_diff_can_be_asked_about_one_pod(node: Node) -> None:
    delete_pod(node)
    assert node.command("diff", "--pod", "shop/cache") == (0, [])
    assert node.command("diff", "--pod", "shop/client")[0] == 1
    assert node.command("check", "--repair")[0] == 0


# -- what docs/security.md says of the time until something is put back --------------------------


def from_outside(node: Node, port: int = 8080) -> str:
    """Ask the cache in plaintext, from outside the mesh, and say how that ends."""
    fd = netns.open_netns(node.lab.netns("fabric"))
    try:
        asked = netns.run_in(fd, socket.socket)
    finally:
        os.close(fd)
    with asked:
        asked.settimeout(GAP_SECONDS)
        try:
            asked.connect((str(node.lab.find_pod("cache").address4), port))
            asked.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return asked.recv(12).decode()
        except OSError as error:
            return type(error).__name__


@contextmanager
def without(node: Node, *links: Path) -> Iterator[None]:
    for link in links:
        detach(link)
    try:
        yield
    finally:
        assert node.command("check", "--repair")[0] == 0


@contextmanager
def policy(node: Node, kind: str, spec: dict[str, Any]) -> Iterator[None]:
    """Have a policy in force for the namespace."""
    body = {
        "apiVersion": "security.istio.io/v1",
        "kind": kind,
        "metadata": {"name": "gap", "namespace": "shop"},
        "spec": spec,
    }
    node.lab.write_object(body)
    wait_for_policies(node, 1)
    try:
        yield
    finally:
        node.lab.remove_object(body)
        wait_for_policies(node, 0)


def wait_for_policies(node: Node, count: int) -> None:
    wait_until(lambda: len(node.command("policies")[1]) == count, 10)


def test_nothing_is_opened_while_connect_is_detached(node: Node) -> None:
    with without(node, node.pins.link_path("ss_connect4")), pytest.raises(TimeoutError):
        node.client.open(node.server.address, 9000, GAP_SECONDS)


def test_nothing_comes_through_while_sockops_is_detached(node: Node) -> None:
    with (
        without(node, node.pins.link_path("ss_sockops")),
        node.client.open(node.server.address, 9000, GAP_SECONDS) as connection,
    ):
        assert not is_alive(connection)


def test_while_lookup_is_detached_only_a_strict_pod_is_closed(node: Node) -> None:
    lookup = node.link("lookup", "cache")
    with policy(node, "AuthorizationPolicy", {"action": "DENY", "rules": [{}]}):
        assert from_outside(node) == "ConnectionResetError"
        with without(node, lookup):
            assert from_outside(node).startswith("HTTP/")
        assert from_outside(node) == "ConnectionResetError"
    with policy(node, "PeerAuthentication", {"mtls": {"mode": "STRICT"}}):
        assert from_outside(node) == "ConnectionResetError"
        with without(node, lookup):
            assert from_outside(node) == "TimeoutError"


def test_pod_that_is_not_in_the_map_speaks_in_plaintext(node: Node) -> None:
    delete_pod(node)
    with node.client.open(node.server.address, 9000) as connection:
        assert is_alive(connection)
        assert connection.getpeername() == (node.server.address, 9000)
    assert node.command("check", "--repair")[0] == 0
