"""What somebody changed behind the agent's back is named by `diff`, and mended on request."""

from __future__ import annotations

import os
import socket
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest

from agent import netns
from agent.model.capture import HBONE_PORT
from tests.support.damage import detach
from tests.support.damaged_node import (
    Node,
    add_address,
    add_exception,
    add_service,
    clear_slot,
    delete_pod,
    destroy_listener,
    make_strict,
    open_node,
    remove_connect,
    remove_guard,
    remove_lookup,
    remove_map_pin,
    remove_reply_route,
    reset_sysctl,
    steal_address,
)
from tests.support.labs import is_alive
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]
GAP_SECONDS = 0.7


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with open_node("--upkeep-seconds", "0") as made:  # what is damaged stays so until asked
        yield made


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
        (add_address, "sysctl", "accept_local of interface", True, True),
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
        suppress(ConnectionResetError),  # connect() itself may see it
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
