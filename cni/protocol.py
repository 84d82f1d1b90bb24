"""What the plugin and the agent say to each other. Pure.

    request   b"sidestep-cni 1\\n", NAME=VALUE\\0 for each CNI_ variable, \\0, configuration in JSON
    answer    b"0\\n", or b"1\\n" and an error of the CNI specification in JSON

`shim.c` writes the one and reads the other; the agent's side is `agent.cni`. Requests come from
the node's root, but a runtime or a plugin before us may be odd: nothing about their shape is taken
for granted. Results are not the agent's business: the plugin passes them on as they came.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import IntEnum
from ipaddress import IPv4Address, IPv6Address, ip_interface
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

MAGIC = b"sidestep-cni 1\n"
SUCCESS = b"0\n"
SPEC_VERSION = "1.1.0"
COMMANDS = frozenset({"ADD", "CHECK", "DEL", "GC", "STATUS"})
VALID_ATTACHMENTS = "cni.dev/valid-attachments"


class Code(IntEnum):
    """Codes of the CNI specification, section "Error"; those from 100 on are ours."""

    INVALID_ENVIRONMENT = 4
    IO_FAILURE = 5
    DECODE_FAILURE = 6
    INVALID_CONFIG = 7
    TRY_AGAIN_LATER = 11
    NOT_AVAILABLE = 50
    NOT_CAPTURED = 100


class CniError(Exception):
    """A request that fails; the message tells the operator what to do."""

    def __init__(self, code: Code, message: str, details: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.details = details


@dataclass(frozen=True, slots=True)
class Request:
    """One run of the plugin. Names are empty for what is no pod of Kubernetes."""

    command: str
    cni_version: str = SPEC_VERSION
    container_id: str = ""
    netns: str = ""
    namespace: str = ""
    name: str = ""
    uid: str = ""
    addresses: tuple[IPv4Address | IPv6Address, ...] = ()
    valid_containers: frozenset[str] = field(default_factory=frozenset)  # of GC


def parse_request(data: bytes) -> Request:
    """Read a request (CniError)."""
    if not data.startswith(MAGIC):
        raise CniError(
            Code.DECODE_FAILURE,
            "the plugin and the agent are not of one version: run sidestep cni install again",
        )
    environment, separator, text = data[len(MAGIC) :].partition(b"\0\0")
    if not separator:
        raise CniError(Code.DECODE_FAILURE, "the request has no end of its environment")
    variables = _pairs(environment.split(b"\0"))
    configuration = _parse_configuration(text)
    command = variables.get("CNI_COMMAND", "")
    if command not in COMMANDS:
        raise CniError(Code.INVALID_ENVIRONMENT, f"CNI_COMMAND is not known: {command!r}")
    arguments = _pairs(variables.get("CNI_ARGS", "").encode().split(b";"))
    version = configuration.get("cniVersion")
    return Request(
        command=command,
        cni_version=version if isinstance(version, str) else SPEC_VERSION,
        container_id=variables.get("CNI_CONTAINERID", ""),
        netns=variables.get("CNI_NETNS", ""),
        namespace=arguments.get("K8S_POD_NAMESPACE", ""),
        name=arguments.get("K8S_POD_NAME", ""),
        uid=arguments.get("K8S_POD_UID", ""),
        addresses=tuple(dict.fromkeys(_addresses(configuration.get("prevResult")))),
        valid_containers=frozenset(_valid_containers(configuration) if command == "GC" else ()),
    )


def build_error(error: CniError, cni_version: str = SPEC_VERSION) -> bytes:
    """Write the answer that says why a request fails."""
    body = {"cniVersion": cni_version, "code": int(error.code), "msg": f"sidestep: {error}"}
    if error.details:
        body["details"] = error.details
    return b"1\n" + json.dumps(body).encode() + b"\n"


def _pairs(parts: list[bytes]) -> dict[str, str]:
    pairs = (part.decode(errors="replace").partition("=") for part in parts)
    return {name: value for name, separator, value in pairs if separator}


def _parse_configuration(text: bytes) -> dict[str, Any]:
    try:
        configuration = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CniError(
            Code.DECODE_FAILURE, f"the network configuration is not JSON: {error}"
        ) from error
    if not isinstance(configuration, dict):
        raise CniError(Code.DECODE_FAILURE, "the network configuration is not a JSON object")
    return configuration


def _addresses(result: object) -> Iterator[IPv4Address | IPv6Address]:
    """Yield the addresses of the pod in a result, of which also the node may have some."""
    if result is None:
        return
    try:
        assert isinstance(result, dict)
        interfaces = result.get("interfaces") or []
        for item in result.get("ips") or []:
            index = item.get("interface")
            # Without an index it is not said whose it is; only the pod's are worth a mention then.
            if index is None or interfaces[index].get("sandbox"):
                yield ip_interface(item["address"]).ip
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CniError(
            Code.DECODE_FAILURE,
            "prevResult of the plugin before this one cannot be read",
            f"{type(error).__name__}: {error}",
        ) from error


def _valid_containers(configuration: dict[str, Any]) -> Iterator[str]:
    attachments = configuration.get(VALID_ATTACHMENTS, False)
    # Go writes an empty list as null. Anything else does not say that no sandbox is left.
    if not isinstance(attachments, list | None):
        raise CniError(Code.INVALID_CONFIG, f"{VALID_ATTACHMENTS} is missing, or is no list")
    for attachment in attachments or ():
        if isinstance(attachment, dict) and isinstance(attachment.get("containerID"), str):
            yield attachment["containerID"]
