"""Whether a DaemonSet's pods are ready on all nodes, or gone from all, as its controller says.

Called by `agent.commands.wait`, and `is_deleted` by an agent that ends. Asks once a second: the
right to watch one object by its name would not be smaller, and this ends soon.
"""

from __future__ import annotations

import json
import time
from typing import Any

from agent.discovery.api import Api, StatusError
from agent.discovery.cluster import connect
from agent.errors import KubernetesError

PAUSE_SECONDS = 1.0
NOT_FOUND = 404


def wait_until_ready(namespace: str, name: str, seconds: float) -> int:
    """Return on how many nodes it is ready, when it is on all (KubernetesError if late)."""
    api = Api(connect().configuration)
    until = time.monotonic() + seconds
    while True:
        try:
            found = _read(api, namespace, name)
            wanted, ready, detail = count_nodes(found)
        except KubernetesError as error:
            wanted, ready, detail = 0, -1, str(error)
        if ready == wanted:
            return ready
        if time.monotonic() > until:
            raise KubernetesError(
                f"DaemonSet {namespace}/{name} is not ready on every node after {seconds:.0f} s: "
                f"{detail}; look at its pods that are not ready"
            )
        time.sleep(PAUSE_SECONDS)


def delete(namespace: str, name: str, seconds: float) -> None:
    """Delete it, and return when its last pod has ended (KubernetesError if late)."""
    api = Api(connect().configuration)
    until = time.monotonic() + seconds
    is_asked = False
    while True:
        try:
            if not is_asked:
                # In the foreground: the object stays until the pods are gone.
                api.delete(_path(namespace, name), {"propagationPolicy": "Foreground"})
                is_asked = True
            _wanted, _ready, detail = count_nodes(_read(api, namespace, name))
        except KubernetesError as error:
            if isinstance(error, StatusError) and error.status == NOT_FOUND:
                return
            detail = str(error)
        if time.monotonic() > until:
            raise KubernetesError(
                f"DaemonSet {namespace}/{name} has not gone after {seconds:.0f} s: {detail}; "
                "look at its pods that do not end"
            )
        time.sleep(PAUSE_SECONDS)


def is_deleted(api: Api, namespace: str, name: str) -> bool:
    """Say whether it goes now, or is to stay (KubernetesError if nobody says, or it has gone)."""
    return "deletionTimestamp" in _read(api, namespace, name)["metadata"]


def _path(namespace: str, name: str) -> str:
    return f"/apis/apps/v1/namespaces/{namespace}/daemonsets/{name}"


def _read(api: Api, namespace: str, name: str) -> dict[str, Any]:
    with api.get(_path(namespace, name), {}) as response:
        found: dict[str, Any] = json.loads(response.read())
        return found


def count_nodes(daemonset: dict[str, Any]) -> tuple[int, int, str]:
    """Return how many nodes are to have a pod, how many have one that is ready, and both as text.

    -1 are ready while the controller has not seen the newest specification.
    """
    status = daemonset.get("status", {})
    wanted, ready = status.get("desiredNumberScheduled", 0), status.get("numberReady", 0)
    if status.get("observedGeneration") != daemonset["metadata"]["generation"]:
        ready = -1
    return wanted, ready, f"{max(ready, 0)} of {wanted} nodes"
