"""The CA's key in a Kubernetes Secret: implements the store of `agent.identity.custody`.

All entries are written in one update, which the API server refuses if somebody else wrote since
they were read, so two CAs that start at once agree on one key.
"""

from __future__ import annotations

import asyncio
import base64
from typing import TYPE_CHECKING, Any

from kubernetes import client

from agent.discovery.cluster import connect
from agent.errors import KubernetesError
from agent.model.place import parse_place

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

POLL_SECONDS = 10.0
CALL_SECONDS = 10.0
NOT_FOUND, CONFLICT = 404, 409


class SecretStore:
    """Keeps the entries as the data of one Secret."""

    def __init__(self, api: client.CoreV1Api, namespace: str, name: str) -> None:
        self._api = api
        self._namespace = namespace
        self._name = name

    @classmethod
    def open(cls, place: str) -> SecretStore:
        """Name the Secret as NAMESPACE/NAME (ConfigError)."""
        namespace, name = parse_place(place, "--secret")
        return cls(client.CoreV1Api(connect()), namespace, name)

    def _find(self) -> Any:
        try:
            return self._api.read_namespaced_secret(
                self._name, self._namespace, _request_timeout=CALL_SECONDS
            )
        except client.ApiException as error:
            if error.status == NOT_FOUND:
                return None
            raise self._failed("read", error) from error
        except Exception as error:  # urllib3's, of many kinds
            raise self._failed("read", error) from error

    def _failed(self, verb: str, error: Exception) -> KubernetesError:
        detail = f"{error.status} {error.reason}" if isinstance(error, client.ApiException) else ""
        return KubernetesError(
            f"Secret {self._namespace}/{self._name} cannot be {verb}: "
            f"{detail or type(error).__name__}; may this service account do so?"
        )

    def read(self) -> dict[str, bytes]:
        """Return the entries; none if there is no Secret."""
        found = self._find()
        data = {} if found is None else found.data or {}
        return {name: base64.b64decode(text) for name, text in data.items()}

    def write(self, entries: Mapping[str, bytes | None]) -> None:
        """Put all entries at once; None removes one (KubernetesError, also if another wrote)."""
        found = self._find()
        data = {} if found is None else dict(found.data or {})
        for name, content in entries.items():
            data.pop(name, None)
            if content is not None:
                data[name] = base64.b64encode(content).decode()
        metadata = client.V1ObjectMeta(name=self._name, namespace=self._namespace)
        body = client.V1Secret(metadata=metadata, type="Opaque", data=data)
        try:
            if found is None:
                self._api.create_namespaced_secret(
                    self._namespace, body, _request_timeout=CALL_SECONDS
                )
            else:
                metadata.resource_version = found.metadata.resource_version
                self._api.replace_namespaced_secret(
                    self._name, self._namespace, body, _request_timeout=CALL_SECONDS
                )
        except client.ApiException as error:
            if error.status == CONFLICT:
                raise KubernetesError(
                    f"Secret {self._namespace}/{self._name} was written by somebody else "
                    "meanwhile; start again to use what he wrote"
                ) from error
            raise self._failed("written", error) from error

    async def changes(self, stop: asyncio.Event) -> AsyncIterator[None]:
        """Yield now and every ten seconds, until `stop`: whoever reads compares."""
        while not stop.is_set():
            yield
            try:
                async with asyncio.timeout(POLL_SECONDS):
                    await stop.wait()
            except TimeoutError:
                continue
