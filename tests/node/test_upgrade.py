"""A new agent takes over from the one that runs: no connection fails, none is cut."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent import netns
from agent.datapath import listing
from agent.errors import LabError
from agent.handover import SOCKET_NAME, Predecessor, PredecessorGone
from agent.lab import machine
from agent.question import ask
from tests.support.labs import PodEnd, entries, is_alive, wait_for_certificates, wait_for_entry
from tests.support.load import Load
from tests.support.modules import ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from agent.lab.cluster import LabNode
    from agent.lab.lab import Lab

pytestmark = pytest.mark.root
PORT = 9000
SECONDS = 10.0


@pytest.fixture
def other_version(tmp_path: Path) -> Path:
    """Return the sources of a version whose programs differ from ours."""
    tree = tmp_path / "other"
    for part in ("agent", "bpf"):
        shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
    with (tree / "bpf/lookup.c").open("a") as file:
        file.write("/* another version */\n")
    return tree


def programs(lab: Lab, node: LabNode) -> dict[str, object]:
    """Return the id of each program."""
    (directory,) = listing.find_directories((lab.pins / node.name,))
    return {str(row["name"]): row["id"] for row in listing.list_programs(directory)}


def is_direct(lab: Lab, client: PodEnd, address: str) -> bool:
    """Whether a connection goes without the agent, which the maps say while it is open."""
    with client.open(address, PORT) as connection:
        assert is_alive(connection)
        port = connection.getsockname()[1]
        (directory,) = listing.find_directories((lab.pins / client.pod.node.name,))
        flows = listing.dump_map(directory, "ss_direct_flows")
        return any(str(port) in str(row) for row in flows)


@pytest.mark.timeout(150)
def test_nothing_fails_through_five_upgrades_in_a_row(lab: Lab, other_version: Path) -> None:
    east, west = lab.cluster().nodes
    with ExitStack() as stack:
        client = PodEnd(lab, "client", stack)
        far = Load(client, PodEnd(lab, "server", stack), stack)  # by tunnel
        near_end = PodEnd(lab, "cache", stack)
        near = Load(client, near_end, stack)  # directly
        far.start()
        # Allowed before the streams begin, so that those are direct, too.
        while not is_direct(lab, client, near_end.address):
            pass
        near.start(has_bulk=False)
        before = programs(lab, east)
        olds: list[int] = []
        for tree in (other_version, None, other_version, other_version, None):
            olds += [lab.upgrade_agent(node, tree) for node in (east, west)]
        assert programs(lab, east).keys() == before.keys()
        assert not set(programs(lab, east).values()) & set(before.values())
        assert len(far.connects.good) > 100
        far.stop()
        near.stop()
        for load in (far, near):
            assert load.connects.failed == []
            assert load.streams.failed == []
            assert load.bulk.failed == []
        assert far.sent_bytes > 20 << 20
        # With nothing left to serve they end, long before the drain time is over.
        for pid in olds:
            assert machine.wait_for_exit(pid, 10)
    for node in (east, west):
        assert len(lab.agent_processes(node)) <= 3  # itself, its worker, a caller that ends
        assert not entries(lab, node, "the time to drain is over, what is left is cut")


def test_what_an_agent_before_still_carries_is_listed_and_counted(lab: Lab) -> None:
    east, _west = lab.cluster().nodes
    kept = {"reporter": "source", "source_workload": "client", "destination_workload": "server"}
    with ExitStack() as stack:
        client, server = PodEnd(lab, "client", stack), PodEnd(lab, "server", stack)
        server.echo(PORT)
        with client.open(server.address, PORT) as connection:
            assert is_alive(connection, b"x" * 1000)
            (worker,) = next(lab.agent_states(east, "state"))["workers"]
            first = lab.upgrade_agent(east)
            lab.upgrade_agent(east)  # it hears of the first from the second
            assert {"pid": first} in next(lab.agent_states(east, "state"))["elders"]
            (row,) = ask(lab.admin_socket(east), "connections", pod="client")
            assert row["worker"] == worker["pid"]
            assert row["source"].endswith(f":{connection.getsockname()[1]}")
            assert samples(lab, east, "sidestep_connections_open", path="hbone") == 1
            assert is_alive(connection, b"y" * 1000)
        for state in lab.agent_states(east):
            if not state["elders"]:
                break
        # Counted to the last byte, and as one series from before the first upgrade on.
        assert samples(lab, east, "istio_tcp_connections_opened_total", **kept) == 1
        assert samples(lab, east, "istio_tcp_connections_closed_total", **kept) == 1
        assert samples(lab, east, "istio_tcp_received_bytes_total", **kept) == 2000
    assert not list((lab.run / east.name).glob("agent-*.sock"))


def samples(lab: Lab, node: LabNode, name: str, **labels: str) -> float:
    """Return the sum of a metric's series."""
    text = ask(lab.admin_socket(node), "metrics")["text"]
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def test_pod_that_leaves_while_the_agent_before_still_serves_it_keeps_its_connections(
    lab: Lab,
) -> None:
    _east, west = lab.cluster().nodes
    with ExitStack() as stack:
        client, server = PodEnd(lab, "client", stack), PodEnd(lab, "server", stack)
        server.echo(PORT)
        with client.open(server.address, PORT) as kept:
            assert is_alive(kept)
            old = lab.upgrade_agent(west)
            lab.label_namespace("shop", None)
            assert is_alive(kept, b"x" * 100_000)
            lab.label_namespace("shop", "ambient")
            assert is_alive(kept, b"x" * 100_000)
            lab.label_namespace("shop", None)
            assert not machine.wait_for_exit(old, 3)  # longer than a pod without it drains
            assert is_alive(kept, b"x" * 100_000)
        assert machine.wait_for_exit(old, 10)
        wait_for_entry(lab, west, "pod has nothing of ours any more", lambda _entry: True)


def test_agent_that_would_be_started_anew_stays_until_it_is_told_to_end_or_wanted_again(
    lab: Lab,
) -> None:
    east, _west = lab.cluster().nodes
    lab.agent_options = ("--daemonset", "any/agents")
    lab.restart_agent(east)
    stays = "succeeded, and nothing is open any more; waiting to be told to end"

    def wait_until_staying(count: int) -> None:
        wait_for_entry(lab, east, stays, lambda _entry: len(entries(lab, east, stays)) == count)

    first = lab.upgrade_agent(east)
    wait_until_staying(1)
    assert not machine.wait_for_exit(first, 0)
    os.kill(first, signal.SIGTERM)
    assert machine.wait_for_exit(first, 10)
    second = lab.upgrade_agent(east)
    wait_until_staying(2)
    third = lab.agent_pid(east)
    assert third not in (None, second)
    assert not machine.wait_for_exit(second, 0)
    os.kill(third or 0, signal.SIGKILL)
    assert machine.wait_for_exit(second, 10)


def test_successor_that_dies_half_way_changes_nothing(lab: Lab) -> None:
    east, _west = lab.cluster().nodes
    agent = lab.agent_pid(east)

    async def begin_and_die() -> None:
        found = Predecessor.find(lab.run / east.name / SOCKET_NAME)
        assert found is not None
        assert found.pid == agent
        _lock, _elders, heritage = await found.begin()
        assert {pod.pod.name for pod, _fds in heritage} == {"client", "cache"}
        found.connection.close()
        for fd in (_lock, *_elders, *(fd for _pod, fds in heritage for fd in fds)):
            os.close(fd)

    asyncio.run(begin_and_die())
    wait_for_entry(lab, east, "nothing was handed over", lambda _entry: True)
    with ExitStack() as stack:
        client, server = PodEnd(lab, "client", stack), PodEnd(lab, "server", stack)
        server.echo(PORT)
        assert is_alive(client.connect(server.address, PORT))
    lab.label_namespace("shop", None)  # pods change again
    lab.label_namespace("shop", "ambient")
    lab.upgrade_agent(east)
    assert lab.agent_pid(east) != agent


def test_agent_that_is_told_to_end_while_it_hands_over_is_no_elder(lab: Lab) -> None:
    east, _west = lab.cluster().nodes
    agent = lab.agent_pid(east)
    assert agent is not None

    async def begin_and_commit_late() -> None:
        found = Predecessor.find(lab.run / east.name / SOCKET_NAME)
        assert found is not None
        lock, elders, heritage = await found.begin()
        os.kill(agent, signal.SIGTERM)
        wait_for_entry(lab, east, "leaving", lambda entry: entry["why"] == "stopped")
        with pytest.raises(PredecessorGone):
            await found.commit()
        found.close()
        found.connection.close()
        for fd in (lock, *elders, *(fd for _pod, fds in heritage for fd in fds)):
            os.close(fd)

    asyncio.run(begin_and_commit_late())
    lab.restart_agent(east)
    with ExitStack() as stack:
        client, server = PodEnd(lab, "client", stack), PodEnd(lab, "server", stack)
        server.echo(PORT)
        assert is_alive(client.connect(server.address, PORT))


def test_successor_that_cannot_have_its_ports_leaves_the_one_before_in_office(lab: Lab) -> None:
    east, _west = lab.cluster().nodes
    before = lab.agent_pid(east)
    with ExitStack() as stack:
        client, server = PodEnd(lab, "client", stack), PodEnd(lab, "server", stack)
        server.echo(PORT)
        node = netns.open_netns(lab.node_netns(east))
        stack.callback(os.close, node)
        take = partial(socket.create_server, ("127.0.0.1", 0))
        with netns.run_in(node, take) as stranger:
            port = stranger.getsockname()[1]
            for option in ("--metrics-port", "--admin-port"):
                lab.agent_options = (option, str(port))
                with pytest.raises(LabError, match=f"{option} {port}: Address already in use"):
                    lab.upgrade_agent(east)
                assert lab.agent_pid(east) == before
                assert is_alive(client.connect(server.address, PORT))
        # Where nobody else has them it may be one of the other's, at more addresses, and a new one.
        lab.agent_options = ("--metrics-host", "::", "--admin-port", str(port))
        lab.upgrade_agent(east)
        for served in (15020, port):
            connect = partial(socket.create_connection, ("127.0.0.1", served), SECONDS)
            netns.run_in(node, connect).close()


def test_successor_without_certificates_waits_until_the_one_before_is_gone(lab: Lab) -> None:
    east, _west = lab.cluster().nodes
    agent = lab.agent_pid(east)
    assert agent is not None
    with ExitStack() as stack:
        client, server = PodEnd(lab, "client", stack), PodEnd(lab, "server", stack)
        server.echo(PORT)
        assert is_alive(client.connect(server.address, PORT))
        # That may have been plaintext: a node learns a moment later who is enrolled on another.
        wait_for_certificates(lab)
        machine.kill_cgroup(lab.cgroup / "ca")
        with pytest.raises(LabError, match="did not become ready"):
            lab.upgrade_agent(east, ready_seconds=2)
        assert is_alive(client.connect(server.address, PORT))  # by the one that runs
        os.kill(agent, signal.SIGKILL)
        wait_for_entry(
            lab,
            east,
            "the agent before this one has ended before it had handed over",
            lambda _entry: True,
        )
        assert lab.agent_pid(east) != agent
        for state in lab.agent_states(east):  # now, and at each change
            found = [pod["state"] for pod in state["pods"]]
            if found == ["enrolled"] * sum(pod.node == east for pod in lab.cluster().pods):
                break
        assert [row["mesh"] for row in lab.status()] == ["enrolled"] * 3
        ca = lab.start_ca()
        assert ca is not None
        ca()
        assert is_alive(client.connect(server.address, PORT))


def test_agent_that_is_stopped_leaves_its_pods_closed(lab: Lab) -> None:
    east, _west = lab.cluster().nodes
    with ExitStack() as stack:
        client, server = PodEnd(lab, "client", stack), PodEnd(lab, "server", stack)
        server.echo(PORT)
        kept = client.connect(server.address, PORT)
        assert is_alive(kept)
        lab.stop_agent(east)
        with pytest.raises(ConnectionRefusedError):
            client.open(server.address, PORT)
        # A reset, and not an end that an application takes for all that there was.
        with pytest.raises(ConnectionResetError):
            kept.recv(1)
        lab.restart_agent(east)
        assert is_alive(client.connect(server.address, PORT))


def test_maps_of_another_layout_are_refused_and_say_what_to_do(
    lab: Lab, other_version: Path
) -> None:
    east, _west = lab.cluster().nodes
    agent = lab.agent_pid(east)
    with (other_version / "bpf/include/types.h").open("a") as file:
        file.write("/* another layout */\n")
    with pytest.raises(LabError, match="sidestep uninstall --pins"):
        lab.upgrade_agent(east, other_version)
    assert lab.agent_pid(east) == agent
    with ExitStack() as stack:
        client, server = PodEnd(lab, "client", stack), PodEnd(lab, "server", stack)
        server.echo(PORT)
        assert is_alive(client.connect(server.address, PORT))
