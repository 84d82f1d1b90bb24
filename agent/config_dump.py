"""The agent's state in the shape of ztunnel's /config_dump, for Istio's tools. Pure.

    istioctl ztunnel-config workload|service|policy|certificate|connections

Keys and spellings are those of that JSON: they are the interface, not ours to choose. What ambient
mesh has and Sidestep does not (waypoints, networks) is left out. No private key is in here.
"""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from agent.identity import der
from agent.model.condition import Attribute, NetworkSet, PortSet, TextSet
from agent.model.policy import PeerAuthentication
from agent.model.workload import owners
from agent.tunnel.labels import CANONICAL_NAME, CANONICAL_REVISION, CLUSTER, NO_REVISION

if TYPE_CHECKING:
    from collections.abc import Iterable

    from agent.identity.issuer import Certificate
    from agent.model.condition import Term
    from agent.model.open_connection import OpenConnection
    from agent.model.pod import Address, LocalPod
    from agent.model.policy import AnyPolicy, Match, Policy, Scope
    from agent.model.service import Service
    from agent.model.workload import Workload
    from agent.state.store import Snapshot

Json = dict[str, object]
PROTOCOLS = {"hbone": "HBONE", "direct": "TCP", "plaintext": "TCP", "tcp": "TCP"}
FIELDS = {
    Attribute.PRINCIPAL: "principals",
    Attribute.NAMESPACE: "namespaces",
    Attribute.SERVICE_ACCOUNT: "serviceAccounts",
    Attribute.SOURCE_ADDRESS: "sourceIps",
    Attribute.DESTINATION_ADDRESS: "destinationIps",
    Attribute.DESTINATION_PORT: "destinationPorts",
}


def build_dump(
    snapshot: Snapshot,
    trust_domain: str,
    cluster_domain: str,
    certificates: Iterable[tuple[str, Certificate | None, bytes, str]],
    pods: Iterable[tuple[LocalPod, bool]],
    connections: Iterable[OpenConnection],
    version: str,
    settings: Json,
) -> Json:
    """Return the dump.

    Args:
        snapshot: what is known of the mesh.
        trust_domain: of every workload here.
        cluster_domain: behind the names of services.
        certificates: identity, certificate, trusted roots (PEM) and last failure or nothing.
        pods: those of this node that want the mesh, and whether each is in it.
        connections: that are open now.
        version: of Sidestep.
        settings: shown as `config`.
    """
    by_address = owners(snapshot.workloads)
    services = [_service(each, cluster_domain, by_address) for each in snapshot.services]
    listed = list(connections)
    return {
        "workloads": [_workload(each, trust_domain) for each in snapshot.workloads],
        "services": services,
        "policies": [_policy(each) for each in snapshot.policies],
        "stagedServices": {},
        "staticConfig": {"workloads": [], "policies": [], "services": []},
        "version": {"version": version},
        "config": settings,
        "certificates": [_certificate(*each) for each in certificates],
        "workloadState": {
            pod.uid: _state(pod, trust_domain, is_up=is_up, connections=listed)
            for pod, is_up in pods
        },
    }


def _uid(workload: Workload) -> str:
    return f"{CLUSTER}//Pod/{workload.namespace}/{workload.name}"


def _first(labels: dict[str, str], keys: Iterable[str], otherwise: str) -> str:
    return next((labels[key] for key in keys if labels.get(key)), otherwise)


def _workload(workload: Workload, trust_domain: str) -> Json:
    labels = dict(workload.labels)
    name = workload.owner or workload.name
    return {
        "uid": _uid(workload),
        "workloadIps": [str(address) for address in workload.addresses],
        "protocol": "HBONE" if workload.is_hbone else "TCP",
        "name": workload.name,
        "namespace": workload.namespace,
        "trustDomain": trust_domain,
        "serviceAccount": workload.service_account,
        "workloadName": name,
        "workloadType": "deployment" if workload.owner else "pod",
        "canonicalName": _first(labels, CANONICAL_NAME, name),
        "canonicalRevision": _first(labels, CANONICAL_REVISION, NO_REVISION),
        "network": workload.network,
        "clusterId": CLUSTER,
        "locality": {"region": workload.locality.region, "zone": workload.locality.zone},
        "node": workload.node,
        "status": "Healthy",
        "hostname": "",
        "capacity": 1,
        "applicationTunnel": {"protocol": "NONE"},
    }


def _service(service: Service, cluster_domain: str, by_address: dict[Address, Workload]) -> Json:
    hostname = f"{service.name}.{service.namespace}.svc.{cluster_domain}"
    endpoints: dict[str, Json] = {}
    for endpoint in service.endpoints:
        workload = by_address.get(endpoint.address)
        uid = _uid(workload) if workload else ""
        targets = dict(endpoint.ports)
        endpoints[f"{uid}:/{endpoint.address}"] = {
            "workloadUid": uid,
            "service": f"{service.namespace}/{hostname}",
            "address": f"/{endpoint.address}",
            "port": {
                str(port.port): targets[port.name] for port in service.ports if port.name in targets
            },
        }
    targets = dict(service.endpoints[0].ports) if service.endpoints else {}
    return {
        "name": service.name,
        "namespace": service.namespace,
        "hostname": hostname,
        "vips": [f"/{address}" for address in (*service.addresses, *service.balanced)],
        "ports": {str(port.port): targets.get(port.name, 0) for port in service.ports},
        "endpoints": endpoints,
        "subjectAltNames": [],
        "ipFamilies": "",
    }


def _scope(scope: Scope) -> str:
    if scope.selector:
        return "WorkloadSelector"
    return "Namespace" if scope.namespace else "Global"


def _policy(policy: AnyPolicy) -> Json:
    named: Json = {
        "name": policy.key.name,
        "namespace": policy.key.namespace,
        "scope": _scope(policy.scope),
    }
    if isinstance(policy, PeerAuthentication):
        # As istiod says it to ztunnel: plaintext, which has no principal, is denied.
        presence: Json = {"notPrincipals": [{"Presence": {}}]}
        rules = [[[presence]]] if policy.mode == "STRICT" else []
        return named | {"action": "Deny", "rules": rules}
    return named | {"action": policy.action.title(), "rules": _rules(policy)}


def _rules(policy: Policy) -> list[list[list[Json]]]:
    return [
        [[_match(match) for match in clause.matches] for clause in rule.clauses]
        for rule in policy.rules
    ]


def _match(match: Match) -> Json:
    found: dict[str, list[object]] = {}
    for term in match:
        name = FIELDS[term.attribute]
        name = f"not{name[0].upper()}{name[1:]}" if term.is_negated else name
        found.setdefault(name, []).extend(_values(term))
    return dict(found)


def _values(term: Term) -> list[object]:
    values = term.values
    if isinstance(values, PortSet):
        return list(values.ports)
    if isinstance(values, NetworkSet):
        return [*filter(None, str(values).split(", "))]  # a DENY may have no exception left
    if term.attribute is Attribute.SERVICE_ACCOUNT:
        pairs = [text.partition("/") for text in values.exact]
        return [{"namespace": space, "serviceAccount": name} for space, _, name in pairs]
    return _texts(values)


def _texts(values: TextSet) -> list[object]:
    kinds = (("Exact", values.exact), ("Prefix", values.prefixes), ("Suffix", values.suffixes))
    listed: list[object] = [{kind: text} for kind, texts in kinds for text in texts]
    return [*listed, {"Presence": {}}] if values.is_any else listed


def _certificate(
    identity: str, certificate: Certificate | None, roots: bytes, failure: str
) -> Json:
    state = "Available" if certificate else f"Unavailable: {failure}" if failure else "Initializing"
    chain = der.decode_pem(certificate.chain) if certificate else []
    trusted = der.decode_pem(roots) if certificate else []
    return {
        "identity": identity,
        "state": state,
        "certChain": [_describe(each) for each in chain],
        "rootCerts": [_describe(each) for each in trusted],
    }


def _describe(found: bytes) -> Json:
    facts = der.read_certificate(found)
    text = base64.encodebytes(found).decode()
    pem = f"-----BEGIN CERTIFICATE-----\n{text}-----END CERTIFICATE-----\n".encode()
    return {
        "pem": base64.b64encode(pem).decode(),
        "serialNumber": str(facts.serial),
        "validFrom": _moment(facts.not_before),
        "expirationTime": _moment(facts.not_after),
    }


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _state(
    pod: LocalPod, trust_domain: str, *, is_up: bool, connections: Iterable[OpenConnection]
) -> Json:
    found: dict[str, list[Json]] = {"inbound": [], "outbound": []}
    for each in connections:
        if (each.namespace, each.pod) == (pod.namespace, pod.name):
            found[each.direction].append(
                {
                    "src": each.source,
                    "originalDst": each.original if each.direction == "outbound" else None,
                    "actualDst": each.destination,
                    "protocol": PROTOCOLS[each.path],
                }
            )
    return {
        "state": "Up" if is_up else "Pending",
        "connections": found,
        "info": {
            "name": pod.name,
            "namespace": pod.namespace,
            "trustDomain": trust_domain,
            "serviceAccount": pod.service_account,
        },
    }
