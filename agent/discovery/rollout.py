"""Whether a DaemonSet's pods are ready on all nodes, or gone from all, as its controller says.

Called by `agent.commands.wait`, and `is_deleted` by an agent that ends. Asks once a second: the
right to watch one object by its name would not be smaller, and this ends soon. Nodes that are not
ready are not waited for: what they are told they hear when they are back, if ever.
"""

from __future__ import annotations

import json
import time
from typing import Any

from agent.discovery.api import Api, StatusError
from agent.discovery.cluster import connect
from agent.errors import KubernetesError

SHOWN_NODES = 5
PAUSE_SECONDS = 1.0
NOT_FOUND = 404


def wait_until_ready(namespace: str, name: str, seconds: float) -> tuple[int, list[str]]:
    """Return on how many nodes it is ready, and the others, when all of those are away.

    KubernetesError if late.
    """
    api = Api(connect().configuration)
    until = time.monotonic() + seconds
    while True:
        away: list[str] = []
        try:
            wanted, ready, detail = count_nodes(_read(api, namespace, name))
            if 0 <= ready < wanted:
                late = {node for node, is_ready in _pods(api, namespace, name) if not is_ready}
                away, detail = sorted(_find_away(api, late)), f"{detail}, not {_some(late)}"
        except KubernetesError as error:
            wanted, ready, detail = 0, -1, str(error)
        if ready + len(away) == wanted:
            return ready, away
        if time.monotonic() > until:
            raise KubernetesError(
                f"DaemonSet {namespace}/{name} is not ready on every node after {seconds:.0f} s: "
                f"{detail}; look at its pods that are not ready"
            )
        time.sleep(PAUSE_SECONDS)


def delete(namespace: str, name: str, seconds: float) -> list[str]:
    """Delete it, and return when its pods have ended on all nodes but those that are away.

    These are returned (KubernetesError if late).
    """
    api = Api(connect().configuration)
    until = time.monotonic() + seconds
    # In the foreground: the object stays until the pods are gone.
    policy = "Foreground"
    away: list[str] = []
    while True:
        try:
            if policy:
                api.delete(_path(namespace, name), {"propagationPolicy": policy})
            _read(api, namespace, name)
            left = {node for node, _is_ready in _pods(api, namespace, name)}
            detail = f"pods are left on {_some(left)}"
            away = sorted(left) if left == _find_away(api, left) else []
            # Then whoever deletes the rest of what was installed is not to wait for the object.
            policy = "Background" if away else ""
        except KubernetesError as error:
            if isinstance(error, StatusError) and error.status == NOT_FOUND:
                return away
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


def _pods(api: Api, namespace: str, name: str) -> list[tuple[str, bool]]:
    """List the node of each of its pods, and whether it is ready there."""
    owner = {"kind": "DaemonSet", "name": name}
    return [
        (pod["spec"]["nodeName"], _is_ready(pod))
        for pod in _list(api, f"/api/v1/namespaces/{namespace}/pods")
        if "nodeName" in pod["spec"]
        and any(
            owner.items() <= each.items() for each in pod["metadata"].get("ownerReferences", ())
        )
    ]


def _find_away(api: Api, nodes: set[str]) -> set[str]:
    """Return which of `nodes` are not ready."""
    found = _list(api, "/api/v1/nodes") if nodes else []
    return nodes - {node["metadata"]["name"] for node in found if _is_ready(node)}


def _list(api: Api, path: str) -> list[dict[str, Any]]:
    with api.get(path, {}) as response:
        found: list[dict[str, Any]] = json.loads(response.read())["items"]
        return found


def _is_ready(found: dict[str, Any]) -> bool:
    conditions = found.get("status", {}).get("conditions", ())
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def _some(nodes: set[str]) -> str:
    """Name nodes, but not thousands of them."""
    names = sorted(nodes)
    return ", ".join([*names[:SHOWN_NODES], *(["..."] if len(names) > SHOWN_NODES else [])])


def count_nodes(daemonset: dict[str, Any]) -> tuple[int, int, str]:
    """Return how many nodes are to have a pod, how many have one that is ready, and both as text.

    -1 are ready while the controller has not seen the newest specification.
    """
    status = daemonset.get("status", {})
    wanted, ready = status.get("desiredNumberScheduled", 0), status.get("numberReady", 0)
    if status.get("observedGeneration") != daemonset["metadata"]["generation"]:
        ready = -1
    return wanted, ready, f"{max(ready, 0)} of {wanted} nodes"
