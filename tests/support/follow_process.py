"""A process that follows a cluster, and says in a JSON line what each snapshot had and cost.

    python -m tests.support.follow_process [NODE]     the cluster is that of KUBECONFIG

Ends at the end of its input.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from pathlib import Path

from agent.discovery.kubernetes import KubernetesSource

PAGE_BYTES = resource.getpagesize()


def resident_megabytes() -> float:
    """Return what this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES / 2**20


async def follow() -> None:
    """Follow until the end of the input."""
    began, stop = time.monotonic(), asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin, stop.set)
    source = KubernetesSource.open()
    async for snapshot in source.watch(stop):
        line = {
            "workloads": len(snapshot.workloads),
            "hbone": sum(each.is_hbone for each in snapshot.workloads),
            "services": len(snapshot.services),
            "endpoints": sum(len(each.endpoints) for each in snapshot.services),
            "local_pods": sum(map(len, snapshot.local_pods.values())),
            "at": time.monotonic(),
            "seconds": time.monotonic() - began,
            "cpu_seconds": time.process_time(),
            "megabytes": resident_megabytes(),
        }
        print(json.dumps(line), flush=True)  # noqa: T201  # what the test reads
    await source.close()


if __name__ == "__main__":
    asyncio.run(follow())
