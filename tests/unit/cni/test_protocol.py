"""What the plugin and the agent say to each other."""

from __future__ import annotations

import json
from ipaddress import ip_address
from typing import Any

import pytest

from cni.protocol import MAGIC, CniError, Code, Request, build_error, parse_request

POD = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0;K8S_POD_UID=1-2"
INTERFACES = [{"name": "cni0"}, {"name": "eth0", "sandbox": "/run/netns/a"}]


def raw(configuration: object, **variables: str) -> bytes:
    environment = b"".join(f"{key}={value}\0".encode() for key, value in variables.items())
    text = configuration if isinstance(configuration, bytes) else json.dumps(configuration).encode()
    return MAGIC + environment + b"\0" + text


def add(previous: object, **more: Any) -> Request:
    configuration = {"cniVersion": "1.0.0", "name": "pods", "prevResult": previous} | more
    return parse_request(
        raw(
            configuration,
            CNI_COMMAND="ADD",
            CNI_CONTAINERID="c1",
            CNI_NETNS="/run/netns/a",
            CNI_IFNAME="eth0",
            CNI_ARGS=POD,
        )
    )


def test_request_says_which_pod_where_and_at_which_addresses() -> None:
    ips = [{"address": "10.0.0.5/24", "interface": 1}, {"address": "fd00::5/64", "interface": 1}]
    assert add({"interfaces": INTERFACES, "ips": ips}) == Request(
        command="ADD",
        cni_version="1.0.0",
        container_id="c1",
        netns="/run/netns/a",
        namespace="shop",
        name="cart-0",
        uid="1-2",
        addresses=(ip_address("10.0.0.5"), ip_address("fd00::5")),
    )


def test_addresses_of_the_node_are_not_the_pods() -> None:
    ips = [
        {"address": "10.0.0.1/24", "interface": 0},
        {"address": "10.0.0.5/24", "interface": 1},
        {"address": "10.0.0.6/24"},
        {"address": "10.0.0.6/24"},
    ]
    found = add({"interfaces": INTERFACES, "ips": ips}).addresses
    assert found == (ip_address("10.0.0.5"), ip_address("10.0.0.6"))


@pytest.mark.parametrize("previous", [None, {}, {"ips": None}, {"ips": []}])
def test_result_without_addresses_has_none(previous: object) -> None:
    assert add(previous).addresses == ()


@pytest.mark.parametrize(
    "previous",
    [
        [],
        {"ips": 1},
        {"ips": ["10.0.0.5"]},
        {"ips": [{}]},
        {"ips": [{"address": "10.0.0.5", "interface": 7}]},
        {"ips": [{"address": "somewhere"}]},
    ],
)
def test_result_that_cannot_be_read_is_an_error(previous: object) -> None:
    with pytest.raises(CniError, match="prevResult") as raised:
        add(previous)
    assert raised.value.code == Code.DECODE_FAILURE
    assert raised.value.details


@pytest.mark.parametrize("command", ["DEL", "CHECK", "STATUS"])
def test_other_commands_need_no_pod(command: str) -> None:
    assert parse_request(raw({"name": "pods"}, CNI_COMMAND=command)) == Request(command)


def test_collection_names_what_is_still_there() -> None:
    attachments = [{"containerID": "c1", "ifname": "eth0"}, {"containerID": 7}, "c2"]
    configuration = {"cni.dev/valid-attachments": attachments}
    found = parse_request(raw(configuration, CNI_COMMAND="GC"))
    assert found.valid_containers == {"c1"}
    none = parse_request(raw({"cni.dev/valid-attachments": None}, CNI_COMMAND="GC"))
    assert none.valid_containers == frozenset()


@pytest.mark.parametrize("configuration", [{}, {"cni.dev/valid-attachments": 1}])
def test_collection_that_does_not_say_what_is_still_there_is_an_error(
    configuration: dict[str, object],
) -> None:
    with pytest.raises(CniError, match="valid-attachments is missing") as raised:
        parse_request(raw(configuration, CNI_COMMAND="GC"))
    assert raised.value.code == Code.INVALID_CONFIG


@pytest.mark.parametrize(
    ("data", "code", "message"),
    [
        (b"sidestep-cni 2\n", Code.DECODE_FAILURE, "run sidestep cni install again"),
        (MAGIC + b"CNI_COMMAND=ADD\0", Code.DECODE_FAILURE, "no end of its environment"),
        (raw(b"{", CNI_COMMAND="ADD"), Code.DECODE_FAILURE, "is not JSON"),
        (raw(b"[" * 100_000, CNI_COMMAND="ADD"), Code.DECODE_FAILURE, "is not JSON"),
        (raw([], CNI_COMMAND="ADD"), Code.DECODE_FAILURE, "not a JSON object"),
        (raw({}, CNI_COMMAND="GO"), Code.INVALID_ENVIRONMENT, "'GO'"),
        (raw({}, CNI_ARGS="a"), Code.INVALID_ENVIRONMENT, "CNI_COMMAND is not known"),
    ],
)
def test_request_that_cannot_be_used_says_why(data: bytes, code: Code, message: str) -> None:
    with pytest.raises(CniError, match=message) as raised:
        parse_request(data)
    assert raised.value.code == code


def test_error_is_one_of_the_specification() -> None:
    answer = build_error(CniError(Code.TRY_AGAIN_LATER, "not yet"), "0.4.0")
    status, _, text = answer.partition(b"\n")
    assert status == b"1"
    expected = {"cniVersion": "0.4.0", "code": 11, "msg": "sidestep: not yet"}
    assert json.loads(text) == expected
    detailed = build_error(CniError(Code.NOT_CAPTURED, "no", "since"))
    assert json.loads(detailed.partition(b"\n")[2])["details"] == "since"
