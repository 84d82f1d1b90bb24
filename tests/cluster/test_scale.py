"""A large cluster: how long until an agent has it, what it costs, and that the cost is linear."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

import pytest

from agent.discovery.translate import REDIRECTION
from tests.support.api_server import path_of
from tests.support.cluster_objects import Body, endpoint_slice, namespace, pod, service

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

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


def test_cost_of_a_large_cluster(
    api_server: ApiServer, tmp_path: Path, measured: Callable[[str], None]
) -> None:
    api_server.apply(namespace(SPACE))
    firsts: list[dict[str, Any]] = []
    with ThreadPoolExecutor(WRITERS) as pool:
        made = 0
        for count in STEPS:
            bodies = [numbered(number) for number in range(made, count)]
            for index in range(SERVICES * made // STEPS[-1], SERVICES * count // STEPS[-1]):
                members = range(index * ENDPOINTS, (index + 1) * ENDPOINTS)
                bodies.append(service(SPACE, f"service-{index}"))
                bodies.append(endpoint_slice(SPACE, f"service-{index}", *map(address, members)))
            list(pool.map(lambda body: create(api_server, body), bodies))
            made = count
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
        with follower(tmp_path, api_server) as lines:
            line = json.loads(lines.readline())
            before = line["cpu_seconds"], line["at"]
            change = CHANGES_EACH_SECOND * CHANGE_SECONDS
            merge = "application/merge-patch+json"
            body = {"metadata": {"annotations": {REDIRECTION: "enabled"}}}

            def alter(number: int) -> None:
                time.sleep(max(0.0, began + number / CHANGES_EACH_SECOND - time.monotonic()))
                path = path_of(numbered(number))
                api_server.must("PATCH", f"{path}/status", body, merge)

            began = time.monotonic()
            list(pool.map(alter, range(change)))
            ended = time.monotonic()
            while line["hbone"] < change:
                line = json.loads(lines.readline())
        share = (line["cpu_seconds"] - before[0]) / (line["at"] - before[1])
        measured(
            f"{change / (ended - began):.0f} changes a second: {share:.0%} of a core, "
            f"{line['megabytes']:.0f} MB resident, the last one seen after "
            f"{line['at'] - ended:.2f} s"
        )
    assert firsts[-1]["seconds"] < READY_SECONDS
    assert line["megabytes"] < MOST_MEGABYTES
    assert line["at"] - ended < 1.0
    # Four times the pods cost at most four times the work, and some for what is measured badly.
    assert firsts[-1]["cpu_seconds"] < 5 * firsts[0]["cpu_seconds"]
