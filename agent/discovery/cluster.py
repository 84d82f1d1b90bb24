"""The connection to the cluster's API server: from inside a pod, or with the user's kubeconfig."""

from __future__ import annotations

from kubernetes import client, config

from agent.errors import KubernetesError


def connect() -> client.ApiClient:
    """Return a client (KubernetesError if there is neither a pod nor a kubeconfig)."""
    configuration = client.Configuration()
    try:
        config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]  # theirs
    except config.ConfigException:
        try:
            config.load_kube_config(client_configuration=configuration)  # type: ignore[no-untyped-call]  # theirs
        except config.ConfigException as error:
            raise KubernetesError(f"no cluster is known here: {error}") from error
    return client.ApiClient(configuration)
