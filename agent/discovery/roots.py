"""The CA's roots in a Kubernetes ConfigMap, which the agents' pods mount.

The ConfigMap has to be there: so the CA needs the right to patch this one, and none to create any.

Called by `agent.ca`, in a thread.
"""

from __future__ import annotations

from agent.discovery.api import Api
from agent.discovery.cluster import connect
from agent.model.place import parse_place

ENTRY = "root-cert.pem"


class RootsPublisher:
    """Writes the roots into one ConfigMap."""

    def __init__(self, api: Api, namespace: str, name: str) -> None:
        self._api = api
        self._path = f"/api/v1/namespaces/{namespace}/configmaps/{name}"

    @classmethod
    def open(cls, place: str) -> RootsPublisher:
        """Name the ConfigMap as NAMESPACE/NAME (ConfigError)."""
        namespace, name = parse_place(place, "--publish-roots")
        return cls(Api(connect().configuration), namespace, name)

    def publish(self, roots: str) -> None:
        """Write the roots, PEM (KubernetesError)."""
        self._api.patch(self._path, {"data": {ENTRY: roots}})
