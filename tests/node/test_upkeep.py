"""What somebody changed behind the agent's back is mended by the agent, without being asked."""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from agent.errors import Contested, MapError
from agent.model.capture import HBONE_PORT
from agent.state.patience import FREE_TRIES
from tests.support.damage import detach, is_attached
from tests.support.damaged_node import (
    Node,
    add_exception,
    clear_slot,
    delete_pod,
    destroy_listener,
    open_node,
    remove_connect,
    remove_guard,
    remove_lookup,
    remove_map_pin,
    remove_reply_route,
    reset_sysctl,
    steal_address,
)
from tests.support.labs import entries, is_alive, scrape, wait_for_entry
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]
FIGHT_SECONDS = 10.0
LOOK_SECONDS = 0.02
PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with open_node("--upkeep-seconds", str(LOOK_SECONDS)) as made:
        yield made


def remove_program_pin(node: Node) -> None:
    (node.pins.directory / "programs" / "ss_connect4").unlink()


def remove_links(node: Node) -> None:
    for path in node.pins.link_path("").iterdir():
        path.unlink()
    node.pins.link_path("").rmdir()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (delete_pod, "map ss_pods"),
        (add_exception, "map ss_ports"),
        (steal_address, "map ss_local"),
        (clear_slot, "map ss_listeners"),
        (remove_lookup, "link lookup_"),
        (remove_guard, "link guard_out_"),
        (remove_connect, "link ss_connect4"),
        (remove_links, "link ss_sockops"),
        (remove_map_pin, "pin ss_pods"),
        (remove_program_pin, "pin ss_connect4"),
        (remove_reply_route, "rule ipv4"),
        (reset_sysctl, "sysctl /proc/sys/net/ipv4/tcp_fwmark_accept"),
        (destroy_listener, "listener"),
    ],
)
def test_damage_is_mended_without_being_asked(node: Node, damage: Any, named: str) -> None:
    damage(node)
    wait_for_entry(node.lab, node.node, "mended", lambda entry: entry["what"].startswith(named))
    assert node.command("diff") == (0, [])
    with node.client.connect(node.server.address, 9000) as connection:
        assert is_alive(connection)


def fight(link: Path, seconds: float) -> None:
    """Detach a link again and again."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if is_attached(link):
            with suppress(MapError):  # just being replaced
                detach(link)


def test_repairs_are_counted(node: Node) -> None:
    def count() -> float:
        labels = frozenset({("kind", "link"), ("outcome", "mended")})
        return scrape(node.lab, node.node).get(("sidestep_repairs_total", labels), 0)

    before = count()
    began = len(entries(node.lab, node.node, "mended"))
    detach(node.pins.link_path("ss_bind6"))
    wait_for_entry(node.lab, node.node, "mended", lambda entry: entry["what"] == "link ss_bind6")
    assert count() - before == len(entries(node.lab, node.node, "mended")) - began == 1


def test_who_takes_away_again_and_again_is_answered_later_and_named(node: Node) -> None:
    of_node, of_pod = node.pins.link_path("ss_bind4"), node.link("lookup")
    for link in (of_node, of_pod):
        before = len(entries(node.lab, node.node, "mended"))
        fight(link, FREE_TRIES * LOOK_SECONDS + 3)
        assert FREE_TRIES < len(entries(node.lab, node.node, "mended")) - before <= FREE_TRIES + 3
    state = next(node.lab.agent_states(node.node, "state"))
    assert "link ss_bind4" in state["pending"]["kernel"]
    (pod,) = [each for each in state["pods"] if each["name"] == "client"]
    assert (pod["state"], pod["reason"]) == ("enrolled", Contested.reason)
    assert of_pod.name in pod["detail"]
    wait_until(lambda: is_attached(of_node) and is_attached(of_pod), FIGHT_SECONDS)


def test_pod_that_the_next_agent_cannot_enroll_stays_closed(node: Node) -> None:
    """What an agent before left of it is no difference: it is what keeps the pod captured."""
    lab = node.lab
    lab.stop_agent(node.node)
    before = len(entries(lab, node.node, "mended"))

    def take_port() -> socket.socket:
        taken = socket.socket()
        before = PORT_RANGE.read_text()
        PORT_RANGE.write_text(f"{HBONE_PORT} {HBONE_PORT}")
        taken.bind(("0.0.0.0", 0))  # to no port by name, which bind.c would refuse
        PORT_RANGE.write_text(before)
        taken.listen()
        return taken

    with node.inside(take_port):
        lab.restart_agent(node.node)
        code, rows = node.command("diff", "--pod", "shop/client")
        assert (code, [row["kind"] for row in rows]) == (1, ["pod"])
        assert node.pins.maps["ss_pods"].get({"value": node.cookie}) is not None
        with pytest.raises(ConnectionRefusedError):
            node.client.connect(node.server.address, 9000)
    assert len(entries(lab, node.node, "mended")) == before
