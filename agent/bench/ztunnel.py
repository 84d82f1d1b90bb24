"""A ztunnel as a node runs it: told of one pod over the socket that its CNI agent would serve.

The state is a file instead of xDS, the certificates come from the lab's CA, the socket speaks ZDS:
one protobuf message for each packet, the pod's namespace beside it. What is not named here is
ztunnel's default, but for the log of connections, which no proxy of the benchmark writes in full,
and the client's address, which an Envoy does not keep either. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from agent.lab.cluster import LabPod

SIGN = "handling new stream"  # it has found the socket, and is ready when it has heard of a pod
OUTBOUND_PORT = 15001
PACKET_MARK = 1337  # its default, on the sockets that it makes in a pod


@dataclass(frozen=True, slots=True)
class Authority:
    """The CA, and what proves to it whose pods are asked for."""

    address: str
    name: str
    roots: Path
    token: Path


def service_account(pod: LabPod) -> str:
    """Return the account that the pod's object names."""
    return str(pod.body["spec"]["serviceAccountName"])


def build_state(pods: Iterable[LabPod], trust_domain: str) -> dict[str, Any]:
    """Return the content of LOCAL_XDS_PATH: who is in the mesh."""
    workloads = [
        {
            "uid": pod.uid,
            "name": pod.name,
            "namespace": pod.namespace,
            "serviceAccount": service_account(pod),
            "workloadIps": [str(pod.address4)],
            "protocol": "HBONE",
            "node": pod.node.name,
            "network": "",
            "trustDomain": trust_domain,
            "services": {},
        }
        for pod in pods
    ]
    return {"workloads": workloads, "policies": [], "services": []}


def environment(pod: LabPod, state: Path, zds: Path, authority: Authority) -> dict[str, str]:
    """Return the settings of the ztunnel of one pod."""
    return {
        "NODE_NAME": pod.node.name,
        "LOCAL_XDS_PATH": str(state),
        "XDS_ADDRESS": "",
        "INPOD_UDS": str(zds),
        "CA_ADDRESS": f"https://{authority.address}",
        "ALT_CA_HOSTNAME": authority.name,
        "CA_ROOT_CA": str(authority.roots),
        "AUTH_TOKEN": str(authority.token),
        "ENABLE_ORIG_SRC": "false",
        "RUST_LOG": "info,access=off",
    }


def build_capture(address: str, ports: Sequence[int]) -> str:
    """Return the nftables rules that send a pod's connections to its ztunnel."""
    matched = f"ip daddr {address} tcp dport {{ {', '.join(map(str, ports))} }}"
    return f"""table ip bench {{
  chain output {{
    type nat hook output priority -100
    meta mark != {PACKET_MARK} {matched} redirect to :{OUTBOUND_PORT}
  }}
}}
"""


def _field(number: int, payload: bytes) -> bytes:
    """Return a protobuf field of bytes, shorter than 128."""
    return bytes((number << 3 | 2, len(payload))) + payload


def build_add(pod: LabPod) -> bytes:
    """Return WorkloadRequest{add: AddWorkload{uid, workload_info}} (zds.proto)."""
    texts = (pod.name, pod.namespace, service_account(pod))
    info = b"".join(_field(number, text.encode()) for number, text in enumerate(texts, 1))
    return _field(1, _field(1, pod.uid.encode()) + _field(2, info))


SNAPSHOT_SENT = _field(3, b"")
ACK = _field(1, b"")
