"""What the accounts of agent and CA may do: all that they need, and nothing else."""

from __future__ import annotations

import asyncio
import logging
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from agent.discovery.api import Api, StatusError
from agent.discovery.kubernetes import KubernetesSource
from agent.discovery.redirection import RedirectionWriter
from agent.discovery.roots import RootsPublisher
from agent.discovery.secret import SecretStore
from agent.discovery.token_review import TokenReviewer
from agent.discovery.translate import REDIRECTION
from agent.errors import CallerUnknown, ConfigError
from agent.identity.custody import open_authority
from agent.model.caller import Caller
from tests.support.api_server import ApiServer, path_of
from tests.support.cluster_objects import enrolled, following, namespace, pod
from tests.support.modules import ROOT
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from kubernetes import client

Body = dict[str, Any]
MANIFESTS = list(yaml.safe_load_all((ROOT / "deploy/manifests/sidestep.yaml").read_text()))
# Who may do what, and what that is about; the pods themselves need a node.
RIGHTS = ("Namespace", "ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding")
SYSTEM = "sidestep-system"
AUDIENCE = "istio-ca"


def account(name: str, space: str = SYSTEM) -> Body:
    metadata = {"namespace": space, "name": name}
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata}


def token_of(server: ApiServer, name: str, **spec: Any) -> str:
    """Ask for a token of an account, as a kubelet does for a projected volume."""
    path = f"{path_of(account(name))}/token"
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
    token: str = server.must("POST", path, request)["status"]["token"]
    return token


@pytest.fixture
def installed(api_server: ApiServer) -> ApiServer:
    """Return an API server that knows our accounts and their rights, as an operator gives them."""
    for body in MANIFESTS:
        if body["kind"] in (*RIGHTS, "Secret", "ConfigMap"):
            api_server.apply(body)
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
    [
        "/api/v1/secrets",
        "/api/v1/configmaps",
        "/apis/apps/v1/deployments",
        "/api/v1/serviceaccounts",
    ],
)
def test_agent_may_read_nothing_else(agent_api: Api, path: str) -> None:
    with pytest.raises(StatusError) as raised, agent_api.get(path, {}):
        pass
    assert raised.value.status == 403
    assert "may the service account do so?" in str(raised.value)


def test_agent_that_may_not_read_nodes_goes_on_without(
    installed: ApiServer, agent_api: Api
) -> None:
    (role,) = (
        body
        for body in MANIFESTS
        if (body["kind"], body["metadata"]["name"]) == ("ClusterRole", "sidestep-agent")
    )
    rules = [rule for rule in role["rules"] if rule["resources"] != ["nodes"]]
    assert len(rules) == len(role["rules"]) - 1
    installed.apply(namespace("rights"))
    installed.apply(pod("rights/d", "10.6.0.4"))

    async def run() -> None:
        async with following(KubernetesSource(agent_api)) as seen:
            await seen.until(lambda found: "d" in enrolled(found, "rights"))

    try:
        installed.apply(role | {"rules": rules})
        wait_until(lambda: _is_forbidden(agent_api, "/api/v1/nodes"))
        asyncio.run(run())
    finally:
        installed.apply(role)
        installed.delete(pod("rights/d", ""))


def _is_forbidden(api: Api, path: str) -> bool:
    try:
        with api.get(path, {}) as response:
            response.read()
    except StatusError as error:
        return error.status == 403
    return False


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


# -- the key and the roots of the CA ------------------------------------------------------------


@pytest.fixture
def ca_configuration(installed: ApiServer) -> client.Configuration:
    return installed.configuration(token_of(installed, "sidestep-ca"))


def test_ca_keeps_its_key_and_publishes_its_roots(
    installed: ApiServer, ca_configuration: client.Configuration
) -> None:
    from kubernetes import client

    store = SecretStore(client.CoreV1Api(client.ApiClient(ca_configuration)), SYSTEM, "sidestep-ca")
    authority = open_authority(store, "cluster.local")
    assert open_authority(store, "cluster.local").bundle == authority.bundle
    RootsPublisher(Api(ca_configuration), SYSTEM, "sidestep-ca-root").publish(authority.bundle)
    found = installed.must("GET", f"/api/v1/namespaces/{SYSTEM}/configmaps/sidestep-ca-root")
    assert found["data"] == {"root-cert.pem": authority.bundle}


@pytest.mark.parametrize("account_name", ["sidestep-agent", "sidestep-ca"])
def test_nobody_reads_or_writes_what_is_not_his(installed: ApiServer, account_name: str) -> None:
    """Compare all that the API server says an account may do with what it is to do."""
    token = token_of(installed, account_name)
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": SYSTEM},
    }
    status, answer = installed.ask(
        "POST", "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews", review, token=token
    )
    assert status == 201
    found = {
        (verb, group, resource, name)
        for rule in answer["status"]["resourceRules"]
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for name in rule.get("resourceNames") or [""]
        # What every account may: ask who it is, and what it may.
        if group not in ("authorization.k8s.io", "authentication.k8s.io") or "self" not in resource
    }
    followed = {
        "": ("pods", "namespaces", "nodes", "services"),
        "discovery.k8s.io": ("endpointslices",),
        "security.istio.io": ("authorizationpolicies", "peerauthentications"),
        "networking.istio.io": ("serviceentries", "workloadentries"),
    }
    wanted = {
        "sidestep-agent": {
            (verb, group, resource, "")
            for group, resources in followed.items()
            for resource in resources
            for verb in ("list", "watch")
        }
        | {
            ("patch", "", "pods/status", ""),
            ("create", "events.k8s.io", "events", ""),
            ("patch", "events.k8s.io", "events", ""),
            ("get", "apps", "daemonsets", "sidestep-agent"),
        },
        "sidestep-ca": {
            *((verb, "", "pods", "") for verb in ("get", "list", "watch")),
            ("create", "authentication.k8s.io", "tokenreviews", ""),
            ("get", "", "secrets", "sidestep-ca"),
            ("update", "", "secrets", "sidestep-ca"),
            ("patch", "", "configmaps", "sidestep-ca-root"),
        },
    }
    assert found == wanted[account_name]


def test_place_of_the_roots_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be NAMESPACE/NAME"):
        RootsPublisher.open("roots")


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
