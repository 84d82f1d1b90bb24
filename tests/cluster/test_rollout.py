"""Waiting for a DaemonSet of which a node is away: a real API server's answers."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from agent.discovery import rollout
from agent.errors import KubernetesError
from tests.support.cluster_objects import namespace
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from tests.support.api_server import ApiServer

Body = dict[str, Any]
PLACE = "/apis/apps/v1/namespaces/rollout/daemonsets"


@pytest.fixture
def server(api_server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> ApiServer:
    made = SimpleNamespace(configuration=api_server.configuration())
    monkeypatch.setattr(rollout, "connect", lambda: made)
    monkeypatch.setattr(rollout, "PAUSE_SECONDS", 0.01)
    return api_server


def condition(is_ready: bool) -> Body:
    return {"conditions": [{"type": "Ready", "status": "True" if is_ready else "Unknown"}]}


def put_node(server: ApiServer, name: str, is_ready: bool) -> None:
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}
    server.apply(node | {"status": condition(is_ready)})


def put_pod(server: ApiServer, daemonset: Body, node: str, is_ready: bool) -> Body:
    owner = {
        "apiVersion": "apps/v1", "kind": "DaemonSet", "blockOwnerDeletion": True,
        "name": daemonset["metadata"]["name"], "uid": daemonset["metadata"]["uid"],
    }  # fmt: skip
    name = f"{owner['name']}-{node}"
    metadata = {"namespace": "rollout", "name": name, "ownerReferences": [owner]}
    spec = {"nodeName": node, "containers": [{"name": "one", "image": "one"}]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
    server.apply(pod | {"status": condition(is_ready)})
    return pod


def put_daemonset(server: ApiServer, name: str, ready: int) -> Body:
    """Have a DaemonSet of three nodes, as its controller sees it."""
    server.apply(namespace("rollout"))
    labels = {"app": name}
    containers = [{"name": "one", "image": "one"}]
    body = {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"namespace": "rollout", "name": name},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": containers}},
        },
    }
    found = server.must("POST", PLACE, body)
    status = {
        "observedGeneration": found["metadata"]["generation"], "desiredNumberScheduled": 3,
        "numberReady": ready, "currentNumberScheduled": 3, "numberMisscheduled": 0,
    }  # fmt: skip
    return server.must("PUT", f"{PLACE}/{name}/status", found | {"status": status})


@pytest.fixture
def nodes(server: ApiServer) -> None:
    for name, is_ready in (("rollout-a", True), ("rollout-b", True), ("rollout-away", False)):
        put_node(server, name, is_ready)


@pytest.mark.usefixtures("nodes")
def test_node_that_is_away_is_not_waited_for_and_is_named(server: ApiServer) -> None:
    made = put_daemonset(server, "late", ready=2)
    put_pod(server, made, "rollout-a", is_ready=True)
    put_pod(server, made, "rollout-b", is_ready=True)
    put_pod(server, made, "rollout-away", is_ready=False)
    assert rollout.wait_until_ready("rollout", "late", 5) == (2, ["rollout-away"])


@pytest.mark.usefixtures("nodes")
def test_node_that_is_there_is_waited_for_and_named_when_late(server: ApiServer) -> None:
    made = put_daemonset(server, "later", ready=1)
    put_pod(server, made, "rollout-a", is_ready=True)
    put_pod(server, made, "rollout-b", is_ready=False)
    put_pod(server, made, "rollout-away", is_ready=False)
    with pytest.raises(KubernetesError, match="1 of 3 nodes, not rollout-away, rollout-b"):
        rollout.wait_until_ready("rollout", "later", 0.1)


@pytest.mark.usefixtures("nodes")
def test_pods_end_where_nodes_are_and_nothing_waits_for_others(server: ApiServer) -> None:
    made = put_daemonset(server, "gone", ready=2)
    here = put_pod(server, made, "rollout-a", is_ready=True)
    put_pod(server, made, "rollout-away", is_ready=False)
    returned: list[list[str]] = []
    thread = threading.Thread(target=lambda: returned.append(rollout.delete("rollout", "gone", 10)))
    thread.start()
    wait_until(lambda: "deletionTimestamp" in server.must("GET", f"{PLACE}/gone")["metadata"])
    assert not returned
    server.delete(here)
    thread.join(10)
    assert returned == [["rollout-away"]]
    assert server.ask("GET", f"{PLACE}/gone")[0] == 404
