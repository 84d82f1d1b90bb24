"""What a worker's memory comes to, by the kernel's own account.

"Its own" is what it shares with no other process (private pages of smaps_rollup): the cost of one
more worker, and what ends with it. Pages of Python and OpenSSL are files that all workers map.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agent.bench.servers import Server
from agent.bench.tools import build_wire
from agent.datapath import links
from tests.node.test_tunnel import in_a_row
from tests.support.namespaces import PEER4
from tests.support.processes import private_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.node.conftest import MeshPair
    from tests.support.namespaces import Namespace

pytestmark = pytest.mark.root

CONNECTIONS = 10_000
WORKER_BYTES = 25 << 20
CONNECTION_BYTES = 6 << 10


def own_memory(mesh: MeshPair) -> list[int]:
    return [private_bytes(each.worker.process.pid) for each in (mesh.client, mesh.server)]


def test_worker_is_small_at_idle_and_after_work(
    mesh: MeshPair, measured: Callable[[str], None]
) -> None:
    at_idle = own_memory(mesh)
    in_a_row(mesh, 1000)
    after_work = own_memory(mesh)
    for name, sizes in (("at idle", at_idle), ("after 1,000 connections", after_work)):
        measured(f"worker {name}: {max(sizes) / 1048576:.1f} MiB of its own")
        assert max(sizes) <= WORKER_BYTES
    maps = Path(f"/proc/{mesh.client.worker.process.pid}/maps").read_text()
    assert "libbcc" not in maps
    assert "libLLVM" not in maps


def wire(namespace: Namespace, *words: str) -> list[str]:
    """Return the command line of the benchmark's load generator inside a namespace."""
    netns = f"/proc/{os.getpid()}/fd/{namespace.fd}"
    launcher = [sys.executable, "-m", "agent.lab.launch", netns, str(links.cgroup_root())]
    return [*launcher, str(build_wire()), *words]


def test_ten_thousand_idle_connections_cost_little(
    mesh: MeshPair, measured: Callable[[str], None]
) -> None:
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard > CONNECTIONS + 1000, f"the limit of open files is {hard}: raise it"
    in_a_row(mesh, 1000)  # the tunnel is there, and what a worker allocates once
    before = own_memory(mesh)
    server = Server(wire(mesh.server.namespace, "serve", "7000"), "ready")
    try:
        command = wire(mesh.client.namespace, "idle", PEER4, "7000", str(CONNECTIONS))
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as client:
            assert client.stdout is not None
            assert f'"count": {CONNECTIONS}' in client.stdout.readline()
            during = own_memory(mesh)
            client.communicate()
    finally:
        server.stop()
    for name, old, new in zip(("client", "server"), before, during, strict=True):
        each = (new - old) / CONNECTIONS
        measured(f"idle connection at the {name}'s node: {each / 1024:.2f} KiB")
        assert each <= CONNECTION_BYTES
