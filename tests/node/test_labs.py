"""Labs under strain: a neighbor that goes, a worker that dies, exclusions, files that are wrong."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from agent import netns
from agent.demo.recorder import Recorder
from agent.discovery.translate import (
    EXCLUDE_INBOUND_PORTS,
    EXCLUDE_OUTBOUND_NETWORKS,
    EXCLUDE_OUTBOUND_PORTS,
)
from agent.errors import LabError
from agent.lab.lab import DEFAULT_CLUSTER, Lab
from agent.lab.machine import command_of
from agent.model.capture import OUTBOUND_PORT
from tests.support.labs import PodEnd, entries, is_alive, wait_for_entry

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from agent.lab.cluster import LabNode

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

COMPLETE = "connection complete"
WARM_UP_PORT = 8999


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def bring_up(
    stack: ExitStack, suffix: str = "", cluster: Path = DEFAULT_CLUSTER, *options: str
) -> Lab:
    lab = Lab(f"t{os.getpid()}{suffix}")
    lab.agent_options = options
    stack.callback(lab.down)
    lab.up(cluster, print)
    lab.label_namespace("shop", "ambient")
    return lab


def bring_up_mesh(
    stack: ExitStack, suffix: str = "", cluster: Path = DEFAULT_CLUSTER, *options: str
) -> Lab:
    lab = bring_up(stack, suffix, cluster, *options)
    wait_for_mesh(lab)
    return lab


def wait_for_mesh(lab: Lab) -> None:
    """Wait until the client's node knows that the server's answers tunnels."""
    with ExitStack() as stack:
        client, server = PodEnd(lab, "client", stack), PodEnd(lab, "server", stack)
        server.echo(WARM_UP_PORT)
        path, count = "", 0
        while path != "hbone":
            assert count < 1000
            talk(client, server, WARM_UP_PORT)
            count += 1
            path = last_path(lab, server, WARM_UP_PORT, count)


def last_path(lab: Lab, server: PodEnd, port: int, count: int) -> str:
    """Return how the last of `count` connections to a port of the server went."""
    east, _west = nodes(lab)
    found: list[dict[str, Any]] = []

    def is_the_last(entry: dict[str, Any]) -> bool:
        if entry["dst.original"] == f"{server.address}:{port}" and entry not in found:
            found.append(entry)
        return len(found) == count

    return str(wait_for_entry(lab, east, COMPLETE, is_the_last)["path"])


def nodes(lab: Lab) -> tuple[LabNode, LabNode]:
    east, west = lab.cluster().nodes
    return east, west


def outbound(lab: Lab) -> list[dict[str, Any]]:
    east, _west = nodes(lab)
    return [
        entry
        for entry in entries(lab, east, COMPLETE)
        if entry["direction"] == "outbound"
        and not entry["dst.original"].endswith(f":{WARM_UP_PORT}")
    ]


def talk(client: PodEnd, server: PodEnd, port: int) -> None:
    """Say something and hang up."""
    with client.connect(server.address, port) as connection:
        assert is_alive(connection)


def wait_for_tunnel(lab: Lab, server: PodEnd, port: int) -> None:
    """Wait until the access log tells that a connection went through the tunnel."""
    assert last_path(lab, server, port, 1) == "hbone"


# -- several labs -------------------------------------------------------------------------------


def test_labs_side_by_side_do_not_disturb_each_other(stack: ExitStack) -> None:
    # The same addresses in both, and one name begins with the other.
    first, second = bring_up_mesh(stack), bring_up_mesh(stack, "-b")
    ends = [(PodEnd(lab, "client", stack), PodEnd(lab, "server", stack)) for lab in (first, second)]
    heard = [server.echo(9000) for _client, server in ends]
    for client, server in ends:
        talk(client, server, 9000)
        talk(client, server, 9000)
    assert [len(peers) for peers in heard] == [2, 2]
    for lab, (_client, server) in zip((first, second), ends, strict=True):
        wait_for_tunnel(lab, server, 9000)
        assert {entry["path"] for entry in outbound(lab)} == {"hbone"}

    client, server = ends[1]
    kept = client.connect(server.address, 9000)
    assert is_alive(kept)
    before = second.status()
    assert first.down()
    assert is_alive(kept, b"x" * 100_000)
    talk(client, server, 9000)
    assert second.status() == before
    assert [row["mesh"] for row in before] == ["enrolled"] * 3
    with pytest.raises(LabError, match="is not up"):
        first.status()


# -- several workers ----------------------------------------------------------------------------


def worker_pids(lab: Lab, node: LabNode) -> list[int]:
    return [worker["pid"] for worker in next(lab.agent_states(node, "state"))["workers"]]


@contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    """Hold processes, so that what comes goes to the others."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def sockets_of(pid: int) -> set[str]:
    targets = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            targets.append(str(link.readlink()))
        except FileNotFoundError:
            continue
    return {target for target in targets if target.startswith("socket:")}


def accepted_inode(lab: Lab, connection: socket.socket) -> str:
    """Return the socket that the agent accepted a captured connection on, as /proc names it."""
    port = connection.getsockname()[1]

    def read() -> str:
        for line in Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            local, remote = (int(field.split(":")[1], 16) for field in fields[1:3])
            if (local, remote) == (OUTBOUND_PORT, port):
                return f"socket:[{fields[9]}]"
        raise AssertionError("the connection was not captured")

    fd = netns.open_netns(lab.pod_netns(lab.find_pod("client")))
    try:
        return netns.run_in(fd, read)
    finally:
        os.close(fd)


def test_worker_that_dies_takes_its_own_connections_and_is_replaced(stack: ExitStack) -> None:
    lab = bring_up_mesh(stack, "", DEFAULT_CLUSTER, "--workers", "3")
    east, _west = nodes(lab)
    client, server = PodEnd(lab, "client", stack), PodEnd(lab, "server", stack)
    server.echo(9000)
    workers = worker_pids(lab, east)
    assert len(workers) == 3
    held: dict[int, list[socket.socket]] = {}
    for worker in workers:  # each may serve the pod's listeners, and each has to, alone
        with stopped([other for other in workers if other != worker]):
            held[worker] = [client.connect(server.address, 9000) for _ in range(3)]
            assert all(is_alive(connection) for connection in held[worker])
    for worker, connections in held.items():
        assert {accepted_inode(lab, each) for each in connections} <= sockets_of(worker)

    victim, *others = workers
    pidfd = os.pidfd_open(victim)
    stack.callback(os.close, pidfd)
    os.kill(victim, signal.SIGKILL)
    assert select.select([pidfd], [], [], 10)[0]
    assert [is_alive(each) for each in held[victim]] == [False] * 3
    for other in others:
        assert all(is_alive(each) for each in held[other])

    wait_for_entry(lab, east, "worker died and is replaced", lambda entry: entry["pid"] == victim)
    now = worker_pids(lab, east)
    assert len(now) == 3
    assert set(others) < set(now)
    (heir,) = set(now) - set(others)
    with stopped(others):
        taken = client.connect(server.address, 9000)
        assert is_alive(taken)  # by the new one: there is no other
    assert accepted_inode(lab, taken) in sockets_of(heir)


# -- exclusions ---------------------------------------------------------------------------------


def annotated_cluster(tmp_path: Path, annotations: dict[str, dict[str, str]]) -> Path:
    objects = list(yaml.safe_load_all(DEFAULT_CLUSTER.read_text()))
    for body in objects:
        if body["kind"] == "Pod":
            body["metadata"]["annotations"] = annotations.get(body["metadata"]["name"], {})
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump_all(objects))
    return path


EXCLUDED_BY_ANNOTATION = {
    "client": {EXCLUDE_OUTBOUND_PORTS: "9001,9002"},
    "server": {EXCLUDE_INBOUND_PORTS: "9002"},
}
EXCLUDED_BY_SETTING = (
    "--exclude-outbound-port", "9001", "--exclude-outbound-port", "9002",
    "--exclude-inbound-port", "9002",
)  # fmt: skip


@pytest.mark.parametrize(
    ("annotations", "options"),
    [(EXCLUDED_BY_ANNOTATION, ()), ({}, EXCLUDED_BY_SETTING)],
    ids=["annotation", "setting"],
)
def test_ports_are_excluded_in_both_directions(
    stack: ExitStack,
    tmp_path: Path,
    annotations: dict[str, dict[str, str]],
    options: tuple[str, ...],
) -> None:
    lab = bring_up_mesh(stack, "", annotated_cluster(tmp_path, annotations), *options)
    _east, west = nodes(lab)
    client, server = PodEnd(lab, "client", stack), PodEnd(lab, "server", stack)
    heard = {port: server.echo(port) for port in (9000, 9001, 9002)}
    recorder = stack.enter_context(Recorder(lab.netns("fabric"), f"node{west.number}"))
    own_ports = {}
    for port, text in ((9000, b"in the tunnel"), (9001, b"plain one"), (9002, b"plain two")):
        with client.connect(server.address, port) as connection:
            own_ports[port] = connection.getsockname()[1]
            assert is_alive(connection, text * 3)
    link = b"".join(recorder.take())
    assert b"in the tunnel" not in link
    assert b"plain one" in link
    assert b"plain two" in link

    wait_for_tunnel(lab, server, 9000)
    assert [entry["dst.original"] for entry in outbound(lab)] == [f"{server.address}:9000"]
    # Captured at the server's pod as plaintext: the agent dialed in between.
    entry = wait_for_entry(
        lab, west, COMPLETE, lambda entry: entry["dst.original"] == f"{server.address}:9001"
    )
    assert entry["path"] == "plaintext"
    assert entry["src.addr"] == f"{client.address}:{own_ports[9001]}"
    # Excluded on both sides: one connection from end to end, with the client's own port.
    assert heard[9002] == [(client.address, own_ports[9002])]
    assert {peers[0][0] for peers in heard.values()} == {client.address}
    inbound = [entry["dst.original"] for entry in entries(lab, west, COMPLETE)]
    assert f"{server.address}:9002" not in inbound


@pytest.mark.parametrize("by", ["annotation", "setting"])
def test_networks_are_excluded(stack: ExitStack, tmp_path: Path, by: str) -> None:
    network = "10.244.2.0/24"
    annotations = {"server": {EXCLUDE_INBOUND_PORTS: "9002"}}
    if by == "annotation":
        annotations["client"] = {EXCLUDE_OUTBOUND_NETWORKS: network}
    options = ("--exclude-outbound-network", network) if by == "setting" else ()
    lab = bring_up(stack, "", annotated_cluster(tmp_path, annotations), *options)
    client, server = PodEnd(lab, "client", stack), PodEnd(lab, "server", stack)
    heard = server.echo(9002)
    with client.connect(server.address, 9002) as connection:
        assert is_alive(connection)
        assert heard == [connection.getsockname()]
    assert outbound(lab) == []


# -- wrong input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "field", "detail"),
    [
        ("broken.yaml", "kind: [", "content", "cannot be read"),
        (
            "pod.shop.server.yaml",
            "{apiVersion: v1, kind: Pod, metadata: {name: server, namespace: shop, uid: u},"
            " status: {podIPs: [{ip: here}]}}",
            "status.podIPs[0].ip",
            "'here' is not an IP address",
        ),
    ],
    ids=["new file", "file of a pod in use"],
)
def test_wrong_file_changes_nothing_and_is_named(
    stack: ExitStack, name: str, text: str, field: str, detail: str
) -> None:
    lab = bring_up_mesh(stack)
    client, server = PodEnd(lab, "client", stack), PodEnd(lab, "server", stack)
    server.echo(9000)
    connection = client.connect(server.address, 9000)
    assert is_alive(connection)
    before = lab.status()
    (lab.objects / name).write_text(text)
    for node in nodes(lab):
        entry = wait_for_entry(
            lab,
            node,
            "object cannot be used; the last good state stays in force",
            lambda entry: entry["file"] == str(lab.objects / name),
        )
        assert entry["field"] == field
        assert detail in entry["detail"]
    assert is_alive(connection)
    talk(client, server, 9000)
    wait_for_tunnel(lab, server, 9000)
    assert lab.status() == before


# -- what an agent needs ------------------------------------------------------------------------


def test_agent_that_lacks_something_ends_with_one_sentence(stack: ExitStack) -> None:
    lab = bring_up_mesh(stack)
    east, _west = nodes(lab)
    before = lab.status()
    pid = lab.agent_pid(east)
    assert pid is not None
    command = command_of(pid)  # what the lab itself started, with all of its options
    assert command[1:4] == ["-m", "agent.cli", "agent"]
    # The interpreter may be where only root can read, so the right goes when all is imported.
    without_root = (
        "import os; from agent.cli import main; import agent.commands.agent;"
        " os.seteuid(65534); main(prog_name='sidestep')"
    )
    without_bpffs = 'umount -l /sys/fs/bpf && exec "$@"'
    for started, sentence in (
        ([command[0], "-c", without_root, *command[3:]], "error: root is missing, "),
        (
            ["unshare", "--mount", "sh", "-c", without_bpffs, "sh", *command],
            "error: bpffs is missing, ",
        ),
    ):
        done = subprocess.run(started, capture_output=True, text=True, timeout=30, check=False)
        (line,) = done.stderr.splitlines()
        assert done.returncode == 2
        assert line.startswith(sentence), line
    assert lab.status() == before
