"""What a pod can say of itself to the API server: nothing that lets it join, or leave."""

from __future__ import annotations

import asyncio

import pytest

from agent.discovery.api import Api, StatusError
from agent.discovery.kubernetes import KubernetesSource
from agent.discovery.translate import REDIRECTION
from agent.model.enrollment import MODE_LABEL
from tests.cluster.test_rights import account, annotation, installed, token_of
from tests.support.api_server import ApiServer, path_of
from tests.support.cluster_objects import Body, enrolled, following, namespace, pod

__all__ = ["installed"]
SPACE = "attackers"


@pytest.fixture
def attacker(installed: ApiServer) -> Body:
    """Return a pod outside the mesh with an account of its own that nobody gave a right."""
    installed.apply(namespace(SPACE, None))
    installed.apply(account("attacker", SPACE))
    body = pod(f"{SPACE}/attacker", "10.9.0.1", serviceAccountName="attacker")
    uid = installed.apply(body)["metadata"]["uid"]
    return body | {"reference": {"apiVersion": "v1", "kind": "Pod", "name": "attacker", "uid": uid}}


def test_pod_can_not_set_the_labels_that_decide(installed: ApiServer, attacker: Body) -> None:
    path = f"{path_of(account('attacker', SPACE))}/token"
    request = {
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenRequest",
        "spec": {"boundObjectRef": attacker["reference"]},
    }
    token = installed.must("POST", path, request)["status"]["token"]
    its_own = Api(installed.configuration(token))
    labels = {"metadata": {"labels": {MODE_LABEL: "ambient"}}}
    captured = {"metadata": {"annotations": {REDIRECTION: "enabled"}}}
    for target, change in (
        (path_of(attacker), labels),
        (path_of(namespace(SPACE, None)), labels),
        (path_of(attacker), captured),
        (f"{path_of(attacker)}/status", captured),
    ):
        with pytest.raises(StatusError) as raised:
            its_own.patch(target, change)
        assert raised.value.status == 403
    assert annotation(installed, attacker) is None

    async def run() -> None:
        source = KubernetesSource(
            Api(installed.configuration(token_of(installed, "sidestep-agent")))
        )
        async with following(source) as seen:
            await seen.until(lambda found: bool(found.workloads))
            assert enrolled(seen.snapshots[-1], SPACE) == set()
            # The same source takes it in as soon as somebody who may sets the label.
            installed.apply(namespace(SPACE))
            await seen.until(lambda found: enrolled(found, SPACE) == {"attacker"})

    asyncio.run(run())
