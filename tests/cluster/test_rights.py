"""What the accounts of agent and CA may do: all that they need, and nothing else."""

from __future__ import annotations

import asyncio
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from agent.discovery.api import Api, StatusError
from agent.discovery.kubernetes import KubernetesSource
from agent.discovery.redirection import RedirectionWriter
from agent.discovery.token_review import TokenReviewer
from agent.discovery.translate import REDIRECTION
from agent.errors import CallerUnknown
from agent.model.caller import Caller
from tests.support.api_server import ApiServer, path_of, wait_until
from tests.support.cluster_objects import enrolled, following, namespace, pod

if TYPE_CHECKING:
    from kubernetes import client

Body = dict[str, Any]
ROLES = list(yaml.safe_load_all((Path(__file__).parent / "roles.yaml").read_text()))
SYSTEM = "sidestep-system"
AUDIENCE = "istio-ca"


def account(name: str, space: str = SYSTEM) -> Body:
    metadata = {"namespace": space, "name": name}
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata}


def binding(name: str) -> Body:
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": name},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name},
        "subjects": [{"kind": "ServiceAccount", "namespace": SYSTEM, "name": name}],
    }


def token_of(server: ApiServer, name: str, **spec: Any) -> str:
    """Ask for a token of an account, as a kubelet does for a projected volume."""
    path = f"{path_of(account(name))}/token"
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
    token: str = server.must("POST", path, request)["status"]["token"]
    return token


@pytest.fixture
def installed(api_server: ApiServer) -> ApiServer:
    """Return an API server that knows our accounts and their roles."""
    api_server.apply(namespace(SYSTEM, None))
    for role in ROLES:
        api_server.apply(role)
        api_server.apply(account(role["metadata"]["name"]))
        api_server.apply(binding(role["metadata"]["name"]))
    return api_server


@pytest.fixture
def agent_api(installed: ApiServer) -> Api:
    return Api(installed.configuration(token_of(installed, "sidestep-agent")))


def annotation(server: ApiServer, body: Body) -> str | None:
    found = server.must("GET", path_of(body))["metadata"].get("annotations") or {}
    value: str | None = found.get(REDIRECTION)
    return value


def test_agent_follows_and_says_on_the_pod_whether_it_is_captured(
    installed: ApiServer, agent_api: Api
) -> None:
    body = pod("rights/a", "10.6.0.1")

    async def run() -> None:
        installed.apply(namespace("rights"))
        installed.apply(body)
        source = KubernetesSource(agent_api)
        async with following(source) as seen:
            snapshot = await seen.until(lambda found: enrolled(found, "rights") == {"a"})
            (local,) = (
                each for each in snapshot.local_pods["node-1"] if each.namespace == "rights"
            )
            source.publish(local, "pending")
            source.publish(local, "enabled")
            await seen.until(lambda found: any(each.is_hbone for each in found.workloads))
            assert annotation(installed, body) == "enabled"
            source.publish(local, None)
            await seen.until(lambda found: not any(each.is_hbone for each in found.workloads))
            assert annotation(installed, body) is None
            source.publish(local, "pending")
        assert annotation(installed, body) == "pending"  # what was said last is written at the end

    asyncio.run(run())


@pytest.mark.parametrize(
    "path",
    ["/api/v1/secrets", "/api/v1/nodes", "/apis/apps/v1/deployments", "/api/v1/serviceaccounts"],
)
def test_agent_may_read_nothing_else(agent_api: Api, path: str) -> None:
    with pytest.raises(StatusError) as raised, agent_api.get(path, {}):
        pass
    assert raised.value.status == 403
    assert "may the service account do so?" in str(raised.value)


def test_agent_may_not_change_a_pod_beyond_its_status(installed: ApiServer, agent_api: Api) -> None:
    installed.apply(namespace("rights"))
    body = pod("rights/b", "10.6.0.2")
    installed.apply(body)
    with pytest.raises(StatusError) as raised:
        agent_api.patch(path_of(body), {"metadata": {"labels": {"a": "b"}}})
    assert raised.value.status == 403


def test_pod_that_took_over_a_name_is_not_touched(installed: ApiServer, agent_api: Api) -> None:
    installed.apply(namespace("rights"))
    body = pod("rights/c", "10.6.0.3")
    first = installed.apply(body)["metadata"]["uid"]
    installed.delete(body)
    installed.apply(body)
    writer = RedirectionWriter(agent_api)
    writer.start()
    writer.publish(first, "rights", "c", "enabled")
    writer.publish("gone", "rights", "nobody", None)
    writer.close(10.0)
    writer.join(10.0)
    assert not writer.is_alive()
    assert annotation(installed, body) is None


def test_account_that_may_not_list_a_kind_is_never_ready_and_says_why(
    installed: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    # The CA's may list pods only. Without policies an agent would let in whom they keep out.
    source = KubernetesSource(Api(installed.configuration(token_of(installed, "sidestep-ca"))))

    def refused() -> set[str]:
        return {
            vars(each)["kind"]
            for each in caplog.records
            if each.levelno == logging.WARNING and "403" in vars(each).get("detail", "")
        }

    async def run() -> None:
        async with following(source) as seen:
            await asyncio.to_thread(wait_until, lambda: "Namespace" in refused())
            assert seen.snapshots == []

    asyncio.run(run())


# -- tokens of agents ---------------------------------------------------------------------------


@pytest.fixture
def reviewer(installed: ApiServer) -> TokenReviewer:
    """Return the CA's way to know callers, with the CA's own rights."""
    from kubernetes import client

    configuration = installed.configuration(token_of(installed, "sidestep-ca"))
    api: client.ApiClient = client.ApiClient(configuration)
    return TokenReviewer(api, AUDIENCE, [f"{SYSTEM}/sidestep-agent"])


@pytest.fixture
def agent_pod(installed: ApiServer) -> Body:
    """Return a pod of an agent, on node-1."""
    body = pod(f"{SYSTEM}/agent-1", "10.7.0.1", serviceAccountName="sidestep-agent")
    found = installed.apply(body)
    reference = {"kind": "Pod", "apiVersion": "v1", "name": "agent-1"}
    return body | {"reference": reference | {"uid": found["metadata"]["uid"]}}


def test_token_of_an_agents_pod_names_its_node(
    installed: ApiServer, reviewer: TokenReviewer, agent_pod: Body
) -> None:
    token = token_of(
        installed, "sidestep-agent", audiences=[AUDIENCE], boundObjectRef=agent_pod["reference"]
    )
    caller = asyncio.run(reviewer.identify(token))
    assert caller == Caller(f"system:serviceaccount:{SYSTEM}:sidestep-agent", "node-1")


def test_tokens_that_prove_no_agents_node_are_refused(
    installed: ApiServer, reviewer: TokenReviewer, agent_pod: Body
) -> None:
    installed.apply(account("somebody"))
    bound = agent_pod["reference"]
    somebody = pod(f"{SYSTEM}/somebody", "10.7.0.2", serviceAccountName="somebody")
    other = {"kind": "Pod", "apiVersion": "v1", "name": "somebody"}
    other["uid"] = installed.apply(somebody)["metadata"]["uid"]
    cases = {
        "does not accept": token_of(installed, "sidestep-agent", boundObjectRef=bound),
        "not bound to a pod": token_of(installed, "sidestep-agent", audiences=[AUDIENCE]),
        "is no account of": token_of(
            installed, "somebody", audiences=[AUDIENCE], boundObjectRef=other
        ),
    }
    with ExitStack() as stack:
        stack.callback(installed.delete, somebody)
        for detail, token in cases.items():
            with pytest.raises(CallerUnknown) as raised:
                asyncio.run(reviewer.identify(token))
            assert detail in str(raised.value)


def test_token_ends_with_its_pod(
    installed: ApiServer, reviewer: TokenReviewer, agent_pod: Body
) -> None:
    token = token_of(
        installed, "sidestep-agent", audiences=[AUDIENCE], boundObjectRef=agent_pod["reference"]
    )
    installed.delete(agent_pod)
    with pytest.raises(CallerUnknown):
        asyncio.run(reviewer.identify(token))
