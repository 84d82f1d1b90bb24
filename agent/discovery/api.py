"""Plain requests to the API server, with the official client's connection and credentials.

The client knows where the server is, whom to trust and how to renew a token. Its classes for each
kind are left aside: they cost many times what the JSON does, and fail on what a newer server adds
(docs/decisions/0009-json-lines-instead-of-classes.md).

Called by `follow`, `redirection` and `pod_events`, each in threads of its own. Beyond here only
ours travel.
"""

from __future__ import annotations

import json
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import urllib3

from agent.errors import KubernetesError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kubernetes import client

CONNECT_SECONDS = 5.0
CALL_SECONDS = 15.0
MOST_CONNECTIONS = 16  # one for each kind, and what is patched
SHOWN_CHARACTERS = 200
# A server that went without a word is noticed in 25 seconds, also while nothing changes.
KEEPALIVE = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
]


class StatusError(KubernetesError):
    """The API server answered with an error."""

    def __init__(self, message: str, status: int, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class Api:
    """One API server."""

    def __init__(self, configuration: client.Configuration) -> None:
        from kubernetes import client

        configuration.socket_options = KEEPALIVE
        configuration.connection_pool_maxsize = MOST_CONNECTIONS
        self._configuration = configuration
        self._pool: Any = client.ApiClient(configuration).rest_client.pool_manager

    @contextmanager
    def get(
        self,
        path: str,
        query: Mapping[str, str],
        read_seconds: float = CALL_SECONDS,
        accept: str = "application/json",
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        """Ask, and yield the answer unread; no byte for `read_seconds` is an error."""
        form = {"Accept": accept}
        with self._request("GET", path, read_seconds, fields=query, headers=form) as response:
            yield response

    def create(self, path: str, body: Mapping[str, Any]) -> None:
        """Add an object to a collection."""
        data = json.dumps(body).encode()
        kind = {"Content-Type": "application/json"}
        with self._request("POST", path, CALL_SECONDS, body=data, headers=kind) as response:
            response.read()

    def patch(self, path: str, body: Mapping[str, Any]) -> None:
        """Merge `body` into an object (RFC 7386)."""
        data = json.dumps(body).encode()
        kind = {"Content-Type": "application/merge-patch+json"}
        with self._request("PATCH", path, CALL_SECONDS, body=data, headers=kind) as response:
            response.read()

    def delete(self, path: str, body: Mapping[str, Any]) -> None:
        """Delete an object, with DeleteOptions."""
        data = json.dumps(body).encode()
        kind = {"Content-Type": "application/json"}
        with self._request("DELETE", path, CALL_SECONDS, body=data, headers=kind) as response:
            response.read()

    @contextmanager
    def _request(
        self,
        method: str,
        path: str,
        read_seconds: float,
        *,
        headers: Mapping[str, str] | None = None,
        **content: Any,
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        sent = {"Accept": "application/json", "User-Agent": "sidestep", **(headers or {})}
        configuration: Any = self._configuration
        # Asked for each time: the token of a service account is renewed each hour.
        for setting in configuration.auth_settings().values():
            if setting["in"] == "header":
                sent[setting["key"]] = setting["value"]
        try:
            response = self._pool.request(
                method,
                f"{configuration.host}{path}",
                headers=sent,
                timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=read_seconds),
                preload_content=False,
                redirect=False,
                retries=False,
                **content,
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise self._unreachable(error) from error
        try:
            if not 200 <= response.status <= 299:
                raise _refusal(method, path, response)
            yield response
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise self._unreachable(error) from error
        finally:
            # One that was read to its end is in the pool already; half an answer is of no use.
            response.close()

    def _unreachable(self, error: Exception) -> KubernetesError:
        return KubernetesError(
            f"the API server {self._configuration.host} cannot be reached: "
            f"{type(error).__name__}: {error}"
        )


def _refusal(method: str, path: str, response: urllib3.BaseHTTPResponse) -> StatusError:
    text = response.read(decode_content=True).decode(errors="replace")
    try:
        text = json.loads(text)["message"]
    except (LookupError, TypeError, ValueError):
        text = " ".join(text.split())
    try:
        retry_after = float(response.headers.get("Retry-After", 0))
    except ValueError:
        retry_after = 0.0
    message = f"{method} {path}: {response.status}: {text[:SHOWN_CHARACTERS]}"
    if response.status in (401, 403):
        message += "; may the service account do so?"
    return StatusError(message, response.status, retry_after)
