"""Callers of the CA by their service-account tokens, as the API server reviews them.

Implements the authenticator of `agent.identity.service`. A token counts if it is for our audience,
of an account of the agents, and bound to a pod: the pod's node is what the caller may ask for.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from typing import TYPE_CHECKING, Any

from kubernetes import client

from agent.discovery.cluster import connect
from agent.errors import CallerUnknown
from agent.model.caller import Caller

if TYPE_CHECKING:
    from collections.abc import Iterable

USER_PREFIX = "system:serviceaccount:"
NODE_NAME = "authentication.kubernetes.io/node-name"  # Kubernetes 1.32 and later
POD_NAME = "authentication.kubernetes.io/pod-name"
POD_UID = "authentication.kubernetes.io/pod-uid"
CALL_SECONDS = 5.0
# An agent that asks for many identities shows the same token many times. Short, since a token
# ends with its pod.
REMEMBER_SECONDS = 10.0
MOST_REMEMBERED = 10_000


class TokenReviewer:
    """Asks TokenReview; remembers an answer for ten seconds."""

    def __init__(
        self, api_client: client.ApiClient, audience: str, accounts: Iterable[str]
    ) -> None:
        self._reviews = client.AuthenticationV1Api(api_client)
        self._core = client.CoreV1Api(api_client)
        self._audience = audience
        self._users = {USER_PREFIX + account.replace("/", ":") for account in accounts}
        self._known: dict[bytes, tuple[float, Caller]] = {}

    @classmethod
    def open(cls, audience: str, accounts: Iterable[str]) -> TokenReviewer:
        """Connect to the cluster (KubernetesError)."""
        return cls(connect(), audience, accounts)

    async def identify(self, token: str) -> Caller:
        """Return the agent whose token it is (CallerUnknown)."""
        digest = hashlib.sha256(token.encode()).digest()
        until, caller = self._known.get(digest, (0.0, None))
        if caller is None or until < time.monotonic():
            caller = await asyncio.to_thread(self._review, token)
            if len(self._known) >= MOST_REMEMBERED:
                self._known.clear()
            self._known[digest] = (time.monotonic() + REMEMBER_SECONDS, caller)
        return caller

    def _review(self, token: str) -> Caller:
        spec = client.V1TokenReviewSpec(token=token, audiences=[self._audience])
        answer: Any  # the generated classes hold everything to be optional
        try:
            answer = self._reviews.create_token_review(
                client.V1TokenReview(spec=spec), _request_timeout=CALL_SECONDS
            )
        except Exception as error:  # ApiException, and urllib3's of many kinds
            raise CallerUnknown(f"the token cannot be reviewed: {_named(error)}") from error
        status = answer.status
        if not status.authenticated:
            raise CallerUnknown("the API server does not accept the token")
        if self._audience not in (status.audiences or []):
            raise CallerUnknown(f"the token is not meant for {self._audience}")
        if status.user.username not in self._users:
            raise CallerUnknown(f"{status.user.username} is no account of the agents")
        return Caller(status.user.username, self._find_node(status.user))

    def _find_node(self, user: Any) -> str:
        extra: dict[str, list[str]] = user.extra or {}
        if told := _first(extra, NODE_NAME):
            return told
        pod, uid = _first(extra, POD_NAME), _first(extra, POD_UID)
        if not pod or not uid:
            raise CallerUnknown("the token is not bound to a pod, so it says nothing of a node")
        namespace = user.username.removeprefix(USER_PREFIX).partition(":")[0]
        found: Any
        try:
            found = self._core.read_namespaced_pod(pod, namespace, _request_timeout=CALL_SECONDS)
        except Exception as error:
            detail = f"the pod {namespace}/{pod} of the token cannot be read: {_named(error)}"
            raise CallerUnknown(detail) from error
        if found.metadata.uid != uid or not found.spec.node_name:
            raise CallerUnknown(f"the pod {namespace}/{pod} of the token is gone")
        node: str = found.spec.node_name
        return node


def _first(extra: dict[str, list[str]], key: str) -> str:
    return (extra.get(key) or [""])[0]


def _named(error: Exception) -> str:
    if isinstance(error, client.ApiException):
        return f"{error.status} {error.reason}"
    return type(error).__name__
