"""What a successor is told of a pod: the same after a round trip, also across versions."""

from __future__ import annotations

import json
from ipaddress import ip_address, ip_network

import pytest

from agent.errors import HandoverFailed
from agent.inheritance import Inheritance, decode, encode
from agent.model.pod import Exclusions, LocalPod

POD = LocalPod(
    "uid-1",
    "shop",
    "client",
    "buyer",
    (ip_address("10.1.0.2"), ip_address("fd00::2")),
    Exclusions(frozenset({80, 443}), (ip_network("192.0.2.0/24"),), frozenset({9000})),
    may_go_direct=False,
    bypasses_inbound=True,
    dns_capture=True,
    node_uid="0123456789abcdef0123456789abcdef",
)


@pytest.mark.parametrize(
    "inheritance",
    [
        Inheritance(POD, 42, (15001, 15006, 15008), sysctls={"/proc/sys/net/x": "0"}),
        Inheritance(LocalPod("uid-2", "a", "b", "c", ()), 7, (15008,), is_draining=True),
    ],
)
def test_what_is_told_is_what_is_heard(inheritance: Inheritance) -> None:
    assert decode(encode(inheritance)) == inheritance


def test_member_of_a_later_version_is_ignored_and_one_that_is_missing_has_its_default() -> None:
    message = json.loads(encode(Inheritance(POD, 42, (15001,))))
    message["later"] = message["pod"]["later"] = {"anything": 1}
    for name in ("outbound_ports", "outbound_networks", "inbound_ports", "may_go_direct"):
        del message["pod"][name]
    del message["pod"]["bypasses_inbound"], message["pod"]["dns_capture"]
    del message["pod"]["node_uid"]
    del message["is_draining"], message["sysctls"]
    found = decode(json.dumps(message).encode())
    assert found.pod == LocalPod(POD.uid, "shop", "client", "buyer", POD.addresses)
    assert found == Inheritance(found.pod, 42, (15001,))


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"pod": 1}', b'{"pod": {"uid": "x"}, "netns_cookie": 1}']
)
def test_message_that_cannot_be_used_is_refused(data: bytes) -> None:
    with pytest.raises(HandoverFailed, match="strange"):
        decode(data)
