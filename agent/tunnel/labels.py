"""The labels of Istio's TCP metrics for one connection. Pure.

Every series of ambient mesh has the same labels, so that dashboards made for it work here. What is
not known is `unknown`, as there; `source_principal` and `destination_principal` are identities that
were proved, without `spiffe://`, never those that an address suggests.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent.model.flag import Flag
    from agent.model.workload import Workload
    from agent.tunnel.counts import Labels

UNKNOWN = "unknown"
CLUSTER = "Kubernetes"  # the name that Istio gives a cluster without one
SCHEME = "spiffe://"
CLUSTER_DOMAIN = "cluster.local"  # the DNS domain of services
NAMES = (
    "connection_security_policy",
    "destination_app",
    "destination_canonical_revision",
    "destination_canonical_service",
    "destination_cluster",
    "destination_principal",
    "destination_region",
    "destination_service",
    "destination_service_name",
    "destination_service_namespace",
    "destination_version",
    "destination_workload",
    "destination_workload_namespace",
    "destination_zone",
    "reporter",
    "request_protocol",
    "response_flags",
    "source_app",
    "source_canonical_revision",
    "source_canonical_service",
    "source_cluster",
    "source_principal",
    "source_region",
    "source_version",
    "source_workload",
    "source_workload_namespace",
    "source_zone",
)
# What a workload says of an end, beside what it has proved.
OF_WORKLOAD = (
    "app",
    "canonical_revision",
    "canonical_service",
    "cluster",
    "region",
    "version",
    "workload",
    "workload_namespace",
    "zone",
)
# The first of these labels of a pod that it has; the last resort is its workload's name.
CANONICAL_NAME = ("service.istio.io/canonical-name", "app.kubernetes.io/name", "app")
CANONICAL_REVISION = (
    "service.istio.io/canonical-revision",
    "app.kubernetes.io/version",
    "version",
)
NO_REVISION = "latest"


@dataclass(frozen=True, slots=True)
class Party:
    """One end of a connection: who it is by address, and who it proved to be."""

    workload: Workload | None = None
    identity: str | None = None


@dataclass(frozen=True, slots=True)
class ServiceName:
    """The service that a connection was to; `hostname` is its name in DNS."""

    namespace: str
    name: str
    hostname: str


def service_name(namespace: str, name: str) -> ServiceName:
    """Name a service of the cluster."""
    return ServiceName(namespace, name, f"{name}.{namespace}.svc.{CLUSTER_DOMAIN}")


def read_service_name(hostname: str | None) -> ServiceName | None:
    """Read `NAME.NAMESPACE.svc.DOMAIN`, whatever the domain; None for anything else."""
    parts = (hostname or "").split(".")
    if len(parts) > 3 and parts[2] == "svc" and all(parts):
        return service_name(parts[1], parts[0])
    return None


@lru_cache(maxsize=4096)
def build_labels(
    reporter: str,
    source: Party,
    destination: Party,
    service: ServiceName | None,
    flag: Flag,
    *,
    is_tls: bool = True,
) -> Labels:
    """Return the labels in the order of NAMES; `reporter` is source or destination.

    On the direct path identities are the kernel's word, and there is no TLS.
    """
    is_mutual = is_tls and source.identity is not None and destination.identity is not None
    found = {
        "connection_security_policy": "mutual_tls" if is_mutual else UNKNOWN,
        "destination_service": service.hostname if service else UNKNOWN,
        "destination_service_name": service.name if service else UNKNOWN,
        "destination_service_namespace": service.namespace if service else UNKNOWN,
        "reporter": reporter,
        "request_protocol": "tcp",
        "response_flags": flag.value,
    }
    for prefix, party in (("source", source), ("destination", destination)):
        found |= {f"{prefix}_{name}": value for name, value in _describe(party).items()}
    return tuple((name, found[name]) for name in NAMES)


def _describe(party: Party) -> dict[str, str]:
    workload = party.workload
    described = {
        "principal": party.identity.removeprefix(SCHEME) if party.identity else UNKNOWN,
    }
    if workload is None:
        return described | dict.fromkeys(OF_WORKLOAD, UNKNOWN)
    labels = dict(workload.labels)
    name = workload.owner or workload.name
    canonical = next((labels[key] for key in CANONICAL_NAME if labels.get(key)), name)
    revision = next((labels[key] for key in CANONICAL_REVISION if labels.get(key)), NO_REVISION)
    return described | {
        "app": labels.get("app") or canonical,
        "canonical_revision": revision,
        "canonical_service": canonical,
        "cluster": CLUSTER,
        "region": workload.locality.region or UNKNOWN,
        "version": labels.get("version") or revision,
        "workload": name,
        "workload_namespace": workload.namespace,
        "zone": workload.locality.zone or UNKNOWN,
    }
