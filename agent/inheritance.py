"""What a successor is told of a pod beside its descriptors, as JSON. Pure.

    {"pod": {...}, "netns_cookie": 42, "is_draining": false, "ports": [15001, ...],
     "sysctls": {"/proc/sys/net/...": "0"}}

Predecessor and successor may be of different versions, in either order: who reads ignores members
that it does not know, and does without those that are missing where there is a default.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any

from agent.errors import HandoverFailed
from agent.model.pod import Exclusions, LocalPod


@dataclass(frozen=True, slots=True)
class Inheritance:
    """One pod: `ports` are those of the listeners, in the order of their descriptors."""

    pod: LocalPod
    netns_cookie: int
    ports: tuple[int, ...]
    is_draining: bool = False
    sysctls: dict[str, str] = field(default_factory=dict)  # by path, as they were before us


# What reading JSON of another program may raise: it nests too deeply, a number has no end.
STRANGE = (
    ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError,
)  # fmt: skip


def encode(inheritance: Inheritance) -> bytes:
    """Return the message."""
    pod = inheritance.pod
    exclusions = pod.exclusions
    return json.dumps(
        {
            "pod": {
                "uid": pod.uid,
                "namespace": pod.namespace,
                "name": pod.name,
                "service_account": pod.service_account,
                "addresses": [str(address) for address in pod.addresses],
                "outbound_ports": sorted(exclusions.outbound_ports),
                "outbound_networks": [str(network) for network in exclusions.outbound_networks],
                "inbound_ports": sorted(exclusions.inbound_ports),
                "may_go_direct": pod.may_go_direct,
                "bypasses_inbound": pod.bypasses_inbound,
                "dns_capture": pod.dns_capture,
                "node_uid": pod.node_uid,
            },
            "netns_cookie": inheritance.netns_cookie,
            "is_draining": inheritance.is_draining,
            "ports": inheritance.ports,
            "sysctls": inheritance.sysctls,
        }
    ).encode()


def decode(data: bytes) -> Inheritance:
    """Return what a message says (HandoverFailed if it cannot be used)."""
    try:
        message: dict[str, Any] = json.loads(data)
        pod = message["pod"]
        return Inheritance(
            LocalPod(
                uid=str(pod["uid"]),
                namespace=str(pod["namespace"]),
                name=str(pod["name"]),
                service_account=str(pod["service_account"]),
                addresses=tuple(map(ip_address, pod["addresses"])),
                exclusions=Exclusions(
                    frozenset(map(int, pod.get("outbound_ports", ()))),
                    tuple(map(ip_network, pod.get("outbound_networks", ()))),
                    frozenset(map(int, pod.get("inbound_ports", ()))),
                ),
                may_go_direct=bool(pod.get("may_go_direct", True)),
                bypasses_inbound=bool(pod.get("bypasses_inbound", False)),
                dns_capture=pod.get("dns_capture"),
                node_uid=str(pod.get("node_uid", "")),
            ),
            netns_cookie=int(message["netns_cookie"]),
            ports=tuple(map(int, message["ports"])),
            is_draining=bool(message.get("is_draining", False)),
            sysctls={str(key): str(text) for key, text in message.get("sysctls", {}).items()},
        )
    except STRANGE as error:
        raise HandoverFailed(
            f"the agent that runs tells of a pod in a strange way: {error}"
        ) from error
