"""Whose token counts at the CA, as the API server reviews it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from agent.discovery.token_review import NODE_NAME, POD_NAME, POD_UID, TokenReviewer
from agent.errors import CallerUnknown
from agent.model.caller import Caller
from tests.support.kube_api import KubeApi, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kubernetes import client

AGENT = "system:serviceaccount:sidestep-system:sidestep-agent"
POD_PATH = "/api/v1/namespaces/sidestep-system/pods/agent-x"


@pytest.fixture
def api() -> KubeApi:
    return KubeApi()


@pytest.fixture
def connected(api: KubeApi) -> Iterator[client.ApiClient]:
    with serving(api) as made:
        yield made


def know(api: KubeApi, username: str = AGENT, audience: str = "istio-ca", **extra: str) -> None:
    """Make `token` the token of a user."""
    named = {"node": NODE_NAME, "pod": POD_NAME, "uid": POD_UID}
    api.users["token"] = {
        "username": username, "extra": {named[key]: [value] for key, value in extra.items()}
    }  # fmt: skip
    api.audiences["token"] = [audience]


def identify(connected: client.ApiClient, token: str = "token") -> Caller:
    reviewer = TokenReviewer(connected, "istio-ca", ["sidestep-system/sidestep-agent"])
    return asyncio.run(reviewer.identify(token))


def test_bound_token_of_an_agent_names_its_node(api: KubeApi, connected: client.ApiClient) -> None:
    know(api, node="node-1", pod="agent-x", uid="u-1")
    assert identify(connected) == Caller(AGENT, "node-1")


def test_older_clusters_tell_the_pod_and_the_pod_its_node(
    api: KubeApi, connected: client.ApiClient
) -> None:
    know(api, pod="agent-x", uid="u-1")
    api.put(POD_PATH, {"metadata": {"name": "agent-x", "uid": "u-1"}, "spec": spec("node-1")})
    assert identify(connected) == Caller(AGENT, "node-1")


def spec(node: str | None) -> dict[str, Any]:
    return {"containers": [], "nodeName": node}


def test_unknown_token_is_refused(connected: client.ApiClient) -> None:
    with pytest.raises(CallerUnknown, match="does not accept"):
        identify(connected, "forged")


def test_token_for_another_audience_is_refused(api: KubeApi, connected: client.ApiClient) -> None:
    know(api, audience="vault", node="node-1")
    with pytest.raises(CallerUnknown, match="does not accept"):
        identify(connected)


def test_server_that_ignores_audiences_is_not_believed(
    api: KubeApi, connected: client.ApiClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    know(api, node="node-1")
    answer = {"authenticated": True, "user": api.users["token"]}
    monkeypatch.setattr(api, "_review", lambda _spec: answer)
    with pytest.raises(CallerUnknown, match="not meant for istio-ca"):
        identify(connected)


@pytest.mark.parametrize(
    "username",
    [
        "system:serviceaccount:shop:cart",
        "system:node:node-1",
        "system:serviceaccount:x:sidestep-agent",
    ],
)
def test_account_that_is_no_agents_is_refused(
    api: KubeApi, connected: client.ApiClient, username: str
) -> None:
    know(api, username, node="node-1")
    with pytest.raises(CallerUnknown, match="no account of the agents"):
        identify(connected)


def test_token_without_a_pod_is_refused(api: KubeApi, connected: client.ApiClient) -> None:
    know(api)
    with pytest.raises(CallerUnknown, match="not bound to a pod"):
        identify(connected)


@pytest.mark.parametrize(("uid", "node"), [("u-2", "node-1"), ("u-1", None)])
def test_token_of_a_pod_that_is_gone_or_not_placed_is_refused(
    api: KubeApi, connected: client.ApiClient, uid: str, node: str | None
) -> None:
    know(api, pod="agent-x", uid="u-1")
    with pytest.raises(CallerUnknown, match="cannot be read: 404"):
        identify(connected)
    api.put(POD_PATH, {"metadata": {"name": "agent-x", "uid": uid}, "spec": spec(node)})
    with pytest.raises(CallerUnknown, match="is gone"):
        identify(connected)


def test_api_that_fails_lets_nobody_in(api: KubeApi, connected: client.ApiClient) -> None:
    know(api, node="node-1")
    api.is_broken = True
    with pytest.raises(CallerUnknown, match="cannot be reviewed: 500"):
        identify(connected)


def test_answer_is_remembered_for_a_moment_and_a_refusal_is_not(
    api: KubeApi, connected: client.ApiClient
) -> None:
    reviewer = TokenReviewer(connected, "istio-ca", ["sidestep-system/sidestep-agent"])

    async def ask() -> None:
        with pytest.raises(CallerUnknown):
            await reviewer.identify("token")
        know(api, node="node-1")
        for _ in range(3):
            await reviewer.identify("token")

    asyncio.run(ask())
    assert len(api.requests) == 2
