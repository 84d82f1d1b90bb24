"""A large cluster: how long until an agent has it, what it costs, and that the cost is linear."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pytest

from agent.discovery.translate import REDIRECTION
from tests.cluster.test_agent import Processes
from tests.support.api_server import path_of
from tests.support.cluster_objects import Body, endpoint_slice, namespace, pod, service
from tests.support.processes import cpu_seconds, resident_bytes
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.api_server import ApiServer

STEPS = (2_500, 5_000, 10_000)
SERVICES = 2_000
NODES = 500
ENDPOINTS = 5
CHANGES_EACH_SECOND = 100
CHANGE_SECONDS = 5
SPACE = "scale"
# Promises of the project, beside what is measured.
READY_SECONDS = 5.0
MOST_MEGABYTES = 200.0
WRITERS = 16

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(autouse=True)
def _pods_of_the_node_end_with_their_test() -> None:
    """Leave them: they are for all tests of this module, the last one."""


def address(number: int) -> str:
    return f"10.{100 + number // 62_500}.{number // 250 % 250}.{number % 250 + 1}"


def numbered(number: int) -> Body:
    # About as large as the pods of a cluster are.
    environment = [{"name": f"SETTING_{index}", "value": "x" * 40} for index in range(50)]
    container = {"name": "main", "image": "example.org/main", "env": environment}
    labels = {"app": f"app-{number // ENDPOINTS}", "version": "v1", "pod-template-hash": "7d4b9c5"}
    spec = {"nodeName": f"node-{number % NODES}", "containers": [container]}
    return pod(f"{SPACE}/pod-{number:05}", address(number), labels, **spec)


def create(server: ApiServer, body: Body) -> None:
    path = path_of(body)
    server.must("POST", path.rpartition("/")[0], body)
    if "status" in body:
        merge = "application/merge-patch+json"
        server.must("PATCH", f"{path}/status", {"status": body["status"]}, merge)


@contextmanager
def follower(directory: Path, server: ApiServer) -> Iterator[IO[str]]:
    """Start a process that follows the cluster, and yield its lines."""
    config = directory / "kubeconfig"
    config.write_text(json.dumps(server.kubeconfig()))
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.follow_process"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"KUBECONFIG": str(config)},
    )  # fmt: skip
    assert process.stdout is not None
    try:
        yield process.stdout
    finally:
        process.communicate()
    assert process.returncode == 0


@pytest.fixture(scope="module")
def grow(api_server: ApiServer) -> Callable[[int], None]:
    """Return a function that makes the cluster as large as so many pods."""
    api_server.apply(namespace(SPACE))
    made = 0

    def create_until(count: int) -> None:
        nonlocal made
        bodies = [numbered(number) for number in range(made, count)]
        for index in range(SERVICES * made // STEPS[-1], SERVICES * count // STEPS[-1]):
            members = range(index * ENDPOINTS, (index + 1) * ENDPOINTS)
            bodies.append(service(SPACE, f"service-{index}"))
            bodies.append(endpoint_slice(SPACE, f"service-{index}", *map(address, members)))
        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(lambda body: create(api_server, body), bodies))
        made = max(made, count)

    return create_until


def processes_below(pid: int) -> Iterator[int]:
    """Yield a process and all that it started, those that they started included."""
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from processes_below(int(child))


def change_pods(server: ApiServer, count: int, word: str) -> float:
    """Change so many pods at the usual pace; return how many that were in a second."""
    merge = "application/merge-patch+json"
    body = {"metadata": {"annotations": {REDIRECTION: word}}}
    began = time.monotonic()

    def alter(number: int) -> None:
        time.sleep(max(0.0, began + number / CHANGES_EACH_SECOND - time.monotonic()))
        server.must("PATCH", f"{path_of(numbered(number))}/status", body, merge)

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(alter, range(count)))
    return count / (time.monotonic() - began)


def test_cost_of_a_large_cluster(
    api_server: ApiServer,
    grow: Callable[[int], None],
    tmp_path: Path,
    measured: Callable[[str], None],
) -> None:
    firsts: list[dict[str, Any]] = []
    with ExitStack() as stack:
        for count in STEPS:
            grow(count)
            with follower(tmp_path, api_server) as lines:
                first = json.loads(lines.readline())
            assert first["local_pods"] >= count
            firsts.append(first)
            measured(
                f"{count} pods, {SERVICES * count // STEPS[-1]} services: all there after "
                f"{first['seconds']:.2f} s, {first['cpu_seconds']:.2f} s of CPU, "
                f"{first['megabytes']:.0f} MB resident"
            )
        assert firsts[-1]["endpoints"] >= SERVICES * ENDPOINTS
        lines = stack.enter_context(follower(tmp_path, api_server))
        line = json.loads(lines.readline())
        before = line["cpu_seconds"], line["at"]
        change = CHANGES_EACH_SECOND * CHANGE_SECONDS
        pace = change_pods(api_server, change, "enabled")
        ended = time.monotonic()
        while line["hbone"] < change:
            line = json.loads(lines.readline())
        share = (line["cpu_seconds"] - before[0]) / (line["at"] - before[1])
        measured(
            f"{pace:.0f} changes a second: {share:.0%} of a core, "
            f"{line['megabytes']:.0f} MB resident, the last one seen after "
            f"{line['at'] - ended:.2f} s"
        )
    assert firsts[-1]["seconds"] < READY_SECONDS
    assert line["megabytes"] < MOST_MEGABYTES
    assert line["at"] - ended < 1.0
    # Four times the pods cost at most four times the work, and some for what is measured badly.
    assert firsts[-1]["cpu_seconds"] < 5 * firsts[0]["cpu_seconds"]


@pytest.mark.root
def test_whole_agent_in_a_large_cluster(
    api_server: ApiServer,
    grow: Callable[[int], None],
    tmp_path: Path,
    measured: Callable[[str], None],
) -> None:
    grow(STEPS[-1])
    with ExitStack() as stack:
        processes = Processes(tmp_path, api_server)
        stack.callback(processes.end)
        (tmp_path / "ca").mkdir()  # no pod here wants a certificate
        began = time.monotonic()
        agent = processes.start_agent("not asked for", account=None)
        wait_until(lambda: processes.state()["ready"], 60.0)  # the machine may be busy
        took = time.monotonic() - began
        pids = list(processes_below(agent.pid))
        sizes = {pid: resident_bytes(pid) / 2**20 for pid in pids}
        before, at = sum(map(cpu_seconds, pids)), time.monotonic()
        change_pods(api_server, CHANGES_EACH_SECOND * CHANGE_SECONDS, "pending")
        share = (sum(map(cpu_seconds, pids)) - before) / (time.monotonic() - at)
        measured(
            f"{STEPS[-1]} pods, a whole agent: ready {took:.2f} s after its start, "
            f"{before:.2f} s of CPU, "
            f"{sizes[agent.pid]:.0f} MB resident and "
            f"{', '.join(f'{sizes[pid]:.0f}' for pid in pids[1:])} MB in its workers; "
            f"{CHANGES_EACH_SECOND} changes a second: {share:.0%} of a core in all"
        )
    # The server's own work is as large and shares the cores with us, so not the time on the clock.
    assert before < READY_SECONDS
    assert sum(sizes.values()) < MOST_MEGABYTES
